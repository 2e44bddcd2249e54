"""The input and the findings of `doctor --self-test`, shared by the checks of the method and the forecast of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from arcopo_fast.objectives.ratio import RatioObjective
from arcopo_fast.training.groups import JudgedGroup
from arcopo_fast.training.trainer import Trainer


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        subject: what was checked, a noun phrase.
        holds: None for a remark.
        detail: goes on where the subject ends.
        forecast: tells what a run would learn, not whether the method holds.
    """

    subject: str
    holds: bool | None
    detail: str
    forecast: bool = False


@dataclass
class Check:
    """One judged group, on which all checks are made.

    Attributes:
        trainer: of the recipe.
        judged: the group.
        frames: of the first members [n, F, 3, H, W], decoded from their shared context.
        frames_alone: the same members' frames, each decoded alone.
        advantages: [G] float64.
    """

    trainer: Trainer
    judged: JudgedGroup
    frames: Tensor
    frames_alone: Tensor
    advantages: Tensor

    def spread(self, name: str) -> float:
        """Return the standard deviation of a reward in the group; NaN if no score is finite."""
        scores = self.judged.rewards[name]
        return scores[scores.isfinite()].double().std(correction=0).item() if scores.isfinite().any() else float("nan")


class Replayed(NamedTuple):
    """An iteration of two updates, seen from outside: its statistics, and its second update under the weights in between.

    Attributes:
        statistics: what `Objective.update` returned.
        steps: of the N samples of the second update, [N].
        ratio_minus_one, live: [N, K] of the samples, after the first step, against the policy that made the group.
        gain: mean of A (ratio - 1) of the pairs of the first update, after its step.
        moved: share of the adapter's elements with a gradient whose values have changed.
    """

    statistics: dict[str, float]
    steps: Tensor
    ratio_minus_one: Tensor
    live: Tensor
    gain: float
    moved: float


def ratio_objective(check: Check) -> RatioObjective[Any]:
    """Return the objective, which has a ratio."""
    assert isinstance(check.trainer.objective, RatioObjective)
    return check.trainer.objective
