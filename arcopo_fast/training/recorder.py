"""The records of a run: metrics, checkpoints, trace and progress. Only rank 0 writes them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from arcopo_fast.reports.stall import PATIENCE, notice, stalled_since
from arcopo_fast.runtime.console import Progress
from arcopo_fast.runtime.profiling import Trace
from arcopo_fast.storage.metrics import MetricsWriter
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.training.trainer import Trainer


class Recorder:
    """Writes metrics, checkpoints, the trace and the progress line, and warns. A context manager.

    Args:
        done: iterations that an earlier part of the run did.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory, trace: Trace, done: int) -> None:
        self.trainer, self.run, self.trace, self.done = trainer, run, trace, done
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=PATIENCE)
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        config = self.trainer.config
        if self.trainer.world.is_main:
            metrics = MetricsWriter(self.run.path, after=self.done, tensorboard=config.run.tensorboard)
            self.metrics = self._stack.enter_context(metrics)
            self.progress = self._stack.enter_context(Progress(config.train.iterations, self.done))
            self._stack.enter_context(self.trace.to(self.run.path / "profile" / "trace.json.gz"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, iteration: int, record: dict[str, Any]) -> None:
        """Write and show what an iteration measured."""
        if not self.trainer.world.is_main:
            return
        self.trace.step()
        self.metrics.write(iteration, record)
        self._recent.append({"step": iteration} | record)
        if len(self._recent) == self._recent.maxlen and (since := stalled_since(self._recent)) is not None:
            warnings.warn(notice(since), stacklevel=1)
            self._recent.clear()  # say it again only after as many more
        self.progress.update(record.get("reward"), **self.trainer.objective.headline(record))
        if iteration in (1, self.trainer.config.train.iterations) and (over := self.trainer.over_plan()):
            warnings.warn(over, stacklevel=1)

    def save(self, iteration: int) -> None:
        """Save a checkpoint after an iteration."""
        if self.trainer.world.is_main:
            self.trainer.save(self.run, iteration)
