"""The input and the findings of `doctor --self-test`, shared by the checks of the method and the forecast of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from arcopo_fast.evaluation.judging import Judging
from arcopo_fast.evaluation.windows import View
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
        view: what rewards see of the videos.
        frames: its frames of the first members [n, F, 3, H, W], decoded from their shared context.
        frames_alone: the same members' frames, each decoded alone.
        advantages: [G] float64.
    """

    trainer: Trainer
    judged: JudgedGroup
    view: View
    frames: Tensor
    frames_alone: Tensor
    advantages: Tensor

    def judge(self, name: str, frames: Tensor, prompts: list[str]) -> Tensor:
        """Return the scores [n] float64 of one name of some videos, decoded as `frames` are, on the CPU."""
        trainer = self.trainer
        return self.view.judge(trainer.rewards, frames, prompts, trainer.generator.decoder.factor, names=[name])[name].double().cpu()

    def at_work(self, name: str) -> AbstractContextManager[None]:
        """Keep the judge of a score at work inside the block."""
        reward = next(window.rewards[name] for window in self.view.windows if name in window.rewards)
        return Judging.of(self.trainer.config, self.trainer.generator).at_work(self.trainer.rewards[reward])

    def spread(self, name: str) -> float:
        """Return the standard deviation of a score in the group; NaN if no score is finite."""
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
