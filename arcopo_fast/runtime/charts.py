"""Charts as SVG text, for a page that needs nothing else; their colours are the page's (`runtime.page`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, title: str, smooth: bool = False, width: int = 360, height: int = 190) -> str:
    """An SVG of lines over iterations; its colours are the page's.

    Args:
        series: label -> (x, y) points with finite numbers. A single series needs no label.
        smooth: draw a moving mean over a tenth of the points; with a single series the points themselves stay visible behind it.
    """
    left, right, top, bottom = 46, 10, 8 + 16 * (len(series) > 1), 24
    curves = {label: _moving_mean(points) if smooth else list(points) for label, points in series.items()}
    shown = [point for points in [*curves.values(), *(series.values() if len(series) == 1 else [])] for point in points]
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    first, last = min(xs), max(xs)
    ticks = _ticks(min(ys), max(ys))
    low, high = min(ticks[0], *ys), max(ticks[-1], *ys)

    def place(point: tuple[float, float]) -> str:
        x = left + (point[0] - first) / ((last - first) or 1) * (width - left - right)
        y = height - bottom - (point[1] - low) / ((high - low) or 1) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    def path(points: Points, style: str) -> str:
        return f'<polyline class="{style}" points="{" ".join(map(place, points))}"/>'

    drawn = []
    for tick in ticks:
        x, y = place((first, tick)).split(",")
        drawn.append(f'<line class="grid" x1="{x}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        x = place((step, low)).split(",")[0]
        drawn.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{"iteration " if anchor == "start" else ""}{step:g}</text>')
    if smooth and len(series) == 1:
        drawn += [path(points, "raw") for points in series.values()]
    drawn += [path(points, f"line s{index % 5}") for index, points in enumerate(curves.values())]
    if len(series) > 1:
        start = float(left)
        for index, label in enumerate(series):
            drawn.append(f'<line class="line s{index % 5}" x1="{start:.0f}" x2="{start + 14:.0f}" y1="9" y2="9"/>')
            drawn.append(f'<text x="{start + 19:.0f}" y="13">{escape(label)}</text>')
            start += 36 + 6.6 * len(label)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


def _moving_mean(points: Points) -> list[tuple[float, float]]:
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
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")
