"""The AR-CoPO surrogate in two launches: loss and gradient together, bitwise equal from run to run.

    _partials             for each tile of D, in float64: the sums over the tile of ||x_i - x_old||^2 and <u, x_i - x_old>
    _epilogue_gradient    every program adds up all tiles' sums of its anchors in one order, computes ratio and clip from them in float64,
                          and writes its tiles of the gradient, a combination of x_i - x_old; one writes the loss

Differences, products and sums are float64 from the load on. With float32 inside tiles of 4096 the log-ratio is off by 2e-10 to 5e-10
(D = 299,520, tau = 1/30, updates of 1e-2 rms): more than a millionth of the clip radius 1e-4, which is what the tests allow.

Both kernels are bound by reading the candidates, [T, G, D]. Anchors of the same step need the same ones, so a program takes up to ANCHORS
anchors of one step at once. It finds them in `step_index` on the device: nothing is read back, and the grid does not depend on it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from torch import Tensor


class BlockSizes(NamedTuple):
    """The tile of a program.

    Attributes:
        anchors: of one step in a program.
        block: elements of D in a tile.
    """

    anchors: int
    block: int
    num_warps: int
    num_stages: int


def block_sizes(kernel: str, anchors: int, steps: int) -> BlockSizes:
    """Return as many anchors to a program as there are to a step, while their tiles fit the registers: float64 in "partials", else
    float32."""
    together = triton.next_power_of_2(triton.cdiv(anchors, steps))
    if kernel == "partials":
        return BlockSizes(min(together, 2), block=4096, num_warps=8, num_stages=3)
    return BlockSizes(min(together, 4), block=2048, num_warps=8, num_stages=3)


PROGRAMS = 128
"""At most so many share the gradient's tiles of one step: each repeats the epilogue, so many tiles should not mean many programs."""


