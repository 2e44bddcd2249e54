"""The public operators: checks at the boundary, choice of the implementation, registration of the kernels with torch.library.

All are one kernel: `qk_norm_rope` gives it two tensors, `rms_norm` one and no grid, `apply_rope` one and no weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from arcopo_kernels.dispatch import choose, operator, unsupported
from arcopo_kernels.qk_norm_rope import reference
from torch import Tensor

LARGEST_ROW = 32768
"""Elements of a token that a program can hold in registers."""


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *,
    grid: tuple[int, int, int],
    position: int | Tensor = 0,
    key_position: int | Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Apply RMSNorm over all heads together, then 3-axis RoPE, to a chunk's queries and keys.

    Args:
        query, key: [B, T, H, D], any floating dtype, any strides: slices of a fused projection are read in place. D is even.
        query_weight, key_weight: [H * D].
        grid: frames, rows and columns of the chunk's tokens; their product is T, columns vary fastest.
        position: RoPE time position of the chunk's first frame, at least 0: an int, or a tensor with one integer that is read when the
            kernel runs, so that a captured CUDA graph can be replayed for another chunk. Such a position and the frames after it must
            stay below 4096; beyond, the kernel gives NaN.
        key_position: the same for the keys where it differs.
        eps: of the norms.

    Returns:
        query and key, normalized and turned, [B, T, H, D], contiguous, of the dtype of query * query_weight. Differentiable in all four.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    key_position = position if key_position is None else key_position
    _check_pair(query, key, query_weight, key_weight)
    _check_rope(query, grid, position, key_position)
    if choose("qk_norm_rope", query.device, unsupported(LARGEST_ROW, len(query_weight), query, query_weight, key_weight)) == "reference":
        roped_query = reference.norm_rope(query, query_weight, position, grid, eps)
        return roped_query, reference.norm_rope(key, key_weight, key_position, grid, eps)
    starts = _starts(position, key_position)
    roped_query, roped_key = _qk_norm_rope(query, key, query_weight, key_weight, *starts, grid[1], grid[2], eps)
    return roped_query, roped_key


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x [..., E] / sqrt(mean(x^2) + eps) * weight [E], of the dtype of x * weight. Differentiable in both.

    Raises:
        ValueError: a weight of another shape or on another device.
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:] or weight.device != x.device:
        found = f"weight has shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"{found}; expected [E] on {x.device} for x {tuple(x.shape)} = [..., E]")
    if choose("rms_norm", x.device, unsupported(LARGEST_ROW, len(weight), x, weight)) == "reference":
        return reference.rms_norm(x, weight, eps)
    rows = x.reshape(1, math.prod(x.shape[:-1]), 1, x.shape[-1])
    return _qk_norm_rope(rows, None, weight, None, None, None, 0, 0, 0, 0, eps)[0].view(x.shape)


def apply_rope(x: Tensor, position: int | Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Apply 3-axis RoPE to x [B, frames * rows * columns, H, D] from time position `position` on, as `qk_norm_rope` does. Differentiable in
    x.

    Raises:
        ValueError: a shape that does not fit the grid, or a position that is none.
    """
    _check_rope(x, grid, position)
    if choose("apply_rope", x.device, unsupported(LARGEST_ROW, x.shape[2] * x.shape[3], x)) == "reference":
        return reference.apply_rope(x, position, grid)
    return _qk_norm_rope(x, None, None, None, *_starts(position, 0), grid[1], grid[2], 0.0)[0]


