"""Gains without learning beside the policy's gain: a table, and a warning where a fixed filter earns much of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from arcopo_fast.evaluation.baselines import SHARE, Baseline, bought, total_of
from arcopo_fast.evaluation.changes import Change
from arcopo_fast.reports.html import section, table, warning
from arcopo_fast.reports.table import signed

_NOTE = (
    "Changes against the untrained videos, in standard deviations of a video. Fixed filters have learned nothing, nor has the choice of "
    "the best of several untrained videos: a gain is believed where they do not reach it."
)


def filter_warning(policy: Sequence[Change], found: Sequence[Baseline]) -> str:
    """HTML: a warning if a filter earns at least `SHARE` of the policy's gain, and of what kind the held-out metrics find it."""
    total, dearest = total_of(policy), bought(policy, found)
    if total is None or not dearest:
        return ""
    items = [
        f"<li><b>{escape(each.name)}</b> earns {100 * each.gain.change / total.change:.0f} % of what the policy has gained.</li>"
        for each in dearest
        if each.gain is not None
    ]
    advice = (
        "The reward pays for what needs no learning, and the policy may have learned just that. Look at the videos, and at the held-out "
        "metrics of the filter and of the policy below; then take rewards that a filter does not raise."
    )
    return warning(f"A fixed filter earns {100 * SHARE:.0f} % or more of the gain", f"<ul>{''.join(items)}</ul><p>{advice}</p>")


def baseline_section(policy: Sequence[Change], found: Sequence[Baseline]) -> str:
    """HTML: the policy and every baseline, by the change of the reward and of each held-out metric; empty where there is no baseline."""
    if not found:
        return ""
    names = [change.name for change in policy if change.kind == "held out"]
    rows = [_row("the policy", policy, names), *(_row(each.name, each.changes, names) for each in found)]
    return section("Without learning", table(["", "reward", *names], rows, style="series"), _NOTE)


def _row(label: str, found: Sequence[Change], names: Sequence[str]) -> str:
    held_out = {change.name: change for change in found}
    cells = [total_of(found), *(held_out.get(name) for name in names)]
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(map(_cell, cells))}</tr>'


def _cell(change: Change | None) -> str:
    if change is None:
        return "<td></td>"
    return f'<td class="{("", "up", "down")[change.direction]}">{signed(change.in_spreads, 2)}</td>'
