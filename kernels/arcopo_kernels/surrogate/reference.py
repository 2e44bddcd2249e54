"""The AR-CoPO surrogate in plain PyTorch: the specification.

For one anchor with prediction x (gradient), old prediction x_old, candidates x_i, advantages A_i, i = 1..G:

    pi_old(i) = softmax_i(-||x_i - x_old||^2 / tau)        u = x - x_old        a_i = (2 / tau) <u, x_i - x_old>
    log rho_i = a_i - log sum_k pi_old(k) exp(a_k)         (the common <u, u> of both distances cancels)
    J         = 1/G sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

Differences are taken before products and everything runs in float64: the Gram form (||x||^2 - 2 <x, x_i> + ||x_i||^2) loses the ratio,
whose clip radius is 1e-4. Source: AR-CoPO (arXiv 2603.17461) for J; the ratio in this form is derived.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class SurrogateOutput(NamedTuple):
    """The surrogate of N anchors.

    Attributes:
        loss: [N] float64, -J, differentiable in `pred`.
        ratio_minus_one: [N, G] float64.
        live: [N, G] bool, the gradient is not clipped away.
    """

    loss: Tensor
    ratio_minus_one: Tensor
    live: Tensor


def projections(pred: Tensor, old_pred: Tensor, candidates: Tensor, step_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ||x_i - x_old||^2 and <u, x_i - x_old>, each [N, G] float64, summed over D.

    Args:
        pred, old_pred: [N, D]. candidates: [T, G, D]. step_index: [N], or None for step 0.
    """
    if step_index is None:
        step_index = torch.zeros(pred.shape[0], dtype=torch.long, device=pred.device)

    def of_anchor(x: Tensor, x_old: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        x_old = x_old.double()
        towards = candidates.detach().index_select(0, step)[0].double() - x_old  # [G, D]
        return towards.square().sum(-1), towards @ (x.double() - x_old)

    # One anchor's [G, D] in float64 at a time, in the backward pass too: hence checkpoint.
    anchors = [
        checkpoint(of_anchor, pred[n], old_pred[n].detach(), step_index[n : n + 1], use_reentrant=False, preserve_rng_state=False)
        for n in range(pred.shape[0])
    ]
    old_distance, projection = (torch.stack(parts) for parts in zip(*anchors))
    return old_distance, projection


def log_ratio(old_distance: Tensor, projection: Tensor, tau: float, size: int) -> Tensor:
    """Return log rho [N, G] from the sums over D. size: D for mean-reduced distances, 1 for summed ones."""
    old_log_prob = torch.log_softmax(-(old_distance / size) / tau, dim=-1)
    a = 2 / (size * tau) * projection
    # log sum_k pi_old(k) exp(a_k): to full relative precision where the ratios are near 1, without overflow where they are not.
    near = torch.log1p((old_log_prob.exp() * torch.expm1(a.clamp(-1, 1))).sum(-1, keepdim=True))
    far = torch.logsumexp(old_log_prob + a, dim=-1, keepdim=True)
    return a - torch.where(a.abs().amax(-1, keepdim=True) <= 1, near, far)


def surrogate(log_ratio: Tensor, advantages: Tensor, clip: float | None) -> SurrogateOutput:
    """Return the surrogate of log_ratio [N, G] and advantages [G]; clip None: no clipping."""
    radius = float("inf") if clip is None else clip
    advantages = advantages.detach().double()
    ratio_minus_one = torch.expm1(log_ratio)
    # min(rho A, clip(rho) A) has no gradient where the ratio has left the interval on the side that the advantage favors.
    clipped = torch.where(advantages > 0, ratio_minus_one > radius, (advantages < 0) & (ratio_minus_one < -radius))
    gain = torch.where(clipped, ratio_minus_one.detach().clamp(-radius, radius), ratio_minus_one) * advantages + advantages
    return SurrogateOutput(-gain.mean(-1), ratio_minus_one.detach(), ~clipped)
