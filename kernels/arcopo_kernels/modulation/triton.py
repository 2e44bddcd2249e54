"""Gated residual, LayerNorm and modulation in one pass over the rows, and its backward.

A program holds the E elements of one token in registers. Computed in float32; the residual sum and the result are rounded once each. The
norm sees the residual sum as it is stored, so the backward pass, which recomputes mean and variance from the stored sum, differentiates
what was computed. The fused operator equals its two halves bit for bit where all tensors have one dtype; where dtypes are mixed, a GPU may
add the elements of a row in another order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import contiguous, on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from torch import Tensor

TOKENS_PER_PARTIAL = 16
"""Tokens that a program sums for the gradients of gate, scale, shift, weight and bias: a constant, so that the order of sums is one too."""


def block_sizes(size: int) -> tuple[int, int]:
    """Return BLOCK and num_warps: 16 elements a thread, two 16-byte loads in half precision, in at most 256 threads where registers allow
    it.

    The larger the block of threads, the fewer rows are under way while one waits for its sums.
    """
    block = triton.next_power_of_2(size)
    return block, min(max(block // 512, 1), 8 if block <= 8192 else 16)


@triton.jit
def _normalize(x, inside, eps, SIZE: tl.constexpr):
    """Return (x - mean) / std and 1 / std of a row."""
    centered = tl.where(inside, x - tl.sum(x) / SIZE, 0.0)
    rstd = tl.rsqrt((tl.sum(centered * centered) / SIZE + eps).to(tl.float32))
    return centered * rstd, rstd


@triton.jit
def _forward(
    x,
    y,  # None: no residual
    gate,  # None: 1
    scale,  # None: 0
    shift,  # None: 0
    weight,  # None: 1
    bias,  # None: 0
    hidden,  # x + y * gate; None without y
    out,  # None: no norm
    gate_stride_batch,
    gate_stride_frame,
    scale_stride_batch,
    scale_stride_frame,
    shift_stride_batch,
    shift_stride_frame,
    frames,
    tokens,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)  # of [B, F, T]
    batch, frame = (row // tokens // frames).to(tl.int64), (row // tokens % frames).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < SIZE
    at = row.to(tl.int64) * SIZE + element
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        update = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            source = gate + batch * gate_stride_batch + frame * gate_stride_frame
            update *= tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
        stored = (values + update).to(hidden.dtype.element_ty)
        tl.store(hidden + at, stored, mask=inside)
        values = stored.to(tl.float32)
    if out is not None:
        values, _ = _normalize(values, inside, eps, SIZE)
        if weight is not None:
            values *= tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            values += tl.load(bias + element, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            source = scale + batch * scale_stride_batch + frame * scale_stride_frame
            values *= 1 + tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            source = shift + batch * shift_stride_batch + frame * shift_stride_frame
            values += tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_hidden,  # None without y
    grad_out,  # None without norm
    hidden,  # what was normalized
    y,  # None: no gradient of the gate wanted
    gate,
    scale,
    weight,
    grad_x,
    grad_y,  # None without gate: it is grad_x
    # Sums over a program's tokens, [B * F, programs, SIZE]; None: not wanted.
    gate_partials,  # of the gradient of hidden * y
    grad_partials,  # of grad_out
    normed_partials,  # of grad_out * normed
    gate_stride_batch,
    gate_stride_frame,
    scale_stride_batch,
    scale_stride_frame,
    frames,
    tokens,
    tokens_per_program,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(tokens, tokens_per_program)
    run = tl.program_id(0) // programs  # of [B, F]
    batch, frame = (run // frames).to(tl.int64), (run % frames).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < SIZE
    gate_sum = tl.zeros([BLOCK], tl.float32)
    grad_sum = tl.zeros([BLOCK], tl.float32)
    normed_sum = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0) % programs * tokens_per_program
    for token in range(start, tl.minimum(start + tokens_per_program, tokens)):
        at = (run.to(tl.int64) * tokens + token) * SIZE + element
        if grad_out is not None:
            grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
            normed, rstd = _normalize(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), inside, eps, SIZE)
            if grad_partials is not None:
                grad_sum += grad
                normed_sum += grad * normed
            if scale is not None:
                source = scale + batch * scale_stride_batch + frame * scale_stride_frame
                grad *= 1 + tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
            if weight is not None:
                grad *= tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
            mean, slope = tl.sum(grad) / SIZE, tl.sum(grad * normed) / SIZE
            grad = rstd * (grad - mean - normed * slope)
            if grad_hidden is not None:
                grad += tl.load(grad_hidden + at, mask=inside, other=0.0).to(tl.float32)
        else:
            grad = tl.load(grad_hidden + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if gate is not None:
            if gate_partials is not None:
                gate_sum += grad * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            source = gate + batch * gate_stride_batch + frame * gate_stride_frame
            grad *= tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * SIZE + element
    if gate_partials is not None:
        tl.store(gate_partials + at, gate_sum, mask=inside)
    if grad_partials is not None:
        tl.store(grad_partials + at, grad_sum, mask=inside)
        tl.store(normed_partials + at, normed_sum, mask=inside)


def _strides(modulation: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """Return a modulation [1 or B, 1 or F, 1, E] of x [B, F, T, E] and its strides over batch and frames, 0 where it is shared."""
    if modulation is None:
        return None, 0, 0
    modulation = modulation if modulation.stride(-1) == 1 else modulation.contiguous()
    over_batch, over_frames, *_ = modulation.expand(*x.shape[:2], 1, x.shape[3]).stride()
    return modulation, over_batch, over_frames


@on_device_of_tensors
def forward(
    hidden: Tensor | None, out: Tensor | None, x: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Fill `hidden`, the residual sum of x and y, and `out`, its norm (that of x without y), both [B, F, T, E]; None is not computed."""
    if not x.numel():
        return
    batch, frames, tokens, size = x.shape
    block, num_warps = block_sizes(size)
    (gate, *gate_strides), (scale, *scale_strides), (shift, *shift_strides) = (_strides(m, x) for m in (gate, scale, shift))
    row, update, weight, bias = contiguous(x, y, weight, bias)
    _forward[(batch * frames * tokens,)](
        row, update, gate, scale, shift, weight, bias, hidden, out, *gate_strides, *scale_strides, *shift_strides, frames, tokens, eps,
        SIZE=size, BLOCK=block, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


@on_device_of_tensors
def backward(
    grad_hidden: Tensor | None, grad_out: Tensor | None, hidden: Tensor | None, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    grad_x: Tensor, grad_y: Tensor | None, parameters: dict[str, Tensor],
) -> None:  # fmt: skip
    """Fill `grad_x`, `grad_y` (None without gate, where it is the same) and the gradients of modulations and weights in `parameters`."""
    if not grad_x.numel():
        for gradient in parameters.values():
            gradient.zero_()
        return
    batch, frames, tokens, size = grad_x.shape
    tokens_per_program = TOKENS_PER_PARTIAL if parameters else 1
    programs = triton.cdiv(tokens, tokens_per_program)
    names = ["gate"] if "gate" in parameters else []
    names += ["grad", "normed"] if parameters.keys() - {"gate"} else []
    shape = (batch * frames, programs, size)
    partials = {name: torch.empty(shape, dtype=torch.float32, device=grad_x.device) for name in names}
    block, num_warps = block_sizes(size)
    (gate, *gate_strides), (scale, *scale_strides) = _strides(gate, grad_x), _strides(scale, grad_x)
    grad_hidden, grad_out, hidden, y, weight = contiguous(grad_hidden, grad_out, hidden, y, weight)
    _backward[(batch * frames * programs,)](
        grad_hidden, grad_out, hidden, y, gate, scale, weight, grad_x, grad_y,
        partials.get("gate"), partials.get("grad"), partials.get("normed"),
        *gate_strides, *scale_strides, frames, tokens, tokens_per_program, eps,
        SIZE=size, BLOCK=block, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    sums = {name: partial.sum(1).view(batch, frames, 1, size) for name, partial in partials.items()}
    _fill_parameter_gradients(parameters, sums, scale, weight, bias)


def _fill_parameter_gradients(
    parameters: dict[str, Tensor], sums: dict[str, Tensor], scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Fill the gradients of modulations and weights from the sums of `_backward` over the tokens of each frame, [B, F, 1, E].

    Scale, weight and bias are constants of a frame, so the sums give their gradients, too.
    """
    for name, gradient in parameters.items():
        if name in ("gate", "shift"):
            of_frames = sums["gate" if name == "gate" else "grad"]
        elif name == "scale":
            of_frames = sums["normed"] if weight is None else sums["normed"] * weight
            of_frames = of_frames if bias is None else of_frames + sums["grad"] * bias
        else:
            of_frames = sums["normed" if name == "weight" else "grad"]
            of_frames = of_frames if scale is None else of_frames * (1 + scale.float())
        gradient.copy_(of_frames.sum_to_size(gradient.shape))


def _case(name: str, kernel: Any, size: int, *, absent: str = "") -> AotCase:
    """Return a kernel at bf16 without the arguments `absent`."""
    block, num_warps = block_sizes(size)
    sizes: dict[str, Any] = {"SIZE": size, "BLOCK": block}
    if _PARTIALS in absent:
        sizes["tokens_per_program"] = 1  # Triton makes a 1 a constant at run time, too: there is no loop
    signature, divisible = {}, []
    for argument in kernel.arg_names:
        if argument not in sizes and argument not in absent.split():
            scalar = "_stride_" in argument or argument in ("frames", "tokens", "tokens_per_program")
            pointer = "*fp32" if argument.endswith("_partials") else "*bf16"
            signature[argument] = "i32" if scalar else "fp32" if argument == "eps" else pointer
            if "_stride_" in argument or argument == "tokens_per_program" or signature[argument].startswith("*"):
                divisible.append(argument)
    return AotCase(name, kernel, signature, sizes | dict.fromkeys(absent.split()), divisible, num_warps)


_PARTIALS = "gate_partials grad_partials normed_partials"


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [
        case
        for size, model in ((1536, "1.3B"), (5120, "14B"))
        for case in (
            _case(f"forward, norm {model}", _forward, size, absent="y gate weight bias hidden"),
            _case(f"forward, residual {model}", _forward, size, absent="scale shift weight bias out"),
            _case(f"forward, both {model}", _forward, size, absent="weight bias"),
            _case(f"backward, norm {model}", _backward, size, absent=f"grad_hidden y gate weight grad_y {_PARTIALS}"),
            _case(f"backward, residual {model}", _backward, size, absent=f"grad_out hidden y scale weight {_PARTIALS}"),
            _case(f"backward, both {model}", _backward, size, absent=f"y weight {_PARTIALS}"),
            _case(f"backward, both, parameters too {model}", _backward, size),
        )
    ]
