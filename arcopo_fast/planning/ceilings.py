"""The best that a device reaches, measured in a moment: the yardstick beside which a run's times are shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import NamedTuple

import torch

ROUNDS = 7


class Ceilings(NamedTuple):
    """The best rates of a device.

    Attributes:
        bandwidth: bytes a second of a large copy, read plus written.
        matmul: FLOP a second of a large matrix product.
    """

    bandwidth: float
    matmul: float

    def seconds(self, flops: float, traffic: float) -> float:
        """Return the seconds of so much arithmetic, and of moving so many bytes between it."""
        return flops / self.matmul + traffic / self.bandwidth


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Multiply two matrices of `dtype` and copy a tensor, both of random numbers: the median of a few rounds of each.

    On a GPU 8192 x 8192 and 512 MiB, a gigabyte and a half that is free again afterwards; on a CPU 512 x 512 and 32 MiB.
    """
    gpu = device.type == "cuda"
    side, size = (8192, 1 << 29) if gpu else (512, 1 << 25)
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.randn(size // 4, device=device)
    target, out = torch.empty_like(source), torch.empty_like(left)
    with torch.cuda.device(device) if gpu else nullcontext():  # whose stream the events mark
        copied = _seconds(lambda: target.copy_(source), gpu)
        multiplied = _seconds(lambda: torch.mm(left, right, out=out), gpu)
    return Ceilings(bandwidth=2 * size / copied, matmul=2 * side**3 / multiplied)


def _seconds(call: Callable[[], object], gpu: bool) -> float:
    call()
    samples = []
    for _ in range(ROUNDS):
        if gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
    return median(samples)
