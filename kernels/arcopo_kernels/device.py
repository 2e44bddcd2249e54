"""Triton launches on the current GPU, wherever the tensors are: what launches a kernel makes theirs the current one.

What a launch depends on is the target that Triton compiles for there, named as in `python -m arcopo_kernels.aot --target`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

INTERPRETER_TARGET = "sm_90"
"""The target whose launches Triton's interpreter repeats, on the CPU."""


class BlockSizes(NamedTuple):
    """The tile of a kernel that goes over plain rows of elements.

    Attributes:
        block: the elements in it.
    """

    block: int
    num_warps: int


P = ParamSpec("P")
T = TypeVar("T")


def on_device_of_tensors(launcher: Callable[P, T]) -> Callable[P, T]:
    """Make the GPU of a launcher's first tensor argument, or of the first in a list, the current one during the call (a decorator)."""

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        inputs = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        with torch.cuda.device_of(next(x for x in inputs if isinstance(x, Tensor))):
            return launcher(*args, **kwargs)

    return launch


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors as a kernel takes them whose rows lie one behind the other; None where there is none."""
    return [t if t is None else t.contiguous() for t in tensors]


def target_of(x: Tensor) -> str:
    """Return what Triton compiles for on the GPU that holds `x`: "sm_NN" of NVIDIA, "gfxNNN" of AMD; `INTERPRETER_TARGET` on the CPU."""
    if not x.is_cuda:
        return INTERPRETER_TARGET
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(x.device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"
