"""Triton kernels: attention over one segment, its backward with dQ and dK/dV apart, and the merge of partial outputs.

Queries, outputs and their gradients are contiguous [B, Tq, H, D]; keys and values may have any strides that are 1 along D, so runs of a
page pool are read in place. No atomics: each program owns its rows of the result, and results are bitwise equal from run to run. Lengths
are masked in the last tile only. Scores are kept in base 2 inside the kernels; log-sum-exps outside are natural.

The forward and dQ kernels are written to be simple and portable. Whether they beat cuDNN or FlashAttention on any shape has not been
measured; only `merge`, which moves bytes, is used by default on a GPU. Skipping dK and dV of a frozen segment saves 3 of 5 matrix products.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import on_device_of_tensors, target_of
from arcopo_kernels.dispatch import FP_FUSION, INTERPRETED
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _tile(base, start, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Load rows [start, start + BLOCK) of a [tokens, HEAD_DIM] matrix; rows from `tokens` on read as 0."""
    rows = tl.arange(0, BLOCK)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :])
    if MASKED:
        tile = tl.load(pointers, mask=(start + rows < tokens)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_tile(base, tile, start, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(start + rows < tokens)[:, None])


@triton.jit
def _place(tokens, heads, BLOCK: tl.constexpr):
    """Return the first row, batch and head of this program; programs of one head are neighbors, so that its keys stay in the cache."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    batch_head = program // blocks
    return (program % blocks) * BLOCK, (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)


@triton.jit
def _attend(
    total, maximum, acc, query, key, value, scale, start, tokens_k, key_token, value_token,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    keys = _tile(key, start, key_token, tokens_k, HEAD_DIM, BLOCK_K, MASKED)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where((start + tl.arange(0, BLOCK_K) < tokens_k)[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    values = _tile(value, start, value_token, tokens_k, HEAD_DIM, BLOCK_K, MASKED)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return total * shrink + tl.sum(weights, 1), new_maximum, acc


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def _forward(
    query, key, value, out, lse, scale, tokens_q, tokens_k, heads,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start_q, batch, head = _place(tokens_q, heads, BLOCK_Q)
    row = heads * HEAD_DIM
    offset = batch * tokens_q * row + head * HEAD_DIM
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    scale = tl.cast(scale, tl.float32) * LOG2_E
    queries = _tile(query + offset, start_q, row, tokens_q, HEAD_DIM, BLOCK_Q, True)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    full_blocks = tokens_k // BLOCK_K * BLOCK_K
    for start in range(0, full_blocks, BLOCK_K):
        total, maximum, acc = _attend(
            total, maximum, acc, queries, key, value, scale, start, tokens_k, key_token, value_token, HEAD_DIM, BLOCK_K, False
        )
    if full_blocks < tokens_k:
        total, maximum, acc = _attend(
            total, maximum, acc, queries, key, value, scale, full_blocks, tokens_k, key_token, value_token, HEAD_DIM, BLOCK_K, True
        )
    _store_tile(out + offset, acc / total[:, None], start_q, row, tokens_q, HEAD_DIM, BLOCK_Q)
    rows = start_q + tl.arange(0, BLOCK_Q)
    tl.store(lse + (batch * heads + head) * tokens_q + rows, (maximum + tl.log2(total)) * LN_2, mask=rows < tokens_q)


@triton.jit
def _add_grad_query(
    acc, query, grad_out, key, value, lse, delta, scale, start, tokens_k, key_token, value_token,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    keys = _tile(key, start, key_token, tokens_k, HEAD_DIM, BLOCK_K, MASKED)
    values = _tile(value, start, value_token, tokens_k, HEAD_DIM, BLOCK_K, MASKED)
    weights = tl.exp2(tl.dot(query, tl.trans(keys), input_precision="ieee") * scale - lse[:, None])
    if MASKED:  # a missing key has score 0 here, and exp(-lse) may be infinite
        weights = tl.where((start + tl.arange(0, BLOCK_K) < tokens_k)[None, :], weights, 0.0)
    grad_scores = weights * (tl.dot(grad_out, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def _grad_query(
    grad_out, query, key, value, out, lse, grad_query, delta, scale, tokens_q, tokens_k, heads,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dQ, and delta = rowsum(dO * O) for `_grad_key_value`."""
    start_q, batch, head = _place(tokens_q, heads, BLOCK_Q)
    row = heads * HEAD_DIM
    offset = batch * tokens_q * row + head * HEAD_DIM
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    natural_scale = tl.cast(scale, tl.float32)
    queries = _tile(query + offset, start_q, row, tokens_q, HEAD_DIM, BLOCK_Q, True)
    grads = _tile(grad_out + offset, start_q, row, tokens_q, HEAD_DIM, BLOCK_Q, True)
    outs = _tile(out + offset, start_q, row, tokens_q, HEAD_DIM, BLOCK_Q, True)
    deltas = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    rows = start_q + tl.arange(0, BLOCK_Q)
    statistics = (batch * heads + head) * tokens_q + rows
    tl.store(delta + statistics, deltas, mask=rows < tokens_q)
    lses = tl.load(lse + statistics, mask=rows < tokens_q, other=0.0) * LOG2_E
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    full_blocks = tokens_k // BLOCK_K * BLOCK_K
    for start in range(0, full_blocks, BLOCK_K):
        acc = _add_grad_query(
            acc, queries, grads, key, value, lses, deltas, natural_scale * LOG2_E, start, tokens_k, key_token, value_token,
            HEAD_DIM, BLOCK_K, False,
        )  # fmt: skip
    # The tail is a loop of at most one step: its loads then go through shared memory as the main loop's do, which saves registers.
    for start in range(full_blocks, tokens_k, BLOCK_K):
        acc = _add_grad_query(
            acc, queries, grads, key, value, lses, deltas, natural_scale * LOG2_E, start, tokens_k, key_token, value_token,
            HEAD_DIM, BLOCK_K, True,
        )  # fmt: skip
    _store_tile(grad_query + offset, acc * natural_scale, start_q, row, tokens_q, HEAD_DIM, BLOCK_Q)


@triton.jit
def _add_grad_key_value(
    grad_key, grad_value, query, grad_out, key, value, lse, delta, scale, start, tokens_q, row,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    queries = _tile(query, start, row, tokens_q, HEAD_DIM, BLOCK_Q, MASKED)
    grads = _tile(grad_out, start, row, tokens_q, HEAD_DIM, BLOCK_Q, MASKED)
    rows = start + tl.arange(0, BLOCK_Q)
    if MASKED:  # an infinite lse gives a missing query no weight
        lses = tl.load(lse + rows, mask=rows < tokens_q, other=float("inf"))
        deltas = tl.load(delta + rows, mask=rows < tokens_q, other=0.0)
    else:
        lses, deltas = tl.load(lse + rows), tl.load(delta + rows)
    weights = tl.exp2(tl.dot(key, tl.trans(queries), input_precision="ieee") * scale - (lses * LOG2_E)[None, :])  # [BLOCK_K, BLOCK_Q]
    grad_value = tl.dot(weights.to(grads.dtype), grads, grad_value, input_precision="ieee")
    grad_scores = weights * (tl.dot(value, tl.trans(grads), input_precision="ieee") - deltas[None, :])
    grad_key = tl.dot(grad_scores.to(queries.dtype), queries, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def _grad_key_value(
    grad_out, query, key, value, lse, delta, grad_key, grad_value, scale, tokens_q, tokens_k, heads,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV, contiguous [B, Tk, H, D]."""
    start_k, batch, head = _place(tokens_k, heads, BLOCK_K)
    row = heads * HEAD_DIM
    query += batch * tokens_q * row + head * HEAD_DIM
    grad_out += batch * tokens_q * row + head * HEAD_DIM
    lse += (batch * heads + head) * tokens_q
    delta += (batch * heads + head) * tokens_q
    natural_scale = tl.cast(scale, tl.float32)
    keys = _tile(key + batch * key_batch + head * key_head, start_k, key_token, tokens_k, HEAD_DIM, BLOCK_K, True)
    values = _tile(value + batch * value_batch + head * value_head, start_k, value_token, tokens_k, HEAD_DIM, BLOCK_K, True)
    acc_key = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    acc_value = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    full_blocks = tokens_q // BLOCK_Q * BLOCK_Q
    for start in range(0, full_blocks, BLOCK_Q):
        acc_key, acc_value = _add_grad_key_value(
            acc_key, acc_value, query, grad_out, keys, values, lse, delta, natural_scale * LOG2_E, start, tokens_q, row,
            HEAD_DIM, BLOCK_Q, False,
        )  # fmt: skip
    for start in range(full_blocks, tokens_q, BLOCK_Q):
        acc_key, acc_value = _add_grad_key_value(
            acc_key, acc_value, query, grad_out, keys, values, lse, delta, natural_scale * LOG2_E, start, tokens_q, row,
            HEAD_DIM, BLOCK_Q, True,
        )  # fmt: skip
    offset = batch * tokens_k * row + head * HEAD_DIM
    _store_tile(grad_key + offset, acc_key * natural_scale, start_k, row, tokens_k, HEAD_DIM, BLOCK_K)
    _store_tile(grad_value + offset, acc_value, start_k, row, tokens_k, HEAD_DIM, BLOCK_K)


@triton.jit
def _lse_of(lse, batch, head, token, stride_batch, stride_head, inside):
    """Load the log-sum-exps of rows [BLOCK]; -inf, no weight, for a part that is None."""
    if lse is None:
        return tl.full(inside.shape, float("-inf"), tl.float32)
    else:
        return tl.load(lse + batch * stride_batch + head * stride_head + token, mask=inside, other=0.0)


@triton.jit
def _add_part(merged, part, weight, at, mask):
    if part is None:
        return merged
    else:
        return merged + tl.load(part + at, mask=mask, other=0.0).to(tl.float32) * weight[:, None]


@triton.jit
def _merge(
    part_0, part_1, part_2, part_3, out, lse_0, lse_1, lse_2, lse_3, lse, rows, tokens, heads,
    batch_0, head_0, batch_1, head_1, batch_2, head_2, batch_3, head_3,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of [B, Tq, H]
    inside = row < rows
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    a = _lse_of(lse_0, batch, head, token, batch_0, head_0, inside)
    b = _lse_of(lse_1, batch, head, token, batch_1, head_1, inside)
    c = _lse_of(lse_2, batch, head, token, batch_2, head_2, inside)
    d = _lse_of(lse_3, batch, head, token, batch_3, head_3, inside)
    maximum = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - maximum), tl.exp(b - maximum), tl.exp(c - maximum), tl.exp(d - maximum)
    total = (a + b) + (c + d)
    tl.store(lse + (batch * heads + head) * tokens + token, maximum + tl.log(total), mask=inside)
    dims = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    merged = tl.zeros([BLOCK, WIDTH], tl.float32)
    merged = _add_part(merged, part_0, a / total, at, mask)
    merged = _add_part(merged, part_1, b / total, at, mask)
    merged = _add_part(merged, part_2, c / total, at, mask)
    merged = _add_part(merged, part_3, d / total, at, mask)
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=mask)


MERGED = 4
"""Parts that one launch merges: a sink, a window, what a branch has cached of its own, and its chunk."""


class Blocks(NamedTuple):
    """Tile heights and the launch.

    Attributes:
        query, key: rows of a tile.
    """

    query: int
    key: int
    num_warps: int
    num_stages: int


def block_sizes(kernel: str, head_dim: int, itemsize: int, target: str) -> Blocks:
    """Return the tiles for "forward", "grad_query" or "grad_key_value" on a target, "sm_NN" or "gfxNNN".

    Chosen ahead of time, not measured: they spill no register on any of NVIDIA's targets (`python -m arcopo_kernels.aot`), whether Triton
    3.7, 3.8 or 3.9 compiles them, and fit the 99 KiB of shared memory of sm_86, sm_89 and sm_120. One stage fits the 64 KiB of AMD's GPUs.
    """
    nvidia = target.startswith("sm_")
    stages = 2 if nvidia else 1
    if itemsize > 2:  # exact products, without tensor cores: a thread keeps a row and a column of its one or two scores. For small models
        return Blocks(16, 32 if kernel == "grad_key_value" else 16, 8, stages)
    if kernel == "grad_key_value":
        return Blocks(32, 64, 8, stages)
    if head_dim < 128:
        return Blocks(128, 64, 8, stages)
    if kernel == "forward":  # one block fills a multiprocessor's registers: shared memory for a third stage would else lie idle
        return Blocks(128, 64, 8, 3 if nvidia else 1)
    # Tensor cores of sm_9x to sm_11x read operands from shared memory; the others' read registers, of which eight warps have enough.
    registers = nvidia and not 90 <= int(target[3:]) < 120
    return Blocks(64, 64, 8 if registers else 4, stages)


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the kernels cannot take a segment; None if they can."""
    if query.dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {query.dtype}"
    if INTERPRETED and query.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if query.shape[-1] not in HEAD_DIMS:
        return f"the kernels take a head_dim of {', '.join(map(str, HEAD_DIMS))}, not {query.shape[-1]}"
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        return "keys and values must have stride 1 along the head dimension"
    return None


def _strides(key: Tensor, value: Tensor) -> tuple[int, ...]:
    return *key.stride()[:3], *value.stride()[:3]


@on_device_of_tensors
def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, Tq, H, D] and lse [B, H, Tq] float32 of query, contiguous [B, Tq, H, D], over key and value [B, Tk, H, D]."""
    batch, tokens, heads, head_dim = query.shape
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    blocks = block_sizes("forward", head_dim, query.element_size(), target_of(query))
    _forward[(triton.cdiv(tokens, blocks.query) * batch * heads,)](
        query, key, value, out, lse, scale, tokens, key.shape[1], heads, *_strides(key, value),
        HEAD_DIM=head_dim, BLOCK_Q=blocks.query, BLOCK_K=blocks.key, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out, lse


@on_device_of_tensors
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dQ and, if trained, dK and dV, from the output and log-sum-exp over all segments; all but key and value contiguous."""
    batch, tokens, heads, head_dim = query.shape
    grad_query, delta = torch.empty_like(query), torch.empty_like(lse)
    sizes = (scale, tokens, key.shape[1], heads, *_strides(key, value))
    blocks = block_sizes("grad_query", head_dim, query.element_size(), target_of(query))
    _grad_query[(triton.cdiv(tokens, blocks.query) * batch * heads,)](
        grad_out, query, key, value, out, lse, grad_query, delta, *sizes,
        HEAD_DIM=head_dim, BLOCK_Q=blocks.query, BLOCK_K=blocks.key, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    if not trained:
        return grad_query, None, None
    grad_key, grad_value = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (key, value))
    blocks = block_sizes("grad_key_value", head_dim, query.element_size(), target_of(query))
    _grad_key_value[(triton.cdiv(key.shape[1], blocks.key) * batch * heads,)](
        grad_out, query, key, value, lse, delta, grad_key, grad_value, *sizes,
        HEAD_DIM=head_dim, BLOCK_Q=blocks.query, BLOCK_K=blocks.key, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


@on_device_of_tensors
def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts as `reference.merge_attention`, up to `MERGED` in one pass; all of them see a key. Only the last pass rounds to their
    dtype.

    Args:
        outs: [B, Tq, H, D], copied first unless contiguous.
        lses: [B, H, Tq], copied first unless their stride along Tq is 1.
    """
    dtype = outs[0].dtype
    parts = [(out.contiguous(), lse if lse.stride(2) == 1 else lse.contiguous()) for out, lse in zip(outs, lses)]
    batch, tokens, heads, head_dim = outs[0].shape
    rows, block = batch * tokens * heads, 32
    while len(parts) > 1:
        chosen, parts = parts[:MERGED], parts[MERGED:]
        merged = torch.empty_like(chosen[0][0], dtype=torch.float32 if parts else dtype)
        merged_lse = merged.new_empty((batch, heads, tokens), dtype=torch.float32)
        padding = [None] * (MERGED - len(chosen))
        strides = [stride for _, lse in chosen for stride in lse.stride()[:2]] + [0] * 2 * len(padding)
        _merge[(triton.cdiv(rows, block),)](
            *(out for out, _ in chosen), *padding, merged, *(lse for _, lse in chosen), *padding, merged_lse, rows, tokens, heads, *strides,
            HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), BLOCK=block, num_warps=4, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        parts.insert(0, (merged, merged_lse))
    return parts[0]


def _aot_case(kernel: str, function: triton.JITFunction, head_dim: int, dtype: str, target: str) -> AotCase:
    blocks = block_sizes(kernel, head_dim, 4 if dtype == "fp32" else 2, target)
    signature = {}
    for name in function.arg_names:
        if name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name.startswith(("tokens", "heads")) or name.endswith(("_batch", "_token", "_head")):
            signature[name] = "i32"
        elif name.islower():
            signature[name] = f"*{dtype}"
    divisible = [name for name in signature if name not in ("scale", "tokens_q", "tokens_k", "heads")]
    constants = {"HEAD_DIM": head_dim, "BLOCK_Q": blocks.query, "BLOCK_K": blocks.key}
    return AotCase(f"{kernel}[{head_dim}, {dtype}]", function, signature, constants, divisible, blocks.num_warps, blocks.num_stages)


def _merge_case(parts: int) -> AotCase:
    present = range(parts)
    pointers = {f"part_{i}": "*bf16" for i in present} | {f"lse_{i}": "*fp32" for i in present} | {"out": "*bf16", "lse": "*fp32"}
    integers = ["rows", "tokens", "heads", *(f"{name}_{i}" for i in range(MERGED) for name in ("batch", "head"))]
    constants: dict[str, Any] = {"HEAD_DIM": 128, "WIDTH": 128, "BLOCK": 32}
    constants |= dict.fromkeys(f"{name}_{i}" for i in range(parts, MERGED) for name in ("part", "lse"))
    return AotCase(f"merge of {parts}[128, bf16]", _merge, pointers | dict.fromkeys(integers, "i32"), constants, [*pointers])


def aot_cases(target: str) -> list[AotCase]:
    """Return cases with the tiles of "sm_NN" or "gfxNNN"."""
    return [
        _aot_case(kernel, function, head_dim, dtype, target)
        for kernel, function in (("forward", _forward), ("grad_query", _grad_query), ("grad_key_value", _grad_key_value))
        for head_dim, dtype in ((64, "bf16"), (128, "bf16"), (64, "fp32"), (128, "fp32"))
    ] + [_merge_case(parts) for parts in range(2, MERGED + 1)]
