"""RMSNorm and SiLU in plain PyTorch: the specification.

    y = silu(x / max(|x|, 1e-12) * sqrt(C) * weight)          (the norm and activation of Wan's VAE)

The norm is taken in at least float32. In half precision x / |x| * sqrt(C), its product with the weight, and the activation round once each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-12
"""The least norm that x is divided by."""


def norm_silu(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Fill out [..., C] from x [..., C] and weight [C]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    # Not torch.mul(.., out=out): torch.compile refuses an `out` that is not contiguous, such as the end of a buffer.
    out.copy_(x).mul_(norm.clamp_min_(FLOOR).reciprocal_().mul_(x.shape[-1] ** 0.5)).mul_(weight)
    F.silu(out, inplace=True)
