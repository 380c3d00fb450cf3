"""Score candidates without a model: by popularity, by co-occurrence, or by chance. Scores are [R, C]: R examples."""

from collections.abc import Sequence

import numpy as np

from hanorec.data.folder import Example


def interaction_counts(sequences: Sequence[list[int]], items: int) -> np.ndarray:
    """Return the number of interactions of each item in these sequences: [N].

    Args:
        sequences: the training sequence of each user, item indices.
        items: the number N of items.
    """
    return np.bincount(np.concatenate(sequences), minlength=items)


def popularity_scores(sequences: Sequence[list[int]], items: int, examples: Sequence[Example]) -> np.ndarray:
    """Return the number of training interactions of each candidate: [R, C]. For the arguments see above."""
    return interaction_counts(sequences, items)[[example.candidates for example in examples]].astype(float)


def cooccurrence_scores(sequences: Sequence[list[int]], items: int, examples: Sequence[Example]) -> np.ndarray:
    """Return for each candidate the number of pairs (history item, training user with that item and the candidate)."""
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    interactions = np.concatenate(sequences)
    users = users[np.argsort(interactions, kind="stable")]  # the users of item i are users[start[i] : start[i + 1]]
    start = np.append(0, interaction_counts(sequences, items).cumsum())
    scores = np.zeros((len(examples), len(examples[0].candidates)))
    for number, example in enumerate(examples):
        shared = np.zeros(len(sequences))  # the number of history items that each training user has
        for item in example.history:
            shared[users[start[item] : start[item + 1]]] += 1
        for column, item in enumerate(example.candidates):
            scores[number, column] = shared[users[start[item] : start[item + 1]]].sum()
    return scores


def baseline_scores(sequences: Sequence[list[int]], items: int, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return the scores [R, C] of every baseline by name. chance scores all candidates alike."""
    return {
        "co-occurrence": cooccurrence_scores(sequences, items, examples),
        "popularity": popularity_scores(sequences, items, examples),
        "chance": np.zeros((len(examples), len(examples[0].candidates))),
    }
