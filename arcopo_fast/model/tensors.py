"""Checks of the tensors of a file before they are used: of a dtype that weights have, finite, each under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from arcopo_fast.errors import UserError

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Value = TypeVar("Value")


def check_dtype(name: str, tensor: Tensor, source: str | Path) -> None:
    """Raise `UserError` if a tensor's dtype is none that weights have. Quantized weights need scales, which nothing here reads."""
    if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise UserError(
            f"{source}: {name} is of {kind}, which is not a dtype of weights; give float32, bfloat16 or float16, not quantized weights"
        )


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `UserError` if a tensor holds NaN or infinity.

    One pass for the smallest and the largest value: NaN passes through both, no temporary is made, and it takes less than copying the
    tensor does. `isfinite` would take several times as long, and memory of the tensor's size.
    """
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        smallest, largest = (value.item() for value in torch.aminmax(tensor.detach()))
        if not -torch.inf < smallest <= largest < torch.inf:
            cause = "float16 is too narrow for them, or they" if tensor.dtype == torch.float16 else "they"
            raise UserError(f"{source}: {name} holds values that are not finite; {cause} come from a damaged file or diverged training")


def rename(state: Mapping[str, Value], rule: Callable[[str], str], source: str | Path) -> dict[str, Value]:
    """Return a state dict under other names. Raises `UserError` if two names become one."""
    renamed: dict[str, Value] = {}
    for name, value in state.items():
        if (new := rule(name)) in renamed:
            raise UserError(f"{source}: two entries are both {new!r}, under different names; save one set of weights")
        renamed[new] = value
    return renamed


def replace_prefix(name: str, table: Mapping[str, str]) -> str:
    """Return a dotted name whose beginning is replaced as a table says; one that the table lacks is returned as it is."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name
