"""Choice of the implementation of an operator: the Triton kernels where there is a GPU, plain PyTorch elsewhere, unless told otherwise.

    ARCOPO_KERNELS=reference python ...        for a whole process: auto (default), triton, reference
    with arcopo_kernels.use("reference"): ...  for a block of code
    arcopo_kernels.used("copo_surrogate")      what the last eager call ran on, and why

Triton kernels also run on CPU tensors, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before the first import, and force "triton".

Kernels are operators of PyTorch, registered by `operator`, so that compilers and autograd see them. Where neither looks, they are called
directly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

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


class Operator:
    """A registered operator, whose body is called directly where nothing needs the registration.

    The way through PyTorch's dispatcher and its Python wrappers takes longer than most of these kernels run. Compilers, fake tensors and
    other modes that see every call, transforms and autograd need it; a call without gradient does not.

    Attributes:
        registered: the operator as PyTorch knows it, for `register_fake`, `register_autograd` and `torch.library.opcheck`.
        body: the function that computes it.
        mutated: positions of the arguments that the body writes to.
    """

    def __init__(self, registered: torch.library.CustomOpDef, body: Callable[..., Any], mutated: Sequence[int]) -> None:
        self.registered, self.body, self.mutated = registered, body, mutated

    def __call__(self, *arguments: Any) -> Any:
        if _is_watched(arguments):
            return self.registered(*arguments)
        result = self.body(*arguments)
        for position in self.mutated:  # autograd refuses a saved tensor that was overwritten; a kernel of ours does not tell it
            if arguments[position] is not None:
                torch.autograd.graph.increment_version(arguments[position])
        return result


def operator(name: str, mutates: Sequence[str] = (), schema: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that registers a function under `arcopo::name`, with the arguments of `torch.library.custom_op`."""

    def register(body: Callable[..., Any]) -> Operator:
        mutated = [position for position, parameter in enumerate(signature(body).parameters) if parameter in mutates]
        return Operator(torch.library.custom_op(f"arcopo::{name}", body, mutates_args=mutates, schema=schema), body, mutated)

    return register


def _is_watched(arguments: Iterable[Any]) -> bool:
    """Return whether a compiler, a mode, a transform or autograd must see a call of an operator with these arguments."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    recording = torch.is_grad_enabled()
    for argument in arguments:
        for tensor in argument if isinstance(argument, list) else (argument,):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                if recording and tensor.requires_grad or tensor.is_meta:  # of the meta device only the shape is wanted
                    return True
            elif isinstance(tensor, torch.Tensor):  # a fake one, or another subclass that computes in its own way
                return True
    return False
