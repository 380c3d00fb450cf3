"""Format results as Markdown tables."""

from collections.abc import Sequence

from hanorec.ranking.metrics import Result

TABLES = (("AUC", "HR@1", "HR@3", "NDCG@3"), ("GAUC", "HR@5", "NDCG@5", "MRR"))
LONG_TABLES = (("Recall@5", "Recall@10", "Recall@20"), ("NDCG@10", "NDCG@20"))  # for long lists
SLICE_TABLE = ("AUC", "HR@3", "NDCG@3")


def tables(results: dict[str, Result], corner: str = "", slices: bool = True) -> str:
    """Return Markdown tables of the results: a row for each system, and in each cell a value with its 95% interval.

    There are two tables. Lists with more than 20 candidates have two more, and results with slices one for each
    slicing.

    Args:
        corner: the text above the names of the systems.
        slices: whether to show the slices too.
    """
    is_long = any(name in result.values for result in results.values() for name in LONG_TABLES[0])
    texts = []
    for columns in TABLES + (LONG_TABLES if is_long else ()):
        rows = [[name, *(cell(result, metric) for metric in columns)] for name, result in results.items()]
        texts.append(markdown([[corner, *columns], *rows]))
    return "\n\n".join(texts + (slice_tables(results, corner) if slices else []))


def slice_tables(results: dict[str, Result], corner: str) -> list[str]:
    """Return a Markdown table for each slicing, with a row for each system and slice."""
    sliced = {name: result.slices for name, result in results.items() if result.slices}
    texts = []
    for slicing in next(iter(sliced.values()), {}):
        rows = [[corner, slicing, "examples", *SLICE_TABLE]]
        for name, slices in sliced.items():
            for label, part in slices[slicing].items():
                rows.append([name, label, str(part.examples), *(cell(part, metric) for metric in SLICE_TABLE)])
        texts.append(markdown(rows))
    return texts


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as a Markdown table. The first row is the header. A `|` in a text is escaped."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{first:{widths[0]}}", *(f"{text:^{width}}" for text, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cell(result: Result, metric: str) -> str:
    """Return a value and its interval, such as `.659 [.623, .693]`; `-` if the result lacks the metric.

    The result of several seeds has their standard deviation too: `.659 ±.009 [.623, .693]`.
    """
    if metric not in result.values:
        return "-"
    low, high = result.interval(metric)
    spread = f" ±{short(result.sd[metric])}" if metric in result.sd else ""
    return f"{short(result.values[metric])}{spread} [{short(low)}, {short(high)}]"


def short(value: float) -> str:
    """Format a number with three decimals, without a zero before the point.

    >>> short(0.6591), short(-0.0001), short(10.5)
    ('.659', '.000', '10.500')
    """
    text = f"{value:.3f}".replace("-0.000", "0.000")
    return text.replace("0.", ".") if abs(value) < 1 else text
