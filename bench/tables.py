"""Measure the finished runs of a study, and write its tables and its figure into docs/."""

import argparse
import json
import statistics
from collections.abc import Collection
from pathlib import Path

import numpy as np
from arms import Study

import evaluate
from hanorec.data.folder import DataFolder, Example
from hanorec.ranking.baselines import baseline_scores
from hanorec.ranking.ceiling import ceiling_scores
from hanorec.ranking.exchange import read_scores
from hanorec.ranking.markdown import cell, markdown, short
from hanorec.ranking.metrics import Result, measure, pool
from hanorec.ranking.sasrec import predictions_name, trained_scores
from hanorec.ranking.scoring import target_columns
from hanorec.ranking.slices import Slicings, measure_slices
from hanorec.run.files import read_json, replacing

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
COLUMNS = ("NDCG@3", "HR@3", "AUC")
FEWEST = 3  # seeds of an arm in a table
TITLES = (
    "Start",
    "1. Controls",
    "2. Rejected answers",
    "3. HaRS",
    "4. NoDO and its rivals",
    "5. HaNoRec and its ablations",
)
# Of the paper, MicroLens with Qwen2.5-VL-3B: AUC, HR@3, NDCG@3 in percent
PUBLISHED = {
    "paper": (78.52, 73.60, 56.73),
    "wo_hars": (75.18, 67.93, 51.26),
    "wo_nodo": (77.24, 71.45, 54.38),
    "wo_sam": (76.89, 70.12, 53.91),
    "wo_all": (74.03, 65.87, 49.82),
}


class Measured:
    """The results of a study's runs in one split.

    Attributes:
        runs: the Result of each finished seed, by arm and seed. An arm with fewer than FEWEST seeds is left out,
            or with fewer than all if fewer are asked for.
        users: the number of examples.
        reference: the arm `continued`, or `sft` if no run of that is finished.
        minus: for each arm the difference to the reference, paired by seed and user, pooled over the seeds.
        others: the ceilings, SASRec, SFT with shuffled posters if it was evaluated, and the baselines.
    """

    def __init__(self, study: Study, seeds: list[int], split: str):
        data = DataFolder(ROOT / "data" / study.name)
        examples, sequences = data.examples(split), [*data.sequences().values()]
        targets, slicings = target_columns(examples), slicings_of(data, examples)
        self.users, self.runs = len(examples), {}
        for arm in study.arms:
            for seed in seeds:
                path = ROOT / study.run_folder(arm, seed) / predictions_name(split)
                if path.exists():
                    scores = read_scores(path, data.items.ids, examples)
                    result = measure(*scores, targets)
                    result.slices = measure_slices(scores[0], None, targets, slicings, 0).slices  # AUC would take long
                    self.runs.setdefault(arm, {})[seed] = result
        fewest = min(FEWEST, len(seeds))
        self.runs = {arm: results for arm, results in self.runs.items() if len(results) >= fewest}
        self.reference = "continued" if "continued" in self.runs else "sft"
        self.minus = {arm: self.difference(arm, self.reference) for arm in self.runs if arm != self.reference}

        def measured(scores: np.ndarray) -> Result:
            return measure(scores, scores, targets)

        self.others = {name: measured(scores) for name, (scores, _) in ceiling_scores(data, split, examples).items()}
        for name, own in trained_scores(data, split, examples).items():
            self.others[name] = pool([measured(scores) for scores in own])
        shuffled = [ROOT / study.run_folder("sft", seed) / f"shuffled_{predictions_name(split)}" for seed in seeds]
        found = [read_scores(path, data.items.ids, examples) for path in shuffled if path.exists()]
        if found:
            self.others["SFT, posters shuffled at evaluation"] = pool([measure(*scores, targets) for scores in found])
        for name, scores in baseline_scores(sequences, len(data.items), examples).items():
            self.others[name] = measured(scores)

    def difference(self, arm: str, other: str) -> Result:
        """Return an arm minus another arm, paired by user and by the seeds that both have."""
        both = self.runs[arm].keys() & self.runs[other].keys()
        return pool([self.runs[arm][seed].minus(self.runs[other][seed]) for seed in sorted(both)])


def slicings_of(data: DataFolder, examples: list[Example]) -> Slicings:
    """Return the slices of the examples, by the item vectors of the tiny backbone's encoding."""
    options = argparse.Namespace(trust_remote_code=False)
    return evaluate.slicings_of({}, data, examples, options)


def difference_cell(result: Result, metric: str) -> str:
    """Return a difference with its interval, in bold if the interval excludes 0."""
    low, high = result.interval(metric)
    text = cell(result, metric)
    return f"**{text}**" if low > 0 or high < 0 else text