def _starts(position: int | Tensor, key_position: int | Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return positions on the device, then positions on the host."""
    query_start, query_position = (position, 0) if isinstance(position, Tensor) else (None, position)
    key_start, key_position = (key_position, 0) if isinstance(key_position, Tensor) else (None, key_position)
    return query_start, key_start, query_position, key_position


def _integral(x: Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)


def _check_pair(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, T, H, D]")
    if (key.shape, key.dtype, key.device) != (query.shape, query.dtype, query.device):
        actual, expected = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (key, query))
        raise ValueError(f"key is {actual}; expected the same as the query, {expected}")
    size = query.shape[2] * query.shape[3]
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.shape != (size,) or weight.device != query.device:
            found = f"{name} has shape {tuple(weight.shape)} on {weight.device}"
            raise ValueError(f"{found}; expected [{size}] on {query.device}: the norm is over all heads together")


def _check_rope(x: Tensor, grid: tuple[int, int, int], *positions: int | Tensor) -> None:
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no rotary positions; expected [B, T, H, D] with an even D")
    if len(grid) != 3 or math.prod(grid) != x.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens do not fill a grid of {tuple(grid)} frames, rows and columns")
    for position in positions:
        if isinstance(position, Tensor):
            if position.numel() != 1 or not _integral(position) or position.device != x.device:
                found = f"{tuple(position.shape)} {position.dtype} on {position.device}"
                raise ValueError(f"a position is a tensor {found}; expected one integer on {x.device}")
        elif position < 0:
            raise ValueError(f"a position is {position}; expected 0 or more")


# Registration. Without `key` there is one tensor; without its weight no norm; with rows 0 no RoPE.


def _outputs(query: Tensor, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None) -> list[Tensor]:
    """Make the results: contiguous, of the dtype that the weight promotes to."""
    outputs = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        if x is not None:
            outputs.append(x.new_empty(x.shape, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)))
    return outputs


_WEIGHTS = "Tensor? query_weight, Tensor? key_weight"
_PLACES = "Tensor? query_start, Tensor? key_start, SymInt query_position, SymInt key_position, SymInt rows, SymInt columns"


@operator("qk_norm_rope", schema=f"(Tensor query, Tensor? key, {_WEIGHTS}, {_PLACES}, float eps) -> Tensor[]")
def _qk_norm_rope(*arguments: Any) -> list[Tensor]:
    from arcopo_kernels.qk_norm_rope import triton

    outputs = _outputs(*arguments[:4])
    triton.forward(outputs, *arguments)
    return outputs


@_qk_norm_rope.registered.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return _outputs(*arguments[:4])


def _gradients(
    grad_query_out: Tensor,
    grad_key_out: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """Make the gradients of query, key and, if wanted (the last argument), their weights, for those that are given, in this order."""
    inputs = grad_query_out if query is None else query, grad_key_out if key is None else key
    weights = (query_weight, key_weight) if rest[-1] else ()
    return [x.new_empty(x.shape) for x in (*inputs, *weights) if x is not None]


_GRADIENTS = "Tensor grad_query_out, Tensor? grad_key_out"


@operator(
    "qk_norm_rope_backward",
    schema=f"({_GRADIENTS}, Tensor? query, Tensor? key, {_WEIGHTS}, {_PLACES}, float eps, bool weight_gradients) -> Tensor[]",
)
def _qk_norm_rope_backward(*arguments: Any) -> list[Tensor]:
    from arcopo_kernels.qk_norm_rope import triton

    outputs = _gradients(*arguments)
    triton.backward(outputs, *arguments)
    return outputs


@_qk_norm_rope_backward.registered.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return _gradients(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, query_weight, *_ = inputs
    ctx.tensors, ctx.weight_gradients = len(output), any(ctx.needs_input_grad[2:4])
    # RoPE alone is linear: its backward needs no input.
    ctx.save_for_backward(*((None, None) if query_weight is None else (query, key)), *inputs[2:6])
    ctx.constants = inputs[6:]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    grad_key_out = grads[1] if ctx.tensors == 2 else None
    outputs = _qk_norm_rope_backward(grads[0], grad_key_out, *ctx.saved_tensors, *ctx.constants, ctx.weight_gradients)
    of_inputs, of_weights = outputs[: ctx.tensors], outputs[ctx.tensors :]
    missing = [None] * (2 - ctx.tensors)
    return *of_inputs, *missing, *(of_weights or [None] * ctx.tensors), *missing, *[None] * 7


_qk_norm_rope.registered.register_autograd(_backward, setup_context=_setup_context)
