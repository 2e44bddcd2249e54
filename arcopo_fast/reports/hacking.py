"""In-domain against held-out: has a run raised the reward it is trained on at the cost of what it is not trained on?

Before and after are the same prompts and noises, so a change counts once it exceeds two standard errors of its paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from arcopo_fast.evaluation.changes import Change
from arcopo_fast.reports.charts import Mark, scatter_chart
from arcopo_fast.reports.html import figures, warning
from arcopo_fast.reports.results import Run

_ADVICE = (
    "Look at the videos. Then stop earlier, weigh the rewards differently, or merge the adapter with a semi-on-policy one "
    "(<code>python -m arcopo_fast.merge</code>)."
)
_HARM_ADVICE = "The run has done harm without a gain: lower <code>optimizer.lr</code>, or stop earlier."


def verdict(series: Mapping[str, Sequence[Run]]) -> str:
    """HTML: warnings about held-out metrics that fell, or that none did.

    series: the runs of each configuration, by its label; a single one needs no label.
    """
    judged = [(run, change) for runs in series.values() for run in runs for change in run.changes if change.kind in ("total", "held out")]
    if not any(change.kind == "held out" for _, change in judged):
        return "<p>No held-out metric was measured, so nothing here tells whether the reward is being exploited.</p>"
    parted = [line for label, runs in series.items() for line in _lines(label, runs, rising=True)]
    harmed = [line for label, runs in series.items() for line in _lines(label, runs, rising=False)]
    parts = []
    if parted:
        parts.append(warning("The reward is being exploited", f"<ul>{''.join(parted)}</ul><p>{_ADVICE}</p>"))
    if harmed:
        parts.append(warning("Held-out metrics fell, and the reward did not rise", f"<ul>{''.join(harmed)}</ul><p>{_HARM_ADVICE}</p>"))
    if not parts and any(change.kind == "held out" and change.known for _, change in judged):
        parts.append("<p>No held-out metric fell by more than two standard errors.</p>")
    unknown = sorted({change.name for _, change in judged if not change.known})
    if unknown:
        parts.append(f"<p>Not judged, for want of two videos or of finite values: {escape(', '.join(unknown))}.</p>")
    return "".join(parts)


def fallen(run: Run) -> list[Change]:
    """Held-out metrics that fell."""
    return [change for change in run.changes if change.kind == "held out" and change.direction < 0]


def rose(run: Run) -> Change | None:
    """The weighted sum of the rewards, if it rose."""
    return next((change for change in run.changes if change.kind == "total" and change.direction > 0), None)


def _lines(label: str, runs: Sequence[Run], *, rising: bool) -> list[str]:
    """A list item for each held-out metric that fell in runs whose reward rose, or in those whose reward did not."""
    found: dict[str, list[tuple[Run, Change]]] = {}
    for run in runs:
        if (rose(run) is not None) is rising:
            for change in fallen(run):
                found.setdefault(change.name, []).append((run, change))
    lines = []
    for name, hits in found.items():
        text = f"<b>{escape(name)}</b> fell{_by([change for _, change in hits])}"
        if label:
            seeds = ", ".join(str(run.config.seed) for run, _ in hits)
            text += f" in {len(hits)} of {sum(bool(run.changes) for run in runs)} runs of {escape(label)} (seed {seeds})"
        totals = [total for run, _ in hits if (total := rose(run))]
        lines.append(f"<li>{text}{f', while the trained reward rose{_by(totals)}' if rising else ''}.</li>")
    return lines


def _by(found: Sequence[Change]) -> str:
    """Return the size of changes, in standard deviations of a video; nothing where these do not vary."""
    sizes = sorted(abs(change.in_spreads) for change in found)
    if not all(map(math.isfinite, sizes)):
        return ""
    low, high = f"{sizes[0]:.2f}", f"{sizes[-1]:.2f}"
    return f" by {low if low == high else f'{low} to {high}'} standard deviations of a video"


def scatter_charts(series: Mapping[str, Sequence[Run]]) -> str:
    """HTML: for each held-out metric, its change in every run against that of the trained reward."""
    marks: dict[str, list[Mark]] = {}
    for index, (label, runs) in enumerate(series.items()):
        for run in runs:
            total = next((change for change in run.changes if change.kind == "total"), None)
            for change in run.changes:
                if change.kind == "held out" and total and math.isfinite(change.in_spreads) and math.isfinite(total.in_spreads):
                    errors = [2 * each.error / each.spread if math.isfinite(each.error) else 0.0 for each in (total, change)]
                    tip = f"{label}, seed {run.config.seed}: {change.in_spreads:+.2f} against {total.in_spreads:+.2f}"
                    marks.setdefault(change.name, []).append(Mark(total.in_spreads, change.in_spreads, errors[0], errors[1], index, tip))
    return figures(
        (name, "Its change, upwards, against that of the trained reward.", scatter_chart(points, title=name, x_label="trained reward"))
        for name, points in marks.items()
    )
