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
    """x [.., C], weight [C] -> out [.., C]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    torch.mul(x, norm.clamp_min_(FLOOR).reciprocal_().mul_(x.shape[-1] ** 0.5), out=out)
    F.silu(out.mul_(weight), inplace=True)
