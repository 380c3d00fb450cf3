"""Metrics of ranked candidates, on arrays: values, bootstrap replicates, intervals, and the table they are shown in."""

from dataclasses import dataclass

import numpy as np

METRICS = ("AUC", "GAUC", "HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR")
LONG = ("Recall@5", "Recall@10", "Recall@20", "NDCG@10", "NDCG@20")  # of more than 20 candidates


def ranking_metrics(scores: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """HR@1,3,5, NDCG@3,5 and MRR of each row: their mean over every order of the candidates that tie with the target.
    With more than 20 candidates also Recall@5,10,20 and NDCG@10,20.

    scores: [R, C]; target: [R], the target's column. Returns arrays [R]. With one relevant item, Recall@K is HR@K, and
    NDCG@K is 1 / log2(1 + rank) up to rank K.

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
    cumulative = {name: np.append(0, gain.cumsum()) for name, gain in gains.items()}
    return {name: (total[above + tied] - total[above]) / tied for name, total in cumulative.items()}


def group_auc(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[R]: the share of a row's negatives below its target, ties half; their mean is GAUC."""
    own = np.take_along_axis(scores, target[:, None], axis=1)
    return ((scores < own).sum(1) + ((scores == own).sum(1) - 1) / 2) / (scores.shape[1] - 1)


def pooled_auc(scores: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUC over all (row, candidate) scores with the targets as positives, ties half.

    weights: [S, R], how often each row counts in each of S resamples. Returns [S], or [1] without weights.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, axis=None, kind="stable")
    starts = np.flatnonzero(np.diff(scores.ravel()[order], prepend=-np.inf))  # of each run of equal scores
    positive = (np.arange(scores.shape[1]) == target[:, None]).ravel()[order]
    row = order // scores.shape[1]
    result = []
    for weight in weights:
        up = np.add.reduceat(weight[row] * positive, starts)
        down = np.add.reduceat(weight[row] * ~positive, starts)
        result.append((up * (down.cumsum() - down / 2)).sum() / (up.sum() * down.sum()))
    return np.array(result)


@dataclass
class Result:
    """A system's metrics of one split: value, and S bootstrap replicates over rows, of each metric."""

    values: dict[str, float]
    replicates: dict[str, np.ndarray]

    def interval(self, name: str) -> list[float]:
        return [float(v) for v in np.percentile(self.replicates[name], [2.5, 97.5])]

    def minus(self, other: "Result") -> "Result":
        """The paired difference: both drew the same rows in each replicate."""
        shared = [name for name in self.values if name in other.values]
        values = {name: self.values[name] - other.values[name] for name in shared}
        return Result(values, {name: self.replicates[name] - other.replicates[name] for name in shared})


def measure(scores, yes_scores, target: np.ndarray, seed: int = 0, resamples: int = 1000) -> Result:
    """All metrics, with bootstrap replicates that resample rows. The same seed draws the same rows for every system, so
    differences of replicates are paired. scores (ranking), yes_scores (AUC, GAUC): [R, C], yes_scores may be None."""
    rows = len(target)
    weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(float)
    per_row = ranking_metrics(scores, target)
    values, replicates = {}, {}
    if yes_scores is not None:
        per_row["GAUC"] = group_auc(yes_scores, target)
        values["AUC"], replicates["AUC"] = (pooled_auc(yes_scores, target, w) for w in (None, weights))
        values["AUC"] = float(values["AUC"][0])
    for name, value in per_row.items():
        values[name], replicates[name] = float(value.mean()), weights @ value / rows
    return Result({n: values[n] for n in (*METRICS, *LONG) if n in values}, replicates)


def tables(results: dict[str, Result]) -> str:
    """The results as Markdown, and below them a second table of those lists that are long enough for it."""
    long = any(name in result.values for result in results.values() for name in LONG)
    second = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20")
    return "\n\n".join(table(results, columns) for columns in (METRICS, second)[: 1 + long])


def table(results: dict[str, Result], columns: tuple[str, ...]) -> str:
    """Markdown: a row per system, each value over its 95% interval."""
    width = max(map(len, results))
    lines = [f"| {'':{width}} | " + " | ".join(f"{name:^19}" for name in columns) + " |"]
    lines.append(f"|{'-' * (width + 2)}|" + ("-" * 21 + "|") * len(columns))
    for name, result in results.items():
        cells = dict.fromkeys(columns, "-")
        for metric in [name for name in columns if name in result.values]:
            value, (low, high) = result.values[metric], result.interval(metric)
            cells[metric] = f"{value:.3f} [{low:.3f}, {high:.3f}]".replace("-0.000", "0.000").replace("0.", ".")
        lines.append(f"| {name:{width}} | " + " | ".join(f"{cell:^19}" for cell in cells.values()) + " |")
    return "\n".join(lines)
