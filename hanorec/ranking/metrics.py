"""Compute metrics of ranked candidates from arrays: values, replicates and intervals, of one run or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

METRICS = ("AUC", "GAUC", "HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR")
LONG_METRICS = ("Recall@5", "Recall@10", "Recall@20", "NDCG@10", "NDCG@20")
LIST_LENGTH = 20  # longer lists of candidates have LONG_METRICS too
NORMAL = 1.96  # the 97.5% quantile of the normal distribution
# The 97.5% quantiles of Student's t with 1, 2, 3, ... degrees of freedom; the last one also serves for more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def above_and_tied(scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each example the number of candidates above its target, and of those that tie with it: [R] each.

    Args:
        scores: [R, C].
        target: [R], the target's column. The target itself is not counted.
    """
    target_score = np.take_along_axis(scores, target[:, None], axis=1)
    return (scores > target_score).sum(1), (scores == target_score).sum(1) - 1


def ranking_metrics(scores: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Return HR@1,3,5, NDCG@3,5 and MRR of each example; for long lists also Recall@5,10,20 and NDCG@10,20.

    If candidates tie with the target, a metric is its mean over every order of these candidates. With one relevant item
    Recall@K is HR@K, and NDCG@K is 1 / log2(1 + rank) up to rank K, else 0.

    Args:
        scores: [R, C].
        target: [R], the target's column.

    Returns a dict of arrays [R] by name.

    >>> ranking_metrics(np.array([[0.5, 0.5, 0.1]]), np.array([0]))["HR@1"]
    array([0.5])
    """
    above, tied = above_and_tied(scores, target)
    rank = np.arange(1, scores.shape[1] + 1)
    gains = {f"HR@{k}": (rank <= k).astype(float) for k in (1, 3, 5)}  # the metric of a target at each rank
    gains |= {f"NDCG@{k}": (rank <= k) / np.log2(1 + rank) for k in (3, 5)}
    if scores.shape[1] > LIST_LENGTH:
        gains |= {f"Recall@{k}": (rank <= k).astype(float) for k in (5, 10, 20)}
        gains |= {f"NDCG@{k}": (rank <= k) / np.log2(1 + rank) for k in (10, 20)}
    gains["MRR"] = 1 / rank
    metrics = {}
    for name, gain in gains.items():
        total = np.append(0, gain.cumsum())  # total[n] is the sum of the gains of ranks 1 to n
        metrics[name] = (total[above + tied + 1] - total[above]) / (tied + 1)
    return metrics


def target_ranks(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the rank of each example's target: [R], from 1. Candidates that tie share the mean of their ranks.

    >>> target_ranks(np.array([[3.0, 1.0, 3.0, 0.0]]), np.array([2]))
    array([1.5])
    """
    above, tied = above_and_tied(scores, target)
    return 1 + above + tied / 2


def rank_changes(scores: np.ndarray, other: np.ndarray, target: np.ndarray) -> float:
    """Return the share of examples whose target has another rank in the other scores: [R, C] each."""
    return float((target_ranks(scores, target) != target_ranks(other, target)).mean())


def group_auc(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return for each example the share of its negatives below its target: [R]. A tie counts half. The mean is GAUC."""
    above, tied = above_and_tied(scores, target)
    return 1 - (above + tied / 2) / (scores.shape[1] - 1)


def pooled_auc(scores: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return AUC over the scores of all examples together, with the targets as positives. A tie counts half.

    Args:
        weights: [S, R], how often each example occurs in each of S resamples.

    Returns [S], or [1] without weights.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, axis=None, kind="stable")
    starts = np.flatnonzero(np.diff(scores.ravel()[order], prepend=-np.inf))  # where each group of equal scores begins
    positive = (np.arange(scores.shape[1]) == target[:, None]).ravel()[order]
    example = order // scores.shape[1]
    result = []
    for weight in weights:
        positives = np.add.reduceat(weight[example] * positive, starts)  # in each group of equal scores
        negatives = np.add.reduceat(weight[example] * ~positive, starts)
        wins = (positives * (negatives.cumsum() - negatives / 2)).sum()
        result.append(wins / (positives.sum() * negatives.sum()))
    return np.array(result)


@dataclass
class Result:
    """A system's metrics of one split, or the difference of two systems' metrics.

    Args:
        values: the value of each metric by name; of several seeds the mean.
        replicates: [S] by name, the metric in each of S bootstrap resamples, see `measure` and `pool`.
        examples: the number of examples.
        sd: of several seeds, the standard deviation over the seeds, by name.
        slices: results of parts of the examples, by name of the slicing and name of the slice.
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    examples: int = 0
    sd: dict[str, float] = field(default_factory=dict)
    slices: dict[str, dict[str, "Result"]] = field(default_factory=dict)

    def interval(self, name: str) -> list[float]:
        """Return a metric's 95% interval: [low, high]."""
        return np.percentile(self.replicates[name], [2.5, 97.5]).tolist()

    def minus(self, other: "Result") -> "Result":
        """Return the paired difference of two systems. It requires that both were measured with the same seed."""
        shared = [name for name in self.values if name in other.values]
        values = {name: self.values[name] - other.values[name] for name in shared}
        replicates = {name: self.replicates[name] - other.replicates[name] for name in shared}
        slices = {
            slicing: {name: part.minus(other.slices[slicing][name]) for name, part in parts.items()}
            for slicing, parts in self.slices.items()
        }
        return Result(values, replicates, self.examples, slices=slices)

    def summary(self) -> dict:
        """Return the result as JSON values, for metrics.json."""
        summary = {"values": self.values, "intervals": {name: self.interval(name) for name in self.values}}
        if self.slices:
            summary["slices"] = {
                slicing: {name: {"examples": part.examples, **part.summary()} for name, part in parts.items()}
                for slicing, parts in self.slices.items()
            }
        return summary


def measure(
    scores: np.ndarray, yes_scores: np.ndarray | None, target: np.ndarray, seed: int = 0, resamples: int = 1000
) -> Result:
    """Compute all metrics, and their replicates by bootstrap over examples.

    The same seed draws the same examples for every system, so that differences of replicates are paired.

    Args:
        scores: [R, C], for the ranking metrics.
        yes_scores: [R, C], for AUC and GAUC; None: no AUC and GAUC.
        target: [R], the target's column.
        resamples: the number of replicates.
    """
    count = len(target)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    values, replicates = {}, {}
    by_example = ranking_metrics(scores, target)
    if yes_scores is not None:
        by_example["GAUC"] = group_auc(yes_scores, target)
        values["AUC"] = float(pooled_auc(yes_scores, target)[0])
        replicates["AUC"] = pooled_auc(yes_scores, target, weights)
    for name, value in by_example.items():
        values[name], replicates[name] = float(value.mean()), weights @ value / count
    return Result({name: values[name] for name in (*METRICS, *LONG_METRICS) if name in values}, replicates, count)


def pool(results: Sequence[Result], seed: int = 0) -> Result:
    """Pool the results of runs that differ in their seed: means, standard deviations, and replicates for an interval.

    A replicate is the mean over the runs on the examples that `measure` has drawn, plus a normal random number for the
    runs. The standard deviation of this number is the standard error of the mean over the runs, times Student's t over
    1.96, because few runs tell little about their spread. The interval is one for the mean over training runs and
    examples: a single run can lie outside it.

    Args:
        results: one for each run, measured with the same `seed`. One result is returned as it is. For a difference of
            two systems, the differences of runs with equal seeds: it is then paired by seed and by example.
        seed: of the random numbers.
    """
    if len(results) == 1:
        return results[0]
    first, count = results[0], len(results)
    resamples = len(next(iter(first.replicates.values())))
    # The quantiles of the normal distribution in random order: their percentiles are exact
    quantiles = [NormalDist().inv_cdf((number + 0.5) / resamples) for number in range(resamples)]
    noise = np.random.default_rng([seed, 1]).permutation(quantiles)
    widening = STUDENT[min(count - 2, len(STUDENT) - 1)] / NORMAL
    values, sd, replicates = {}, {}, {}
    for name in first.values:
        by_run = np.array([result.values[name] for result in results])
        values[name], sd[name] = float(by_run.mean()), float(by_run.std(ddof=1))
        mean = np.mean([result.replicates[name] for result in results], axis=0)
        replicates[name] = mean + widening * sd[name] / count**0.5 * noise
    slices = {
        slicing: {name: pool([result.slices[slicing][name] for result in results], seed) for name in parts}
        for slicing, parts in first.slices.items()
    }
    return Result(values, replicates, first.examples, sd, slices)


def differences(rows: dict[str, list[Result]], reference: str, seed: int) -> dict[str, Result]:
    """Return the paired difference of every other row to the row `reference`, by name of the row.

    Args:
        rows: the results of each row's runs, in order of their seeds. Another system has one result.
        seed: of `pool`.
    """
    differences_by_row = {}
    for name, results in rows.items():
        if name != reference:
            others = rows[reference]
            results = results * len(others) if len(results) == 1 else results
            paired = [one.minus(other) for one, other in zip(results, others, strict=True)]
            differences_by_row[name] = pool(paired, seed)
    return differences_by_row
