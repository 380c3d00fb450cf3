"""Scores of candidates, to and from other systems: predictions.jsonl, and RecBole's files."""

import sys
from pathlib import Path

import numpy as np

from hanorec.data import readers
from hanorec.run import runs
from hanorec.run.runs import UserError


def write_predictions(path: Path, ids: list[str], rows, scores: np.ndarray | None, yes: np.ndarray | None) -> None:
    """predictions.jsonl: a line per row with its candidates and their scores ([R, C] each, either may be None)."""
    lines = []
    for number, row in enumerate(rows):
        line = {"user": row.user, "target": ids[row.target], "candidates": [ids[c] for c in row.candidates]}
        line["scores"] = (scores if scores is not None else yes)[number].tolist()
        lines.append(line | {"yes_scores": None if yes is None else yes[number].tolist()})
    runs.write_jsonl(path, lines)


def inter_lines(path: Path) -> list[dict]:
    """The lines of a RecBole file as `write_recbole` writes it, in the form of predictions.jsonl."""
    rows, found = readers.text_rows(path, "\t", quotes=False), {}
    header = [name.split(":")[0] for name in readers.header_of(rows, path)]
    wanted = ("user_id", "item_id", "label", "score")
    if not set(wanted) <= set(header):
        raise UserError(f"{path} lacks {', '.join(wanted)}; give the .candidates.inter that --export-recbole wrote")
    places = [header.index(name) for name in wanted]
    for number, row in rows:
        try:
            user, item, label, score = (row[place] for place in places)
            line = found.setdefault(user, {"user": user, "target": None, "candidates": [], "scores": []})
            line["scores"].append(float(score))
            line["target"] = item if float(label) > 0 else line["target"]
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}, line {number}: expected {', '.join(header)}, got {row}") from error
        line["candidates"].append(item)
    return list(found.values())


def read_scores(path: Path, ids: list[str], rows) -> tuple[np.ndarray, np.ndarray | None]:
    """(scores, yes_scores or None), [R, C] each, for these rows: from a predictions.jsonl, or a RecBole .inter with a
    score column. Candidates may stand in any order."""
    if path.suffix == ".inter":
        lines = inter_lines(path)
    else:
        fields = {"user": object, "target": object, "candidates": list, "scores": (list, type(None))}
        lines = runs.read_jsonl(path, fields, "see --scores in the README")
    by_row = {(str(line["user"]), str(line["target"])): line for line in lines}
    found = {"scores": [], "yes_scores": []}
    for row in rows:
        line = by_row.get((row.user, ids[row.target]))
        if line is None:
            raise UserError(f"{path} has no row of this data: user {row.user} with target {ids[row.target]}")
        candidates = [str(c) for c in line["candidates"]]
        if sorted(candidates) != sorted(ids[c] for c in row.candidates):
            raise UserError(f"{path}, user {row.user}: not the candidates of this data")
        for key in [key for key in found if line.get(key) is not None]:
            values = line[key] if isinstance(line[key], list) else []
            good = all(isinstance(value, (int, float)) and abs(value) <= sys.float_info.max for value in values)
            if not good or len(values) != len(candidates):
                raise UserError(f"{path}, user {row.user}: {key} must hold one finite number for each candidate")
            found[key].append([values[candidates.index(ids[c])] for c in row.candidates])
    yes = len(found["yes_scores"])
    if len(found["scores"]) < len(rows) or yes not in (0, len(rows)):
        raise UserError(f"{path}: some of the {len(rows)} rows have no scores, or no yes_scores; give them for all")
    return np.array(found["scores"], dtype=float), np.array(found["yes_scores"], dtype=float) if yes else None


def write_recbole(folder: Path, catalogue, splits: dict[str, list], scores: np.ndarray) -> None:
    """RecBole's atomic files of a dataset named like the folder: <name>.item; <name>.train.inter, .valid.inter and
    .test.inter (its benchmark_filename), one row's history and target a line; and <name>.candidates.inter with every
    candidate, a label, and `scores` [R, C] of splits["candidates"]."""
    ids, name = catalogue.ids, folder.name
    spaced = [
        text for text in (*ids, *(row.user for rows in splits.values() for row in rows)) if len(text.split()) != 1
    ]
    if spaced:
        raise UserError(f"RecBole's files are separated by spaces and tabs, and the id {spaced[0]!r} holds one")
    head = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for split, rows in splits.items():
        lines = [head + "\tlabel:float\tscore:float" * (split == "candidates")]
        for number, row in enumerate(rows):
            start = f"{row.user}\t{' '.join(ids[item] for item in row.history)}\t"
            if split != "candidates":
                lines.append(start + ids[row.target])
                continue
            for item, score in zip(row.candidates, scores[number], strict=True):
                lines.append(f"{start}{ids[item]}\t{float(item == row.target)}\t{score}")
        with runs.replacing(folder / f"{name}.{'valid' if split == 'val' else split}.inter") as beside:
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["item_id:token\ttitle:token_seq", *map("\t".join, zip(ids, catalogue.titles, strict=True))]
    with runs.replacing(folder / f"{name}.item") as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
