"""Rank the candidates of a user's example and print them by title, for evaluate.py --user."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hanorec.data.folder import DataFolder, Example
from hanorec.run.files import UserError, printable


def examples_of_user(user: str, among: str | None, data: DataFolder, split: str) -> list[Example]:
    """Return the user's first example of a split, in a list.

    Args:
        among: ids of other candidates, separated by commas. None: the example's own candidates.
    """
    examples = [example for example in data.examples(split) if example.user == user]
    if not examples:
        raise UserError(f'user {user} has no example in {data.folder / split}.jsonl; its "user" fields are the ids')
    ids = [item.strip() for item in (among or "").split(",") if item.strip()]
    for item in ids:
        if item not in data.items.index_of:
            raise UserError(f"--from: {item} is not in {data.folder / 'items.jsonl'}")
    candidates = [data.items.index_of[item] for item in dict.fromkeys(ids)]
    return [replace(examples[0], candidates=candidates)] if candidates else examples[:1]


def print_recommendations(
    name: str, data: DataFolder, example: Example, scores: Sequence[float], top_k: int, unit: str
) -> None:
    """Print a user's history and the best candidates by title.

    Args:
        name: the run's name.
        scores: [C], one for each candidate.
        unit: what the scores are, e.g. log-likelihood.
    """
    titles = data.items.titles
    print(f"\n{name}: user {printable(example.user)}\n  history, oldest first:")
    for item in example.history:
        print(f"    {printable(titles[item])}")
    print(f"  top {min(top_k, len(scores))} of {len(scores)}, with {unit}:")
    best = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
    for rank, column in enumerate(best, 1):
        item = example.candidates[column]
        mark = "  <- came next" if item == example.target else ""
        label = printable(f"{titles[item]} ({data.items.ids[item]})")
        print(f"    {rank:2}. {label}, {scores[column]:.3f}{mark}")
