"""Metrics of ranked candidates, on arrays: values, bootstrap replicates, intervals, and their table."""

from dataclasses import dataclass

import numpy as np

METRICS = ("AUC", "GAUC", "HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR")
LONG_METRICS = ("Recall@5", "Recall@10", "Recall@20", "NDCG@10", "NDCG@20")  # of more than 20 candidates
LONG_TABLE = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20")


def ranking_metrics(scores: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """HR@1,3,5, NDCG@3,5 and MRR of each example; with more than 20 candidates also Recall@5,10,20 and NDCG@10,20.

    If candidates tie with the target, the metric is its mean over every order of them. With one relevant item Recall@K
    is HR@K, and NDCG@K is 1 / log2(1 + rank) up to rank K.

    Args:
        scores: [R, C].
        target: [R], the target's column.

    Returns arrays [R] by name.

    >>> ranking_metrics(np.array([[0.5, 0.5, 0.1]]), np.array([0]))["HR@1"]
    array([0.5])
    """
    own = np.take_along_axis(scores, target[:, None], axis=1)
    above = (scores > own).sum(1)
    tied = (scores == own).sum(1)  # the target itself included
    rank = np.arange(1, scores.shape[1] + 1)
    gains = {f"HR@{k}": (rank <= k).astype(float) for k in (1, 3, 5)}
    gains |= {f"NDCG@{k}": (rank <= k) / np.log2(1 + rank) for k in (3, 5)}
    if scores.shape[1] > 20:
        gains |= {f"Recall@{k}": (rank <= k).astype(float) for k in (5, 10, 20)}
        gains |= {f"NDCG@{k}": (rank <= k) / np.log2(1 + rank) for k in (10, 20)}
    gains["MRR"] = 1 / rank
    metrics = {}
    for name, gain in gains.items():
        total = np.append(0, gain.cumsum())  # total[n]: the gains of ranks 1 to n
        metrics[name] = (total[above + tied] - total[above]) / tied
    return metrics


def group_auc(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[R]: the share of an example's negatives below its target, ties half. Their mean is GAUC."""
    own = np.take_along_axis(scores, target[:, None], axis=1)
    return ((scores < own).sum(1) + ((scores == own).sum(1) - 1) / 2) / (scores.shape[1] - 1)


def pooled_auc(scores: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUC over all (example, candidate) scores with the targets as positives, ties half.

    Args:
        weights: [S, R], how often each example counts in each of S resamples.

    Returns [S], or [1] without weights.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, axis=None, kind="stable")
    starts = np.flatnonzero(np.diff(scores.ravel()[order], prepend=-np.inf))  # of each run of equal scores
    positive = (np.arange(scores.shape[1]) == target[:, None]).ravel()[order]
    example = order // scores.shape[1]
    result = []
    for weight in weights:
        up = np.add.reduceat(weight[example] * positive, starts)
        down = np.add.reduceat(weight[example] * ~positive, starts)
        result.append((up * (down.cumsum() - down / 2)).sum() / (up.sum() * down.sum()))
    return np.array(result)


@dataclass
class Result:
    """A system's metrics of one split: the value of each, and S bootstrap replicates over examples."""

    values: dict[str, float]
    replicates: dict[str, np.ndarray]

    def interval(self, name: str) -> list[float]:
        """The 95% interval: [low, high]."""
        return [float(v) for v in np.percentile(self.replicates[name], [2.5, 97.5])]

    def minus(self, other: "Result") -> "Result":
        """The paired difference: both drew the same examples in each replicate."""
        shared = [name for name in self.values if name in other.values]
        values = {name: self.values[name] - other.values[name] for name in shared}
        return Result(values, {name: self.replicates[name] - other.replicates[name] for name in shared})


def measure(
    scores: np.ndarray, yes_scores: np.ndarray | None, target: np.ndarray, seed: int = 0, resamples: int = 1000
) -> Result:
    """All metrics, with bootstrap replicates that resample examples.

    The same seed draws the same examples for every system, so that differences of replicates are paired.

    Args:
        scores: [R, C], for the ranking metrics.
        yes_scores: [R, C], for AUC and GAUC; None leaves them out.
        target: [R], the target's column.
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
    """The results as Markdown; below them a second table of the metrics of long lists, if there are any."""
    text = table(results, METRICS)
    if any(name in result.values for result in results.values() for name in LONG_METRICS):
        text += "\n\n" + table(results, LONG_TABLE)
    return text


def table(results: dict[str, Result], columns: tuple[str, ...]) -> str:
    """Markdown: a row for each system, each value with its 95% interval."""
    width = max(map(len, results))
    lines = [
        f"| {'':{width}} | " + " | ".join(f"{name:^19}" for name in columns) + " |",
        f"|{'-' * (width + 2)}|" + ("-" * 21 + "|") * len(columns),
    ]
    for name, result in results.items():
        cells = [cell(result, metric) for metric in columns]
        lines.append(f"| {name:{width}} | " + " | ".join(f"{text:^19}" for text in cells) + " |")
    return "\n".join(lines)


def cell(result: Result, metric: str) -> str:
    """`.659 [.623, .693]`: a value and its interval; `-` if the result lacks the metric."""
    if metric not in result.values:
        return "-"
    low, high = result.interval(metric)
    text = f"{result.values[metric]:.3f} [{low:.3f}, {high:.3f}]"
    return text.replace("-0.000", "0.000").replace("0.", ".")
