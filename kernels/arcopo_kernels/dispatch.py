"""Choice of the implementation of an operator: the Triton kernels where there is a GPU, plain PyTorch elsewhere, unless told otherwise.

    ARCOPO_KERNELS=reference python ...        for a whole process: auto (default), triton, reference
    with arcopo_kernels.use("reference"): ...  for a block of code
    arcopo_kernels.used("copo_surrogate")      what the last eager call ran on, and why

Triton kernels also run on CPU tensors, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before the first import, and force "triton".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference")
TRITON_INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
FP_FUSION = True
"""Whether the compiler may turn a product and a sum into one fused multiply-add, rounded once; `enable_fp_fusion` of every launch.

Stated because Triton's default differs: on before release 3.10, off from it on. On for all kernels: float32 and float64 products without
tensor cores take half the instructions, and nothing that must be exact is lost. The values that must be exactly zero, such as a log-ratio
without an update, come from differences of loaded values and from products with such a zero, which fusion leaves as they are.
"""


class Choice(NamedTuple):
    """A chosen implementation.

    Attributes:
        name: "triton" or "reference" (of attention, a backend).
        reason: why it was chosen.
    """

    name: str
    reason: str


def checked(name: str, origin: str, known: Iterable[str] = IMPLEMENTATIONS) -> str:
    """Return a name that `origin`, a variable or an argument, gives. Raises ValueError if it is not among the known ones."""
    if name not in known:
        raise ValueError(f"{origin} is {name!r}; expected one of {', '.join(known)}")
    return name


_forced = checked(os.environ.get("ARCOPO_KERNELS", "auto"), "ARCOPO_KERNELS")
_used: dict[str, Choice] = {}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run operators with one implementation inside the block: "auto", "triton" or "reference"."""
    global _forced
    before, _forced = _forced, checked(name, "the implementation")
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """Return what `use` or ARCOPO_KERNELS asks for: "auto", "triton" or "reference"."""
    return _forced


def record(operator: str, choice: Choice) -> None:
    """Remember what a call of `operator` runs on, for `used`. While a graph is compiled nothing runs, and nothing is remembered."""
    if not torch.compiler.is_compiling():
        _used[operator] = choice


def used(operator: str) -> Choice | None:
    """Return the implementation that the last eager call of an operator ran on; None if it has not been called."""
    return _used.get(operator)


def choose(operator: str, device: torch.device, unsupported: str | None = None) -> str:
    """Return the implementation for a call of `operator` on `device`.

    Args:
        unsupported: why the Triton version cannot take these arguments; None if it can.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: Triton was asked for by name and cannot run this call.
    """
    choice = _choice(_forced, device, unsupported)
    record(operator, choice)
    if _forced == "triton" and choice.name != "triton":
        raise ValueError(f"{operator}: Triton was asked for, but {choice.reason}; use 'auto' to fall back to plain PyTorch")
    return choice.name


def unsupported(largest: int, size: int, *tensors: torch.Tensor | None) -> str | None:
    """Return why a kernel that holds a row of `size` elements in registers, `largest` at most, cannot take tensors; None if it can."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{tensor.dtype} is computed in plain PyTorch"
    return f"a row of {size} elements does not fit a program's {largest}" if size > largest else None


def _choice(forced: str, device: torch.device, unsupported: str | None) -> Choice:
    if forced == "reference":
        return Choice("reference", "asked for")
    if not TRITON_INSTALLED:
        return Choice("reference", "triton is not installed")
    if unsupported is not None:
        return Choice("reference", unsupported)
    if INTERPRETED and forced == "triton":
        return Choice("triton", "asked for, in Triton's interpreter")
    if device.type != "cuda":
        return Choice("reference", f"the tensors are on {device.type}, not on a GPU")
    return Choice("triton", "asked for" if forced == "triton" else "the tensors are on a GPU")
