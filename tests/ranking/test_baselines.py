"""Popularity and co-occurrence against brute-force loops."""

import numpy as np

from hanorec.ranking.baselines import cooccurrence_scores, popularity_scores


def test_popularity_and_cooccurrence_equal_brute_force():
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(12)[: rng.integers(2, 8)].tolist() for _ in range(30)]

    class Data:
        items = range(12)

        @staticmethod
        def sequences():
            return dict(enumerate(sequences))

    class Sample:
        def __init__(self):
            items = rng.permutation(12).tolist()
            self.history, self.candidates = items[:3], items[3:8]

    rows = [Sample() for _ in range(9)]
    popularity = [[sum(c in s for s in sequences) for c in row.candidates] for row in rows]
    assert popularity_scores(Data, rows).tolist() == popularity
    together = [
        [sum(c in s and i in s for s in sequences for i in row.history) for c in row.candidates] for row in rows
    ]
    assert cooccurrence_scores(Data, rows).tolist() == together
