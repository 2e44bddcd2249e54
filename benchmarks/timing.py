"""The times that calls take on a device, measured so that they can be compared with one another.

On a GPU a sample is the time between two device events around a call. Before it

* a kernel that only spins keeps the device busy while the host enqueues the call: launch latency is hidden, as it is behind the full queue
  of a training step, and the time the host needs for the call is reported by itself;
* the L2 cache is flushed by reading a buffer of several times its size. Reading, not writing: dirty lines of the buffer would be written
  back at the expense of the call.

Calls that are compared are sampled in turn, round by round, so that a drift of the clocks meets them all, and medians are compared. On a
CPU a sample is the wall-clock time of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 100
SPIN_CYCLES = 2.0e9
"""Cycles of `torch.cuda._sleep` in a second: at least the clock of today's GPUs, so that a spin is never too short."""
LONGEST_SPIN = 0.05
"""Seconds. A call whose host time is longer waits for the device inside, and no spin hides that."""


class Timing(NamedTuple):
    """Seconds: median and quartiles of the samples; `host` is the host's time to issue one call, 0 where there is no device queue."""

    median: float
    q1: float
    q3: float
    rounds: int
    host: float


class Ceilings(NamedTuple):
    """The best rates of a device: bytes a second of a large copy, read plus written, and FLOP a second of a large matrix product."""

    bandwidth: float
    matmul: float

    def floor(self, traffic: float, flops: float) -> float:
        """Seconds below which no implementation gets: the longer of moving the bytes and doing the arithmetic."""
        return max(traffic / self.bandwidth, flops / self.matmul)


class Timer:
    """Samples the time of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            flushed = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 26)
            self._flushed = torch.randint(1 << 30, (flushed // 4,), dtype=torch.int32, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_time(self, call: Call) -> float:
        """Warm `call` up, and give the seconds until it returns to the host on an idle device, the median of three; 0 on a CPU."""
        if self.device.type != "cuda":
            call()
            return 0.0
        times = []
        for _ in range(5):
            self.synchronize()
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        self.synchronize()
        return median(times[2:])

    def sample(self, call: Call, host: float = 0.0) -> float:
        """Seconds that one call takes on the device; `host` is its `host_time`."""
        if self.device.type != "cuda":
            begin = perf_counter()
            call()
            return perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(min(1.5 * host + 1e-4, LONGEST_SPIN) * SPIN_CYCLES))
        self._flushed.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Comparison:
    """Samples of several calls, taken in turn.

    The number of rounds follows from the first call (as many as fit into `seconds`); a slower call stops earlier, after the same time, but
    not before `MIN_ROUNDS`.
    """

    def __init__(self, timer: Timer, calls: Mapping[str, Call], seconds: float) -> None:
        self._timer = timer
        self._calls = dict(calls)
        self._host = {name: timer.host_time(call) for name, call in self._calls.items()}
        fitting = {}
        for name, call in self._calls.items():
            fitting[name] = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / timer.sample(call, self._host[name]))))
        self.rounds = next(iter(fitting.values()))
        self._rounds = {name: min(self.rounds, count) for name, count in fitting.items()}
        self._samples: dict[str, list[float]] = {name: [] for name in self._calls}
        self._round = 0

    def round(self) -> dict[str, float]:
        """One more sample of each call that has not had all of its own. The order rotates from round to round."""
        names = list(self._calls)
        shift = self._round % len(names)
        self._round += 1
        taken = {}
        for name in names[shift:] + names[:shift]:
            if len(self._samples[name]) < self._rounds[name]:
                taken[name] = self._timer.sample(self._calls[name], self._host[name])
                self._samples[name].append(taken[name])
        return taken

    def timings(self) -> dict[str, Timing]:
        return {name: _timing(samples, self._host[name]) for name, samples in self._samples.items() if samples}


def _timing(samples: list[float], host: float) -> Timing:
    q1, middle, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(middle, q1, q3, len(samples), host)


def compare(timer: Timer, calls: Mapping[str, Call], seconds: float) -> dict[str, Timing]:
    """The timings of all calls, about `seconds` of samples for each."""
    comparison = Comparison(timer, calls, seconds)
    for _ in range(comparison.rounds):
        comparison.round()
    return comparison.timings()


def measure_ceilings(timer: Timer) -> Ceilings:
    """Copy 2 GiB and multiply 8192 x 8192 bf16 matrices of random numbers; on a CPU, 32 MiB and 512 x 512 in float32."""
    gpu = timer.device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    source = torch.randn((1 << 30) if gpu else (1 << 23), device=timer.device, dtype=dtype)
    target = torch.empty_like(source)
    left, right = torch.randn(2, side, side, device=timer.device, dtype=dtype)
    out = torch.empty_like(left)
    timings = compare(timer, {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right, out=out)}, 0.2)
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(bandwidth=copied / timings["copy"].median, matmul=2 * side**3 / timings["matmul"].median)
