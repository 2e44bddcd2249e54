"""The negative-aware forward-process loss in one pass over its three inputs, float32, without atomics.

Each program takes one tile of one sample, writes the tile of the gradient and stores the tile's three sums, which PyTorch adds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import BlockSizes, on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from torch import Tensor


def block_sizes() -> BlockSizes:
    """Return a tile of 16 elements to a thread: four 16-byte loads in flight from each of three float32 inputs."""
    return BlockSizes(block=4096, num_warps=8)


@triton.jit
def _tiles(
    pred_ptr,  # [B, D]
    old_ptr,  # [B, D]
    target_ptr,  # [B, D]
    reward_ptr,  # [B]
    partials_ptr,  # [3, B, tiles] float32: l_plus, l_minus, drift
    gradient_ptr,  # [B, D] float32
    B,
    D,
    tiles,
    beta,
    scale,  # 1 / D for the mean, 1 for the sum
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    beta = tl.cast(beta, tl.float32)
    scale = tl.cast(scale, tl.float32)
    reward = tl.load(reward_ptr + sample).to(tl.float32)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < D
    elements = sample.to(tl.int64) * D + offsets
    old = tl.load(old_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    delta = tl.load(pred_ptr + elements, mask=mask, other=0.0).to(tl.float32) - old
    error = old - tl.load(target_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    step = beta * delta
    plus = error + step
    minus = error - step
    partials = partials_ptr + sample * tiles + tile
    tl.store(partials, scale * tl.sum(plus * plus, axis=0))
    tl.store(partials + B * tiles, scale * tl.sum(minus * minus, axis=0))
    tl.store(partials + 2 * B * tiles, scale * tl.sum(delta * delta, axis=0))
    if WITH_GRADIENT:
        # r (plus)^2 + (1 - r) (minus)^2 = error^2 + step^2 + 2 (2 r - 1) error step
        tl.store(gradient_ptr + elements, 2 * beta * scale * (step + (2 * reward - 1) * error), mask=mask)


@on_device_of_tensors
def nft_loss(
    pred: Tensor, old_pred: Tensor, target: Tensor, reward: Tensor, beta: float, mean: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [B]; l_plus, l_minus and drift, [3, B]; the gradient of each loss, [B, D] (or [0, D]): all float32."""
    samples, size = pred.shape
    sizes = block_sizes()
    tiles = triton.cdiv(size, sizes.block)
    reward = reward.float().contiguous()
    partials = torch.empty(3, samples, tiles, dtype=torch.float32, device=pred.device)
    gradient = partials.new_empty(samples if with_gradient else 0, size)
    _tiles[(samples * tiles,)](
        pred.contiguous(),
        old_pred.contiguous(),
        target.contiguous(),
        reward,
        partials,
        gradient,
        samples,
        size,
        tiles,
        beta,
        1 / size if mean else 1.0,
        BLOCK=sizes.block,
        WITH_GRADIENT=with_gradient,
        num_warps=sizes.num_warps,
        enable_fp_fusion=FP_FUSION,
    )
    parts = partials.sum(-1)
    return torch.lerp(parts[1], parts[0], reward), parts, gradient


_POINTERS = ("pred_ptr", "old_ptr", "target_ptr", "reward_ptr", "partials_ptr", "gradient_ptr")
_SCALARS = {"B": "i32", "D": "i32", "tiles": "i32", "beta": "fp32", "scale": "fp32"}


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target: a chunk of Wan's latents, D = 299,520."""
    return [
        AotCase(
            dtype,
            _tiles,
            {name: f"*{dtype if name in _POINTERS[:3] else 'fp32'}" for name in _POINTERS} | _SCALARS,
            {"BLOCK": block_sizes().block, "WITH_GRADIENT": True},
            [*_POINTERS, "D"],
            block_sizes().num_warps,
        )
        for dtype in ("fp32", "bf16")
    ]
