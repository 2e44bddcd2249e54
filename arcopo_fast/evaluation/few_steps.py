"""The ability of few steps: how videos of a sampler that stops after 1, 2 or all of its steps have changed. See `evaluation.sharpness`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from arcopo_fast.storage.metrics import TOTAL, number

FEW_STEPS = "few_steps"
"""Name of the table in evaluation.json."""
ACUTANCE, LAPLACIAN, FINE, SPREAD = "acutance", "laplacian", "fine_detail", "latent_std"
MEASURES = (ACUTANCE, LAPLACIAN, FINE, SPREAD)
"""Positive measures, of which logarithms are compared."""
BLURRED, RESIZED = -0.08, 0.3
"""Changes of log acutance (a blur of 0.8 pixels), and of log latent std in either direction, that are told."""


class StepChange(NamedTuple):
    """The change of videos made with so many steps.

    Attributes:
        steps: their number.
        reward: mean before and after.
        logs: by the name of a measure, the mean change of its logarithm over videos, and its standard error.
    """

    steps: int
    reward: tuple[float, float]
    logs: dict[str, tuple[float, float]]


def step_changes(evaluation: Mapping[str, Any]) -> list[StepChange]:
    """Return what an evaluation.json says of few steps, the fewest first; nothing if it was not measured."""
    found = []
    for count, sides in sorted(evaluation.get(FEW_STEPS, {}).items(), key=lambda item: int(item[0])):
        before, after = sides["before"], sides["after"]
        both = [name for name in MEASURES if name in before and name in after]
        logs = {name: _log_change(before[name].get("values", ()), after[name].get("values", ())) for name in both}
        reward = number(before.get(TOTAL, {}).get("mean")), number(after.get(TOTAL, {}).get("mean"))
        found.append(StepChange(int(count), reward, logs))
    return found


def _log_change(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float, float]:
    """Return mean and standard error of log(after / before) over the videos that have both, positive; NaN where too few have."""
    logs = [math.log(late / early) for early, late in zip(before, after) if early and late and early > 0 and late > 0]
    if not logs:
        return math.nan, math.nan
    return statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan


def alarms(found: Sequence[StepChange]) -> list[str]:
    """Return sentences on what of the few steps' ability was lost."""
    sentences = []
    for change in found:
        made = f"videos made with {change.steps} step{'s' * (change.steps > 1)}"
        blur, size = (change.logs.get(name, (math.nan, math.nan))[0] for name in (ACUTANCE, SPREAD))
        if blur < BLURRED:
            sentences.append(f"{made} are blurred: their acutance fell by {100 * (1 - math.exp(blur)):.0f} %")
        if abs(size) > RESIZED:
            direction = "grew" if size > 0 else "shrank"
            sentences.append(f"the latents of {made} {direction}: their standard deviation is {math.exp(size):.2f} times what it was")
    if len(found) > 1:
        first, last = found[0], found[-1]
        if last.reward[1] < first.reward[1] and not last.reward[0] < first.reward[0]:
            sentences.append(
                f"all {last.steps} steps now earn less than {first.steps} ({last.reward[1]:.3f} against {first.reward[1]:.3f}), "
                "which was not so before"
            )
    return sentences
