"""The specification of the page copy, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def copy_pages(keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy page sources[i] to page targets[i] in every layer of keys and values [layers, pages, ...]."""
    for store in (keys, values):
        store[:, targets] = store[:, sources]
