"""Counters of the bytes that a computation keeps, that live at once and that it moves. On the meta device nothing is computed."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import Any, Callable, Iterable, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def kept_for_backward(function: Callable[[], T], constants: Iterable[Tensor]) -> tuple[int, T]:
    """Bytes of the storages that autograd keeps, each counted once, `constants` (parameters, cached pages) not; and the result."""
    known = {tensor.untyped_storage()._cdata for tensor in constants}
    storages: list[torch.UntypedStorage] = []  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            storages.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storage.nbytes() for storage in storages), result


class LiveBytes(TorchDispatchMode):
    """While active, counts storages from the operation that makes them until they are freed. `constants` are there anyway.

    real: do not count what takes no memory: tensors on the meta device, and those that stand for others.
    """

    def __init__(self, constants: Iterable[Tensor], *, real: bool = False) -> None:
        super().__init__()
        self.real = real
        self.now = self.peak = self.largest = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in constants}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if self.real and (type(tensor) not in (Tensor, Parameter) or tensor.is_meta):
                continue
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


class MovedBytes(TorchDispatchMode):
    """While active, counts calls of operators, and what they read and write, by operator: each tensor once, views and new memory not.

    What an operator of ours does inside counts as one pass. A tensor that is written in place is read and written, by copies only written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages]
        named = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | (kwargs or {})
        written = [argument.name for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write]
        changed = [named[name] for name in written if isinstance(named.get(name), Tensor)]
        if (made or changed) and not name.startswith(("aten::empty", "aten::new_empty")):
            read = [] if name.endswith("_like") else [t for t in given if not (name == "aten::copy_" and t is changed[0])]
            self.calls[name] += 1
            self.by_operator[name] += sum(map(_distinct, [*read, *made, *changed]))
        return result

    def outside(self, *kinds: str) -> int:
        """Return the bytes moved by operators whose names contain none of `kinds`."""
        return sum(moved for name, moved in self.by_operator.items() if not any(kind in name for kind in kinds))


def _distinct(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension has one."""
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
