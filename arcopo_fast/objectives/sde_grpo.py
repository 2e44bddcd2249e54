"""SDE-GRPO: explore through the noise of the denoising steps, and maximize the clipped ratio of their transition probabilities.

The baseline that AR-CoPO is compared with (DanceGRPO 2505.07818, Flow-GRPO 2505.05470, CM-GRPO of RAVEN 2605.15190), on the same groups:
members share the prefix and everything after the pivot chunk, and differ in the noise that each draws at the pivot's steps. As published,
all chunks explore at once and share the advantage of the whole video: `explore: all` with `rollout.pivot: 1`. With
x' the state that a member went to, drawn from N(mu_old, std^2 I),

    log rho = log N(x'; mu, std^2 I) - log N(x'; mu_old, std^2 I), a mean over the D elements
            = <mu - mu_old, 2 x' - mu - mu_old> / (2 std^2 D)
    J       = mean over (member, chunk, step) of min(rho A, clip(rho, 1 - eps, 1 + eps) A)

The difference is taken before the squares, in float64: the clip is 1e-4. Steps without noise have no probability and are left out: the last
one, and all of an ODE. Source: ALGORITHM.md 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from arcopo_fast.config.sections import PositiveFloat
from arcopo_fast.errors import UserError
from arcopo_fast.objectives.ratio import Ratio, RatioObjective, RatioSettings
from arcopo_fast.rollout.noise import NoisePlan
from arcopo_fast.rollout.sampler import StepRule, Steps

if TYPE_CHECKING:
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group, Samples

DEFAULT_NOISE = {"consistency": 0.0, "dance_sde": 0.3, "flow_sde": 0.7, "flow_cps": 0.7}


class SdeGrpoSettings(RatioSettings):
    """Settings of SDE-GRPO: the kernel of the pivot's steps, and whether members also start from noise of their own."""

    kind: str = "sde_grpo"
    kernel: Literal["dance_sde", "flow_sde", "flow_cps", "consistency"] = Field(
        "consistency", description="kernel from step to step in the pivot chunk; consistency: the re-noise of few-step generators (CM-GRPO)"
    )
    kernel_noise: PositiveFloat | None = Field(
        None, description="eta of dance_sde (null: 0.3), a of flow_sde and flow_cps (null: 0.7); consistency has none"
    )
    init_noise: Literal["shared", "fresh"] = Field(
        "shared", description="initial noise of the pivot chunk; shared: one for all members; fresh: one for each member"
    )
    explore: Literal["pivot", "all"] = Field(
        "pivot",
        description="chunks in which members draw noises of their own, and which are trained; pivot: that one; all: also those after it, "
        "as published with rollout.pivot 1",
    )
    steps: Annotated[float, Field(gt=0, le=1)] | Literal["all"] = Field(
        0.6, description="steps with noise that are trained: all, or a random fraction of them"
    )
    advantage_max: PositiveFloat | None = Field(5.0, description="largest |A_i|; null: no limit")

    @model_validator(mode="after")
    def _noise_fits_the_kernel(self) -> SdeGrpoSettings:
        if self.kernel_noise is not None:
            if self.kernel == "consistency":
                raise ValueError(f"objective.kernel_noise {self.kernel_noise} given, but the consistency kernel has none; leave it out")
            if self.kernel == "flow_cps" and self.kernel_noise > 1:
                raise ValueError(f"objective.kernel_noise {self.kernel_noise} is more than 1, where flow_cps draws all its noise afresh")
        return self


class SdeGrpoObjective(RatioObjective[SdeGrpoSettings]):
    """SDE-GRPO: the ratio of the probabilities of the steps of the chunks that explore."""

    Settings = SdeGrpoSettings
    method = "SDE-GRPO"

    def __init__(self, engine: Engine, settings: SdeGrpoSettings, *, reference: bool = False) -> None:
        super().__init__(engine, settings, reference=reference)
        if min(len(engine.steps), len(engine.first_steps)) < 2:
            raise UserError("SDE-GRPO explores through the noise between steps; a sampler of one step has none: use objective.kind=copo")

    def noise_plan(self, strength: float) -> NoisePlan:
        """Return a plan with noise of the members' own at the steps of chunks that explore, and at their start if the settings say so."""
        settings = self.settings
        return NoisePlan(0.0 if settings.init_noise == "shared" else 1.0, self.rule, self.explored_chunks(settings))

    @classmethod
    def explored_chunks(cls, settings: Any) -> int | None:
        return 1 if settings.explore == "pivot" else None

    @property
    def rule(self) -> StepRule:
        """Transition through which each member draws noise of its own."""
        noise = self.settings.kernel_noise
        return StepRule(self.settings.kernel, DEFAULT_NOISE[self.settings.kernel] if noise is None else noise)

    def trainable_steps(self, steps: Steps) -> int:
        """Return the number of steps with noise: all but the last."""
        return len(steps) - 1

    def target(self, group: Group, advantages: Tensor) -> Tensor:
        """Return the advantages [G]."""
        return advantages.to(group.inputs.device)

    def ratio(self, group: Group, target: Any, samples: Samples, new: Tensor, old: Tensor) -> Ratio:
        assert samples.steps is not None
        explored, steps = group.explored[samples.chunk], samples.steps.to(new.device)
        transition = group.rule.transitions(explored.steps, steps, dim=new.dim())
        std = group.rule.transitions(explored.steps, steps, dim=1).std
        reached = explored.inputs[samples.steps + 1, samples.members]
        mean, old_mean = transition.mean(samples.x, new), transition.mean(samples.x, old)
        log_ratio = log_probability_ratio(reached, mean, old_mean, torch.as_tensor(std))
        ratio_minus_one = torch.expm1(log_ratio)
        advantages = target[samples.members.to(target.device)]
        clip = self.settings.clip
        clipped = ratio_minus_one if clip is None else ratio_minus_one.clamp(-clip, clip)
        objective = torch.minimum((1 + ratio_minus_one) * advantages, (1 + clipped) * advantages)
        outside = torch.zeros_like(advantages, dtype=torch.bool) if clip is None else ratio_minus_one * advantages.sign() > clip
        live = ~outside[advantages != 0]
        return Ratio(-objective, ratio_minus_one.detach()[:, None], live[:, None])


def log_probability_ratio(reached: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x'; mu, std^2 I) - log N(x'; mu_old, std^2 I), a mean over the elements: [N] float64, differentiable in `mean`.

    reached, mean, old_mean: [N, ...]; std: [N], positive.
    """
    mean, old_mean, reached = (tensor.double().flatten(1) for tensor in (mean, old_mean.detach(), reached.detach()))
    product = (mean - old_mean) * (2 * reached - mean - old_mean)
    return product.mean(1) / (2 * std.double().square())


OBJECTIVE = SdeGrpoObjective
