"""The public operator: checks at the boundary, then one backend for each segment, merged by log-sum-exp.

    ARCOPO_ATTENTION=flash python ...     for a whole process: auto (default) or a name of `backends.BACKENDS`
"""

from __future__ import annotations

import math
import os
from typing import Any, Sequence

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.attention import backends, reference
from arcopo_kernels.attention.reference import Segment, merge_attention
from arcopo_kernels.dispatch import Choice
from torch import Tensor

__all__ = ["Segment", "merge_attention", "segment_attention"]

NAME = "segment_attention"


NAMES = ("auto", *backends.BACKENDS)

_forced = dispatch.checked(os.environ.get("ARCOPO_ATTENTION", "auto"), "ARCOPO_ATTENTION", NAMES)


def segment_attention(query: Tensor, segments: Sequence[Segment], *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Return the attention of `query` over all `segments` together, without concatenating or copying them.

    Each segment is attended to on its own, the outputs are merged by log-sum-exp. The queries of all branches attend to a shared segment as
    one long sequence. The backward pass gives each segment the output and log-sum-exp of the whole (see `backends`).

    Args:
        query: [B, Tq, H, D], any floating dtype.
        segments: keys and values [1 or B, Tk, H, D] of the query's dtype and device; batch 1 is shared by all B, its gradient their sum. A
            frozen segment gets no gradient; backends "math" and "triton" do not compute it, the others compute and drop it. Segments of
            zero tokens are skipped as long as one key is visible.
        scale: factor on the scores; 1/sqrt(D) when None.
        backend: who computes it, chosen for each segment. "auto": on a GPU in half precision FA4 or FA3 where ARCOPO_FLASH_KERNEL names a
            build (see `hub`) or PyTorch's flash operator has been switched to it, else cuDNN (compute capability 9.0 on), else PyTorch's
            flash operator, else Triton; in float32 PyTorch's memory-efficient operator; on a CPU PyTorch's flash kernel for CPUs, "cpu";
            everywhere else plain PyTorch, "math", which keeps all scores. Or a name: math, cpu, kernels, cudnn, flash, fa3, fa4,
            efficient, flash_attn (the package), triton. `arcopo_kernels.used("segment_attention")` says what the last call ran on, and
            `attention.chosen` what one would.

    Returns:
        [B, Tq, H, D] of the query's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, no key at all, or a backend that cannot take this call, with the reason.
    """
    _check(query, segments)
    visible = [segment for segment in segments if segment.key.shape[1]]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    requested, reason = _requested(query, backend)
    if requested == "math" or not query.numel():
        dispatch.record(NAME, Choice("math", reason))
        return reference.segment_attention(query, visible, scale)
    keys, values = [segment.key for segment in visible], [segment.value for segment in visible]
    out, _ = _forward(query, keys, values, [segment.frozen for segment in visible], scale, requested)
    return out


def chosen(query: Tensor, segments: Sequence[Segment], backend: str = "auto") -> Choice:
    """Return what `segment_attention` would run on, and why, without running it; the arguments and errors are its own."""
    name, reason = _requested(query, backend)
    if name == "math" or not query.numel():
        return Choice("math", reason)
    return backends.together(backends.choose(name, query, [(segment.key, segment.value) for segment in segments]))


def _check(query: Tensor, segments: Sequence[Segment]) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, Tq, H, D]")
    batch, _, heads, head_dim = query.shape
    for index, segment in enumerate(segments):
        for name, tensor in (("key", segment.key), ("value", segment.value)):
            fits = tensor.dim() == 4 and tensor.shape[0] in (1, batch) and tensor.shape[2:] == (heads, head_dim)
            if not fits or tensor.shape[:2] != segment.key.shape[:2]:
                expected = f"[1 or {batch}, Tk, {heads}, {head_dim}]"
                raise ValueError(
                    f"segment {index}: {name} has shape {tuple(tensor.shape)}; expected {expected}, the same Tk for key and value"
                )
            if tensor.dtype != query.dtype or tensor.device != query.device:
                raise ValueError(
                    f"segment {index}: {name} is {tensor.dtype} on {tensor.device}, the query {query.dtype} on {query.device}; "
                    "convert one of them"
                )
    if not sum(segment.key.shape[1] for segment in segments):
        raise ValueError(f"{len(segments)} segments hold no key at all; a query needs at least one")


def _requested(query: Tensor, backend: str) -> tuple[str, str]:
    """Return the backend to ask for, and why: the argument, the environment, `arcopo_kernels.use` or what suits the tensors, in order."""
    name = dispatch.checked(backend, "backend", NAMES)
    if name == "auto":
        name = _forced
    if name == "auto":
        name = {"auto": "auto", "reference": "math", "triton": "triton"}[dispatch.forced()]
    if name != "auto":
        return name, "asked for"
    if query.device.type == "cpu":
        return "auto", ""
    if query.device.type != "cuda":
        return "math", f"the tensors are on {query.device.type}, neither on a GPU nor on a CPU"
    if query.dtype not in (*backends.HALF, torch.float32):
        return "math", f"the fused kernels take float16, bfloat16 and float32, not {query.dtype}"
    return "auto", ""


# The operator. "auto" is resolved when it runs, so that a compiled graph asks the device it runs on.


@dispatch.operator("segment_attention")
def _forward(
    query: Tensor, keys: list[Tensor], values: list[Tensor], frozen: list[bool], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    query = query.contiguous()
    choices = backends.choose(backend, query, list(zip(keys, values)))
    dispatch.record(NAME, backends.together(choices))
    parts: list[tuple[Tensor, Tensor]] = []
    for choice, key, value in zip(choices, keys, values):
        rows = backends.folded(query, key)
        out, lse = backends.BACKENDS[choice.name].forward(rows, key, value, scale)
        if rows.shape[0] < query.shape[0]:  # [1, H, B * Tq] -> [B, H, Tq]
            lse = lse.squeeze(0).unflatten(-1, query.shape[:2]).transpose(0, 1)
        parts.append((out.reshape(query.shape), lse))
    out, lse = parts[0] if len(parts) == 1 else _merge(parts)
    return out.to(query.dtype).contiguous(), lse.contiguous()


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = zip(*parts)
    if outs[0].device.type == "cuda" and dispatch.TRITON_INSTALLED and dispatch.forced() != "reference":
        from arcopo_kernels.attention import triton

        return triton.merge(outs, lses)
    if outs[0].device.type == "cpu":
        return backends.merge_pairwise(outs, lses)
    return merge_attention(outs, lses)


@_forward.registered.register_fake
def _(query: Tensor, keys: list[Tensor], values: list[Tensor], frozen: list[bool], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    lse = query.new_empty((batch, heads, tokens), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


@dispatch.operator("segment_attention_backward")
def _backward(
    grad_out: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    trained: list[bool],
    scale: float,
    backend: str,
) -> list[Tensor]:
    """Return dQ, then dK and dV of each trained segment."""
    grad_out, query = grad_out.contiguous(), query.contiguous()
    choices = backends.choose(backend, query, list(zip(keys, values)))
    grad_queries: list[Tensor] = []
    grads: list[Tensor] = []
    for choice, key, value, is_trained in zip(choices, keys, values, trained):
        backward = backends.BACKENDS[choice.name].backward
        rows_grad, rows, rows_out = (backends.folded(tensor, key) for tensor in (grad_out, query, out))
        rows_lse = lse if rows.shape[0] == query.shape[0] else lse.transpose(0, 1).flatten(1).unsqueeze(0).contiguous()
        grad_query, grad_key, grad_value = backward(rows_grad, rows, key, value, rows_out, rows_lse, scale, is_trained)
        grad_queries.append(grad_query.reshape(query.shape))
        if is_trained:
            assert grad_key is not None and grad_value is not None
            grads += [grad_key.to(key.dtype).contiguous(), grad_value.to(value.dtype).contiguous()]
    return [_sum(grad_queries).to(query.dtype).contiguous(), *grads]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum, rounded once to the parts' dtype."""
    if len(parts) <= 2:
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total


@_backward.registered.register_fake
def _(grad_out: Tensor, query: Tensor, keys: list[Tensor], values: list[Tensor], *rest: Any) -> list[Tensor]:
    _, _, trained, *_ = rest
    grads = [tensor for key, value, is_trained in zip(keys, values, trained) if is_trained for tensor in (key, value)]
    return [tensor.new_empty(tensor.shape) for tensor in (query, *grads)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, frozen, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, out, lse, *keys, *values)
    ctx.frozen, ctx.scale, ctx.backend = frozen, scale, backend


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, out, lse, *saved = ctx.saved_tensors
    keys, values = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    _, key_wanted, value_wanted, *_ = ctx.needs_input_grad
    trained = [not fixed and (key or value) for fixed, key, value in zip(ctx.frozen, key_wanted, value_wanted)]
    grad_query, *grads = _backward(grad_out, query, keys, values, out, lse, trained, ctx.scale, ctx.backend)
    gradients = iter(grads)
    pairs = [(next(gradients), next(gradients)) if is_trained else (None, None) for is_trained in trained]
    return grad_query, [key for key, _ in pairs], [value for _, value in pairs], None, None, None


_forward.registered.register_autograd(_differentiate, setup_context=_setup_context)
