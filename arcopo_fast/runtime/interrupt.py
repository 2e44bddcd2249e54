"""Ctrl-C and SIGTERM, which mean the same: what is complete is kept, and one line says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
KEPT = "what was complete by then is kept"


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

    waiting_for: what is finished first, for the line on stderr.
    """

    def __init__(self, waiting_for: str) -> None:
        super().__init__(self._ask)
        self.waiting_for = waiting_for
        self.asked = False

    def __enter__(self) -> Interruption:
        super().__enter__()
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(RuntimeError):  # the signal came while the same stream was being written to
            print(f"\nfinishing {self.waiting_for} first; once more to stop at once", file=sys.stderr, flush=True)


def ignore() -> None:
    """From here on signals change nothing. Python gives them back their own meaning while it ends, when the command has its status."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise `KeyboardInterrupt`."""
    raise KeyboardInterrupt


def end(number: int, frame: FrameType | None) -> None:
    """Signal handler for where nothing could catch an exception, such as while modules are imported: one line, and the process ends."""
    os.write(2, f"interrupted; {KEPT}\n".encode())
    os._exit(INTERRUPTED)
