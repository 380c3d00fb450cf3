"""The report's numbers: what changed in a few sentences, tables with bars, and the slices."""

from collections.abc import Sequence

import numpy as np

from hanorec.ranking import charts
from hanorec.ranking.gallery import System
from hanorec.ranking.markdown import LONG_TABLES, SLICE_TABLE, TABLES, short
from hanorec.ranking.markup import Html, element, joined
from hanorec.ranking.metrics import Result, target_ranks
from hanorec.ranking.results import Results

SHORT_METRICS = ("NDCG@3", "HR@3", "AUC")  # of the sentences
METRICS_NOTE = (
    "AUC and GAUC of the language models: of a separate Yes/No question about each candidate (AUC over all candidates "
    "together, GAUC within each user). HR, NDCG and MRR: of the ranking by title. Other systems have one score for "
    "both, unless their file holds two."
)
CEILING_NOTE = (
    "ceiling: the best possible ranking for one who knows how the data were made; ceiling, titles: for one who sees no "
    "pictures, so a model that sees them can be above it."
)
SEEDS_NOTE = (
    "± is the standard deviation over seeds. Intervals of several seeds are over users and seeds, those of one "
)
SEEDS_NOTE += "seed over users alone: they do not show how much the seed changes."
UNITS = {"length of the history": "items", "popularity of the target": "interactions in training"}


def signed(value: float) -> str:
    """Format a difference with its sign.

    >>> signed(0.0312), signed(-0.5), signed(0)
    ('+.031', '-.500', '.000')
    """
    text = short(value)
    return f"+{text}" if value > 0 and text != ".000" else text


def with_interval(result: Result, metric: str, form=short) -> str:
    low, high = result.interval(metric)
    return f"{form(result.values[metric])} [{form(low)}, {form(high)}]"


def in_short(results: Results, systems: Sequence[System], targets: np.ndarray, recipes: dict[str, str]) -> Html:
    """Say what changed from the reference to each other system, and where the systems stand.

    Args:
        recipes: how each system that is a run was trained, by its name.
    """
    own = {system.name: target_ranks(system.scores, targets) for system in systems}
    lines = []
    begun = {name: [element("b", name), f" ({recipes[name]})" if name in recipes else ""] for name in own}
    if results.differences and results.reference in recipes:
        lines.append([*begun[results.reference], ": the reference."])
    for name, difference in results.differences.items():
        moves = own[results.reference] - own[name]
        up, down, equal = ((np.sign(moves) == sign).sum() for sign in (1, -1, 0))
        seeds = " (in the runs of the first seed)" if results.table[name].sd else ""
        counts = f"of {len(targets)} targets, {up} moved up, {down} moved down and {equal} kept their place{seeds}"
        places_of = f"Places in the ranking{' by title' * (name in recipes)}: {counts}"
        ranked, asked = ([m for m in SHORT_METRICS if m in difference.values and (m == "AUC") == auc] for auc in (0, 1))
        changes = [part for metric in ranked for part in change(difference, metric)]
        changes.append(f"{places_of}; AUC is not computed from these. " if asked else f"{places_of}.")
        changes += [part for metric in asked for part in change(difference, metric)]
        lines.append([*begun[name], " against ", element("b", results.reference), ": ", *changes])
    if not lines:
        for name, place in own.items():
            value = with_interval(results.table[name], "NDCG@3")
            first, three = (place == 1).sum(), (place <= 3).sum()
            counts = f"Of {len(targets)} targets, {first} are in the first place and {three} among the first three."
            lines.append([*begun[name], f": NDCG@3 {value}. {counts}"])
    lines.append([compared_with(results, list(own))])
    if recipes and not any(result.sd for result in results.table.values()):
        lines.append(["Each run has one seed: the intervals are over users, and say nothing of another training."])
    return element("ul", *[element("li", *line) for line in lines])


def compared_with(results: Results, names: Sequence[str]) -> str:
    """Name the ceiling, the best baseline and chance.

    Args:
        names: the systems that are neither.
    """
    values = {name: result.values["NDCG@3"] for name, result in results.table.items() if name not in names}
    baselines = [name for name in values if not name.startswith("ceiling")]
    best = max(baselines, key=values.get)
    texts = [f"the best possible ranking, ceiling, has {short(values['ceiling'])}"] if "ceiling" in values else []
    texts += [f"the best baseline, {best}, {short(values[best])}", f"a random order {short(values['chance'])}"]
    return f"To compare with, in NDCG@3: {', '.join(texts)}."


def change(difference: Result, metric: str) -> list:
    """Give the difference of a metric, and say whether its interval contains 0."""
    low, high = difference.interval(metric)
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return [element("strong", f"{metric} {verdict}"), f" ({with_interval(difference, metric, signed)}). "]


