"""AR-CoPO: pull the policy's prediction of the pivot chunk towards well-scored candidates (arXiv 2603.17461).

Members differ in the pivot's initial noise. Each anchor's prediction is compared with all candidates of its group: the surrogate policy is
a softmax over their distances, and its clipped ratio is maximized (`arcopo_kernels.surrogate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from arcopo_fast.config.sections import PositiveFloat
from arcopo_fast.objectives.ratio import Ratio, RatioObjective, RatioSettings
from arcopo_fast.rollout.sampler import StepRule, Steps

if TYPE_CHECKING:
    from arcopo_fast.rollout.group import Group, Samples

EULER = StepRule("ode")


class CopoSettings(RatioSettings):
    """Settings of AR-CoPO: the surrogate and its open choices."""

    distance: Literal["consistency", "flow_matching"] = Field(
        "consistency", description="distance d_i; consistency: between predictions; flow_matching: between states one step later"
    )
    distance_reduction: Literal["mean", "sum"] = Field(
        "mean", description="how the distance combines its elements; it sets the scale of tau and clip"
    )
    tau: PositiveFloat | Literal["auto"] = Field(
        1.0, description="temperature of softmax(-d / tau); auto: the group's median pairwise distance"
    )


def one_step(clean: Tensor, inputs: Tensor, steps: Steps, step: Tensor) -> Tensor:
    """Return the state after one first-order solver step from `inputs`, given the prediction `clean`; `step` [N] indexes dimension 0."""
    return EULER.transitions(steps, step.to(clean.device), dim=clean.dim()).mean(inputs, clean)


class Target(NamedTuple):
    """The data that AR-CoPO compares a group's samples with, computed once for all updates.

    Attributes:
        candidates: [T, G, ...], in the space where distances are taken.
        advantages: [G] float64.
        tau: temperature of the softmax over distances.
    """

    candidates: Tensor
    advantages: Tensor
    tau: float


class CopoObjective(RatioObjective[CopoSettings]):
    """AR-CoPO: the ratio of the surrogate policy, a softmax over the distances to all candidates of the group."""

    Settings = CopoSettings
    method = "AR-CoPO (arXiv 2603.17461)"

    def target(self, group: Group, advantages: Tensor) -> Target:
        """Return candidates in the space where distances are taken, and tau (``auto``: the median pairwise distance of the group)."""
        candidates = group.predictions
        if self.settings.distance == "flow_matching":
            candidates = one_step(candidates, group.inputs, group.steps, torch.arange(len(group.steps)))
        tau = self.settings.tau
        if tau == "auto":
            flat = candidates[0].flatten(1).double()
            first, second = torch.triu_indices(len(flat), len(flat), offset=1).unbind()
            squared = (flat[first] - flat[second]).square()
            distances = squared.mean(1) if self.settings.distance_reduction == "mean" else squared.sum(1)
            # Where most candidates are alike, the mean; where all are, every tau gives the same.
            tau = distances.median().item() or distances.mean().item() or 1.0
        return Target(candidates, advantages.to(candidates.device), tau)

    def ratio(self, group: Group, target: Target, samples: Samples, new: Tensor, old: Tensor) -> Ratio:
        from arcopo_kernels.surrogate import copo_surrogate  # here: reading a recipe imports this file, and needs no kernel

        assert samples.steps is not None
        if self.settings.distance == "flow_matching":
            new, old = (one_step(clean, samples.x, group.steps, samples.steps) for clean in (new, old))
        loss, ratio_minus_one, live = copo_surrogate(
            new,
            old,
            target.candidates,
            target.advantages,
            samples.steps.to(new.device),
            tau=target.tau,
            clip=self.settings.clip,
            reduction=self.settings.distance_reduction,
        )
        return Ratio(loss, ratio_minus_one, live[:, target.advantages != 0])


OBJECTIVE = CopoObjective
