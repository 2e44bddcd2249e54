"""The device, and memory of the host: settings that make tensor work on a CPU several times faster, and what waits in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from arcopo_fast.errors import UserError

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def tune_for_cpu(threads: int | None = None) -> None:
    """Flush denormal numbers to zero, and keep freed memory for the next tensor. Does nothing where the platform cannot.

    threads: of a matrix product; None: as many as PyTorch takes.

    glibc gives every block above 32 MB back to the system at once, and a training step that frees and allocates such blocks all the time
    spends up to two thirds of its time in page faults. Denormals (weights and moments that decay to nothing) slow a CPU down many times.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, -1)


def device_of(name: str, key: str = "generator.device") -> torch.device:
    """Return the device of a name; "auto" takes a GPU where there is one. Of several ranks each has its own, the current device.

    key: the setting or the option that says the name.

    Raises:
        UserError: there is no such device here, or it is one of several ranks that would share it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{key} is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if device.type == "cuda" and device.index is not None and ranks > 1:
        raise UserError(f"{key} is {name!r}, and each of the {ranks} ranks has a GPU of its own; use {key}=auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key} is {name!r}, but PyTorch sees no GPU here; use {key}=cpu")
    if device.type == "cuda" and device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise UserError(f"{key} is {name!r}, but PyTorch sees {count} GPUs here, counted from 0; use one of them")
    return device


@contextmanager
def resident(device: torch.device, *things: object, offload: bool) -> Iterator[None]:
    """With `offload`, modules among `things` are on `device` inside the block, in host memory after it; else they stay where they are."""
    modules = [thing for thing in things if isinstance(thing, nn.Module)] if offload else []
    for module in modules:
        nn.Module.to(module, device)  # not a library's own `to`, which may warn or convert
    try:
        yield
    finally:
        for module in modules:
            nn.Module.to(module, "cpu")
