"""The few-step sampler of one chunk.

    x = noise;  for each step t:  x0hat = x - sigma_t F(x, t);  x = next state;  the last x0hat is the chunk

``consistency``: the next state re-noises the prediction with fresh noise, x = (1 - sigma') x0hat + sigma' eps (Self-Forcing).
``ode``: one Euler step along the flow, x' = x + (sigma' - sigma) F (no fresh noise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Sequence

import torch
from torch import Tensor

from arcopo_fast.model.causal_wan import CausalWan, ChunkContext, TextContext
from arcopo_fast.rollout.scheduler import Schedule, add_noise, predict_clean


@dataclass(frozen=True)
class Steps:
    """The timesteps a chunk visits and their sigmas; sigma after the last step is 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def from_schedule(cls, schedule: Schedule, steps: Sequence[float], *, warp: bool) -> Steps:
        timesteps = schedule.denoising_steps(steps, warp=warp)
        return cls(tuple(timesteps), tuple(schedule.sigma(timestep) for timestep in timesteps))

    def __len__(self) -> int:
        return len(self.timesteps)

    def next_sigma(self, step: int) -> float:
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
    """x0hat [B, F, C, h, w] float32 for inputs x at timesteps [B] with sigmas [B]. Rollout and replay both go through here."""
    flow = model(x, timesteps[:, None], text, context, checkpoint=checkpoint)
    return predict_clean(x.to(flow.dtype), flow, sigmas.view(-1, 1, 1, 1, 1))


def next_input(
    kind: Literal["consistency", "ode"], x: Tensor, clean: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, noise: Tensor | None
) -> Tensor:
    """The input of the next step, float32, from this step's input and prediction."""
    if kind == "ode":
        return x + (sigma_next - sigma) * (x - clean) / sigma
    if noise is None:
        raise ValueError("the consistency sampler needs noise for every step but the last")
    if not isinstance(sigma_next, Tensor):
        sigma_next = torch.full((), sigma_next, device=clean.device)  # float32, and made on the device: a copy would wait for it
    return add_noise(clean, noise, sigma_next)


@dataclass
class Trajectory:
    """What a chunk's denoising left, per step: inputs x_t and predictions x0hat_t, each [B, F, C, h, w] float32."""

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
    kind: Literal["consistency", "ode"] = "consistency",
) -> Trajectory:
    """Denoise one chunk from `noise` [B, F, C, h, w]. The host never waits for the device in here.

    fresh: the noise [1 or B, F, C, h, w] after each step but the last; none for "ode". All on the model's device.
    """
    x, batch, device = noise, noise.shape[0], model.device
    trajectory = Trajectory([], [])
    for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
        t, s = torch.full((batch,), timestep, device=device), torch.full((batch,), sigma, device=device)
        clean = predict(model, x, t, s, text, context)
        trajectory.inputs.append(x)
        trajectory.predictions.append(clean)
        if step + 1 < len(steps):
            x = next_input(kind, x, clean, sigma, steps.next_sigma(step), fresh[step] if kind == "consistency" else None)
    return trajectory
