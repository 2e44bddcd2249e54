"""The time of an iteration: named stages as NVTX ranges and seconds, and PyTorch traces.

    with profiling.record(device) as seconds:    an iteration
        with profiling.stage("denoise"): ...     anywhere in the library; costs next to nothing outside of `record`
    seconds == {"denoise": 1.23, ...}            complete once the block has ended

On a GPU a stage is measured by device events on the current stream, so nothing waits while it runs. A stage inside another one counts for
the outer one (the prefix's denoising is "prefix"), and shows as a range of its own in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_path

STAGES = ("prefix", "fork", "denoise", "clean", "reencode", "decode", "reward", "replay", "wait", "reduce", "optimizer")
"""The stages of an iteration, in their order.

fork: the branches' noise and page tables; reencode: the VAE's part in a context; wait: for slower ranks, and the small messages among them;
reduce: sums over all ranks.
"""


class _Recorder:
    """Sums up the outermost stages. `marks` are (stage, start, end): times, or events that are read when all is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.depth = 0
        self.marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self.marks:
            sums[name] = sums.get(name, 0.0) + (start.elapsed_time(end) / 1000 if self.on_gpu else end - start)
        known = [name for name in STAGES if name in sums]
        return {name: sums[name] for name in [*known, *(name for name in sums if name not in STAGES)]}


_recorder: _Recorder | None = None


@contextmanager
def record(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds by stage of work on `device`, filled in when the block ends. One at a time."""
    global _recorder
    if _recorder is not None:
        raise RuntimeError("stages are being recorded already")
    seconds: dict[str, float] = {}
    _recorder = recorder = _Recorder(device)
    try:
        yield seconds
    finally:
        _recorder = None
    seconds.update(recorder.seconds())


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count what runs in this block as `name`, one of `STAGES` or another."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    recorder.depth += 1
    start = recorder.now() if recorder.depth == 1 else None
    if recorder.on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if recorder.on_gpu:
            torch.cuda.nvtx.range_pop()
        recorder.depth -= 1
        if start is not None:
            recorder.marks.append((name, start, recorder.now()))


class Trace:
    """A PyTorch trace of `iterations` iterations after the first, which is slower than all others. Open it at ui.perfetto.dev.

        with trace.to(path):
            for ...: ...; trace.step()      after every iteration

    With 0 iterations it does nothing.

    Raises:
        UserError: the run, `of` iterations, is too short for it.
    """

    def __init__(self, iterations: int, *, of: int) -> None:
        if iterations and iterations + 1 > of:
            raise UserError(
                f"--profile {iterations} needs {iterations + 1} iterations, because the first is not traced; train.iterations is {of}"
            )
        self.iterations = iterations
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def to(self, path: Path) -> Iterator[None]:
        """Write it to `path`, at the latest when the block ends: if the loop ended early, what there is may show why."""
        if not self.iterations:
            yield
            return

        def write(profiler: torch.profiler.profile) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                profiler.export_chrome_trace(str(partial))

        plan = torch.profiler.schedule(wait=0, warmup=1, active=self.iterations, repeat=1)
        with torch.profiler.profile(schedule=plan, on_trace_ready=write, record_shapes=True) as self._profiler:
            yield

    def step(self) -> None:
        """Mark the end of an iteration."""
        if self._profiler is not None:
            self._profiler.step()
