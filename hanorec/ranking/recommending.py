"""Recommendations by name: a user's history, and the best candidates."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hanorec.data.folder import DataFolder, Example
from hanorec.run.files import UserError, printable


def examples_of_user(user: str, among: str | None, data: DataFolder, split: str) -> list[Example]:
    """The user's example of a split.

    Args:
        among: ids of other candidates, with commas between them; None keeps the example's own.
    """
    found = [example for example in data.examples(split) if example.user == user]
    if not found:
        raise UserError(f'user {user} has no example in {data.folder / split}.jsonl; its "user" fields are the ids')
    ids = [item.strip() for item in (among or "").split(",") if item.strip()]
    for item in ids:
        if item not in data.items.index_of:
            raise UserError(f"--from: {item} is not in {data.folder / 'items.jsonl'}")
    candidates = [data.items.index_of[item] for item in dict.fromkeys(ids)]
    return [replace(found[0], candidates=candidates)] if candidates else found[:1]


def print_recommendations(
    name: str, data: DataFolder, example: Example, scores: Sequence[float], top_k: int, unit: str
) -> None:
    """Print a user's history and the best candidates by title.

    Args:
        name: of the run.
        scores: one for each candidate, in this unit.
    """
    titles = [printable(title) for title in data.items.titles]
    print(f"\n{name}: user {printable(example.user)}\n  history, oldest first:", end="\n    ")
    print(*(titles[item] for item in example.history), sep="\n    ")
    print(f"  top {min(top_k, len(scores))} of {len(scores)}, with {unit}:")
    best = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
    for place, column in enumerate(best, 1):
        item = example.candidates[column]
        mark = "  <- came next" if item == example.target else ""
        print(f"    {place:2}. {titles[item]} ({printable(data.items.ids[item])}), {scores[column]:.3f}{mark}")
