"""An optimizer's steps, independent of the scale of the loss.

With mean reduction the loss of a full-size chunk (299,520 elements) has gradients with medians near 4e-8 for lora_B and 1e-10 for lora_A.
Beside them Adam's usual eps of 1e-8 is not small: lora_A would hardly train, and what is learned would depend on the resolution through
eps. A norm limit of 1.0 would never act either. So eps and one of the two norm limits are measured against the gradient itself:

* eps is a fraction of the root mean square of the gradient's elements, so a loss times any factor gives the same step;
* `relative_clip` limits the norm to a multiple of the running norm of earlier updates, so no pivot's gradient drowns the others'.

A gradient that is exactly zero takes no step: AdamW would drift on its momentum, in a direction that nothing asks for any more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEMORY = 0.95
"""Weight of the past in the running norm: about the last 20 updates, in which each of seven pivots comes about three times."""


class GradientNotFinite(RuntimeError):
    """The gradient of an update holds NaN or infinity. A step would make every weight it trains NaN, so none was taken."""


class Step(NamedTuple):
    """The outcome of `Stepper.take`.

    Attributes:
        norm: of the gradient, before it is clipped.
        taken: False where the gradient is exactly zero.
        clipped: the gradient was scaled down.
        below_eps: share of the nonzero elements that lie below 10 eps, where Adam's step is shortened.
    """

    norm: float
    taken: bool
    clipped: bool
    below_eps: float


class Stepper:
    """An optimizer's steps, with an eps and a norm limit that are relative to the gradient.

    Args:
        optimizer: any of PyTorch's. Its `state_dict` holds the running norm, too.
        eps: Adam's, relative to the root mean square of the gradient's elements; None: the optimizer's own, absolute.
        gradient_clip: largest norm of the gradient; None: no limit. This one depends on the loss's scale.
        relative_clip: largest norm, in units of the geometric running mean of earlier norms; None: no limit.

    Attributes:
        begun: number of steps that were begun; a step that was broken off counts, for the weights may have moved.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        eps: float | None = None,
        gradient_clip: float | None = None,
        relative_clip: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.eps, self.gradient_clip, self.relative_clip = eps, gradient_clip, relative_clip
        self.begun = 0

    @property
    def _norms(self) -> dict[str, Any]:
        """Home of the running norm: a parameter group is part of the optimizer's `state_dict`."""
        return self.optimizer.param_groups[0]

    @property
    def running_norm(self) -> float | None:
        """Geometric running mean of the norms of earlier updates; None before the first."""
        updates = self._norms.get("norms", 0)
        return math.exp(self._norms["log_norm"] / (1 - MEMORY**updates)) if updates else None

    @torch.no_grad()
    def take(self) -> Step:
        """Clip the gradient and step; take no step where it is exactly zero.

        Raises:
            GradientNotFinite: the parameters are as they were.
        """
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _norm(gradients)
        if not math.isfinite(norm):
            raise GradientNotFinite(f"has the norm {norm}")
        if norm == 0:
            return Step(norm, taken=False, clipped=False, below_eps=0.0)
        limits = [limit for limit in (self.gradient_clip, self._relative_limit()) if limit is not None]
        factor = min([1.0, *(limit / norm for limit in limits)])
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        if self.eps is not None:
            size = factor * norm / math.sqrt(sum(gradient.numel() for gradient in gradients))  # root mean square
            for group in self.optimizer.param_groups:
                group["eps"] = self.eps * size
        below_eps = _share_below(gradients, 10 * self._norms.get("eps", 0.0))
        self.begun += 1
        self.optimizer.step()
        self._norms["log_norm"] = MEMORY * self._norms.get("log_norm", 0.0) + (1 - MEMORY) * math.log(norm)
        self._norms["norms"] = self._norms.get("norms", 0) + 1
        return Step(norm, taken=True, clipped=factor < 1, below_eps=below_eps)

    def _relative_limit(self) -> float | None:
        running = self.running_norm
        return None if self.relative_clip is None or running is None else self.relative_clip * running


def _norm(gradients: list[Tensor]) -> float:
    """Return the norm of all elements, with float64 sums: float32 squares of small gradients would vanish."""
    if not gradients:
        return 0.0
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in gradients]
    return torch.stack(squares).sum().sqrt().item()


def _share_below(gradients: list[Tensor], size: float) -> float:
    """Return the share of elements below `size` among those that are not zero: A has a gradient of zero until B has moved."""
    counts = [torch.stack([((gradient != 0) & (gradient.abs() < size)).sum(), (gradient != 0).sum()]) for gradient in gradients]
    below, total = torch.stack(counts).sum(0).tolist()
    return below / max(1, total)
