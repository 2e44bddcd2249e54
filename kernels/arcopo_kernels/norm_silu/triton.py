"""RMSNorm and SiLU in one pass: each element is read once and written once.

A program holds the C channels of several pixels in registers: few channels alone (96 at full resolution) would not fill its threads.
Computed in float32 and rounded once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from arcopo_kernels.norm_silu.reference import FLOOR
from torch import Tensor


class BlockSizes(NamedTuple):
    """The tile of a program.

    Attributes:
        pixels: that a program takes.
        block: the channels of a pixel, rounded up to a power of two.
    """

    pixels: int
    block: int
    num_warps: int


def block_sizes(size: int) -> BlockSizes:
    """Return a tile of 32 elements to a thread: four 16-byte loads in half precision. More where one pixel has more."""
    block = triton.next_power_of_2(size)
    return BlockSizes(pixels=max(4096 // block, 1), block=block, num_warps=4)


@triton.jit
def _forward(
    x,
    weight,
    out,
    pixels,  # of one batch item
    out_stride_batch,
    scale,  # sqrt(C)
    FLOOR: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(pixels, PIXELS)  # of a batch item
    batch = (tl.program_id(0) // programs).to(tl.int64)
    pixel = (tl.program_id(0) % programs).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channel < SIZE)[None, :]
    at = pixel[:, None] * SIZE + channel[None, :]
    values = tl.load(x + batch * pixels * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, axis=1))
    # A pixel with a NaN in it becomes NaN, as in PyTorch, and not one divided by the floor.
    values *= (scale / tl.maximum(norm, FLOOR, propagate_nan=tl.PropagateNan.ALL))[:, None]
    values *= tl.load(weight + channel, mask=channel < SIZE, other=0.0).to(tl.float32)[None, :]
    values *= tl.sigmoid(values)
    tl.store(out + batch * out_stride_batch + at, values.to(out.dtype.element_ty), mask=inside)


@on_device_of_tensors
def forward(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Fill out [B, ..., C], contiguous but for its first stride, from x [B, ..., C], contiguous, and weight [C]."""
    if not x.numel():
        return
    batch, size = x.shape[0], x.shape[-1]
    pixels = x.numel() // (batch * size)
    sizes = block_sizes(size)
    _forward[(batch * triton.cdiv(pixels, sizes.pixels),)](
        x,
        weight.contiguous(),
        out,
        pixels,
        out.stride(0),
        size**0.5,
        FLOOR=FLOOR,
        SIZE=size,
        PIXELS=sizes.pixels,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
        enable_fp_fusion=FP_FUSION,
    )


def _case(size: int) -> AotCase:
    """Return a case at bf16, with the channels of one resolution of Wan2.1's decoder."""
    sizes = block_sizes(size)
    signature = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "pixels": "i32", "out_stride_batch": "i64", "scale": "fp32"}
    constants = {"FLOOR": FLOOR, "SIZE": size, "PIXELS": sizes.pixels, "BLOCK": sizes.block}
    return AotCase(f"forward {size}", _forward, signature, constants, ["x", "weight", "out", "pixels", "out_stride_batch"], sizes.num_warps)


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [_case(size) for size in (96, 192, 384)]
