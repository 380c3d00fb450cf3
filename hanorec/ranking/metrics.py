"""Compute metrics of ranked candidates from arrays: values, bootstrap replicates, intervals, and their table."""

from dataclasses import dataclass

import numpy as np

METRICS = ("AUC", "GAUC", "HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR")
LONG_METRICS = ("Recall@5", "Recall@10", "Recall@20", "NDCG@10", "NDCG@20")
LIST_LENGTH = 20  # more candidates than this have LONG_METRICS too
LONG_TABLE = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20")
CELL = 19  # characters of a cell, such as .659 [.623, .693] with spaces around it


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
    target_score = np.take_along_axis(scores, target[:, None], axis=1)
    above = (scores > target_score).sum(1)
    tied = (scores == target_score).sum(1)  # with the target itself
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
        metrics[name] = (total[above + tied] - total[above]) / tied
    return metrics


def group_auc(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return for each example the share of its negatives below its target: [R]. A tie counts half. The mean is GAUC."""
    target_score = np.take_along_axis(scores, target[:, None], axis=1)
    below = (scores < target_score).sum(1)
    tied_negatives = (scores == target_score).sum(1) - 1
    return (below + tied_negatives / 2) / (scores.shape[1] - 1)


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
    """A system's metrics of one split.

    Args:
        values: by name.
        replicates: [S] by name, the metric of each of S bootstrap resamples of the examples.
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]

    def interval(self, name: str) -> list[float]:
        """Return a metric's 95% interval: [low, high]."""
        return np.percentile(self.replicates[name], [2.5, 97.5]).tolist()

    def minus(self, other: "Result") -> "Result":
        """Return the paired difference of two systems. It requires that both were measured with the same seed."""
        shared = [name for name in self.values if name in other.values]
        values = {name: self.values[name] - other.values[name] for name in shared}
        return Result(values, {name: self.replicates[name] - other.replicates[name] for name in shared})


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
    return Result({name: values[name] for name in (*METRICS, *LONG_METRICS) if name in values}, replicates)


def tables(results: dict[str, Result]) -> str:
    """Return the results as a Markdown table, and a second table if a result has metrics of long lists."""
    text = table(results, METRICS)
    if any(name in result.values for result in results.values() for name in LONG_METRICS):
        text += "\n\n" + table(results, LONG_TABLE)
    return text


def table(results: dict[str, Result], columns: tuple[str, ...]) -> str:
    """Return a Markdown table with a row for each system, each value with its 95% interval."""
    width = max(map(len, results))
    lines = [
        f"| {'':{width}} | " + " | ".join(f"{name:^{CELL}}" for name in columns) + " |",
        f"|{'-' * (width + 2)}|" + ("-" * (CELL + 2) + "|") * len(columns),
    ]
    for name, result in results.items():
        cells = [cell(result, metric) for metric in columns]
        lines.append(f"| {name:{width}} | " + " | ".join(f"{text:^{CELL}}" for text in cells) + " |")
    return "\n".join(lines)


def cell(result: Result, metric: str) -> str:
    """Return a value and its interval, such as `.659 [.623, .693]`; `-` if the result lacks the metric."""
    if metric not in result.values:
        return "-"
    low, high = result.interval(metric)
    return f"{short(result.values[metric])} [{short(low)}, {short(high)}]"


def short(value: float) -> str:
    """Format a number with three decimals, without a zero before the point.

    >>> short(0.6591), short(-0.0001), short(10.5)
    ('.659', '.000', '10.500')
    """
    text = f"{value:.3f}".replace("-0.000", "0.000")
    return text.replace("0.", ".") if abs(value) < 1 else text
