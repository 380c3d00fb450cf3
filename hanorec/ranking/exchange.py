"""Scores of candidates, to and from other systems: predictions.jsonl, and RecBole's files."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hanorec.data.folder import Example, Items
from hanorec.data.tables import header_of, text_rows
from hanorec.run.files import UserError, read_jsonl, replacing, write_jsonl

# The fields of predictions.jsonl, and their types
PREDICTION = {"user": object, "target": object, "candidates": list, "scores": (list, type(None))}


def write_predictions(
    path: Path, ids: list[str], examples: Sequence[Example], scores: np.ndarray | None, yes_scores: np.ndarray | None
) -> None:
    """Write predictions.jsonl: for each example its candidates and their scores ([R, C] each, either may be None)."""
    lines = []
    for number, example in enumerate(examples):
        ranked = yes_scores if scores is None else scores
        lines.append(
            {
                "user": example.user,
                "target": ids[example.target],
                "candidates": [ids[candidate] for candidate in example.candidates],
                "scores": ranked[number].tolist(),
                "yes_scores": None if yes_scores is None else yes_scores[number].tolist(),
            }
        )
    write_jsonl(path, lines)


def read_scores(path: Path, ids: list[str], examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read scores of these examples' candidates from a predictions.jsonl, or a RecBole .inter with a score column.

    Candidates may stand in any order.

    Returns (scores, yes_scores or None), [R, C] each.
    """
    if path.suffix == ".inter":
        lines = read_recbole_scores(path)
    else:
        lines = read_jsonl(path, PREDICTION, "docs/evaluation.md describes the file for --scores")
    by_example = {(str(line["user"]), str(line["target"])): line for line in lines}
    found = {"scores": [], "yes_scores": []}
    for example in examples:
        line = by_example.get((example.user, ids[example.target]))
        if line is None:
            target = ids[example.target]
            raise UserError(f"{path} has no example of this data: user {example.user} with target {target}")
        for key, rows in found.items():
            if line.get(key) is not None:
                rows.append(ordered_scores(path, line, key, [ids[candidate] for candidate in example.candidates]))
    scores, yes_scores = found["scores"], found["yes_scores"]
    if len(scores) < len(examples) or len(yes_scores) not in (0, len(examples)):
        raise UserError(
            f"{path}: some of the {len(examples)} examples have no scores, or no yes_scores; give them for all"
        )
    return np.array(scores, dtype=float), np.array(yes_scores, dtype=float) if yes_scores else None


def ordered_scores(path: Path, line: dict, key: str, candidates: list[str]) -> list[float]:
    """The scores of a line, in the order of these candidates. UserError if the line has other candidates."""
    own = [str(candidate) for candidate in line["candidates"]]
    if sorted(own) != sorted(candidates):
        raise UserError(f"{path}, user {line['user']}: not the candidates of this data")
    values = line[key] if isinstance(line[key], list) else []
    finite = all(isinstance(value, (int, float)) and abs(value) <= sys.float_info.max for value in values)
    if not finite or len(values) != len(own):
        raise UserError(f"{path}, user {line['user']}: {key} must hold one finite number for each candidate")
    return [values[own.index(candidate)] for candidate in candidates]


# ---------------------------------------------------------------------------------------------------------------------
# RecBole


def read_recbole_scores(path: Path) -> list[dict]:
    """Read a RecBole file that `write_recbole` wrote, in the form of predictions.jsonl."""
    rows, lines = text_rows(path, "\t", quotes=False), {}
    header = [name.split(":")[0] for name in header_of(rows, path)]
    columns = ("user_id", "item_id", "label", "score")
    if not set(columns) <= set(header):
        raise UserError(f"{path} lacks {', '.join(columns)}; give the .candidates.inter that --export-recbole wrote")
    positions = [header.index(name) for name in columns]
    for number, row in rows:
        try:
            user, item, label, score = (row[position] for position in positions)
            line = lines.setdefault(user, {"user": user, "target": None, "candidates": [], "scores": []})
            line["scores"].append(float(score))
            line["target"] = item if float(label) > 0 else line["target"]
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}, line {number}: expected {', '.join(header)}, got {row}") from error
        line["candidates"].append(item)
    return list(lines.values())


def write_recbole(folder: Path, items: Items, splits: dict[str, list[Example]], scores: np.ndarray) -> None:
    """Write RecBole's atomic files of a dataset named like the folder.

    <name>.item; <name>.train.inter, .valid.inter and .test.inter (its benchmark_filename), an example's history and
    target a line; <name>.candidates.inter with every candidate, a label, and a score.

    Args:
        splits: examples by split; those of `candidates` are the examples that were scored.
        scores: [R, C] of splits["candidates"].
    """
    ids, name = items.ids, folder.name
    users = [example.user for examples in splits.values() for example in examples]
    for text in (*ids, *users):
        if len(text.split()) != 1:
            raise UserError(f"RecBole's files are separated by spaces and tabs, and the id {text!r} holds one")
    columns = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for split, examples in splits.items():
        if split == "candidates":
            lines = [columns + "\tlabel:float\tscore:float"]
        else:
            lines = [columns]
        for number, example in enumerate(examples):
            start = f"{example.user}\t{' '.join(ids[item] for item in example.history)}\t"
            if split == "candidates":
                for item, score in zip(example.candidates, scores[number], strict=True):
                    lines.append(f"{start}{ids[item]}\t{float(item == example.target)}\t{score}")
            else:
                lines.append(start + ids[example.target])
        write_lines(folder / f"{name}.{'valid' if split == 'val' else split}.inter", lines)
    titles = ["\t".join(pair) for pair in zip(ids, items.titles, strict=True)]
    write_lines(folder / f"{name}.item", ["item_id:token\ttitle:token_seq", *titles])


def write_lines(path: Path, lines: list[str]) -> None:
    with replacing(path) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
