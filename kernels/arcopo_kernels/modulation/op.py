"""The public operators: checks at the boundary, choice of the implementation, registration of the kernels with torch.library.

All are one kernel: a residual, a norm, or both.
"""

from __future__ import annotations

from typing import Any

import torch
from arcopo_kernels.dispatch import choose, operator, unsupported
from arcopo_kernels.modulation import reference
from torch import Tensor

LARGEST_ROW = 32768
"""Elements of a token that a program can hold in registers."""


def layer_norm_modulate(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return LayerNorm(x; weight, bias) * (1 + scale) + shift, over the last dimension (adaLN of DiT, for each frame).

    Args:
        x: [B, F, T, E], any floating dtype: F frames of T tokens.
        scale, shift: [1 or B, 1 or F, 1, E]; None: 0.
        weight, bias: [E]; None: 1 and 0.
        eps: of the norm.

    Returns:
        [B, F, T, E]. Differentiable in all tensors.

    Raises:
        ValueError: a shape or device that does not fit.
    """
    _check(x, scale=scale, shift=shift)
    _check_affine(x, weight, bias)
    if choose("layer_norm_modulate", x.device, unsupported(LARGEST_ROW, x.shape[3], x, scale, shift, weight, bias)) == "reference":
        return reference.layer_norm_modulate(x, scale, shift, weight, bias, eps)
    return _modulation(x, None, None, scale, shift, weight, bias, eps, True)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + y * gate.

    Args:
        x, y: [B, F, T, E], any floating dtype.
        gate: [1 or B, 1 or F, 1, E]; None: 1.

    Returns:
        [B, F, T, E]. Differentiable in all tensors.

    Raises:
        ValueError: a shape or device that does not fit.
    """
    _check(x, y=y, gate=gate)
    if choose("gated_residual", x.device, unsupported(LARGEST_ROW, x.shape[3], x, y, gate)) == "reference":
        return reference.gated_residual(x, y, gate)
    return _modulation(x, y, gate, None, None, None, None, 0.0, False)[0]


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return h = `gated_residual`(x, y, gate) and `layer_norm_modulate`(h, ...) from one pass; the arguments are theirs.

    Bit for bit what the two give, where all tensors have one dtype.

    Returns:
        h and its norm, both [B, F, T, E].

    Raises:
        ValueError: a shape or device that does not fit.
    """
    _check(x, y=y, gate=gate, scale=scale, shift=shift)
    _check_affine(x, weight, bias)
    refusal = unsupported(LARGEST_ROW, x.shape[3], x, y, gate, scale, shift, weight, bias)
    if choose("gated_residual_layer_norm_modulate", x.device, refusal) == "reference":
        hidden = reference.gated_residual(x, y, gate)
        return hidden, reference.layer_norm_modulate(hidden, scale, shift, weight, bias, eps)
    hidden, out = _modulation(x, y, gate, scale, shift, weight, bias, eps, True)
    return hidden, out


def _check(x: Tensor, y: Tensor | None = None, **modulations: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, F, T, E], frames of tokens")
    if y is not None and (y.shape != x.shape or y.device != x.device):
        raise ValueError(f"y has shape {tuple(y.shape)} on {y.device}; expected that of x, {tuple(x.shape)} on {x.device}")
    batch, frames, _, size = x.shape
    for name, modulation in modulations.items():
        if modulation is None:
            continue
        shape = tuple(modulation.shape)
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, frames) and shape[2:] == (1, size)
        if not fits or modulation.device != x.device:
            expected = f"[1 or {batch}, 1 or {frames}, 1, {size}] on {x.device}"
            raise ValueError(f"{name} has shape {shape} on {modulation.device}; expected {expected}")


def _check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != x.shape[3:] or parameter.device != x.device):
            found = f"{name} has shape {tuple(parameter.shape)} on {parameter.device}"
            raise ValueError(f"{found}; expected [{x.shape[3]}] on {x.device}")


# Registration. Without y there is no residual; norm False: no norm.


def _outputs(
    norm: bool, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Make the residual sum and its norm: contiguous, of the dtype that the arguments promote to."""
    hidden = out = None
    dtype = x.dtype
    if y is not None:
        dtype = torch.promote_types(torch.promote_types(dtype, y.dtype), dtype if gate is None else gate.dtype)
        hidden = x.new_empty(x.shape, dtype=dtype)
    if norm:
        for modulation in (scale, shift):
            dtype = dtype if modulation is None else torch.promote_types(dtype, modulation.dtype)
        out = x.new_empty(x.shape, dtype=dtype)
    return hidden, out


_PARAMETERS = "Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias"


@operator("modulation", schema=f"(Tensor x, Tensor? y, {_PARAMETERS}, float eps, bool norm) -> Tensor[]")
def _modulation(*arguments: Any) -> list[Tensor]:
    from arcopo_kernels.modulation import triton

    *inputs, norm = arguments
    hidden, out = _outputs(norm, *inputs[:5])
    triton.forward(hidden, out, *inputs)
    return [t for t in (hidden, out) if t is not None]


@_modulation.registered.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *inputs, norm = arguments
    return [t for t in _outputs(norm, *inputs[:5]) if t is not None]


_NAMES = ("gate", "scale", "shift", "weight", "bias")


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Make the gradients of x, of y (None without gate: it is that of x), and, if wanted, of the parameters that are given.

    Args:
        arguments: of the backward operator.
    """
    grad_hidden, _, hidden, _, *parameters, _, wanted = arguments
    like = grad_hidden if hidden is None else hidden
    grad_x, grad_y = like.new_empty(like.shape), None if parameters[0] is None else like.new_empty(like.shape)
    return grad_x, grad_y, {name: p.new_empty(p.shape) for name, p in zip(_NAMES, parameters) if wanted and p is not None}


_OF_OUTPUTS = "Tensor? grad_hidden, Tensor? grad_out, Tensor? hidden, Tensor? y"


@operator("modulation_backward", schema=f"({_OF_OUTPUTS}, {_PARAMETERS}, float eps, bool parameter_gradients) -> Tensor[]")
def _modulation_backward(*arguments: Any) -> list[Tensor]:
    from arcopo_kernels.modulation import triton

    grad_hidden, grad_out, hidden, y, gate, scale, _, weight, bias, eps, _ = arguments
    grad_x, grad_y, parameters = _gradients(*arguments)
    triton.backward(grad_hidden, grad_out, hidden, y, gate, scale, weight, bias, eps, grad_x, grad_y, parameters)
    return [grad_x, *([] if grad_y is None else [grad_y]), *parameters.values()]


@_modulation_backward.registered.register_fake
def _(*arguments: Any) -> list[Tensor]:
    grad_x, grad_y, parameters = _gradients(*arguments)
    return [grad_x, *([] if grad_y is None else [grad_y]), *parameters.values()]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, gate, scale, shift, weight, bias, ctx.eps, norm = inputs
    ctx.parameter_gradients = any(ctx.needs_input_grad[2:7])
    ctx.dtypes = x.dtype, None if y is None else y.dtype
    hidden = (x if y is None else output[0]) if norm else None
    ctx.save_for_backward(hidden, y if ctx.parameter_gradients else None, gate, scale, shift, weight, bias)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed block is computed again by the first access only
    hidden, _, *parameters = saved
    x_dtype, y_dtype = ctx.dtypes
    grad_hidden = grads[0] if y_dtype is not None else None
    grad_out = grads[-1] if hidden is not None else None
    outputs = iter(_modulation_backward(grad_hidden, grad_out, *saved, ctx.eps, ctx.parameter_gradients))
    grad_x = next(outputs)
    grad_y = grad_x if parameters[0] is None else next(outputs)
    trained = (p is not None and ctx.parameter_gradients for p in parameters)
    grad_parameters = [next(outputs) if is_trained else None for is_trained in trained]
    return grad_x.to(x_dtype), None if y_dtype is None else grad_y.to(y_dtype), *grad_parameters, None, None


_modulation.registered.register_autograd(_backward, setup_context=_setup_context)