def results_section(results: dict[str, Result], colours: dict[str, str]) -> Html:
    """Return the tables of all systems, and below them what the metrics, the ceilings and the intervals are."""
    seeds = SEEDS_NOTE if any(result.sd for result in results.values()) else None
    notes = [METRICS_NOTE, CEILING_NOTE if "ceiling" in results else None, seeds]
    shown = [element("p", note, class_="note") for note in notes if note]
    return joined([*result_tables(results, colours), *shown])


def result_tables(results: dict[str, Result], colours: dict[str, str], minus: str | None = None) -> list[Html]:
    """Return tables with a row for each system, and each value with its interval as a bar on the column's axis.

    Args:
        colours: the class of each system that has a colour.
        minus: the row that was subtracted, if the results are differences.
    """
    shown = []
    for columns in (*TABLES, *LONG_TABLES):
        metrics = [metric for metric in columns if any(metric in result.values for result in results.values())]
        if not metrics:
            continue
        axes = {}
        for metric in metrics:
            ends = [end for result in results.values() if metric in result.values for end in result.interval(metric)]
            axes[metric] = charts.axis_of(ends, zero=minus is not None)
        head = [element("th", f"minus {minus}" if minus else "")]
        head += [element("th", element("span", metric), charts.axis_labels(axes[metric])) for metric in metrics]
        rows = []
        for name, result in results.items():
            colour = colours.get(name, "other")
            title = element("th", element("span", name, class_=f"key {colour}"), scope="row")
            cells = [
                result_cell(result, metric, axes[metric], colour, signed if minus else short) for metric in metrics
            ]
            rows.append(element("tr", title, *cells))
        table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
        shown.append(element("div", table, class_="scroll"))
    return shown


def result_cell(result: Result, metric: str, axis: charts.Axis, colour: str, form) -> Html:
    """Return a cell: value, standard deviation over seeds, interval, and the bar."""
    if metric not in result.values:
        return element("td", "-", data_metric=metric)
    low, high = result.interval(metric)
    spread = f" ±{short(result.sd[metric])}" if metric in result.sd else ""
    interval = element("span", f"{spread} [{form(low)}, {form(high)}]", class_="note")
    bar = charts.interval_bar(axis, result.values[metric], low, high, colour)
    return element("td", element("span", form(result.values[metric]), interval), bar, data_metric=metric)


def differences(results: Results, colours: dict[str, str]) -> Html | None:
    """Return the paired differences; None if there are none."""
    if not results.differences:
        return None
    note = "Paired by user, and by seed where there are several; computed before rounding. "
    note += "If an interval contains 0, the data do not tell the two apart."
    tables = result_tables(results.differences, colours, results.reference)
    return joined([element("p", note, class_="note"), *tables])


def slices(results: Results, names: Sequence[str]) -> Html | None:
    """Return a chart for each slicing and metric; None without slices."""
    sliced = {name: results.table[name].slices for name in names if results.table[name].slices}
    rows = []
    for metric in reversed(SLICE_TABLE):
        charts_of_metric = slice_charts(sliced, metric)
        if charts_of_metric:
            rows.append(charts.grid(charts_of_metric))
    if not rows:
        return None
    count = sum(len(parts) > 1 for parts in next(iter(sliced.values())).values())
    by = "by one value" if count == 1 else f"by each of {count} values"
    note = f"The examples in parts of about equal size, {by}. Many slices are many comparisons."
    return joined([element("p", note, class_="note"), *rows])


def slice_charts(sliced: dict[str, dict[str, dict[str, Result]]], metric: str) -> list[Html]:
    """Return a chart of a metric for each slicing with more than one slice, all with the same vertical axis.

    Args:
        sliced: results by name of the system, slicing and slice.
    """
    first = next(iter(sliced.values()), {})
    parts = [part for own in sliced.values() for slices in own.values() for part in slices.values()]
    ends = [end for part in parts if metric in part.values for end in part.interval(metric)]
    shown = []
    for slicing, slices in first.items():
        if len(slices) == 1 or not ends:
            continue
        labels = [tuple(label.partition(": ")[::2]) for label in slices]
        series = []
        for name, own in sliced.items():
            found = [(x, part) for x, part in enumerate(own[slicing].values()) if metric in part.values]
            lows, highs = ([part.interval(metric)[end] for _, part in found] for end in (0, 1))
            series.append(charts.Series(name, [x for x, _ in found], [p.values[metric] for _, p in found], lows, highs))
        shown.append(
            charts.points(f"{metric} by {slicing}", UNITS.get(slicing, ""), labels, series, charts.axis_of(ends))
        )
    return shown
