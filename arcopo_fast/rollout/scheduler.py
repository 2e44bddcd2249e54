"""The flow-matching noise schedule of the few-step generators: x_t = (1 - sigma) x_0 + sigma eps, timestep = 1000 sigma.

The official table of 1000 entries: sigma = s u / (1 + (s - 1) u) for u = 1, 0.999, ..., 0.001 and timestep shift s. It does not reach 0:
its last entry is 0.00498 for s = 5. Any timestep is looked up as the nearest entry. Source: Self-Forcing utils/scheduler.py.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor


class Schedule:
    """The table of a timestep shift.

    Attributes:
        shift: s.
        sigmas, timesteps: [1000] float32.
    """

    def __init__(self, shift: float) -> None:
        self.shift = shift
        u = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = shift * u / (1 + (shift - 1) * u)
        self.timesteps = 1000 * self.sigmas

    def sigma(self, timestep: float) -> float:
        """Return the table's sigma for the entry nearest to `timestep`."""
        return self.sigmas[(self.timesteps - timestep).abs().argmin()].item()

    def denoising_steps(self, steps: Sequence[float], *, warp: bool) -> list[float]:
        """Return the timesteps that the sampler visits, as float32. With `warp`, whole steps index the table: 750 -> 937.5 for shift 5."""
        if not warp:
            return torch.tensor(steps, dtype=torch.float32).tolist()
        table = torch.cat([self.timesteps, torch.zeros(1)])
        return [table[1000 - int(step)].item() for step in steps]


def predict_clean(x: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """Return x0hat = x_t - sigma flow, computed in float64, rounded to float32 (float64 for float64 inputs).

    x, flow: [B, F, C, h, w]; sigma: broadcastable to them.
    """
    clean = x.double() - sigma.double() * flow.double()
    return clean.to(torch.promote_types(flow.dtype, torch.float32))
