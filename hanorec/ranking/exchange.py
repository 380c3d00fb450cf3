"""Read and write scores of candidates: predictions.jsonl, and RecBole's files."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hanorec.data.folder import Example, Items
from hanorec.data.tables import header_of, text_rows
from hanorec.run.files import UserError, read_jsonl, replacing, write_jsonl

# The fields of predictions.jsonl, and their types
PREDICTION = {"user": object, "target": object, "candidates": list, "scores": list}

OTHER_CANDIDATES = "the file is of another split, or the data has been prepared again since; score these examples again"


def write_predictions(
    path: Path, ids: list[str], examples: Sequence[Example], scores: np.ndarray, yes_scores: np.ndarray | None
) -> None:
    """Write predictions.jsonl: one line for each example, with its candidates and their scores.

    Args:
        ids: the item ids by item index.
        scores: [R, C], those that rank the candidates.
        yes_scores: [R, C], or None.
    """
    lines = []
    for number, example in enumerate(examples):
        line = {
            "user": example.user,
            "target": ids[example.target],
            "candidates": [ids[candidate] for candidate in example.candidates],
            "scores": scores[number].tolist(),
            "yes_scores": None if yes_scores is None else yes_scores[number].tolist(),
        }
        lines.append(line)
    write_jsonl(path, lines)


def read_scores(path: Path, ids: list[str], examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the scores of these examples' candidates from predictions.jsonl, or from RecBole's .inter with scores.

    The file may have other examples too, and candidates in another order.

    Args:
        ids: the item ids by item index.

    Returns (scores, yes_scores or None), [R, C] each.
    """
    if path.suffix == ".inter":
        lines = read_recbole_scores(path)
    else:
        lines = read_jsonl(path, PREDICTION, "docs/evaluation.md describes the file for --scores")
    by_example = {}
    for line in lines:
        user, target = str(line["user"]), str(line["target"])
        if (user, target) in by_example:
            raise UserError(f"{path} has two lines for user {user} with target {target}; keep one of them")
        by_example[user, target] = line
    scores, yes_scores = [], []
    for example in examples:
        target, candidates = ids[example.target], [ids[candidate] for candidate in example.candidates]
        line = by_example.get((example.user, target))
        if line is None:
            raise UserError(f"{path} has no line for user {example.user} with target {target}: {OTHER_CANDIDATES}")
        scores.append(ordered_scores(path, line, "scores", candidates))
        if line.get("yes_scores") is not None:
            yes_scores.append(ordered_scores(path, line, "yes_scores", candidates))
    if len(yes_scores) not in (0, len(examples)):
        raise UserError(f"{path}: only some examples have yes_scores; give them for all or for none")
    return np.array(scores, dtype=float), np.array(yes_scores, dtype=float) if yes_scores else None


def ordered_scores(path: Path, line: dict, key: str, candidates: list[str]) -> list[float]:
    """Return the scores of a line, in the order of `candidates`.

    Raises:
        UserError: the line has other candidates, or not one finite number for each.
    """
    line_candidates = [str(candidate) for candidate in line["candidates"]]
    if sorted(line_candidates) != sorted(candidates):
        raise UserError(f"{path}, user {line['user']}: not the candidates of this data: {OTHER_CANDIDATES}")
    values = line[key] if isinstance(line[key], list) else []
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    finite = numbers and all(abs(value) <= sys.float_info.max for value in values)
    if not finite or len(values) != len(candidates):
        raise UserError(f"{path}, user {line['user']}: {key} must hold one finite number for each candidate")
    return [values[line_candidates.index(candidate)] for candidate in candidates]


# ---------------------------------------------------------------------------------------------------------------------
# RecBole


def read_recbole_scores(path: Path) -> list[dict]:
    """Read the .candidates.inter that `write_recbole` wrote. Returns dicts like the lines of predictions.jsonl."""
    rows = text_rows(path, "\t", quotes=False)
    header = header_of(rows, path, typed=True)
    columns = ("user_id", "item_id", "label", "score")
    absent = [name for name in columns if name not in header]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; give the .candidates.inter that --export-recbole wrote")
    positions = [header.index(name) for name in columns]
    lines = {}
    for number, row in rows:
        try:
            user, item, label, score = (row[position] for position in positions)
            is_target, score = {0.0: False, 1.0: True}[float(label)], float(score)
        except (IndexError, ValueError, KeyError) as error:
            fields = f"{', '.join(header)} with numbers in score and 0 or 1 in label"
            raise UserError(f"{path}, line {number}: expected {fields}, got {row}") from error
        line = lines.setdefault(user, {"user": user, "target": None, "candidates": [], "scores": []})
        line["candidates"].append(item)
        line["scores"].append(score)
        if is_target:
            if line["target"] is not None:
                raise UserError(f"{path}, line {number}: user {user} has label 1 twice; the target alone has it")
            line["target"] = item
    for user, line in lines.items():
        if line["target"] is None:
            raise UserError(f"{path}: user {user} has no line with label 1; give the target this label")
    return list(lines.values())


def write_recbole(
    folder: Path, items: Items, splits: dict[str, list[Example]], scores: np.ndarray, sequences: dict[str, list[int]]
) -> None:
    """Write RecBole's atomic files of a dataset with the folder's name.

    - <name>.item: the items with their titles.
    - <name>.train.inter, .valid.inter, .test.inter (RecBole's benchmark_filename): a line for each example, with its
      history and target.
    - <name>.interactions.inter: a line for each training interaction, for models without histories.
    - <name>.candidates.inter: a line for each candidate of each example, with a label (1 for the target) and a score.

    Args:
        splits: the examples of train, val and test; under `candidates` the examples that were scored.
        scores: [R, C], of splits["candidates"].
        sequences: the training sequence of each user.
    """
    ids, name = items.ids, folder.resolve().name
    users = [example.user for examples in splits.values() for example in examples]
    for text in (*ids, *users, *sequences):
        if len(text.split()) != 1:
            raise UserError(f"RecBole's files cannot hold the id {text!r}: it is empty, or has white space")

    def start(example: Example) -> str:
        return f"{example.user}\t{' '.join(ids[item] for item in example.history)}"

    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for split in splits.keys() - {"candidates"}:
        lines = [f"{start(example)}\t{ids[example.target]}" for example in splits[split]]
        write_lines(folder / f"{name}.{'valid' if split == 'val' else split}.inter", [header, *lines])
    lines = []
    for example, own_scores in zip(splits["candidates"], scores, strict=True):
        for item, score in zip(example.candidates, own_scores, strict=True):
            lines.append(f"{start(example)}\t{ids[item]}\t{float(item == example.target)}\t{score}")
    write_lines(folder / f"{name}.candidates.inter", [f"{header}\tlabel:float\tscore:float", *lines])
    lines = [f"{user}\t{ids[item]}" for user, sequence in sequences.items() for item in sequence]
    write_lines(folder / f"{name}.interactions.inter", ["user_id:token\titem_id:token", *lines])
    lines = [f"{item}\t{title}" for item, title in zip(ids, items.titles, strict=True)]
    write_lines(folder / f"{name}.item", ["item_id:token\ttitle:token_seq", *lines])


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file, replacing an old one."""
    with replacing(path) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
