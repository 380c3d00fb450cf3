"""Draw small charts as inline SVG: intervals in a table, curves over steps, and points with intervals in slices.

Colours and fonts are those of the page's style sheet: the class `c0` to `c7` gives a system its colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hanorec.ranking.markup import Html, element, joined

COLOURS = 8
BAR_WIDTH, BAR_HEIGHT = 160, 16  # pixels of the chart in a table cell
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 150, 46, 10, 8, 24  # pixels of a chart, and its margins
POINTS = 150  # of a curve


@dataclass
class Axis:
    """An axis from the first to the last of its ticks."""

    ticks: list[float]

    def part(self, value: float) -> float:
        """Return where a value lies: 0 at the first tick, 1 at the last one."""
        low, high = self.ticks[0], self.ticks[-1]
        return (value - low) / (high - low)


def axis_of(values: Sequence[float], parts: int = 4, zero: bool = False) -> Axis:
    """Return an axis over all values, with ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        parts: the maximum number of steps between the lowest and the highest value.
        zero: include 0.

    >>> axis_of([0.213, 0.69]).ticks, axis_of([3, 3]).ticks
    ([0.2, 0.4, 0.6, 0.8], [2.6, 2.8, 3.0, 3.2, 3.4])
    """
    low, high = min([*values, *[0] * zero]), max([*values, *[0] * zero])
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = abs(low) / 8 or 0.5
        low, high = low - room, high + room
    power = 10 ** math.floor(math.log10((high - low) / parts))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * parts >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return Axis([round(number * step, decimals) for number in range(first, last + 1)])


def number(value: float) -> str:
    """Format a number for an axis or a tooltip.

    >>> number(0.20), number(-0.0015), number(1500), number(0.00001)
    ('.2', '-.0015', '1500', '1e-05')
    """
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if 0 < abs(value) < 1 and "e" not in text else text


def numbers(ticks: Sequence[float]) -> list[str]:
    """Format the numbers of an axis, with as many digits as tell them apart.

    >>> numbers([0.995, 1, 1.005]), numbers([0, 0.5])
    (['.995', '1', '1.005'], ['0', '.5'])
    """
    texts = [number(tick) for tick in ticks]
    return texts if len({*texts}) == len(ticks) else [f"{tick:.6g}".replace("0.", ".", 1) for tick in ticks]


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def label(x: float, y: float, text, anchor: str = "middle") -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def drawing(width: int, height: int, title: str | None, *parts: Html) -> Html:
    """Return an SVG. title: a text for those who do not see it; None: it only repeats a text beside it."""
    role = {"role": "img", "aria_label": title} if title else {"aria_hidden": "true"}
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, **role)


# ---------------------------------------------------------------------------------------------------------------------
# In a table


def bar_x(axis: Axis, value: float) -> float:
    return 12 + axis.part(value) * (BAR_WIDTH - 24)


def interval_bar(axis: Axis, value: float, low: float, high: float, class_: str) -> Html:
    """Return a value as a dot on its interval, on an axis that all cells of the column share."""
    middle = BAR_HEIGHT / 2
    grid = [
        line(bar_x(axis, tick), 0, bar_x(axis, tick), BAR_HEIGHT, "zero" if tick == 0 else "grid")
        for tick in axis.ticks
    ]
    interval = line(bar_x(axis, low), middle, bar_x(axis, high), middle, f"interval {class_}")
    dot = element("circle", cx=f"{bar_x(axis, value):.1f}", cy=middle, r=3.5, class_=f"dot {class_}")
    return drawing(BAR_WIDTH, BAR_HEIGHT, None, *grid, interval, dot)


def axis_labels(axis: Axis) -> Html:
    """Return the numbers of an axis, for the head of a column. Where there are many, every second is left out."""
    ticks = axis.ticks[:: 1 + (len(axis.ticks) > 4)]
    texts = zip(ticks, numbers(ticks), strict=True)
    return drawing(BAR_WIDTH, 12, None, *[label(bar_x(axis, tick), 10, text) for tick, text in texts])


# ---------------------------------------------------------------------------------------------------------------------
# Curves and slices


@dataclass
class Series:
    """Points of one colour.

    Args:
        name: for the legend.
        x, y: the points. A y of None is left out.
        low, high: the ends of a band or an interval at each point; empty: none.
    """

    name: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)

    def thinned(self) -> "Series":
        """Return a series of at most POINTS points: each is the mean of neighbours that have all their numbers."""
        columns = [self.x, self.y, *([self.low, self.high] if self.low else [])]
        points = [point for point in zip(*columns, strict=True) if None not in point]
        size = max(1, math.ceil(len(points) / POINTS))
        thin = [[] for _ in columns]
        for first in range(0, len(points), size):
            part = points[first : first + size]
            for column, values in zip(thin, zip(*part, strict=True), strict=True):
                column.append(sum(values) / len(part))
        return Series(self.name, *thin)


def scaled_x(axis_low: float, axis_high: float, value: float) -> float:
    return LEFT + (value - axis_low) / (axis_high - axis_low or 1) * (WIDTH - LEFT - RIGHT)


def scaled_y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.part(value) * (HEIGHT - TOP - BOTTOM)


def frame(axis: Axis) -> list[Html]:
    """Return the horizontal lines of a chart, with their numbers."""
    parts = []
    for tick, text in zip(axis.ticks, numbers(axis.ticks), strict=True):
        y = scaled_y(axis, tick)
        parts += [line(LEFT, y, WIDTH - RIGHT, y, "grid"), label(LEFT - 5, y + 4, text, "end")]
    return parts


def figure(title: str, note: str, chart: Html, names: Sequence[str]) -> Html:
    """Return a chart with its title, a note and, if there are several series, a legend."""
    keys = [element("span", name, class_=f"key c{index % COLOURS}") for index, name in enumerate(names)]
    legend = element("span", *keys, class_="legend") if len(names) > 1 else None
    caption = element("figcaption", element("b", title), element("span", note, class_="note"), legend)
    return element("figure", caption, chart, class_="chart")


def curves(title: str, note: str, series: Sequence[Series], warm_up: int | None = None) -> Html | None:
    """Return curves over optimizer steps; None if there is no point.

    Args:
        warm_up: the step at which the warm-up ends; None: there is no warm-up.
    """
    series = [one for one in map(Series.thinned, series) if one.x]
    if not series:
        return None
    values = [value for one in series for value in (*one.y, *one.low, *one.high)]
    axis, last = axis_of(values, parts=3), max(one.x[-1] for one in series)
    parts = frame(axis)
    if warm_up:
        x = scaled_x(0, last, warm_up)
        shift, anchor = (4, "start") if x < WIDTH / 2 else (-4, "end")
        parts += [line(x, TOP, x, HEIGHT - BOTTOM, "mark"), label(x + shift, TOP + 10, "end of the warm-up", anchor)]
    for index, one in enumerate(series):
        parts += curve(one, axis, last, f"c{index % COLOURS}")
    parts += [label(scaled_x(0, last, x), HEIGHT - 8, number(x), "middle" if x == 0 else "end") for x in (0, last)]
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step"))
    return figure(title, note, drawing(WIDTH, HEIGHT, f"{title} over steps", *parts), [one.name for one in series])


def curve(series: Series, axis: Axis, last: float, class_: str) -> list[Html]:
    """Return one series: its band, its line and, if it has fewer than 12 points, a dot for each."""

    def path(values: Sequence[float], xs: Sequence[float]) -> str:
        return "L".join(f"{scaled_x(0, last, x):.1f} {scaled_y(axis, y):.1f}" for x, y in zip(xs, values, strict=True))

    parts = []
    if series.low:
        outline = f"M{path(series.low, series.x)}L{path(series.high[::-1], series.x[::-1])}Z"
        parts.append(element("path", d=outline, class_=f"band {class_}"))
    if len(series.x) < 12:
        for x, y in zip(series.x, series.y, strict=True):
            centre = {"cx": f"{scaled_x(0, last, x):.1f}", "cy": f"{scaled_y(axis, y):.1f}"}
            parts.append(
                element("circle", element("title", f"step {x:.0f}: {y:.4g}"), **centre, r=3, class_=f"dot {class_}")
            )
    return [*parts, element("path", d=f"M{path(series.y, series.x)}", class_=f"curve {class_}")]


def points(title: str, note: str, labels: Sequence[tuple[str, str]], series: Sequence[Series], axis: Axis) -> Html:
    """Return points with intervals, side by side in each slice.

    Args:
        labels: name and range of each slice.
        series: x is the number of the slice.
        axis: the vertical axis, which several charts may share.
    """
    room = (WIDTH - LEFT - RIGHT) / len(labels)
    parts = frame(axis)
    for index, (name, span) in enumerate(labels):
        x = LEFT + (index + 0.5) * room
        parts += [label(x, HEIGHT - 12, name), element("g", label(x, HEIGHT - 1, span), class_="small")]
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * min(14, room / (len(series) + 1))
        for x, y, low, high in zip(one.x, one.y, one.low, one.high, strict=True):
            centre, class_ = LEFT + (x + 0.5) * room + shift, f"c{index % COLOURS}"
            parts.append(line(centre, scaled_y(axis, low), centre, scaled_y(axis, high), f"interval {class_}"))
            tip = element("title", f"{one.name}, {labels[int(x)][0]}: {number(y)} [{number(low)}, {number(high)}]")
            parts.append(
                element("circle", tip, cx=f"{centre:.1f}", cy=f"{scaled_y(axis, y):.1f}", r=3.5, class_=f"dot {class_}")
            )
    return figure(title, note, drawing(WIDTH, HEIGHT, title, *parts), [one.name for one in series])


def grid(charts: Sequence[Html | None]) -> Html:
    """Return charts side by side, as many as the page is wide."""
    return element("div", joined(charts), class_="charts")
