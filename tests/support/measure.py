"""What a computation keeps and how much lives at once, in bytes of storage; works on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from typing import Any, Callable, Iterable, TypeVar

import torch
from torch import Tensor
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
    """While active, counts storages from the operation that makes them until they are freed. `constants` are there anyway."""

    def __init__(self, constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in constants}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
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
