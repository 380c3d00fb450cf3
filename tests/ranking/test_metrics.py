"""Metrics and intervals against brute-force loops."""

import itertools
import math

import numpy as np
import pytest

from hanorec.ranking import markdown, metrics
from hanorec.ranking.metrics import LONG_METRICS


def random_scores(rows=40, candidates=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (rows, candidates)).astype(float), rng.integers(candidates, size=rows)  # many ties


def brute_force(scores, target):
    """Each metric as its mean over every order of tied candidates, by enumeration."""
    sums = dict.fromkeys(("HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR"), 0.0)
    for row, column in zip(scores, target, strict=True):
        orders = list(itertools.permutations(range(len(row))))
        valid = [o for o in orders if all(row[a] >= row[b] for a, b in itertools.pairwise(o))]
        for order in valid:
            rank = order.index(column) + 1
            for k in (1, 3, 5):
                sums[f"HR@{k}"] += (rank <= k) / len(valid)
            for k in (3, 5):
                sums[f"NDCG@{k}"] += (rank <= k) / math.log2(rank + 1) / len(valid)
            sums["MRR"] += 1 / rank / len(valid)
    return {name: value / len(scores) for name, value in sums.items()}


def brute_force_auc(scores, target, rows=None):
    rows = range(len(scores)) if rows is None else rows
    positive = [scores[r, target[r]] for r in rows]
    negative = [scores[r, c] for r in rows for c in range(scores.shape[1]) if c != target[r]]
    wins = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    return sum(wins) / len(wins)


def test_ranking_metrics_equal_brute_force():
    scores, target = random_scores()
    found = {name: value.mean() for name, value in metrics.ranking_metrics(scores, target).items()}
    assert found == pytest.approx(brute_force(scores, target))


def test_long_lists_have_recall_too():
    """Of one target Recall@K is HR@K; NDCG at 10 and 20 by the definition."""
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = np.zeros(50, dtype=int)
    rank = 1 + (scores > scores[:, :1]).sum(1)
    found = metrics.ranking_metrics(scores, target)
    for k in (5, 10, 20):
        assert (found[f"Recall@{k}"] == (rank <= k)).all()
        assert found[f"NDCG@{k}"] == pytest.approx([1 / math.log2(1 + r) if r <= k else 0 for r in rank])
    result = {"it": metrics.measure(scores, scores, target, resamples=10)}
    assert len(markdown.tables(result).split("\n\n")) == 4 and " - " not in markdown.tables(result)
    assert not set(LONG_METRICS) & set(metrics.measure(scores[:, :20], None, target, resamples=10).values)


def test_auc_and_gauc_equal_brute_force():
    scores, target = random_scores()
    assert metrics.pooled_auc(scores, target)[0] == pytest.approx(brute_force_auc(scores, target))
    per_row = [brute_force_auc(scores, target, [row]) for row in range(len(scores))]
    assert metrics.group_auc(scores, target) == pytest.approx(per_row)


def test_weighted_auc_is_the_auc_of_the_resample():
    scores, target = random_scores()
    rng = np.random.default_rng(1)
    for _ in range(5):
        rows = rng.integers(len(scores), size=len(scores))
        weight = np.bincount(rows, minlength=len(scores)).astype(float)
        expected = brute_force_auc(scores, target, rows)
        assert metrics.pooled_auc(scores, target, weight[None])[0] == pytest.approx(expected)


def test_chance_is_exact():
    result = metrics.measure(np.zeros((7, 10)), np.zeros((7, 10)), np.arange(7))
    expected = {
        "AUC": 0.5,
        "GAUC": 0.5,
        "HR@1": 0.1,
        "HR@3": 0.3,
        "HR@5": 0.5,
        "MRR": sum(1 / k for k in range(1, 11)) / 10,
    }
    expected |= {f"NDCG@{k}": sum(1 / math.log2(r + 1) for r in range(1, k + 1)) / 10 for k in (3, 5)}
    assert result.values == pytest.approx(expected)


def test_bootstrap_interval_has_the_textbook_width():
    rng = np.random.default_rng(0)
    scores, target = rng.random((1000, 10)), rng.integers(10, size=1000)
    result = metrics.measure(scores, scores, target)
    value = result.values["HR@1"]
    low, high = result.interval("HR@1")
    assert low < value < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(value * (1 - value) / 1000), rel=0.1)


def test_paired_difference_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    scores, target = rng.random((500, 10)), rng.integers(10, size=500)
    one = metrics.measure(scores, None, target)
    other = metrics.measure(scores + 0.01 * rng.random((500, 10)), None, target)
    width = np.diff(one.minus(other).interval("NDCG@3"))
    assert width < 0.3 * np.diff(one.interval("NDCG@3"))
    assert one.minus(one).interval("MRR") == [0, 0]


def test_a_line_in_a_name_makes_no_column():
    table = markdown.markdown([["", "MRR"], ["runs/a|b", ".5"]])
    assert table.splitlines()[2].replace("\\|", "").count("|") == 3 and r"runs/a\|b" in table


def test_cells_lose_the_zero_before_the_point_and_no_other():
    result = metrics.Result({"MRR": 10.5}, {"MRR": np.array([-0.5, 20.25])})
    assert markdown.cell(result, "MRR") == "10.500 [.019, 19.731]"
    result = metrics.Result({"MRR": -0.0001}, {"MRR": np.array([-0.25, -0.25])})
    assert markdown.cell(result, "MRR") == ".000 [-.250, -.250]"
    assert markdown.cell(result, "AUC") == "-"