def chunk(anchors: int, group_pad: int) -> int:
    """Return the tiles that a program adds at a time: 2048 float64 in its registers."""
    return min(64, 2048 // (anchors * group_pad))


@triton.jit
def _anchors_of_step(steps_ptr, step, block, N, N_PAD: tl.constexpr, ANCHORS: tl.constexpr):
    """Return the `block`-th ANCHORS anchors of a step: their indices, int64 [ANCHORS], and which of them exist."""
    anchors = tl.arange(0, N_PAD)
    belongs = anchors < N
    if steps_ptr is not None:
        steps = tl.load(steps_ptr + anchors, mask=belongs, other=0)
        # An index outside [0, T) reads no memory outside the candidates: `_partials` makes that anchor NaN.
        steps = tl.minimum(tl.maximum(steps, 0), tl.num_programs(1) - 1)
        belongs = belongs & (steps == step)
    rank = tl.cumsum(belongs.to(tl.int32), axis=0) - 1 - block * ANCHORS
    match = belongs[None, :] & (rank[None, :] == tl.arange(0, ANCHORS)[:, None])  # [ANCHORS, N_PAD]
    anchor = tl.sum(tl.where(match, anchors[None, :], 0), axis=1)
    return anchor.to(tl.int64), tl.sum(match.to(tl.int32), axis=1) > 0


@triton.jit
def _partials(
    pred_ptr,  # [N, D]
    old_ptr,  # [N, D]
    candidates_ptr,  # [T, G, D]
    steps_ptr,  # [N] or None
    partials_ptr,  # [N, 2 G, tiles] float64: G distances, G projections
    N,
    G,
    D,
    tiles,
    N_PAD: tl.constexpr,
    ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Programs of one tile stand next to each other: their candidates come from the L2 cache.
    blocks = tl.cdiv(N, ANCHORS)
    tile = tl.program_id(0) // blocks
    step = tl.program_id(1)
    anchor, present = _anchors_of_step(steps_ptr, step, tl.program_id(0) % blocks, N, N_PAD, ANCHORS)
    if tl.sum(present.to(tl.int32)) == 0:
        return
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < D
    mask = present[:, None] & inside[None, :]
    elements = anchor[:, None] * D + offsets[None, :]
    old = tl.load(old_ptr + elements, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    update = tl.load(pred_ptr + elements, mask=mask, other=0.0).to(tl.float32).to(tl.float64) - old
    if steps_ptr is not None:
        anchor_step = tl.load(steps_ptr + anchor, mask=present, other=0)
        in_range = (anchor_step >= 0) & (anchor_step < tl.num_programs(1))
        update = tl.where(in_range[:, None], update, float("nan"))
    partials = partials_ptr + anchor * 2 * G * tiles + tile
    for i in tl.range(0, G, num_stages=STAGES):
        candidate = tl.load(candidates_ptr + (step.to(tl.int64) * G + i) * D + offsets, mask=inside, other=0.0).to(tl.float32)
        towards = candidate.to(tl.float64)[None, :] - old
        tl.store(partials + i * tiles, tl.sum(towards * towards, axis=1), mask=present)
        tl.store(partials + (G + i) * tiles, tl.sum(update * towards, axis=1), mask=present)


@triton.jit
def _sum_of_tiles(rows, mask, tiles, ANCHORS: tl.constexpr, G_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sum over the tiles that begin at each pointer of `rows` [ANCHORS, G_PAD]; the order is the same in every program."""
    total = tl.zeros([ANCHORS, G_PAD, CHUNK], tl.float64)
    for start in range(0, tiles, CHUNK):
        index = start + tl.arange(0, CHUNK)
        total += tl.load(rows[:, :, None] + index[None, None, :], mask=mask[:, :, None] & (index < tiles)[None, None, :], other=0.0)
    return tl.sum(total, axis=2)


# Triton has float64 expm1 and log1p in the GPU vendors' libraries only, which its interpreter cannot call.


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 to full relative precision, float64: e = exp(x) is rounded, but log(e) says what it is the exponential of."""
    e = tl.exp(x)
    return tl.where(tl.abs(x) < 1, (e - 1) + e * (x - tl.log(e)), e - 1)


@triton.jit
def _log1p(x):
    """Return log(1 + x) to full relative precision, float64, for x > -1: log of the rounded sum, plus the part of x that rounding cut
    off."""
    w = 1 + x
    return tl.log(w) + (x - (w - 1)) / w


@triton.jit
def _float64(bits):
    """Return a double from its bits: Triton takes Python's floats as float32."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)


@triton.jit
def _store_gradient(
    gradient_ptr, old_ptr, candidates_ptr, weights, anchor, present, first_candidate, tile, G, D,
    ANCHORS: tl.constexpr, G_PAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store a tile of sum_i weights_i (x_i - x_old) for each anchor; weights [ANCHORS, G_PAD]; the candidates are those of a step."""
    group = tl.arange(0, G_PAD)[None, :]
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < D
    mask = present[:, None] & inside[None, :]
    elements = anchor[:, None] * D + offsets[None, :]
    old = tl.load(old_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.zeros([ANCHORS, BLOCK], tl.float32)
    for i in tl.range(0, G, num_stages=STAGES):
        weight = tl.sum(tl.where(group == i, weights, 0.0), axis=1)
        candidate = tl.load(candidates_ptr + (first_candidate + i) * D + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient += weight[:, None] * (candidate[None, :] - old)
    tl.store(gradient_ptr + elements, gradient, mask=mask)


@triton.jit(do_not_specialize=["tau_bits", "clip_bits"])
def _epilogue_gradient(
    old_ptr,  # [N, D]
    candidates_ptr,  # [T, G, D]
    advantages_ptr,  # [G] float32 or float64
    steps_ptr,  # [N] or None
    partials_ptr,  # [N, 2 G, tiles] float64
    loss_ptr,  # [N] float64
    ratio_ptr,  # [N, G] float64
    live_ptr,  # [N, G] bool
    gradient_ptr,  # [N, D] float32
    N,
    G,
    D,
    tiles,
    tau_bits,  # temperature of the summed squared distance
    clip_bits,
    N_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    blocks = tl.cdiv(N, ANCHORS)
    program = tl.program_id(0) // blocks
    # Backwards: the last steps' candidates are still in the L2 cache.
    step = tl.num_programs(1) - 1 - tl.program_id(1)
    anchor, present = _anchors_of_step(steps_ptr, step, tl.program_id(0) % blocks, N, N_PAD, ANCHORS)
    if tl.sum(present.to(tl.int32)) == 0:
        return

    group = tl.arange(0, G_PAD)[None, :]
    mask = present[:, None] & (group < G)  # [ANCHORS, G_PAD]
    rows = partials_ptr + (anchor[:, None] * 2 * G + group) * tiles
    tau = _float64(tau_bits)
    logits = -_sum_of_tiles(rows, mask, tiles, ANCHORS, G_PAD, CHUNK) / tau
    a = 2 / tau * _sum_of_tiles(rows + G * tiles, mask, tiles, ANCHORS, G_PAD, CHUNK)

    # The formulae of reference.py, line by line.
    logits = tl.where(group < G, logits, float("-inf"))
    logits -= tl.max(logits, axis=1)[:, None]
    old_log_prob = logits - tl.log(tl.sum(tl.exp(logits), axis=1))[:, None]
    near = _log1p(tl.sum(tl.exp(old_log_prob) * _expm1(tl.minimum(tl.maximum(a, -1.0), 1.0)), axis=1))
    shifted = old_log_prob + a
    top = tl.max(shifted, axis=1)
    exponential = tl.exp(shifted - top[:, None])
    total = tl.sum(exponential, axis=1)
    far = top + tl.log(total)
    log_ratio = a - tl.where(tl.max(tl.abs(a), axis=1) <= 1, near, far)[:, None]
    ratio_minus_one = _expm1(log_ratio)

    clip = _float64(clip_bits)
    advantage = tl.load(advantages_ptr + group, mask=group < G, other=0.0).to(tl.float64)
    clipped = ((advantage > 0) & (ratio_minus_one > clip)) | ((advantage < 0) & (ratio_minus_one < -clip))
    bounded = tl.where(clipped, tl.minimum(tl.maximum(ratio_minus_one, -clip), clip), ratio_minus_one)
    gain = tl.where(mask, bounded * advantage + advantage, 0.0)
    if program == 0:
        tl.store(loss_ptr + anchor, -tl.sum(gain, axis=1) / G, mask=present)
        tl.store(ratio_ptr + anchor[:, None] * G + group, ratio_minus_one, mask=mask)
        tl.store(live_ptr + anchor[:, None] * G + group, clipped == 0, mask=mask)

    if WITH_GRADIENT:
        # dJ / dx = (2 / tau) sum_i c_i (x_i - x_old), c_i = g_i - pi_i sum_j g_j, g_j = dJ / dlog rho_j
        g = tl.where(mask & (clipped == 0), advantage * (1 + ratio_minus_one), 0.0) / G
        c = g - exponential / total[:, None] * tl.sum(g, axis=1)[:, None]
        weights = (-2 / tau * c).to(tl.float32)
        candidate = step.to(tl.int64) * G  # the step's first
        for tile in range(program, tl.cdiv(D, BLOCK), tl.num_programs(0) // blocks):
            _store_gradient(
                gradient_ptr, old_ptr, candidates_ptr, weights, anchor, present, candidate, tile, G, D, ANCHORS, G_PAD, BLOCK, STAGES
            )


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _launch_partials(pred: Tensor, old_pred: Tensor, candidates: Tensor, step_index: Tensor | None) -> Tensor:
    """Return [N, 2 G, tiles] float64. Tensors are contiguous."""
    (anchors, size), (steps, group) = pred.shape, candidates.shape[:2]
    sizes = block_sizes("partials", anchors, steps)
    tiles = triton.cdiv(size, sizes.block)
    partials = torch.empty(anchors, 2 * group, tiles, dtype=torch.float64, device=pred.device)
    _partials[tiles * triton.cdiv(anchors, sizes.anchors), steps](
        pred, old_pred, candidates, step_index, partials, anchors, group, size, tiles,
        N_PAD=triton.next_power_of_2(anchors), ANCHORS=sizes.anchors, BLOCK=sizes.block, STAGES=sizes.num_stages,
        num_warps=sizes.num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return partials


def _of_steps(candidates: Tensor, step_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both contiguous; without an index, step 0 alone."""
    if step_index is None:
        return candidates[:1].contiguous(), None
    return candidates.contiguous(), step_index.contiguous()


@on_device_of_tensors
def copo_surrogate(
    pred: Tensor,
    old_pred: Tensor,
    candidates: Tensor,
    advantages: Tensor,
    step_index: Tensor | None,
    tau: float,
    clip: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss [N], ratio - 1 [N, G], live [N, G], and the gradient of each loss, [N, D] float32 (or [0, D]); tau: of the summed
    distance."""
    candidates, step_index = _of_steps(candidates, step_index)
    old_pred = old_pred.contiguous()
    if advantages.dtype not in (torch.float32, torch.float64):
        advantages = advantages.double()
    (anchors, size), (steps, group) = pred.shape, candidates.shape[:2]
    partials = _launch_partials(pred.contiguous(), old_pred, candidates, step_index)
    sizes = block_sizes("epilogue_gradient", anchors, steps)
    loss = partials.new_empty(anchors)
    ratio_minus_one = partials.new_empty(anchors, group)
    live = partials.new_empty(anchors, group, dtype=torch.bool)
    gradient = partials.new_empty(anchors if with_gradient else 0, size, dtype=torch.float32)
    tiles = triton.cdiv(size, sizes.block)
    programs = triton.cdiv(tiles, triton.cdiv(tiles, PROGRAMS)) if with_gradient else 1
    group_pad = triton.next_power_of_2(group)
    _epilogue_gradient[programs * triton.cdiv(anchors, sizes.anchors), steps](
        old_pred, candidates, advantages.contiguous(), step_index, partials, loss, ratio_minus_one, live, gradient,
        anchors, group, size, partials.shape[-1], _bits(tau), _bits(float("inf") if clip is None else clip),
        N_PAD=triton.next_power_of_2(anchors), G_PAD=group_pad, ANCHORS=sizes.anchors, BLOCK=sizes.block,
        CHUNK=chunk(sizes.anchors, group_pad), STAGES=sizes.num_stages, WITH_GRADIENT=with_gradient,
        num_warps=sizes.num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return loss, ratio_minus_one, live, gradient


def _aot_case(name: str, kernel: object, *, dtype: str, candidates: str, group: int, anchors: int, steps: int) -> AotCase:
    """Return a case with a chunk of Wan's latents, D = 299,520."""
    sizes = block_sizes("partials" if kernel is _partials else "epilogue_gradient", anchors, steps)
    pointers = {"pred_ptr": dtype, "old_ptr": dtype, "candidates_ptr": candidates, "steps_ptr": "i64", "partials_ptr": "fp64"}
    constants: dict[str, object] = {"N_PAD": triton.next_power_of_2(anchors), "ANCHORS": sizes.anchors, "BLOCK": sizes.block}
    constants["STAGES"] = sizes.num_stages
    integers = {"N": "i32", "G": "i32", "D": "i32", "tiles": "i32"}
    if kernel is _epilogue_gradient:
        del pointers["pred_ptr"]
        pointers |= {"advantages_ptr": "fp32", "loss_ptr": "fp64", "ratio_ptr": "fp64", "live_ptr": "i1", "gradient_ptr": "fp32"}
        integers |= {"tau_bits": "i64", "clip_bits": "i64"}
        group_pad = triton.next_power_of_2(group)
        constants |= {"G_PAD": group_pad, "CHUNK": chunk(sizes.anchors, group_pad), "WITH_GRADIENT": True}
    signature = {argument: f"*{element}" for argument, element in pointers.items()} | integers
    return AotCase(name, kernel, signature, constants, [*pointers, "D"], sizes.num_warps)


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [
        _aot_case(f"{kernel_name}.{name}", kernel, dtype=dtype, candidates=candidates, group=group, anchors=anchors, steps=steps)
        for kernel_name, kernel in (("partials", _partials), ("epilogue_gradient", _epilogue_gradient))
        for name, dtype, candidates, group, anchors, steps in (
            ("fp32", "fp32", "fp32", 12, 16, 4),
            ("bf16", "bf16", "fp32", 12, 16, 4),
            ("fp32_one_anchor_a_step", "fp32", "fp32", 12, 4, 4),
            ("bf16_group_of_64", "bf16", "bf16", 64, 64, 4),
        )
    ]
