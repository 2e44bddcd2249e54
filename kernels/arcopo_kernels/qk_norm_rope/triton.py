"""RMSNorm over all heads and RoPE in one pass over the rows, and its backward.

A program holds the E = H * D elements of one token of one tensor as a tile [H, D] in registers: queries and keys are the third axis of
one launch. cos and sin come from a float32 table [2, positions, D / 2], computed in float64, of which a token reads
one row for each axis; the time axis starts where an int or a tensor on the device says. A position outside the table gives NaN. Computed in
float32 and rounded once.
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
from arcopo_kernels.qk_norm_rope.reference import rope_table, table_length
from torch import Tensor

WEIGHT_GRADIENT_PROGRAMS = 512
"""Partial sums of a weight's gradient: a constant, so that their order does not depend on the device."""


def block_sizes(heads: int, head_dim: int) -> tuple[int, int, int]:
    """Return BLOCK_H, BLOCK_D and num_warps.

    A thread has 16 elements, two 16-byte loads in half precision; a block has at most 256 threads where registers allow it. The
    larger the block of threads, the fewer rows are under way while one waits for its sum.
    """
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    block = block_h * block_d
    return block_h, block_d, min(max(block // 512, 1), 8 if block <= 8192 else 16)


@triton.jit
def _rotate(x, cos, sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Turn adjacent pairs of x [BLOCK_H, BLOCK_D]; cos and sin [1, BLOCK_D / 2]. A thread holds both elements of its pairs."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_H, BLOCK_D])


@triton.jit
def _cos_sin(table, length, start, position, token, rows, columns, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load cos and sin [1, BLOCK_D / 2] of one token."""
    HALF: tl.constexpr = HEAD_DIM // 2
    SPATIAL: tl.constexpr = HEAD_DIM // 6
    TIME: tl.constexpr = HALF - 2 * SPATIAL
    frame = token // (rows * columns) + position
    if start is not None:
        frame += tl.load(start).to(tl.int32)
    pair = tl.arange(0, BLOCK_D // 2)
    at = tl.where(pair < TIME, frame, tl.where(pair < TIME + SPATIAL, token // columns % rows, token % columns))
    in_table = (at >= 0) & (at < length)
    entry = table + at * HALF + pair
    cos = tl.load(entry, mask=in_table & (pair < HALF), other=0.0)
    sin = tl.load(entry + length * HALF, mask=in_table & (pair < HALF), other=0.0)
    return tl.where(in_table, cos, float("nan"))[None, :], tl.where(in_table, sin, float("nan"))[None, :]


@triton.jit
def _rstd(x, eps, SIZE: tl.constexpr):
    return tl.rsqrt((tl.sum(x * x) / SIZE + eps).to(tl.float32))


@triton.jit
def _forward_row(
    x, out, weight, table,  # without weight no norm, without table no RoPE
    length, start, position, stride_batch, stride_token, stride_head, tokens, rows, columns, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, dim = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (dim < HEAD_DIM)
    element = head * HEAD_DIM + dim
    source = x + batch * stride_batch + token.to(tl.int64) * stride_token
    values = tl.load(source + head * stride_head + dim, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
        values = values * _rstd(values, eps, HEADS * HEAD_DIM) * scale
    if table is not None:
        cos, sin = _cos_sin(table, length, start, position, token, rows, columns, HEAD_DIM, BLOCK_D)
        values = _rotate(values, cos, sin, BLOCK_H, BLOCK_D)
    row = out + (batch * tokens + token) * (HEADS * HEAD_DIM)
    tl.store(row + element, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["query_position", "key_position"])
def _forward(
    query, key, query_out, key_out, query_weight, key_weight, table, query_start, key_start, length, query_position, key_position,
    query_stride_batch, query_stride_token, query_stride_head, key_stride_batch, key_stride_token, key_stride_head,
    tokens, rows, columns, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(2) == 0:
        _forward_row(
            query, query_out, query_weight, table, length, query_start, query_position,
            query_stride_batch, query_stride_token, query_stride_head,
            tokens, rows, columns, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )
    else:
        if key is not None:
            _forward_row(
                key, key_out, key_weight, table, length, key_start, key_position,
                key_stride_batch, key_stride_token, key_stride_head,
                tokens, rows, columns, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
            )


@triton.jit
def _backward_rows(
    grad_out, x, grad_x, weight,
    partials,  # [programs, HEADS * HEAD_DIM] of the weight's gradient; None: not wanted
    table, length, start, position,
    grad_stride_batch, grad_stride_token, grad_stride_head, stride_batch, stride_token, stride_head,
    total, rows_per_program, tokens, rows, columns, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, dim = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (dim < HEAD_DIM)
    element = head * HEAD_DIM + dim
    start_row = tl.program_id(0) * rows_per_program
    if partials is not None:
        grad_weight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for row in range(start_row, tl.minimum(start_row + rows_per_program, total)):
        token, batch = row % tokens, tl.cast(row // tokens, tl.int64)
        source = grad_out + batch * grad_stride_batch + tl.cast(token, tl.int64) * grad_stride_token
        grad = tl.load(source + head * grad_stride_head + dim, mask=inside, other=0.0).to(tl.float32)
        if table is not None:
            cos, sin = _cos_sin(table, length, start, position, token, rows, columns, HEAD_DIM, BLOCK_D)
            grad = _rotate(grad, cos, -sin, BLOCK_H, BLOCK_D)
        if weight is not None:
            source = x + batch * stride_batch + tl.cast(token, tl.int64) * stride_token
            values = tl.load(source + head * stride_head + dim, mask=inside, other=0.0).to(tl.float32)
            rstd = _rstd(values, eps, HEADS * HEAD_DIM)
            normed = values * rstd
            if partials is not None:
                grad_weight += grad * normed
            grad *= tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
            grad = rstd * (grad - normed * (tl.sum(grad * normed) / (HEADS * HEAD_DIM)))
        target = grad_x + (batch * tokens + token) * (HEADS * HEAD_DIM)
        tl.store(target + element, grad.to(grad_x.dtype.element_ty), mask=inside)
    if partials is not None:
        tl.store(partials + tl.program_id(0) * (HEADS * HEAD_DIM) + element, grad_weight, mask=inside)


@triton.jit(do_not_specialize=["query_position", "key_position"])
def _backward(
    grad_query_out, grad_key_out, query, key, grad_query, grad_key, query_weight, key_weight, query_partials, key_partials,
    table, query_start, key_start, length, query_position, key_position,
    grad_query_out_stride_batch, grad_query_out_stride_token, grad_query_out_stride_head,
    grad_key_out_stride_batch, grad_key_out_stride_token, grad_key_out_stride_head,
    query_stride_batch, query_stride_token, query_stride_head, key_stride_batch, key_stride_token, key_stride_head,
    total, rows_per_program, tokens, rows, columns, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _backward_rows(
            grad_query_out, query, grad_query, query_weight, query_partials, table, length, query_start, query_position,
            grad_query_out_stride_batch, grad_query_out_stride_token, grad_query_out_stride_head,
            query_stride_batch, query_stride_token, query_stride_head,
            total, rows_per_program, tokens, rows, columns, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )
    else:
        if grad_key_out is not None:
            _backward_rows(
                grad_key_out, key, grad_key, key_weight, key_partials, table, length, key_start, key_position,
                grad_key_out_stride_batch, grad_key_out_stride_token, grad_key_out_stride_head,
                key_stride_batch, key_stride_token, key_stride_head,
                total, rows_per_program, tokens, rows, columns, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
            )


def _rows(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return x [B, T, H, D] with adjacent elements of a head side by side, and its other strides."""
    if x is None:
        return None, (0, 0, 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride()[:3]


def _table(x: Tensor, query_position: int, key_position: int, rows: int, columns: int) -> tuple[Tensor | None, int]:
    """Return the table for tokens [B, T, H, D] of a grid and its length; None without a grid."""
    if not rows:
        return None, 0
    grid = (x.shape[1] // (rows * columns), rows, columns)
    length = table_length(max(query_position, key_position), grid)
    return rope_table(x.shape[3], length, torch.float32, x.device), length


@on_device_of_tensors
def forward(
    outputs: list[Tensor],
    query: Tensor, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None,
    query_start: Tensor | None, key_start: Tensor | None, query_position: int, key_position: int, rows: int, columns: int, eps: float,
) -> None:  # fmt: skip
    """Fill `outputs`, one [B, T, H, D] for the query and one for the key, if there is one.

    *_position: the first frame's; *_start: on the device, added to it. rows 0: no RoPE.
    """
    if not query.numel():
        return
    batch, tokens, heads, head_dim = query.shape
    table, length = _table(query, query_position, key_position, rows, columns)
    block_h, block_d, num_warps = block_sizes(heads, head_dim)
    query_weight, key_weight = contiguous(query_weight, key_weight)
    (q, query_strides), (k, key_strides) = _rows(query), _rows(key)
    _forward[(tokens, batch, len(outputs))](
        q, k, outputs[0], outputs[1] if key is not None else None, query_weight, key_weight, table, query_start, key_start, length,
        query_position, key_position, *query_strides, *key_strides, tokens, rows, columns, eps,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


@on_device_of_tensors
def backward(
    outputs: list[Tensor], grad_query_out: Tensor, grad_key_out: Tensor | None,
    query: Tensor | None, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None,
    query_start: Tensor | None, key_start: Tensor | None, query_position: int, key_position: int, rows: int, columns: int, eps: float,
    weight_gradients: bool,
) -> None:  # fmt: skip
    """Fill `outputs`: gradients of query, key and, with `weight_gradients`, of their weights, those that are there. Without weights
    query and key are not needed."""
    if not grad_query_out.numel():
        for output in outputs:
            output.zero_()
        return
    batch, tokens, heads, head_dim = grad_query_out.shape
    total = batch * tokens
    rows_per_program = triton.cdiv(total, WEIGHT_GRADIENT_PROGRAMS) if weight_gradients else 1
    programs = triton.cdiv(total, rows_per_program)
    tensors = 1 if grad_key_out is None else 2
    partials: list[Tensor | None] = [None, None]
    if weight_gradients:
        partials[:tensors] = torch.empty(tensors, programs, heads * head_dim, dtype=torch.float32, device=grad_query_out.device)
    table, length = _table(grad_query_out, query_position, key_position, rows, columns)
    block_h, block_d, num_warps = block_sizes(heads, head_dim)
    query_weight, key_weight = contiguous(query_weight, key_weight)
    (grad_q_out, grad_query_out_strides), (grad_k_out, grad_key_out_strides) = _rows(grad_query_out), _rows(grad_key_out)
    (q, query_strides), (k, key_strides) = _rows(query), _rows(key)
    _backward[(programs, tensors)](
        grad_q_out, grad_k_out, q, k, outputs[0], outputs[1] if tensors == 2 else None, query_weight, key_weight, *partials,
        table, query_start, key_start, length, query_position, key_position,
        *grad_query_out_strides, *grad_key_out_strides, *query_strides, *key_strides,
        total, rows_per_program, tokens, rows, columns, eps,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    for output, partial in zip(outputs[tensors:], partials):
        if partial is not None:
            output.copy_(partial.sum(0))


def _case(name: str, kernel: Any, heads: int, head_dim: int, *, absent: str = "") -> AotCase:
    """Return a kernel at bf16 without the arguments `absent`; the query's position is on the device, the key's on the host."""
    block_h, block_d, num_warps = block_sizes(heads, head_dim)
    constants: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_H": block_h, "BLOCK_D": block_d}
    constants |= dict.fromkeys([*absent.split(), "key_start"])
    if "query_partials" in absent.split():
        constants["rows_per_program"] = 1  # Triton makes a 1 a constant at run time, too: there is no loop
    integers = ("length", "query_position", "key_position", "total", "rows_per_program", "tokens", "rows", "columns")
    pointers = {"table": "*fp32", "query_partials": "*fp32", "key_partials": "*fp32", "query_start": "*i64"}
    signature, divisible = {}, []
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        scalar = argument in integers or "_stride_" in argument
        signature[argument] = "i32" if scalar else "fp32" if argument == "eps" else pointers.get(argument, "*bf16")
        if argument == "length" or "_stride_" in argument or signature[argument].startswith("*"):
            divisible.append(argument)
    return AotCase(name, kernel, signature, {n: c for n, c in constants.items() if n in kernel.arg_names}, divisible, num_warps)


_KEY = "key key_out key_weight grad_key_out grad_key key_partials"


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [
        case
        for heads, model in ((12, "1.3B"), (40, "14B"))
        for case in (
            _case(f"forward {model}", _forward, heads, 128),
            _case(f"forward, norm only {model}", _forward, 1, heads * 128, absent=f"{_KEY} table query_start"),
            _case(f"forward, RoPE only {model}", _forward, heads, 128, absent=f"{_KEY} query_weight"),
            _case(f"backward {model}", _backward, heads, 128, absent="query_partials key_partials"),
            _case(f"backward, weights too {model}", _backward, heads, 128),
            _case(f"backward, RoPE only {model}", _backward, heads, 128, absent=f"{_KEY} query query_weight query_partials"),
        )
    ]
