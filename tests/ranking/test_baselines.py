"""Popularity and co-occurrence against brute-force loops, and what they may count."""

import csv
from collections import Counter

import numpy as np
from conftest import Opened

from hanorec.ranking.baselines import PairCounts, cooccurrence_scores, interaction_counts, popularity_scores


def test_popularity_and_cooccurrence_equal_brute_force():
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(12)[: rng.integers(2, 8)].tolist() for _ in range(30)]

    class Sample:
        def __init__(self):
            items = rng.permutation(12).tolist()
            self.history, self.candidates = items[:3], items[3:8]

    rows = [Sample() for _ in range(9)]
    popularity = [[sum(c in s for s in sequences) for c in row.candidates] for row in rows]
    assert popularity_scores(sequences, 12, rows).tolist() == popularity
    together = [
        [sum(c in s and i in s for s in sequences for i in row.history) for c in row.candidates] for row in rows
    ]
    assert cooccurrence_scores(sequences, 12, rows).tolist() == together


def test_a_repeated_item_counts_once():
    """In a sequence, as the scored item and as one of the history, and in the history."""
    once, repeated = PairCounts([[0, 1], [], [0, 2]], 4), PairCounts([[0, 1, 0, 1, 1], [], [2, 0, 2]], 4)
    for history in ([0], [1, 2], [3], []):
        expected = [sum(c in s and i in s for s in ([0, 1], [0, 2]) for i in history) for c in (3, 0, 1, 2)]
        for counter in (once, repeated):
            assert counter.scores(history * 2, [3, 0, 1, 2]).tolist() == expected
            assert counter.scores(history, []).tolist() == []


def test_baselines_count_training_interactions_alone(prepared):
    """All ratings, less the targets of validation and test."""
    data = Opened(prepared)
    with open(prepared.parent / "raw" / "ratings.csv", encoding="utf-8-sig") as file:
        ratings = Counter((row["userId"], row["movieId"]) for row in csv.DictReader(file))
    ids, used = data.items.ids, Counter()
    for split in ("val", "test"):
        used.update((example.user, ids[example.target]) for example in data.examples(split))
    users = data.sequences()
    expected = Counter()
    for (user, item), count in ratings.items():
        if user in users:
            expected[item] += count - used[user, item]
    counts = interaction_counts([*users.values()], len(ids))
    titles = Counter(data.items.titles)  # a user's second item of one title does not count
    own = [titles[title] == 1 for title in data.items.titles]
    assert sum(own) > 40 and counts[own].tolist() == [
        expected[item] for item, counted in zip(ids, own, strict=True) if counted
    ]
    for split in ("val", "test"):
        examples = data.examples(split)
        scores = popularity_scores([*users.values()], len(ids), examples)
        assert scores.tolist() == [[counts[item] for item in example.candidates] for example in examples]
