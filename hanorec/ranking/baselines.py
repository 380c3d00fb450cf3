"""Score candidates without a model: by popularity, by co-occurrence, or by chance. Scores are [R, C]: R examples."""

from collections.abc import Sequence

import numpy as np

from hanorec.data.folder import DataFolder, Example


def popularity_scores(data: DataFolder, examples: Sequence[Example]) -> np.ndarray:
    """Return the number of training interactions of each candidate: [R, C]."""
    counts = np.bincount(np.concatenate([*data.sequences().values()]), minlength=len(data.items))
    return counts[[example.candidates for example in examples]].astype(float)


def cooccurrence_scores(data: DataFolder, examples: Sequence[Example]) -> np.ndarray:
    """Return for each candidate the number of pairs (history item, training user with that item and the candidate)."""
    sequences = [*data.sequences().values()]
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences)
    users = users[np.argsort(items, kind="stable")]  # the users of item i are users[start[i] : start[i + 1]]
    start = np.append(0, np.bincount(items, minlength=len(data.items)).cumsum())
    scores = np.zeros((len(examples), len(examples[0].candidates)))
    for number, example in enumerate(examples):
        shared = np.zeros(len(sequences))  # the number of history items that each training user has
        for item in example.history:
            shared[users[start[item] : start[item + 1]]] += 1
        for column, item in enumerate(example.candidates):
            scores[number, column] = shared[users[start[item] : start[item + 1]]].sum()
    return scores


def baseline_scores(data: DataFolder, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return the scores [R, C] of every baseline by name. chance scores all candidates alike."""
    return {
        "co-occurrence": cooccurrence_scores(data, examples),
        "popularity": popularity_scores(data, examples),
        "chance": np.zeros((len(examples), len(examples[0].candidates))),
    }