def arms_table(study: Study, measured: Measured, group: int, split: str) -> str:
    """Return the table of a group of arms: values, and differences to the reference and to what they add to."""
    members = {name: arm for name, arm in study.arms.items() if arm.group == group and name in measured.runs}
    bases = [base for base in dict.fromkeys(arm.base for arm in members.values()) if base in measured.runs]
    compared = [(metric, measured.reference) for metric in COLUMNS] + [("NDCG@3", base) for base in bases]
    minus = [f"{metric} minus {study.arms[other].label}" for metric, other in compared]
    rows = [[f"{split}, {measured.users} users", "seeds", *COLUMNS, *minus]]
    if group == 0:
        for name, result in measured.others.items():
            rows.append([name, "", *(cell(result, metric) for metric in COLUMNS), "", "", ""])
    for name, arm in members.items():
        own = pool([*measured.runs[name].values()])
        result = measured.minus.get(name)
        cells = [difference_cell(result, metric) for metric in COLUMNS] if result else ["", "", ""]
        for base in bases:
            cells.append(difference_cell(measured.difference(name, base), "NDCG@3") if arm.base == base else "")
        count = str(len(measured.runs[name]))
        rows.append([arm.label, count, *(cell(own, metric) for metric in COLUMNS), *cells])
    return markdown(rows)


def slices_table(study: Study, measured: Measured, split: str) -> str:
    """Return NDCG@3 minus the reference in the slices of the examples."""
    slicings = next(iter(measured.minus.values())).slices
    columns = [(slicing, name) for slicing in slicings for name in slicings[slicing] if "popularity" not in slicing]
    corner = f"{split}: NDCG@3 minus {study.arms[measured.reference].label}"
    rows = [[corner, *(f"{slicing}, {name}" for slicing, name in columns)]]
    for name, arm in study.arms.items():
        if name in measured.minus and arm.group:
            parts = measured.minus[name].slices
            rows.append([arm.label, *(difference_cell(parts[slicing][label], "NDCG@3") for slicing, label in columns)])
    return markdown(rows)


def training_table(study: Study, seeds: list[int], finished: Collection[str]) -> str:
    """Return what the logs say of the training of these arms: means over seeds and the last 50 logged steps.

    The KL divergence, which is logged every 50 steps, is a mean over the whole training.
    The validation metric is that of the weights that the run kept, on the examples that its --eval-limit leaves.
    """
    names = {
        "val_NDCG@3": "NDCG@3 on validation",
        "chosen_change": "change of the chosen answer, nats",
        "accuracy": "pairs ranked right",
        "margin": "reward gap",
        "lambda": "lambda in a batch, 1% to 99%",
        "eta": "eta",
        "noise_kl": "KL of noise and dropout, nats a token",
    }
    rows = [["arm", *names.values()]]
    for name, arm in study.arms.items():
        if name not in finished or arm.script != "dpo_hano.py":
            continue
        lines, effects = [], []
        for seed in seeds:
            path = ROOT / study.run_folder(name, seed) / "metrics.jsonl"
            logged = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            lines += [line for line in logged if "loss" in line][-50:]
            effects += [line["noise_kl"] for line in logged if line.get("noise_kl") is not None]
            lines += sorted((line for line in logged if "val_select" in line), key=lambda line: line["val_select"])[-1:]
        if not lines:
            continue
        means = {}
        for key in (*names, "lambda_p01", "lambda_p99"):
            values = effects if key == "noise_kl" else [line[key] for line in lines if line.get(key) is not None]
            means[key] = f"{statistics.fmean(values):.3g}" if values else "-"
        means["lambda"] = f"{means['lambda_p01']} to {means['lambda_p99']}"
        cells = [means[key] for key in names]
        rows.append([arm.label, *cells])
    return markdown(rows)


def published_table(study: Study, measured: Measured) -> str:
    """Return the paper's ablation beside ours, as differences to the full method."""
    rows = [["minus HaNoRec", "paper: NDCG@3", "here: NDCG@3", "paper: HR@3", "here: HR@3", "paper: AUC", "here: AUC"]]
    for arm in PUBLISHED:
        if arm == "paper" or arm not in measured.runs:
            continue
        result = measured.difference(arm, "paper")
        auc, hr, ndcg = ((ours - full) / 100 for ours, full in zip(PUBLISHED[arm], PUBLISHED["paper"], strict=True))
        cells = []
        for value, metric in ((ndcg, "NDCG@3"), (hr, "HR@3"), (auc, "AUC")):
            cells += [short(value), difference_cell(result, metric)]
        rows.append([study.arms[arm].label, *cells])
    return markdown(rows)


