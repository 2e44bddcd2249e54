"""The rotary table as torch.compile takes it: a constant of the graph, which would otherwise compute it at every call.

A module of its own because the decorator imports the whole compiler, 1.2 s: `reference` imports this one while a graph is traced.
"""

from __future__ import annotations

import torch
from arcopo_kernels.qk_norm_rope.table import computed_rope_table
from torch import Tensor


@torch.compiler.assume_constant_result
def rope_table(head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `reference.rope_table`."""
    return computed_rope_table(head_dim, length, dtype, device)
