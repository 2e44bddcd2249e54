"""The public operator: checks at the boundary, choice of the implementation, registration of the kernel with torch.library."""

from __future__ import annotations

import torch
from arcopo_kernels.dispatch import choose, operator, unsupported
from arcopo_kernels.norm_silu import reference
from torch import Tensor

LARGEST_ROW = 8192
"""Channels of a pixel that a program can hold in registers."""


def norm_silu(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return silu(x / max(|x|, 1e-12) * sqrt(C) * weight), the norm over the channels. Constant: no gradient.

    Args:
        x: [B, .., C], any floating dtype, contiguous: a feature map with its channels innermost.
        weight: [C], of x's dtype.
        out: where to, of x's shape and dtype; each out[b] is contiguous, so that it can be the end of a buffer which holds more frames.
            In a compiled function do not slice a buffer that is itself a view with a storage offset: PyTorch (2.13) rebuilds such a view at
            the wrong place.

    Returns:
        `out`, a new tensor if None.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit, or a tensor that carries gradient.
    """
    out = torch.empty_like(x) if out is None else out
    _check(x, weight, out)
    if choose("norm_silu", x.device, unsupported(LARGEST_ROW, x.shape[-1], x)) == "reference":
        reference.norm_silu(x, weight, out)
    else:
        _norm_silu(x, weight, out)
    return out


def _check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.dim() < 2 or not x.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)} and strides {x.stride()}; expected [B, .., C], contiguous")
    for name, tensor, shape in (("weight", weight, x.shape[-1:]), ("out", out, x.shape)):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, x.dtype, x.device):
            found = f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{found}; expected {tuple(shape)} {x.dtype} on {x.device} for x {tuple(x.shape)}")
    if len(out) and (not out[0].is_contiguous() or len(out) > 1 and out.stride(0) < out[0].numel()):
        raise ValueError(
            f"out has strides {out.stride()}; expected each out[b] of {tuple(out.shape)} to be contiguous, and none to overlap"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, out)):
        raise ValueError("norm_silu has no gradient, but x, weight or out carries one; detach them or run under no_grad")


@operator("norm_silu", mutates=("out",))
def _norm_silu(x: Tensor, weight: Tensor, out: Tensor) -> None:
    from arcopo_kernels.norm_silu import triton

    if out.shape != x.shape:  # checked before; but see the note on compiled functions
        raise RuntimeError(f"torch.compile made a view {tuple(out.shape)} of the buffer for {tuple(x.shape)}; slice it outside")
    triton.forward(x, weight, out)


@_norm_silu.registered.register_fake
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None
