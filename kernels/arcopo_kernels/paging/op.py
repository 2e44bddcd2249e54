"""The page copy as an operator: checks at the boundary, then the implementation."""

from __future__ import annotations

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.paging import reference
from torch import Tensor


def copy_pages(keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy page sources[i] to page targets[i] in every layer, keys and values: one launch, and the host waits for nothing.

    Args:
        keys, values: [layers, pages, ...] of one shape, dtype and device; written in place.
        sources, targets: [n] int64 on the same device, page numbers from 0 on. No page may be a target twice, or a source and a target: the
            copies run in no order. This and their range are not checked, for the host does not know them.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or storage that requires gradient.
    """
    if keys.dim() < 2:
        raise ValueError(f"keys has shape {list(keys.shape)}; expected [layers, pages, ...]")
    if values.shape != keys.shape or values.dtype != keys.dtype or values.device != keys.device:
        raise ValueError(f"values is {_describe(values)}; expected what keys is, {_describe(keys)}")
    for name, pages in (("sources", sources), ("targets", targets)):
        if pages.dim() != 1 or pages.shape != sources.shape or pages.dtype != torch.int64 or pages.device != keys.device:
            raise ValueError(f"{name} is {_describe(pages)}; expected [{sources.numel()}] torch.int64 on {keys.device}")
    if keys.requires_grad or values.requires_grad:
        raise ValueError("keys and values must not require gradient: pages are constants")
    unsupported = None
    if not keys.is_contiguous() or not values.is_contiguous():
        unsupported = "keys or values are not contiguous"
    elif keys.itemsize not in (1, 2, 4, 8):
        unsupported = f"elements of {keys.itemsize} bytes are not supported"
    if dispatch.choose("copy_pages", keys.device, unsupported) == "triton":
        _copy_pages(keys, values, sources, targets)
    else:
        reference.copy_pages(keys, values, sources, targets)


@dispatch.operator("copy_pages", mutates=("keys", "values"))
def _copy_pages(keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor) -> None:
    from arcopo_kernels.paging import triton

    triton.copy_pages(keys, values, sources, targets)


@_copy_pages.registered.register_fake
def _(keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor) -> None:
    return None


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
