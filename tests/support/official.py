"""The names of the original Wan repository, for files as their authors write them: the inverse of what the package reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from arcopo_fast.model.checkpoints import _BLOCK_NAMES, _MODEL_NAMES, diffusers_name


def official_name(name: str) -> str:
    """Return the inverse of `diffusers_name`."""
    match = re.match(r"blocks\.\d+\.", name)
    prefix = match.group() if match else ""
    rest = name[len(prefix) :]
    for old, new in (_BLOCK_NAMES if match else _MODEL_NAMES).items():
        if rest == new or rest.startswith(new + "."):
            return prefix + old + rest[len(new) :]
    return name


def to_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the official names (without `model.`)."""
    return {official_name(name): tensor for name, tensor in state.items()}


def to_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under diffusers names; names that are not official are kept."""
    return {diffusers_name(name): tensor for name, tensor in state.items()}
