"""Baselines without a model: popularity, co-occurrence, chance. Each gives scores [R, C] of R examples' candidates."""

from collections.abc import Sequence

import numpy as np

from hanorec.data.folder import DataFolder, Example


def popularity_scores(data: DataFolder, examples: Sequence[Example]) -> np.ndarray:
    """[R, C]: the number of training interactions of each candidate."""
    counts = np.bincount(np.concatenate([*data.sequences().values()]), minlength=len(data.items))
    return counts[[example.candidates for example in examples]].astype(float)


def cooccurrence_scores(data: DataFolder, examples: Sequence[Example]) -> np.ndarray:
    """[R, C]: the number of pairs (history item, training user) whose user has that item and the candidate."""
    sequences = [*data.sequences().values()]
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences)
    order = np.argsort(items, kind="stable")
    users = users[order]  # by item: those of item i are users[start[i] : start[i + 1]]
    start = np.append(0, np.bincount(items, minlength=len(data.items)).cumsum())
    scores = np.zeros((len(examples), len(examples[0].candidates)))
    for number, example in enumerate(examples):
        shared = np.zeros(len(sequences))  # how many history items each training user has
        for item in example.history:
            shared[users[start[item] : start[item + 1]]] += 1
        scores[number] = [shared[users[start[c] : start[c + 1]]].sum() for c in example.candidates]
    return scores


def baseline_scores(data: DataFolder, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The scores of every baseline by its name."""
    return {
        "co-occurrence": cooccurrence_scores(data, examples),
        "popularity": popularity_scores(data, examples),
        "chance": np.zeros((len(examples), len(examples[0].candidates))),
    }
