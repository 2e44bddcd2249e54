"""The rotary table: cos and sin of every position, computed once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many of a head's pairs turn with the frame, the row and the column: 22, 21 and 21 of 64."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@cache
@torch.inference_mode(False)
def computed_rope_table(head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cos and sin of every pair at every position of its axis, [2, length, D / 2], computed in float64."""
    exponents = [torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs for pairs in axis_pairs(head_dim)]
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), 10000.0 ** -torch.cat(exponents))
    return torch.stack([angles.cos(), angles.sin()]).to(device, dtype)
