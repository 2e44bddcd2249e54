"""Memory of the host and of the device: settings that make tensor work on a CPU several times faster, and what waits in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
