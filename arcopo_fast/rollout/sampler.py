"""The few-step sampler of one chunk.

    x = noise;  for each step t:  x0hat = x - sigma_t F(x, t);  x = next state;  the last x0hat is the chunk

The next state is a draw from N(mean, std^2 I); a `StepRule` says which (ALGORITHM.md 4). With s, s' the sigmas before and after a step,
v = (x - x0hat) / s the flow and eps = x + (1 - s) v the noise that the prediction implies:

    consistency   std s',                                 mean (1 - s') x0hat          re-noises the prediction (Self-Forcing)
    ode           std 0,                                  mean x + (s' - s) v          one Euler step along the flow
    dance_sde     std g sqrt(s - s'), g = eta,            mean x + [v + g^2 eps / (2 s)] (s' - s)
    flow_sde      the same with g = a sqrt(s / (1 - s)); at s = 1 the denominator is 1 - s'
    flow_cps      std s' sin(a pi / 2),                   mean (1 - s') x0hat + sqrt(s'^2 - std^2) eps

Sources: DanceGRPO (2505.07818), Flow-GRPO (2505.05470), Flow-CPS, CM-GRPO of RAVEN (2605.15190), whose rule is "consistency".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Sequence

import torch
from torch import Tensor

from arcopo_fast.rollout.scheduler import Schedule, predict_clean

if TYPE_CHECKING:
    from arcopo_fast.model.causal_wan import CausalWan, ChunkContext, TextContext

RuleKind = Literal["consistency", "ode", "dance_sde", "flow_sde", "flow_cps"]


@dataclass(frozen=True)
class Steps:
    """The timesteps that a chunk visits.

    Attributes:
        timesteps: in 0..1000, T of them.
        sigmas: sigma at each timestep; after the last step it is 0.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def from_schedule(cls, schedule: Schedule, steps: Sequence[float], *, warp: bool) -> Steps:
        """Return the steps of a recipe's list; see `Schedule.denoising_steps`."""
        timesteps = schedule.denoising_steps(steps, warp=warp)
        return cls(tuple(timesteps), tuple(schedule.sigma(timestep) for timestep in timesteps))

    def __len__(self) -> int:
        return len(self.timesteps)

    def next_sigma(self, step: int) -> float:
        """Return sigma after a step."""
        return self.sigmas[step + 1] if step + 1 < len(self) else 0.0


def predict(
    model: CausalWan,
    x: Tensor,
    timesteps: Tensor,
    sigmas: Tensor,
    text: TextContext,
    context: ChunkContext,
    *,
    checkpoint: bool = False,
) -> Tensor:
    """Return x0hat [B, F, C, h, w] float32 for inputs x at timesteps [B] with sigmas [B]. Rollout and replay both go through here."""
    flow = model(x, timesteps[:, None], text, context, checkpoint=checkpoint)
    return predict_clean(x.to(flow.dtype), flow, sigmas.view(-1, 1, 1, 1, 1))


class Transition(NamedTuple):
    """The distribution of the next state given x and x0hat: N(on_x x + on_clean x0hat, std^2 I).

    Attributes:
        on_x, on_clean, std: numbers, or tensors that broadcast to the state.
    """

    on_x: float | Tensor
    on_clean: float | Tensor
    std: float | Tensor

    def mean(self, x: Tensor, clean: Tensor) -> Tensor:
        """Return the mean of the next state, given the state x and its prediction x0hat."""
        mean = self.on_clean * clean
        return mean if isinstance(self.on_x, float) and self.on_x == 0 else mean + self.on_x * x


@dataclass(frozen=True)
class StepRule:
    """The rule by which the sampler goes from one state to the next.

    Attributes:
        kind: see the module's table.
        noise: eta of dance_sde, a of flow_sde and flow_cps; the others have none.
    """

    kind: RuleKind = "consistency"
    noise: float = 0.0

    @property
    def random(self) -> bool:
        """True if the rule draws noise."""
        return self.kind != "ode"

    def transition(self, sigma: float, sigma_next: float) -> Transition:
        """Return the coefficients of one step, computed in float64. After the last step sigma_next is 0, and nothing is random."""
        s, following = sigma, sigma_next
        dt = following - s
        if self.kind == "consistency":
            return Transition(0.0, 1 - following, following)
        if self.kind == "ode":
            return Transition(following / s, -dt / s, 0.0)
        if self.kind == "flow_cps":
            std = following * math.sin(self.noise * math.pi / 2)
            implied = math.sqrt(max(0.0, following**2 - std**2))
            return Transition(implied / s, 1 - following - implied * (1 - s) / s, std)
        if following == 0:  # the last step is the prediction itself
            return Transition(0.0, 1.0, 0.0)
        g = self.noise
        if self.kind == "flow_sde":
            g *= math.sqrt(s / (1 - s if s < 1 else 1 - following))
        drift = g**2 * dt / (2 * s**2)  # g^2 / (2 s) dt on the implied noise eps = x / s - (1 - s) / s x0hat
        return Transition(1 + dt / s + drift, -dt / s - drift * (1 - s), g * math.sqrt(-dt))

    def transitions(self, steps: Steps, index: Tensor, *, dim: int) -> Transition:
        """Return the coefficients of the steps `index` [N]: float32 tensors [N, 1, ...] of `dim` dimensions on the index's device."""
        table = torch.tensor([self.transition(sigma, steps.next_sigma(step)) for step, sigma in enumerate(steps.sigmas)])
        columns = table.to(index.device)[index].view(len(index), 3, *[1] * (dim - 1)).unbind(1)
        return Transition(*columns)


CONSISTENCY = StepRule()
"""The rule of the published few-step generators."""


def next_input(rule: StepRule, x: Tensor, clean: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
    """Return the input of the next step, float32, from this step's input x, its prediction and fresh noise (None for "ode")."""
    transition = rule.transition(sigma, sigma_next)
    mean = transition.mean(x, clean)
    if not rule.random:
        return mean
    if noise is None:
        raise ValueError(f"the {rule.kind} sampler needs noise for every step but the last")
    return mean + transition.std * noise


@dataclass
class Trajectory:
    """The states of a chunk's denoising, one entry for each step.

    Attributes:
        inputs, predictions: x_t and x0hat_t, each [B, F, C, h, w] float32.
    """

    inputs: list[Tensor]
    predictions: list[Tensor]


def denoise(
    model: CausalWan,
    noise: Tensor,
    steps: Steps,
    fresh: Sequence[Tensor],
    text: TextContext,
    context: ChunkContext,
    *,
    rule: StepRule = CONSISTENCY,
) -> Trajectory:
    """Denoise one chunk. The host never waits for the device in here.

    Args:
        noise: the initial state, [B, F, C, h, w], on the model's device like the following.
        fresh: the noise [1 or B, F, C, h, w] after each step but the last; none if the rule is not random.
    """
    x, batch, device = noise, noise.shape[0], model.device
    trajectory = Trajectory([], [])
    for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
        t, s = torch.full((batch,), timestep, device=device), torch.full((batch,), sigma, device=device)
        clean = predict(model, x, t, s, text, context)
        trajectory.inputs.append(x)
        trajectory.predictions.append(clean)
        if step + 1 < len(steps):
            x = next_input(rule, x, clean, sigma, steps.next_sigma(step), fresh[step] if rule.random else None)
    return trajectory
