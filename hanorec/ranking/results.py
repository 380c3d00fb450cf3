"""Measure all systems of an evaluation, and write the results: metrics.json, results.md and results.csv."""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hanorec.data.folder import DataFolder, Example
from hanorec.ranking.baselines import baseline_scores
from hanorec.ranking.exchange import write_lines
from hanorec.ranking.markdown import tables
from hanorec.ranking.metrics import Result, differences, pool
from hanorec.ranking.pooling import Groups
from hanorec.ranking.sasrec import trained_scores
from hanorec.ranking.scoring import target_columns
from hanorec.ranking.slices import Slicings, measure_slices
from hanorec.run.files import printable, replacing, write_json

Scores = tuple[np.ndarray, np.ndarray | None]  # scores that rank and Yes/No scores, [R, C] each
COLUMNS = ("system", "minus", "slicing", "slice", "examples", "metric", "value", "sd", "low", "high")  # of results.csv


@dataclass
class Results:
    """The results of an evaluation.

    Args:
        protocol: the data and the protocol in one line.
        runs: the result of each run.
        table: the rows of the results table by name: runs or groups of runs, systems of --scores, ceilings, baselines.
        reference: the row that is compared with the others, or None.
        differences: each run, group or system of --scores minus the reference, by name of the row.
    """

    protocol: str
    runs: dict[Path, Result]
    table: dict[str, Result]
    reference: str | None
    differences: dict[str, Result]

    def text(self, slices: bool = True) -> str:
        """Return the tables as Markdown, below a line with the protocol."""
        parts = [
            f"{printable(self.protocol)}; each value with its 95% bootstrap interval",
            tables(self.table, "", slices),
        ]
        if self.differences:
            parts.append(tables(self.differences, f"minus {self.reference}", slices))
        return "\n\n".join(parts)


def file_prefix(options: argparse.Namespace) -> str:
    """Return the prefix of the names of the files in a run folder, empty for all of test with its images."""
    prefix = "" if options.split == "test" else f"{options.split}_"
    prefix += "blank_" if options.blank_images else "shuffled_" if options.shuffle_images else ""
    return prefix + (f"first{options.limit}_" if options.limit else "")


def negatives_of(data: DataFolder, split: str) -> str:
    """Return how the negatives of a split were drawn, in one word."""
    further = {"test_hard": "hard", "test_popularity": "popularity", "test_99": "uniform"}
    return further.get(split, data.manifest["options"]["negative_sampling"])


def protocol(data: DataFolder, examples: Sequence[Example], options: argparse.Namespace) -> str:
    """Describe the data and the protocol of the results in one line. Other candidates have another hash."""
    prepared, file = data.manifest["options"], f"{options.split}.jsonl"
    text = f"{data.folder}: {options.split} ({prepared['split']}), {len(examples)} examples, "
    negatives = negatives_of(data, options.split)
    text += f"{len(examples[0].candidates)} candidates, {negatives} negatives, seed {prepared['seed']}, "
    images = ", blank images" if options.blank_images else ", shuffled images" if options.shuffle_images else ""
    return text + f"{file} {data.manifest['files'][file][:8]}{images}"


def measure_all(
    scored: dict[Path, Scores],
    others: dict[str, Scores],
    ceilings: dict[str, Scores],
    groups: Groups,
    reference: str | None,
    data: DataFolder,
    examples: Sequence[Example],
    slicings: Slicings,
    options: argparse.Namespace,
) -> Results:
    """Measure the runs, the systems of --scores, the ceilings and the baselines on the same candidates.

    Args:
        scored: of each run. A run without the Yes/No task has no AUC and GAUC.
        others, ceilings: by name. A system with one kind of scores gets its AUC and GAUC from them.
        groups: the runs that become one row of the table.
        reference: the row to compare with the others, or None.
        slicings: the slices of the examples to measure for the runs and the systems of --scores.
    """
    targets, seed = target_columns(examples), options.seed

    def measured(scores, yes_scores=None, slicings=None) -> Result:
        return measure_slices(scores, scores if yes_scores is None else yes_scores, targets, slicings or {}, seed)

    runs = {run: measure_slices(*scores, targets, slicings, seed) for run, scores in scored.items()}
    rows = {name: [runs[run] for run in of_seeds.values()] for name, of_seeds in groups.items()}
    rows |= {name: [measured(*scores, slicings)] for name, scores in others.items()}
    table = {name: pool(row, seed) for name, row in rows.items()}
    table |= {name: measured(*scores) for name, scores in ceilings.items()}
    for name, seeds in trained_scores(data, options.split, examples).items():
        table[name] = pool([measured(scores) for scores in seeds], seed)
    for name, scores in baseline_scores([*data.sequences().values()], len(data.items), examples).items():
        table[name] = measured(scores)
    compared = differences(rows, reference, seed) if reference else {}
    return Results(protocol(data, examples, options), runs, table, reference, compared)


def write_results(run: Path, results: Results, fields: dict, prefix: str) -> None:
    """Write a run's metrics.json, and the tables of all systems as results.md and results.csv.

    Args:
        fields: further fields of metrics.json.
        prefix: of the names of the files.
    """
    metrics = {"protocol": results.protocol, **fields, **results.runs[run].summary()}
    if str(run) in results.differences:
        metrics[f"minus {results.reference}"] = results.differences[str(run)].summary()
    write_json(run / f"{prefix}metrics.json", metrics)
    write_lines(run / f"{prefix}results.md", [results.text()])
    with replacing(run / f"{prefix}results.csv") as new, open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, result in results.table.items():
            writer.writerows(csv_rows(result, name))
        for name, result in results.differences.items():
            writer.writerows(csv_rows(result, name, minus=results.reference))


def csv_rows(result: Result, system: str, minus: str = "", slicing: str = "", label: str = "") -> list[list]:
    """Return a result's rows of results.csv: one for each metric, then those of its slices. See COLUMNS."""
    rows = []
    for metric, value in result.values.items():
        numbers = [value, result.sd.get(metric, ""), *result.interval(metric)]
        rows.append([system, minus, slicing, label, result.examples, metric, *numbers])
    for slicing, slices in result.slices.items():
        for label, part in slices.items():
            rows += csv_rows(part, system, minus, slicing, label)
    return rows
