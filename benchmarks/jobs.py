"""Jobs of several processes that train together, for benchmarks: started once, and then told which iterations to do."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from torch.distributed import TCPStore

from arcopo_fast.config.reading import load_config
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.train import one_iteration
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer


class Job:
    """The processes of one job, as a context manager. They are ready when it begins, and idle until they are asked.

    Args:
        ranks: processes, of one thread each.
        settings: of the toy recipe.
        start: the way its processes are started. A forked one is ready sooner, where libraries are loaded.
    """

    def __init__(self, ranks: int, settings: Sequence[str], start: Literal["spawn", "fork"] = "spawn") -> None:
        self.stages: list[dict[str, float]] = []
        context: Any = multiprocessing.get_context(start)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(ranks):
            connection, remote = context.Pipe()
            arguments = (rank, ranks, self._store.port, remote, [*settings, "train.threads=1"])
            self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self._pipes.append(connection)

    def __enter__(self) -> Job:
        for process in self.processes:
            process.start()
        try:
            self.ask("checksum")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have every rank call a method of `_Rank`; return what rank 0's returned."""
        for pipe in self._pipes:
            pipe.send((name, *arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        if failed := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise failed[0]
        return answers[0]

    def iterate(self, iterations: Sequence[int]) -> None:
        """Do iterations; their mean seconds by stage are appended to `stages`."""
        self.stages.append(self.ask("iterate", iterations))

    def cpu_seconds(self) -> float:
        """Return the CPU time that its processes have taken."""
        ticks = 0
        for process in self.processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class _Rank:
    """One process of a job."""

    def __init__(self, settings: Sequence[str], world: World) -> None:
        self.trainer = Trainer(load_config("toy", list(settings)), world)
        self.watch = LearningWatch(self.trainer.config)

    def checksum(self) -> int:
        """Return that of its adapter."""
        return self.trainer.checksum()

    def each_pivot(self) -> list[int]:
        """Return the first iteration of each pivot, in the pivots' order."""
        pivots = range(self.trainer.shape.chunks)
        return [next(step for step in count(1) if self.trainer.rollouts.pivot(step, 0) == pivot) for pivot in pivots]

    def iterate(self, iterations: Sequence[int]) -> dict[str, float]:
        """Do iterations; return their mean seconds by stage."""
        sums: dict[str, float] = {}
        for iteration in iterations:
            for name, seconds in one_iteration(self.trainer, self.watch, iteration)["time"].items():
                sums[name] = sums.get(name, 0.0) + seconds / len(iterations)
        return sums


def _work(rank: int, ranks: int, port: int, pipe: Connection, settings: Sequence[str]) -> None:
    tune_for_cpu(1)  # as `train` does
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with World.joined(600) as world:
        try:
            worker = _Rank(settings, world)
            while True:
                name, *arguments = pipe.recv()
                pipe.send(getattr(worker, name)(*arguments))
        except EOFError:
            pass
        except BaseException as error:
            pipe.send(error)
            raise
