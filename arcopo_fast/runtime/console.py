"""A command and its user while it runs: a line that says how it is going, and Ctrl-C.

Ctrl-C and SIGTERM mean the same: what is complete is kept, and one line says how to go on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, TextIO

from arcopo_fast.errors import RankLost

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
KEPT = "what was complete by then is kept"
PATIENCE = 15.0
"""Seconds after a signal in which one of several ranks may finish what it is at: launchers such as torchrun kill it after 30."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a command at a place from which it can go on; the message says how."""


class Handler:
    """Within the block `handle` is called for SIGINT and SIGTERM, if this is the main thread. A context manager."""

    def __init__(self, handle: Callable[[int, FrameType | None], Any]) -> None:
        self._handle = handle
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Handler:
        if threading.current_thread() is threading.main_thread():  # Python's own rule for signal handlers
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Interruption(Handler):
    """Within the block the first signal only sets `asked`; a second one interrupts at once.

    One of several ranks, which its launcher kills soon after the signal, is interrupted also after `PATIENCE` seconds, by the end of the
    block, and where another rank has ended.

    waiting_for: what is finished first, for the line on stderr.
    """

    def __init__(self, waiting_for: str) -> None:
        super().__init__(self._ask)
        self._hurried = os.environ.get("WORLD_SIZE", "1") != "1"
        self.waiting_for = waiting_for
        self.asked = False

    def __enter__(self) -> Interruption:
        super().__enter__()
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._hurried:
            self._former[signal.SIGALRM] = signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        with suppress(RuntimeError):  # the signal came while the same stream was being written to
            print(f"\nfinishing {self.waiting_for} first; interrupt again to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if signal.SIGALRM in self._former:
            signal.setitimer(signal.ITIMER_REAL, 0)
        super().__exit__(kind, error, traceback)
        if self.asked and self._hurried and (kind is None or issubclass(kind, RankLost)):
            raise KeyboardInterrupt


def ignore() -> None:
    """Ignore signals from here on. Python gives them back their own meaning while it ends, when the command has its status."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise `KeyboardInterrupt`."""
    raise KeyboardInterrupt


def end(number: int, frame: FrameType | None) -> None:
    """Signal handler for where nothing could catch an exception, such as while modules are imported: one line, and the process ends."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"interrupted; {KEPT}\n".encode())
    os._exit(INTERRUPTED)


def last_line(stream: TextIO, text: str) -> None:
    """Write what a command ends with, below a progress line that may be standing on a terminal."""
    stream.write("\n" * stream.isatty() + text + "\n")
    stream.flush()


# The progress line -----------------------------------------------------------------------------------------------------------------


class Progress:
    """A progress line on stderr; in a log file, where it cannot be redrawn, a plain line every `seconds`. A context manager.

    Args:
        iterations: how many there will be.
        done: how many of them an earlier part of the run did.
        ranks: that share the iterations, for the time that is left.
        seconds: between lines of a log file.
        stream: where to write.
    """

    def __init__(self, iterations: int, done: int = 0, *, ranks: int = 1, seconds: float = 15.0, stream: TextIO | None = None) -> None:
        self.iterations = iterations
        self.ranks = ranks
        self.seconds = seconds
        self.stream = stream or sys.stderr
        self.done = self._before = done
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=iterations, initial=done, file=self.stream, unit="it", dynamic_ncols=True, bar_format=_BAR)

    def update(self, reward: float | None = None, **more: float) -> None:
        """One iteration is done; `reward` is its mean reward, where it has one, `more` other numbers to show."""
        self.done += 1
        shown = ({} if reward is None else {"reward": reward}) | more
        now = time.monotonic()
        pace = (now - self._start) / (self.done - self._before)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_join(shown)}, {pace:.2f} s/it", refresh=False)
            self._bar.update()
        elif now - self._last >= self.seconds or self.done == self.iterations:
            self._last = now
            left = pace * (self.iterations - self.done) / self.ranks
            print(f"{self.done}/{self.iterations}  {_join(shown)}  {pace:.2f} s/it  {_minutes(left)} left", file=self.stream, flush=True)

    def skip(self, iterations: int) -> None:
        """So many were done elsewhere: they count as done, and not for the pace."""
        self.done += iterations
        self._before += iterations
        if self._bar is not None:
            self._bar.update(iterations)

    def close(self) -> None:
        """Remove the bar."""
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
