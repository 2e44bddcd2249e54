"""The public operators: checks at the boundary, choice of the implementation, registration of the kernel with torch.library.

The frozen products are the library's on every device. The kernel adds the adapters where they lie, and applies GELU on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from arcopo_kernels.dispatch import choose, operator, unsupported
from arcopo_kernels.lora_linear import reference
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST_RANK = 256


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0, *, gelu: bool = False
) -> Tensor:
    """Return x W^T + b + s (x A^T) B^T, or tanh GELU of it: a linear layer with LoRA over a frozen weight.

    Args:
        x: [..., in], any floating dtype.
        weight, bias: W [out, in] and b [out] or None, of x's dtype; constants.
        down, up: A [r, in] and B [out, r]. They work in x's dtype: where they have another, such as float32 masters over a base in half
            precision, they are cast for the call, and their gradients back.
        scale: s.
        gelu: apply tanh GELU; bit for bit what it gives of the output without.

    Returns:
        [..., out] of x's dtype. Differentiable in x, down and up, once.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a weight or bias that wants a gradient.
    """
    _check(x, [weight], [bias], down.shape, up.shape, (down, up))
    (out,) = _call("lora_linear", x, [weight], [bias], down, up, scale, gelu)
    return out


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    *,
    gelu: bool = False,
) -> list[Tensor]:
    """Return what `lora_linear` gives for each of several layers of equal sizes that read one tensor, such as q, k and v, up to rounding.

    They share the product with the A's, the addition of the adapters, and in the backward pass the gradient of x.

    Args:
        x: [..., in].
        weights, biases: of L layers, each as in `lora_linear`.
        down, up: all A's [L, r, in], all B's [L, out, r].
        scale, gelu: see `lora_linear`.

    Returns:
        L tensors [..., out].

    Raises:
        ValueError: see `lora_linear`.
    """
    layers = len(weights)
    if down.dim() != 3 or up.dim() != 3 or not layers == len(biases) == len(down) == len(up) or not layers:
        found = f"{layers} weights, {len(biases)} biases, down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise ValueError(f"{found}; expected L of each: down [L, r, in], up [L, out, r]")
    _check(x, weights, biases, down.shape[1:], up.shape[1:], (down, up))
    return _call("lora_linears", x, weights, biases, down, up, scale, gelu)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Sequence[int],
    up: Sequence[int],
    adapters: tuple[Tensor, Tensor],
) -> None:
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise ValueError(f"down is {tuple(down)} and up is {tuple(up)}; expected A [r, in] and B [out, r] with the same r, at least 1")
    expected = up[0], down[1]
    for weight, bias in zip(weights, biases):
        if weight.shape != expected:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [out, in] = {list(expected)} of the adapter")
        if bias is not None and bias.shape != expected[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [{expected[0]}]")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.dtype != x.dtype or tensor.device != x.device:
                found = f"{name} is {tensor.dtype} on {tensor.device}"
                raise ValueError(f"{found}; expected x's {x.dtype} on {x.device}: cast one of them")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} wants a gradient, and gets none here: freeze it with requires_grad_(False)")
    for adapter in adapters:
        if adapter.device != x.device:
            raise ValueError(f"the adapter is on {adapter.device}, x on {x.device}; expected one device")
    if x.dim() < 1 or x.shape[-1] != expected[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {expected[1]}], the inputs of the layer")


def _call(
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Tensor,
    up: Tensor,
    scale: float,
    gelu: bool,
) -> list[Tensor]:
    kernel = choose(name, x.device, unsupported(LARGEST_RANK, down.shape[-2], x)) == "triton"
    down, up, rows = down.to(x.dtype), up.to(x.dtype), x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or down.requires_grad or up.requires_grad):
        outputs: Sequence[Tensor] = _LoRALinears.apply(rows, down, up, scale, gelu, kernel, *weights, *biases)
    else:  # a function of autograd would only take the host's time
        outputs = _forward(rows, weights, biases, down, up, scale, gelu, kernel, keep=False).outputs
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outputs]


def _forward(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Tensor,
    up: Tensor,
    scale: float,
    gelu: bool,
    kernel: bool,
    *,
    keep: bool,
) -> reference.Forward:
    if not kernel:
        return reference.forward(rows, weights, biases, down, up, scale, gelu, keep)
    reduced = rows @ down.flatten(0, -2).T
    if len(weights) == 1:
        base = torch.nn.functional.linear(rows, weights[0], biases[0])[None]
    else:
        base = rows.new_empty(len(weights), len(rows), len(weights[0]))
        for out, weight, bias in zip(base, weights, biases):
            if bias is None:
                torch.mm(rows, weight.T, out=out)
            else:
                torch.addmm(bias, rows, weight.T, out=out)
    activated = torch.empty_like(base) if gelu and keep else None
    _lora_add(base, reduced, up if up.dim() == 3 else up[None], scale, gelu, activated)
    outputs = base if activated is None else activated
    return reference.Forward(list(outputs.unbind()), reduced, list(base.unbind()) if activated is not None else [])


class _LoRALinears(torch.autograd.Function):
    """The layers with gradient for x, A and B; rows [T, in], A and B of its dtype."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, down: Tensor, up: Tensor, scale: float, gelu: bool, kernel: bool, *frozen: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = len(frozen) // 2
        weights = [weight for weight in frozen[:layers] if weight is not None]
        outputs, reduced, before = _forward(rows, weights, frozen[layers:], down, up, scale, gelu, kernel, keep=True)
        ctx.save_for_backward(rows, reduced, down, up, *weights, *before)
        ctx.scale, ctx.layers = scale, layers
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, reduced, down, up, *rest = ctx.saved_tensors
        weights, before = rest[: ctx.layers], rest[ctx.layers :]
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        if before:
            grads = tuple(torch.ops.aten.gelu_backward(grad, z, approximate="tanh") for grad, z in zip(grads, before))
        gradients = reference.backward(grads, rows, reduced, weights, down, up, ctx.scale, ctx.needs_input_grad[0])
        return *gradients, *[None] * (3 + 2 * ctx.layers)


# Registration.


@operator("lora_add", mutates=("base", "activated"))
def _lora_add(base: Tensor, reduced: Tensor, up: Tensor, scale: float, gelu: bool, activated: Tensor | None) -> None:
    """Make base [L, T, out] base + s r B^T, or GELU of it; with `activated`, of base's shape, GELU goes there, and its argument stays.

    Args:
        reduced: r of all layers side by side, [T, L r].
        up: [L, out, r].
    """
    from arcopo_kernels.lora_linear import triton

    triton.add(base, reduced, up, scale, gelu, activated)


@_lora_add.registered.register_fake
def _(base: Tensor, reduced: Tensor, up: Tensor, scale: float, gelu: bool, activated: Tensor | None) -> None:
    return None
