"""Commands that `benchmarks.gpu` runs, each until a deadline, and what became of them."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from subprocess import PIPE, STDOUT, Popen
from threading import Event, Timer
from time import monotonic
from typing import Any, NamedTuple

from benchmarks import results

REPOSITORY = results.ROOT.parent
PASSED, FAILED, LATE, ABSENT, AT_WORK = "passed", "failed", "out of time", "not available", "at work"
KEPT_LINES = 60
"""Lines of a part's output, in the step's file, when the part does not pass."""

Part = dict[str, Any]
"""The record of a command in a step's file."""

_at_work: set[int] = set()  # process groups
_stopped = Event()


def stop(*_: object) -> None:
    """End every command that is at work, and start none any more, so that what they have measured is written: a handler of signals."""
    _stopped.set()
    for group in [*_at_work]:
        _kill(group)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Outcome(NamedTuple):
    """The end of a command: its exit status, None if it was killed at its deadline, and the end of its output."""

    status: int | None
    lines: list[str]
    seconds: float

    def part(self, name: str, verdict: str | None = None, **more: Any) -> Part:
        """Return what the step's file says of it."""
        verdict = LATE if self.status is None else verdict or (FAILED if self.status else PASSED)
        end = {} if verdict == PASSED else {"exit": self.status, "output": self.lines[-KEPT_LINES:]}
        return {"name": name, "status": verdict, "seconds": round(self.seconds, 1), **more, **end}


class Command:
    """A command at work, from the root of the repository: iterating gives the lines that it prints, which are printed, `label` before each.

    It and its children are killed at the deadline. `outcome` is there once all lines are.
    """

    outcome: Outcome

    def __init__(self, command: Sequence[str], deadline: float, label: str = "", **variables: str) -> None:
        self.command, self.deadline, self.label, self.variables = command, deadline, label, variables

    def __iter__(self) -> Iterator[str]:
        start = monotonic()
        if start >= self.deadline or _stopped.is_set():
            self.outcome = Outcome(None, ["not started"], 0.0)
            return
        path = os.pathsep.join(filter(None, ["kernels", ".", os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.variables}
        pipes: dict[str, Any] = {"stdout": PIPE, "stderr": STDOUT, "text": True, "errors": "replace"}
        process = Popen(self.command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)
        late: list[bool] = []

        def kill() -> None:
            late.append(True)
            _kill(process.pid)

        _at_work.add(process.pid)
        if _stopped.is_set():
            kill()
        timer = Timer(self.deadline - start, kill)
        timer.start()
        lines: deque[str] = deque(maxlen=2000)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(self.label + line, end="", flush=True)
                lines.append(line.rstrip())
                yield lines[-1]
            status = process.wait()
        finally:  # whoever reads may have had enough: nothing may go on beside what is timed next
            timer.cancel()
            if process.poll() is None:
                kill()
                process.wait()
            _at_work.discard(process.pid)
        self.outcome = Outcome(None if late or _stopped.is_set() else status, list(lines), monotonic() - start)


def run(command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
    """Run a `Command` to its end."""
    running = Command(command, deadline, label, **variables)
    for _ in running:
        pass
    return running.outcome


def side_by_side(calls: Sequence[Callable[[], Part]], jobs: int) -> Iterator[Part]:
    """Yield what the calls return, as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(call) for call in calls]):
            yield future.result()
