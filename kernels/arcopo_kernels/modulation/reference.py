"""Adaptive LayerNorm and gated residuals in plain PyTorch: the specification.

    layer_norm_modulate(x)                    LayerNorm(x) * (1 + scale) + shift
    gated_residual(x, y)                      x + y * gate
    gated_residual_layer_norm_modulate(x, y)  h = x + y * gate, and layer_norm_modulate(h)

In half precision every operation rounds, as in the official inference of Wan: the norm once, 1 + scale, the product, the sum.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the modulated norm [B, F, T, E] of x [B, F, T, E]; scale, shift [1 or B, 1 or F, 1, E]; weight, bias [E]."""
    out = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        out = out * (1 + scale)
    if shift is not None:
        out = out + shift
    return out


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Return the residual sum [B, F, T, E] of x, y [B, F, T, E]; gate [1 or B, 1 or F, 1, E]."""
    return x + (y if gate is None else y * gate)
