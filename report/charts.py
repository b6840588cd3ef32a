"""Charts as places of lines, ticks and marks, which templates draw as SVG: in milliseconds, not in seconds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from report.plots import COLOURS
from run.logs import Row

MOST_POINTS = 500
"""Points of a curve; one with more is thinned."""

Point = tuple[float, float]
"""An epoch and a value, or a place in percent of a chart, from the left and from the top."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart. look: its CSS classes. path, end: all its points and the last, on 1000 x 1000 units."""

    name: str
    look: str
    path: str
    end: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A chart; places are in percent. marks: where new labels were mined, from the left. best: the best epoch."""

    title: str
    note: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float]
    best: Point | None

    @property
    def alt(self) -> str:
        """The chart in words."""
        return f"{self.title} over the epochs. Last: " + ", ".join(
            f"{curve.name} {curve.last}" for curve in self.curves
        )


def finite(value: object) -> float | None:
    """Return a number, or None for what was left out: None, NaN, or infinite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def points_of(rows: Sequence[Row], name: str, at: str = "Epochs") -> list[Point]:
    """Return (epoch, value) of a column of a log, without what was left out."""
    values = [(row[at], finite(row.get(name))) for row in rows]
    return [(epoch, value) for epoch, value in values if value is not None]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return about `most` of some points in order: the lowest and the highest of each stretch, and the last."""
    if len(points) <= most:
        return list(points)
    length, kept = math.ceil(2 * len(points) / most), set(points[-1:])
    for start in range(0, len(points), length):
        by_value = sorted(points[start : start + length], key=lambda point: point[1])
        kept |= {by_value[0], by_value[-1]}
    return sorted(kept)


def nice_step(span: float, n_parts: int) -> float:
    """Return 1, 2, 5 or 10 times a power of ten: the first that divides a span into at most n_parts parts."""
    power = 10.0 ** math.floor(math.log10(span / n_parts))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * n_parts >= span * (1 - 1e-9))


def nice_ticks(low: float, high: float) -> list[float]:
    """Return some five round values from at most `low` to at least `high`."""
    if high - low <= 1e-9 * abs(high):  # all values alike
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    step = nice_step(high - low, 5)
    return [i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def look_of(index: int) -> str:
    """Return the CSS classes of the index-th line of a chart."""
    return f"c{index % len(COLOURS)}" + (" dashed" if index % len(COLOURS) >= len(COLOURS) // 2 else "")


def chart(
    title: str,
    lines: Mapping[str, tuple[str, Sequence[Point]]],
    *,
    note: str = "",
    marks: Iterable[float] = (),
    best: Point | None = None,
    bounds: Point | None = None,
) -> Chart | None:
    """Return a chart of some lines, {name: (CSS classes, points)}; None where there is no point.

    marks: epochs before which new labels were mined. best: a point to mark. bounds: lowest and highest
    value, by default those of the points.
    """
    every = [point for _, points in lines.values() for point in points]
    if not every:
        return None
    epochs, values = zip(*every)
    first, last = min(epochs) - 0.5, max(epochs) + 0.5
    ticks = nice_ticks(*bounds or (min(values), max(values)))

    def place(epoch: float, value: float = 0.0) -> Point:
        """Return a point's place in percent."""
        height = (ticks[-1] - value) / (ticks[-1] - ticks[0])
        return round(100 * (epoch - first) / (last - first), 2), round(100 * height, 2)

    curves = []
    for name, (look, points) in lines.items():
        if points:
            places = [place(*point) for point in thinned(points, MOST_POINTS)]
            units = [f"{10 * x:.5g} {10 * y:.5g}" for x, y in places]
            curves.append(Curve(name, look, "L".join(units), units[-1], f"{points[-1][1]:.4g}"))
    step = max(1, int(nice_step(last - first, 8)))
    x_ticks = range(math.ceil(first / step) * step, math.ceil(last), step)
    return Chart(
        title,
        note,
        curves,
        x_ticks=[(place(epoch)[0], str(epoch)) for epoch in x_ticks],
        y_ticks=[(place(first, value)[1], f"{value:.6g}") for value in ticks],
        marks=[place(epoch - 0.5)[0] for epoch in marks if first <= epoch - 0.5 <= last],
        best=best and place(*best),
    )
