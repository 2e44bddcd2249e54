"""RMSNorm over all heads together and 3-axis rotary positions in plain PyTorch: the specification.

    rms_norm(x)    x / sqrt(mean(x^2) + eps) * weight, over the full dimension E = H * D
    apply_rope(x)  (x_2j, x_2j+1) turned by the angle p_j * 10000^(-i / n), for each pair j of a head

Of a head's D / 2 pairs the first turn with the token's frame (p = position + frame), the next D // 6 with its row, the last D // 6 with its
column; i counts the n pairs of the axis. Source: Wan2.1, interleaved pairs.

Rounding follows the official half-precision inference: the normalized value is rounded before the weight is applied, the product again, the
rotation once more. Officially it is complex128; here float64 for half-precision inputs on a CPU, which gives the same bits, else float32 or
wider, by tables computed in float64 (cos and sin within half a unit in the last place).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from arcopo_kernels.qk_norm_rope.table import axis_pairs, computed_rope_table
from torch import Tensor

POSITIONS = 4096
"""Length of the table for positions that only the device knows: 17 minutes of video at 16 pixel frames a second, 4 to a latent frame."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm [..., E] of x [..., E]; weight [E]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope(x: Tensor, position: int | Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Apply RoPE to x [B, frames * rows * columns, H, D], whose first frame stands at time position `position`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and x.dtype.itemsize < 4:
        dtype = torch.float64
    # A compiler traces through caches, what inference mode computes could not be used in training, and a graph needs tensors that stay.
    compiling = torch.compiler.is_compiling()
    cached = not (isinstance(position, Tensor) or compiling or torch.is_inference_mode_enabled() or _capturing(x))
    arguments = (position, grid, x.shape[-1], dtype, x.device)
    # A CPU's complex product takes a seventh of the time. No compiler fuses it, and where vectors are not full its rounding is another.
    if x.device.type == "cpu" and x.shape[-1] % 16 == 0 and not compiling:
        turned = _pairs(x.to(dtype)) * (_cached_turns if cached else _turns)(*arguments)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = (_cached_cos_sin if cached else _cos_sin)(*arguments)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _pairs(x: Tensor) -> Tensor:
    """Return the complex numbers [..., D / 2] of adjacent pairs of x [..., D], a view if they are aligned."""
    aligned = x.stride(-1) == 1 and not x.storage_offset() % 2 and not any(stride % 2 for stride in x.stride()[:-1])
    return torch.view_as_complex((x if aligned else x.clone(memory_format=torch.contiguous_format)).unflatten(-1, (-1, 2)))


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def norm_rope(x: Tensor, weight: Tensor, position: int | Tensor, grid: tuple[int, int, int], eps: float) -> Tensor:
    """Apply the norm over all heads, then RoPE, to x [B, T, H, D]; weight [H * D]."""
    return apply_rope(rms_norm(x.flatten(2), weight, eps).unflatten(2, x.shape[2:]), position, grid)


def table_length(position: int, grid: tuple[int, int, int]) -> int:
    """Return POSITIONS, doubled until a grid whose first frame stands at `position` fits."""
    length = POSITIONS
    while length < position + grid[0] or length < max(grid[1:]):
        length *= 2
    return length


def rope_table(head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cos and sin of every pair at every position of its axis, [2, length, D / 2]: a shared constant, not to be written to."""
    if torch.compiler.is_compiling():
        from arcopo_kernels.qk_norm_rope.constant import rope_table as constant  # which imports the compiler

        return constant(head_dim, length, dtype, device)
    return computed_rope_table(head_dim, length, dtype, device)


def _cos_sin(position: int | Tensor, grid: tuple[int, int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cos and sin for the tokens of a grid, [2, frames * rows * columns, 1, D / 2]."""
    frames, rows, columns = grid
    table = rope_table(head_dim, table_length(0 if isinstance(position, Tensor) else position, grid), dtype, device)
    time, row, column = table.split(axis_pairs(head_dim), dim=-1)
    time = time.index_select(1, position + torch.arange(frames, device=device))
    shape = (2, frames, rows, columns, -1)
    parts = time[:, :, None, None].expand(shape), row[:, None, :rows, None].expand(shape), column[:, None, None, :columns].expand(shape)
    return torch.cat(parts, dim=-1).reshape(2, frames * rows * columns, 1, head_dim // 2)


def _turns(*arguments: Any) -> Tensor:
    """Return what `_cos_sin` gives as complex numbers of absolute value 1, [frames * rows * columns, 1, D / 2]."""
    return torch.complex(*_cos_sin(*arguments))


_cached_turns = lru_cache(maxsize=64)(_turns)
_cached_cos_sin = lru_cache(maxsize=64)(_cos_sin)
