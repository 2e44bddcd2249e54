"""Adds low-rank adapters to products where they lie, with GELU on the way: each element is read once and written once.

A program holds a tile of one layer's output. x A^T and B are small and stay in the cache. Sums in float32, rounded once; GELU sees the sum
as it would be stored, so that a pass that keeps the sum for its backward gives the same bits as one that does not. No atomics, no tf32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from torch import Tensor

NUM_STAGES = 1
"""Stages of the loop over ranks, which has one round for up to 64 of them: nothing to be gained from loading ahead."""


class BlockSizes(NamedTuple):
    """The tile of a program.

    Attributes:
        block_t, block_out: its tokens and outputs.
        block_r: the ranks that are multiplied at a time.
    """

    block_t: int
    block_out: int
    block_r: int
    num_warps: int


def block_sizes(rank: int) -> BlockSizes:
    """Return a tile of 32 elements to a thread: four 16-byte loads in half precision; with 64 to a thread registers spill on some GPUs.

    A tensor core multiplies 16 ranks at least.
    """
    return BlockSizes(block_t=64, block_out=128, block_r=min(max(triton.next_power_of_2(rank), 16), 64), num_warps=8)


@triton.jit
def _gelu(x):
    """Return tanh GELU: x (1 + tanh u) / 2 = x sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * u)


@triton.jit
def _add(
    base,  # [L, tokens, SIZE]
    reduced,  # [tokens, L * RANK]
    up,  # [L, SIZE, RANK]
    activated,  # as base; None: base itself, if there is GELU
    scale,
    tokens,
    reduced_stride,  # L * RANK
    GELU: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns = tl.cdiv(SIZE, BLOCK_OUT)
    layer = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = tl.program_id(0) % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = (token < tokens)[:, None] & (out < SIZE)[None, :]
    at = (layer * tokens + token)[:, None] * SIZE + out[None, :]
    product = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    change = tl.zeros([BLOCK_T, BLOCK_OUT], tl.float32)
    for start in range(0, RANK, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        row = reduced + token[:, None] * reduced_stride + layer * RANK + rank[None, :]
        left = tl.load(row, mask=(token < tokens)[:, None] & (rank < RANK)[None, :], other=0.0)
        column = up + layer * SIZE * RANK + out[None, :] * RANK + rank[:, None]
        right = tl.load(column, mask=(out < SIZE)[None, :] & (rank < RANK)[:, None], other=0.0)
        change = tl.dot(left, right, change, input_precision="ieee")
    total = (product + change * scale).to(base.dtype.element_ty)
    if GELU:
        gelu = _gelu(total.to(tl.float32)).to(base.dtype.element_ty)
        if activated is not None:
            tl.store(base + at, total, mask=inside)
            tl.store(activated + at, gelu, mask=inside)
        else:
            tl.store(base + at, gelu, mask=inside)
    else:
        tl.store(base + at, total, mask=inside)


@on_device_of_tensors
def add(base: Tensor, reduced: Tensor, up: Tensor, scale: float, gelu: bool, activated: Tensor | None) -> None:
    """Add s r B^T to base [L, T, out], contiguous, in place, and apply GELU, into `activated` where it is given.

    Args:
        reduced: r, [T, L r].
        up: B, [L, out, r].
    """
    if not base.numel():
        return
    layers, tokens, size = base.shape
    rank = up.shape[2]
    sizes = block_sizes(rank)
    reduced = reduced.contiguous()
    programs = triton.cdiv(tokens, sizes.block_t) * triton.cdiv(size, sizes.block_out)
    _add[(programs, layers)](
        base, reduced, up.contiguous(), activated, float(scale), tokens, layers * rank,
        GELU=gelu, SIZE=size, RANK=rank, BLOCK_T=sizes.block_t, BLOCK_OUT=sizes.block_out, BLOCK_R=sizes.block_r,
        num_warps=sizes.num_warps, num_stages=NUM_STAGES, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


def _case(name: str, size: int, rank: int, layers: int, *, gelu: bool = False, keep: bool = False) -> AotCase:
    """Return a case at bf16 with the outputs of one layer of Wan; `layers` share the input."""
    sizes = block_sizes(rank)
    pointers = ["base", "reduced", "up", *(["activated"] if keep else [])]
    signature = {**dict.fromkeys(pointers, "*bf16"), "scale": "fp32", "tokens": "i32", "reduced_stride": "i32"}
    constants: dict[str, Any] = {"GELU": gelu, "SIZE": size, "RANK": rank, **({} if keep else {"activated": None})}
    constants |= {"BLOCK_T": sizes.block_t, "BLOCK_OUT": sizes.block_out, "BLOCK_R": sizes.block_r}
    divisible = [*pointers, "reduced_stride"]  # a chunk's tokens, 4680, are no multiple of 16
    return AotCase(f"add {name}, rank {rank} of {layers}", _add, signature, constants, divisible, sizes.num_warps, NUM_STAGES)


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [
        _case("1.3B", 1536, 64, 3),
        _case("1.3B, GELU", 8960, 64, 1, gelu=True),
        _case("1.3B, GELU kept", 8960, 64, 1, gelu=True, keep=True),
        _case("14B", 5120, 256, 1),
        _case("14B, GELU kept", 13824, 256, 1, gelu=True, keep=True),
    ]
