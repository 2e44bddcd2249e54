"""Sharpness after few steps, before and after training: a table, and a warning where it was lost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from arcopo_fast.evaluation.few_steps import ACUTANCE, FINE, LAPLACIAN, SPREAD, alarms, step_changes
from arcopo_fast.reports.html import section, table, warning
from arcopo_fast.reports.table import plain, plus_minus, signed

_COLUMNS = {ACUTANCE: "log acutance", LAPLACIAN: "log Laplacian", FINE: "log fine detail", SPREAD: "log latent std"}
_NOTE = (
    "The sampler stops after so many steps, and its last prediction is the video: one of each prompt. Logarithms of after over before, "
    "± one standard error over videos. The acutance is the robust measure of sharpness: −0.03 is a blur of half a pixel. Contrast and "
    "grain hardly move it; the two beside it they raise."
)
_ADVICE = (
    "A generator of few steps that is sharp only after many has lost what it was distilled for. Look at the videos; lower "
    "<code>optimizer.lr</code>, or stop earlier."
)


def few_steps_warning(evaluation: Mapping[str, Any]) -> str:
    """HTML: a warning of what was lost; empty where nothing was, or nothing was measured."""
    items = "".join(f"<li>{escape(sentence[0].upper() + sentence[1:])}.</li>" for sentence in alarms(step_changes(evaluation)))
    return warning("Few steps do less than before", f"<ul>{items}</ul><p>{_ADVICE}</p>") if items else ""


def few_steps_section(evaluation: Mapping[str, Any]) -> str:
    """HTML: a row for each number of steps; empty where nothing was measured."""
    rows = []
    for change in step_changes(evaluation):
        logs = [change.logs.get(name) for name in _COLUMNS]
        cells = "".join(f"<td>{signed(log[0])}<small>{plus_minus(log[1])}</small></td>" if log else "<td></td>" for log in logs)
        reward = " → ".join(map(plain, change.reward))
        rows.append(f'<tr><th scope="row">{change.steps} step{"s" * (change.steps > 1)}</th><td>{reward}</td>{cells}</tr>')
    return section("Few steps", table(["", "reward", *_COLUMNS.values()], rows, style="series"), _NOTE) if rows else ""
