"""Selective regularization, and a reference policy that moves (Astrolabe, after GARDO, arXiv 2512.24138).

A video that one reward ranks far above the others has probably fooled that reward. Of all videos of an iteration,

    delta_i = rank of i under the primary reward - mean rank of i under the other rewards      (ascending: the best has the largest)
    P       = {delta_i >= 0},  masked are those with delta_i > the (1 - rho) quantile of P

and only the masked are drawn towards the reference. The paper's released code ranks descending, and so holds back the videos that the
primary reward dislikes; with hacked videos planted among others this order finds them, and that one none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RECENT = 20
"""Iterations whose mean disagreement the present one is compared with."""
SHARE = (0.02, 0.2)
"""Least and largest rho."""
SOON = 5
"""A reference that is replaced after fewer iterations than these was replaced too early: tau rises."""
TAU = (0.1, 0.2)
"""Least and largest tau of `Renewal`. The released code raises tau to at most 0.05, which lowers it; the upper end is ours."""


def ascending_ranks(scores: Tensor) -> Tensor:
    """Return the ranks [N] float64 of scores [N], 1 for the lowest; equal scores share the mean of their ranks."""
    values, inverse, counts = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def disagreement(scores: Mapping[str, Tensor], primary: str) -> Tensor:
    """Return delta [N] float64 of N videos, NaN for a video without a finite score under each reward.

    Args:
        scores: [N] by the reward's name, more is better; at least two rewards.
        primary: the reward that might be fooled.
    """
    scored = torch.stack(list(scores.values())).isfinite().all(0)
    ranks = {name: ascending_ranks(values[scored]) for name, values in scores.items()}
    others = [values for name, values in ranks.items() if name != primary]
    delta = torch.full(scored.shape, float("nan"), dtype=torch.float64)
    delta[scored] = ranks[primary] - torch.stack(others).mean(0)
    return delta


@dataclass
class Selection:
    """The share of videos that are held back, which follows how much the rewards disagree.

    Attributes:
        rho: share of the videos that the primary reward ranks no lower than the others do.
        recent: mean disagreement of these videos in the last iterations.
    """

    rho: float = 0.1
    recent: list[float] = field(default_factory=list)

    def mask(self, delta: Tensor) -> Tensor:
        """Return which videos [N] are held back."""
        positive = delta[delta >= 0]  # a NaN is not
        if not len(positive):
            return torch.zeros_like(delta, dtype=torch.bool)
        return delta > positive.quantile(1 - self.rho)

    def follow(self, delta: Tensor) -> None:
        """Raise rho where the rewards disagree more than in any recent iteration, lower it where less."""
        positive = delta[delta >= 0]
        if not len(positive):
            return
        mean = positive.mean().item()
        if self.recent:
            factor = 1.1 if mean > max(self.recent) else 0.9 if mean < min(self.recent) else 1.0
            self.rho = min(max(self.rho * factor, SHARE[0]), SHARE[1])
        self.recent = [*self.recent, mean][-RECENT:]


@dataclass
class Renewal:
    """The rule by which the reference becomes the live policy: when that has gone too far from it, or it is too old.

    Attributes:
        tau: the largest distance, a mean square in x0 space.
        age: iterations since the reference was last the live policy.
    """

    tau: float = 0.15
    age: int = 0

    def due(self, distance: float, max_age: int) -> bool:
        """Return whether the reference is to be replaced after an iteration that ended so far from it."""
        self.age += 1
        far, old = distance > self.tau, self.age > max_age
        if not (far or old):
            return False
        if not far:
            self.tau = max(self.tau - 0.01, min(self.tau, TAU[0]))
        elif self.age < SOON:
            self.tau = min(self.tau + 0.01, max(self.tau, TAU[1]))
        self.age = 0
        return True
