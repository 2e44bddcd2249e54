"""One line that says how a run is going: reward, time per iteration, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """A progress line on stderr; in a log file, where it cannot be redrawn, a plain line every `seconds`. A context manager.

    Args:
        iterations: how many there will be.
        done: how many of them an earlier part of the run did.
        rank: only rank 0 says anything.
        seconds: between lines of a log file.
        stream: where to write.
    """

    def __init__(self, iterations: int, done: int = 0, *, rank: int = 0, seconds: float = 15.0, stream: TextIO | None = None) -> None:
        self.iterations = iterations
        self.silent = rank != 0
        self.seconds = seconds
        self.stream = stream or sys.stderr
        self.done = self._before = done
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if not self.silent and self.stream.isatty():
            self._bar = tqdm(total=iterations, initial=done, file=self.stream, unit="it", dynamic_ncols=True, bar_format=_BAR)

    def update(self, reward: float | None = None, **more: float) -> None:
        """One iteration is done; `reward` is its mean reward, where it has one, `more` other numbers to show."""
        self.done += 1
        if self.silent:
            return
        shown = ({} if reward is None else {"reward": reward}) | more
        now = time.monotonic()
        pace = (now - self._start) / (self.done - self._before)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_join(shown)}, {pace:.2f} s/it", refresh=False)
            self._bar.update()
        elif now - self._last >= self.seconds or self.done == self.iterations:
            self._last = now
            left = pace * (self.iterations - self.done)
            print(f"{self.done}/{self.iterations}  {_join(shown)}  {pace:.2f} s/it  {_minutes(left)} left", file=self.stream, flush=True)

    def skip(self, iterations: int) -> None:
        """So many were done elsewhere: they count as done, and not for the pace."""
        self.done += iterations
        self._before += iterations
        if self._bar is not None:
            self._bar.update(iterations)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed} < {remaining}{postfix}]"


def _join(shown: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
