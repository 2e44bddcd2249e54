"""Charts as SVG text, for a page that needs nothing else; their colors are the page's (`reports.html`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
COLORS = 8  # of series, in the page's style: s0, s1, ... for lines, f0, f1, ... for what is filled


@dataclass(frozen=True)
class Spread:
    """The spread behind a line that is a mean. band: (x, low, high), shaded; lines: what it is the mean of, drawn thin."""

    band: Sequence[tuple[float, float, float]]
    lines: Sequence[Points]


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart with what is drawn to both sides of it, and the number of its series. label: a tooltip."""

    x: float
    y: float
    x_error: float
    y_error: float
    series: int
    label: str


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    smooth: bool = False,
    spreads: Mapping[str, Spread] | None = None,
    legend: bool = True,
    x_label: str = "iteration",
    width: int = 360,
    height: int = 190,
) -> str:
    """An SVG of lines, over iterations if `x_label` says nothing else; its colors are the page's.

    Args:
        series: label -> (x, y) points with finite numbers; one without points keeps its color free. A single series needs no label.
        smooth: draw a moving mean over a tenth of the points; with a single series the points themselves stay visible behind it.
        spreads: label -> what lies behind the line of that label.
        legend: name the series, if there are several.
    """
    spreads = spreads or {}
    legend = legend and len(series) > 1
    curves = {label: moving_mean(points) if smooth else list(points) for label, points in series.items()}
    shown = [point for points in [*curves.values(), *(series.values() if len(series) == 1 else [])] for point in points]
    shown += [point for spread in spreads.values() for points in spread.lines for point in points]
    shown += [(x, bound) for spread in spreads.values() for x, *bounds in spread.band for bound in bounds]
    plane = _Plane([x for x, _ in shown], [y for _, y in shown], width, height, top=8 + 16 * legend, bottom=24)

    drawn = plane.rows()
    for step, anchor in ((plane.first, "start"), (plane.last, "end")):
        x, _ = plane.place(step, plane.low)
        text = f"{x_label} {step:g}" if anchor == "start" else f"{step:g}"
        drawn.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{escape(text)}</text>')
    if smooth and len(series) == 1:
        drawn += [plane.path(points, "raw") for points in series.values()]
    for index, label in enumerate(series):
        if label in spreads:
            band = spreads[label].band
            outline = [*((x, low) for x, low, _ in band), *((x, high) for x, _, high in reversed(band))]
            drawn.append(plane.path(outline, f"band f{index % COLORS}", tag="polygon"))
            drawn += [plane.path(points, f"thin s{index % COLORS}") for points in spreads[label].lines]
    drawn += [plane.path(points, f"line s{index % COLORS}") for index, points in enumerate(curves.values())]
    if legend:
        start = plane.left
        for index, label in enumerate(series):
            drawn.append(f'<line class="line s{index % COLORS}" x1="{start:.0f}" x2="{start + 14:.0f}" y1="9" y2="9"/>')
            drawn.append(f'<text x="{start + 19:.0f}" y="13">{escape(label)}</text>')
            start += 36 + 6.6 * len(label)
    return _svg(drawn, title, width, height)


def scatter_chart(marks: Sequence[Mark], *, title: str, x_label: str, width: int = 360, height: int = 230) -> str:
    """An SVG of points with their errors about the two lines of no change; where x rises and y falls it is shaded.

    Args:
        marks: finite numbers.
    """
    xs = [0.0, *(mark.x + sign * mark.x_error for mark in marks for sign in (-1, 1))]
    ys = [0.0, *(mark.y + sign * mark.y_error for mark in marks for sign in (-1, 1))]
    plane = _Plane(xs, ys, width, height, top=8, bottom=38, whole_x=True)
    (left, top), (right, bottom), (zero_x, zero_y) = (
        plane.place(plane.first, plane.high),
        plane.place(plane.last, plane.low),
        plane.place(0, 0),
    )
    shaded = f'x="{zero_x:.1f}" y="{zero_y:.1f}" width="{right - zero_x:.1f}" height="{bottom - zero_y:.1f}"'
    drawn = [f'<rect class="parted" {shaded}/>', *plane.rows()]
    for tick in plane.x_ticks:
        x, _ = plane.place(tick, 0)
        drawn.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">{short(tick)}</text>')
    drawn.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    drawn.append(f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{zero_y:.1f}" y2="{zero_y:.1f}"/>')
    drawn.append(f'<line class="axis" x1="{zero_x:.1f}" x2="{zero_x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    for mark in marks:
        color = mark.series % COLORS
        x, y = plane.place(mark.x, mark.y)
        for x_error, y_error in ((mark.x_error, 0.0), (0.0, mark.y_error)):
            ends = [(mark.x - x_error, mark.y - y_error), (mark.x + x_error, mark.y + y_error)]
            drawn.append(plane.path(ends, f"error s{color}"))
        drawn.append(f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(mark.label)}</title></circle>')
    return _svg(drawn, title, width, height)


def _svg(drawn: Sequence[str], title: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


class _Plane:
    """The places of values in a drawing: from `first` to `last` across, from `low` to `high` upwards. whole_x: widen x to round numbers."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], width: int, height: int, *, top: int, bottom: int, whole_x: bool = False
    ) -> None:
        self.left, self.right, self.top, self.bottom = 52.0, width - 10.0, float(top), float(height - bottom)
        self.x_ticks, self.ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
        self.first, self.last = min(xs), max(xs)
        if whole_x:
            self.first, self.last = min(self.x_ticks[0], self.first), max(self.x_ticks[-1], self.last)
        self.low, self.high = min(self.ticks[0], *ys), max(self.ticks[-1], *ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + (x - self.first) / ((self.last - self.first) or 1) * (self.right - self.left),
            self.bottom - (y - self.low) / ((self.high - self.low) or 1) * (self.bottom - self.top),
        )

    def path(self, points: Points, style: str, *, tag: str = "polyline") -> str:
        """Nothing for no points."""
        corners = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        return f'<{tag} class="{style}" points="{corners}"/>' if corners else ""

    def rows(self) -> list[str]:
        """Horizontal lines at round numbers, with these to their left."""
        drawn = []
        for tick in self.ticks:
            x, y = self.place(self.first, tick)
            drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
        return drawn


def moving_mean(points: Points) -> list[tuple[float, float]]:
    """The mean over a window of a tenth of the points around each one."""
    reach = max(1, len(points) // 20)
    means = []
    for index, (x, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        means.append((x, sum(y for _, y in window) / len(window)))
    return means


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span [low, high]."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(index * step, 12) for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def short(value: float) -> str:
    """At most six characters, where that is possible."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")
