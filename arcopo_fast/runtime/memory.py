"""Process-wide settings that make tensor work on a CPU several times faster, at the cost of memory that stays with the process."""

from __future__ import annotations

import ctypes

import torch

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def tune_for_cpu() -> None:
    """Flush denormal numbers to zero, and keep freed memory for the next tensor. Does nothing where the platform cannot.

    glibc gives every block above 32 MB back to the system at once, and a training step that frees and allocates such blocks all the time
    spends up to two thirds of its time in page faults. Denormals (weights and moments that decay to nothing) slow a CPU down many times.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, -1)
