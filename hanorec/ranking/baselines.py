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


class PairCounts:
    """Counts the pairs (item of a history, user who has that item and the scored one).

    An item that is in a sequence or a history several times counts once.

    Args:
        sequences: the items of each user, item indices.
        items: the number N of items.
    """

    def __init__(self, sequences: Sequence[list[int]], items: int):
        sequences = [np.unique(np.array(sequence, dtype=int)) for sequence in sequences]
        users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        interactions = np.concatenate(sequences)
        # The users of item i are users[start[i] : start[i + 1]]
        self.users, self.count = users[np.argsort(interactions, kind="stable")], len(sequences)
        self.start = np.append(0, interaction_counts(sequences, items).cumsum())

    def scores(self, history: Sequence[int], candidates: Sequence[int]) -> np.ndarray:
        """Return the number of pairs of each candidate: [C]."""
        shared = np.zeros(self.count)  # the number of history items that each user has
        for item in {*history}:
            shared[self.users[self.start[item] : self.start[item + 1]]] += 1
        sums, candidates = np.append(0, shared[self.users].cumsum()), np.asarray(candidates, dtype=int)
        return sums[self.start[candidates + 1]] - sums[self.start[candidates]]


def cooccurrence_scores(sequences: Sequence[list[int]], items: int, examples: Sequence[Example]) -> np.ndarray:
    """Return for each candidate the number of pairs (history item, training user with that item and the candidate)."""
    counter = PairCounts(sequences, items)
    return np.array([counter.scores(example.history, example.candidates) for example in examples])


def baseline_scores(sequences: Sequence[list[int]], items: int, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return the scores [R, C] of every baseline by name. chance scores all candidates alike."""
    return {
        "co-occurrence": cooccurrence_scores(sequences, items, examples),
        "popularity": popularity_scores(sequences, items, examples),
        "chance": np.zeros((len(examples), len(examples[0].candidates))),
    }
