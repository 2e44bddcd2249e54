"""Linear layers with a low-rank adapter in plain PyTorch: the specification.

    y_i = act(x W_i^T + b_i + s (x A_i^T) B_i^T)          i = 1 .. L, act: nothing or tanh GELU

Layers that read one tensor share the product x [A_1; ..; A_L]^T. In half precision x A^T rounds once; x W^T + b rounds as the frozen
layer's does, so that an adapter of zeros adds exactly nothing; then the sum rounds once, and GELU once. Nothing as large as the output is
made beside it: the adapter is added where the product lies.

With z what goes into act, g the gradient of y, W frozen:

    g_z = g act'(z)      g_r = s g_z B      dx = sum_i g_z W_i + g_r A_i      dA = g_r^T x      dB = s g_z^T (x A^T)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Forward(NamedTuple):
    """The results of a forward pass.

    Attributes:
        outputs: y_i, each [T, out].
        reduced: x A^T of all layers, side by side, [T, L r].
        before: z_i, each [T, out], if wanted; none where there is no GELU.
    """

    outputs: list[Tensor]
    reduced: Tensor
    before: list[Tensor]


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], down: Tensor, up: Tensor, scale: float, gelu: bool, keep: bool
) -> Forward:
    """Return the layers' outputs.

    Args:
        x: [T, in].
        weights, biases: L times W [out, in] and b [out] or None.
        down, up: A [r, in] and B [out, r]; of several layers [L, r, in] and [L, out, r].
        scale: s.
        gelu: whether tanh GELU follows.
        keep: whether to return what goes into it.
    """
    reduced = x @ down.flatten(0, -2).T
    outputs: list[Tensor] = []
    for weight, bias, part, of_layer in zip(weights, biases, parts(reduced, len(weights)), ups(up)):
        out = F.linear(x, weight, bias)
        torch.addmm(out, part, of_layer.T, alpha=scale, out=out)  # addmm_ by the name under which its FLOP are counted
        outputs.append(out)
    if not gelu:
        return Forward(outputs, reduced, [])
    return Forward([F.gelu(out, approximate="tanh") for out in outputs], reduced, outputs if keep else [])


def backward(
    grads: Sequence[Tensor], x: Tensor, reduced: Tensor, weights: Sequence[Tensor], down: Tensor, up: Tensor, scale: float, grad_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, if wanted, and of A and B in their shapes, from those of the z_i; the other arguments are `forward`'s."""
    of_layers = [grad @ of_layer for grad, of_layer in zip(grads, ups(up))]
    grad_reduced = (of_layers[0] if len(weights) == 1 else torch.cat(of_layers, dim=1)).mul_(scale)
    of_x = None
    if grad_x:
        of_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            torch.addmm(of_x, grad, weight, out=of_x)
        torch.addmm(of_x, grad_reduced, down.flatten(0, -2), out=of_x)
    of_ups = [grad.T @ part for grad, part in zip(grads, parts(reduced, len(weights)))]
    grad_up = of_ups[0] if up.dim() == 2 else torch.stack(of_ups)
    return of_x, (grad_reduced.T @ x).view_as(down), grad_up.mul_(scale)


def parts(reduced: Tensor, layers: int) -> Sequence[Tensor]:
    """Return each layer's columns [T, r] of a tensor [T, L r]."""
    return (reduced,) if layers == 1 else reduced.chunk(layers, dim=1)


def ups(up: Tensor) -> Sequence[Tensor]:
    """Return B [out, r] of each layer."""
    return (up,) if up.dim() == 2 else up.unbind()
