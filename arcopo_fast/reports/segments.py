"""Long videos by segment: how scores run along them, as a page with curves and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from itertools import groupby
from typing import Any

from arcopo_fast.evaluation.compare import Interval
from arcopo_fast.evaluation.drift import (
    CHROMA,
    CLIPPED,
    CONTRAST,
    DRIFT,
    DRIFTING,
    FIGURES,
    FIRST,
    LAST,
    LUMINANCE,
    MEASURES,
    SIMILARITY,
    SLOPE,
    WORST,
    Course,
    Courses,
)
from arcopo_fast.evaluation.few_steps import ACUTANCE
from arcopo_fast.evaluation.looks import MOTION
from arcopo_fast.reports.charts import Spread, line_chart
from arcopo_fast.reports.html import chip, figures, legend, page, section, table
from arcopo_fast.reports.table import brackets, change_digits, interval_change, markdown_table, plain, signed

COLUMNS = {FIRST: "first segment", LAST: "last", DRIFT: "drift", SLOPE: "slope per minute", WORST: "worst segment"}
NOTE = (
    "Drift is the last segment less the first; the slope is that of least squares over segments, per minute of video. The worst segment is "
    "each video's own: the lowest, of clipped the highest, of luminance, chroma and contrast the farthest from the first; in parentheses "
    "stands the one of the worst mean. Every figure is computed video by video, and every difference between videos of the same prompt and "
    "noise. Brackets are 95 % intervals, clustered by prompt, with Student's t; ≈ marks one that contains 0 or has no width: nothing was "
    "shown."
)
_MEASURED = {
    LUMINANCE: "Mean of all colors.",
    CLIPPED: "Share of pixels with a color at the end of what 8 bits show.",
    CHROMA: "Spread of the colors about the luminance, within a frame.",
    CONTRAST: "Spread of the luminance, within a frame.",
    ACUTANCE: "Sharpness of edges. It falls with blur, hardly moves with contrast.",
    MOTION: "Root mean square of the change from frame to frame. It falls where a video freezes.",
    SIMILARITY: "Correlation of the segment's mean picture with that of the first: layout and colors, not what is shown.",
}
_KINDS = {"total": "Weighted sum of the rewards.", "trained": "Trained on.", "held out": "Held out.", DRIFTING: "Measure of drift."}
_CURVE_NOTE = "Means over videos with their 95 % intervals, clustered by prompt."
_DRIFT_NOTE = (
    "Measures beside the rewards, which are never trained on: image quality scores may like what drift does to a picture, such as more "
    "contrast."
)


def segment_tables(found: Courses) -> str:
    """Return Markdown: every score along the videos of each generator, and the differences to the one that all are compared with."""
    head = ["score", "", "generator", "videos", *COLUMNS.values()]
    rows = [
        [course.name, course.kind, course.generator, str(course.videos - course.failed), *_value_cells(course)] for course in found.found
    ]
    parts = [f"By segment, {_lengths(found)}:", markdown_table(head, rows).rstrip()]
    changes = [
        [course.name, course.generator, str(course.pairs), *(interval_change(difference.figures[name]) for name in FIGURES)]
        for course in found.found
        if (difference := course.difference)
    ]
    if changes:
        head = ["difference", "generator", "pairs", *COLUMNS.values()]
        parts += [f"Difference to {found.compared_with}, video by video:", markdown_table(head, changes).rstrip()]
    failed = [f"{course.name} of {course.generator}: {course.failed} of {course.videos}" for course in found.found if course.failed]
    if failed:
        parts.append(f"Videos of which a segment has no score, left out with their pairs: {'; '.join(failed)}.")
    return "\n\n".join([*parts, NOTE]) + "\n"


def _value_cells(course: Course) -> Iterator[str]:
    for name, interval in course.values.figures.items():
        if name in (DRIFT, SLOPE):
            yield interval_change(interval) if math.isfinite(interval.mean) else "–"
        else:
            place = f" ({course.worst + 1})" if name == WORST else ""
            yield f"{plain(interval.mean)} {brackets(interval)}".strip() + place


def _lengths(found: Courses) -> str:
    first, last = found.seconds[0], found.seconds[-1]
    return f"{len(found.seconds)} segments of {last[1] - last[0]:.3g} s, {last[1] - first[0]:.3g} s in all"


# The page --------------------------------------------------------------------------------------------------------------------------


def segment_page(found: Courses, settings: Mapping[str, Any], prompts: int) -> str:
    """Return the page of long videos: curves by segment, their differences, and tables."""
    names = list(dict.fromkeys(course.generator for course in found.found))
    videos = max(course.videos for course in found.found)
    facts = f"{_lengths(found)} · {settings['segments.latent_frames']} latent frames each · {videos} videos of {prompts} prompts"
    scores = [course for course in found.found if course.kind != DRIFTING]
    drifting = [course for course in found.found if course.kind == DRIFTING]
    shown = legend(names) if len(names) > 1 else ""
    compared = [course for course in found.found if course.difference]
    listed = "".join(f"{escape(key)}: {escape(str(value))}\n" for key, value in settings.items())
    parts = [
        f'<header><h1>Long videos by segment</h1>{_headline(found)}<p class="facts">{escape(facts)}</p></header>',
        section("Scores along the video", shown + _curves(scores, names), _CURVE_NOTE),
        section("What drifts", shown + _curves(drifting, names), _DRIFT_NOTE) if drifting else "",
        section(f"Difference to {found.compared_with}", shown + _curves(compared, names, differences=True), _CURVE_NOTE)
        if compared
        else "",
        section("First segment to last", _table(found.found, names), escape(NOTE)),
        section(f"Differences to {found.compared_with}, in numbers", _table(compared, names, differences=True)) if compared else "",
        section("Settings", f"<details><summary>What every score depends on</summary><pre>{listed}</pre></details>"),
    ]
    return page("Long videos by segment - arcopo_fast", parts)


def _headline(found: Courses) -> str:
    """Return a line for each generator: its reward in the first segment and in the last, and whether that is a change."""
    lines = []
    for course in found.found:
        if course.kind == "total":
            ends = " → ".join(plain(course.values.figures[name].mean) for name in (FIRST, LAST))
            change = interval_change(course.values.figures[DRIFT])
            about = f"{course.generator}: reward of the first segment and of the last, {change}"
            lines.append(f'<p class="result"><span class="number">{ends}</span> {escape(about)}</p>')
    return "".join(lines)


def _curves(courses: Sequence[Course], names: Sequence[str], *, differences: bool = False) -> str:
    """Return a chart for each score, with a line and its interval for each generator; those without one keep their colors."""
    charts = []
    for name, of_score in groupby(courses, lambda course: course.name):
        series: dict[str, list[tuple[float, float]]] = {generator: [] for generator in names}
        spreads, kind = {}, ""
        for course in of_score:
            along, kind = (course.difference if differences else course.values), course.kind
            assert along is not None
            known = [(place, interval) for place, interval in enumerate(along.segments, start=1) if math.isfinite(interval.mean)]
            series[course.generator] = [(place, interval.mean) for place, interval in known]
            if all(math.isfinite(interval.low) for _, interval in known):
                spreads[course.generator] = Spread([(place, interval.low, interval.high) for place, interval in known], [])
        if any(series.values()):
            chart = line_chart(series, title=name, spreads=spreads, legend=False, x_label="segment")
            charts.append((name, _KINDS[kind] if differences else _MEASURED.get(name) or _KINDS[kind], chart))
    return figures(charts)


def _table(courses: Sequence[Course], names: Sequence[str], *, differences: bool = False) -> str:
    rows = []
    for name, of_score in groupby(courses, lambda course: course.name):
        members = list(of_score)
        rows.append(f'<tr class="group"><th colspan="6" scope="rowgroup">{escape(name)}, {members[0].kind}</th></tr>')
        for course in members:
            along = course.difference if differences else course.values
            assert along is not None
            cells = [_cell(along.figures[figure], course, changed=differences or figure in (DRIFT, SLOPE)) for figure in FIGURES]
            if not differences:
                cells[-1] = cells[-1].replace("<br>", f" ({course.worst + 1})<br>")
            head = (chip(names.index(course.generator)) if len(names) > 1 else "") + escape(course.generator)
            left_out = f" <small>({course.failed} left out)</small>" if course.failed and not differences else ""
            rows.append(f'<tr><th scope="row">{head}{left_out}</th>{"".join(cells)}</tr>')
    return table(["", *COLUMNS.values()], rows, style="series narrow")


def _cell(interval: Interval, course: Course, *, changed: bool) -> str:
    """Return a cell; a change that is shown has the color of better or worse where there is one, any other the mark of none."""
    if not changed:
        return f"<td>{plain(interval.mean)}<br><small>{brackets(interval)}</small></td>"
    shown = partial(signed, digits=change_digits(interval))
    mark = "" if interval.direction or not math.isfinite(interval.low) else " ≈"
    good = interval.direction * MEASURES.get(course.name, 1)
    return f'<td class="{("", "up", "down")[good]}">{shown(interval.mean)}{mark}<br><small>{brackets(interval, shown)}</small></td>'