def grid_table(study: Study) -> str | None:
    """Return the validation metrics of the recipes that were tried, or None without any."""
    rows = [["family", "recipe", *COLUMNS, ""]]
    for family, recipes in study.grid.items():
        for recipe in recipes:
            run = ROOT / study.grid_folder(family, recipe)
            if (run / "result.json").exists():
                best = read_json(run / "result.json", {"best": dict}, "delete it")["best"]
                taken = "taken" if study.recipes.get(family) == recipe else ""
                rows.append([family, f"`{recipe}`", *(f"{best[metric]:.4f}".lstrip("0") for metric in COLUMNS), taken])
    return markdown(rows) if len(rows) > 1 else None


def figure(study: Study, by_split: dict[str, Measured]) -> str:
    """Return an SVG: for each arm and split the difference to the reference in NDCG@3, with its interval."""
    finished = set.intersection(*(set(one.minus) for one in by_split.values()))
    arms = [name for name, arm in study.arms.items() if arm.group and name in finished]
    ends = [end for one in by_split.values() for arm in arms for end in one.minus[arm].interval("NDCG@3")]
    low, high = min(ends), max(ends)
    left, width, line = 290, 300, 20
    height = 50 + line * len(arms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + (width + 30) * len(by_split)} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, name in enumerate(arms):
        parts.append(f'<text x="10" y="{54 + line * number}">{study.arms[name].label}</text>')
    for panel, (split, measured) in enumerate(by_split.items()):
        start = left + (width + 30) * panel

        def x(value: float, start: int = start) -> float:
            return round(start + width * (value - low) / (high - low), 1)

        base = study.arms[measured.reference].label
        parts.append(f'<text x="{start}" y="18" font-weight="bold">{split}: NDCG@3 minus {base}</text>')
        for value in sorted({0.0, round(low, 2), round(high, 2)}):
            parts.append(f'<text x="{x(value)}" y="34" fill="#57606a" text-anchor="middle">{value:+.2f}</text>')
        parts.append(f'<path d="M{x(0)} 38V{height - 6}" stroke="#c9c7c0"/>')
        for number, name in enumerate(arms):
            result, y = measured.minus[name], 50 + line * number
            begin, end = result.interval("NDCG@3")
            colour = "#b9c4d0" if begin <= 0 <= end else "#3b8f4d" if begin > 0 else "#b5473c"
            parts.append(f'<path d="M{x(begin)} {y}H{x(end)}" stroke="{colour}" stroke-width="3"/>')
            parts.append(f'<circle cx="{x(result.values["NDCG@3"])}" cy="{y}" r="4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>\n"])


def section(study: Study, seeds: list[int], before: list[list[str]], training: dict[str, list[str]]) -> str:
    """Return the study's section of docs/results.md, and write its figure beside it.

    Args:
        before: the commands that come before the training. training: the training command of each arm.
    """
    by_split = {split: Measured(study, seeds, split) for split in study.splits}
    with replacing(PAGE.with_name(f"study_{study.name}.svg")) as new:
        new.write_text(figure(study, by_split), encoding="utf-8")
    texts = ["```"]
    commands = before + [command for arm, command in training.items() if arm in by_split["test"].runs]
    texts += [f"python {' '.join(command)}" for command in commands]
    texts += ["```", "", f"Seeds {', '.join(map(str, seeds))}: the same commands with other numbers.", ""]
    texts += ["A difference is in bold if its interval, before rounding, excludes 0.", ""]
    for group, title in enumerate(TITLES):
        if any(study.arms[arm].group == group for arm in by_split[study.splits[0]].runs):
            texts += [f"### {title}: {study.name}", ""]
            for split, measured in by_split.items():
                texts += [arms_table(study, measured, group, split), ""]
    if "paper" in by_split["test"].runs:
        texts += [published_table(study, by_split["test"]), ""]
    texts += [f"### Slices: {study.name}", "", slices_table(study, by_split["test"], "test"), ""]
    texts += [f"### What the logs say: {study.name}", "", training_table(study, seeds, by_split["test"].runs), ""]
    if grid := grid_table(study):
        texts += [f"### Recipes on validation, seed 1: {study.name}", "", grid, ""]
    return "\n".join(texts)


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a study's section stands."""
    return f"<!-- study {name} -->\n", f"<!-- end of study {name} -->\n"


def check_marks(name: str, page: Path = PAGE) -> None:
    """Raise ValueError if a page has no place for the study's section."""
    text = page.read_text(encoding="utf-8")
    if not all(mark in text for mark in marks(name)):
        raise ValueError(f"{page} lacks the marks of the study {name}")


def write(study: Study, seeds: list[int], before: list, training: dict, page: Path = PAGE) -> None:
    """Measure the predictions of the runs, and replace the study's section of the page. See `section`."""
    write_section(page, study.name, section(study, seeds, before, training))


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of a study in a page."""
    check_marks(name, page)
    start, end = marks(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    with replacing(page) as new:
        new.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")
