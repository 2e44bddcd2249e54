"""The negative-aware forward-process loss in plain PyTorch: the specification.

For one sample with prediction p (gradient), old prediction p_old, target y and reward r in [0, 1]:

    p_plus = p_old + beta (p - p_old)        p_minus = p_old - beta (p - p_old)
    L      = r ||p_plus - y||^2 + (1 - r) ||p_minus - y||^2

Source: Astrolabe (arXiv 2603.17051), section 3.3 and algorithm 1. Unlike DiffusionNFT it neither normalizes the loss by the size of its own
error nor divides it by beta.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NFTOutput(NamedTuple):
    """The loss of each sample and its parts, each [B] float32 (float64 if an argument is); only `loss` is differentiable, in `pred`.

    All but the loss are means over the elements, or sums with reduction="sum".

    Attributes:
        loss: the weighted sum of l_plus and l_minus.
        l_plus, l_minus: errors of the two mixtures.
        drift: ||p - p_old||^2, how far the policy has moved.
    """

    loss: Tensor
    l_plus: Tensor
    l_minus: Tensor
    drift: Tensor


def nft_loss(pred: Tensor, old_pred: Tensor, target: Tensor, reward: Tensor, beta: float, mean: bool) -> NFTOutput:
    """Return the loss of pred, old_pred, target [B, D] and reward [B]."""
    dtype = torch.float64 if torch.float64 in (pred.dtype, old_pred.dtype, target.dtype) else torch.float32
    p, p_old, y, r = pred.to(dtype), old_pred.detach().to(dtype), target.detach().to(dtype), reward.detach().to(dtype)
    delta = p - p_old
    p_plus, p_minus = p_old + beta * delta, p_old - beta * delta
    l_plus, l_minus, drift = (
        square.mean(-1) if mean else square.sum(-1) for square in ((p_plus - y).square(), (p_minus - y).square(), delta.square())
    )
    return NFTOutput(r * l_plus + (1 - r) * l_minus, l_plus.detach(), l_minus.detach(), drift.detach())
