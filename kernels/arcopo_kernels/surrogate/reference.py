"""The AR-CoPO surrogate in plain PyTorch: the specification.

For one anchor with prediction x (gradient), old prediction x_old, candidates x_i, advantages A_i, i = 1..G:

    pi_old(i) = softmax_i(-||x_i - x_old||^2 / tau)        u = x - x_old        a_i = (2 / tau) <u, x_i - x_old>
    log rho_i = a_i - log1p(sum_k pi_old(k) expm1(a_k))    (the common <u, u> of both distances cancels)
    J         = 1/G sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

Differences are taken before products and sums run in float64: the Gram form (||x||^2 - 2 <x, x_i> + ||x_i||^2) loses the ratio, whose
clip radius is 1e-4. Source: AR-CoPO (arXiv 2603.17461) for J; the ratio in this form is derived.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SurrogateOutput(NamedTuple):
    """loss [N] float64 (= -J, differentiable in `pred`), ratio_minus_one [N, G] float64, live [N, G] bool (gradient not clipped away)."""

    loss: Tensor
    ratio_minus_one: Tensor
    live: Tensor


def copo_surrogate(
    pred: Tensor, old_pred: Tensor, candidates: Tensor, advantages: Tensor, step_index: Tensor, tau: float, clip: float | None, mean: bool
) -> SurrogateOutput:
    """pred, old_pred [N, D]; candidates [T, G, D]; advantages [G]; step_index [N]."""
    size = pred.shape[-1] if mean else 1
    advantages = advantages.double()
    losses, ratios, lives = [], [], []
    for x, x_old, step in zip(pred.double(), old_pred.detach().double(), step_index.tolist()):
        towards = candidates[step].detach().double() - x_old  # [G, D]
        log_pi_old = torch.log_softmax(-towards.square().sum(-1) / (size * tau), dim=0)  # [G]
        a = 2.0 / (size * tau) * (towards @ (x - x_old))  # [G]
        log_ratio = a - torch.log1p((log_pi_old.exp() * torch.expm1(a)).sum())
        ratio_minus_one = torch.expm1(log_ratio)
        if clip is None:
            live = torch.ones_like(a, dtype=torch.bool)
        else:
            # min(rho A, clip(rho) A) has no gradient where the ratio has left the interval on the side that the advantage favours.
            live = ~torch.where(advantages > 0, ratio_minus_one > clip, (advantages < 0) & (ratio_minus_one < -clip))
        bounded = ratio_minus_one if clip is None else ratio_minus_one.clamp(-clip, clip)
        gain = torch.where(live, ratio_minus_one, bounded.detach()) * advantages + advantages
        losses.append(-gain.mean())
        ratios.append(ratio_minus_one.detach())
        lives.append(live)
    return SurrogateOutput(torch.stack(losses), torch.stack(ratios), torch.stack(lives))
