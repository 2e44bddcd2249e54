"""Ctrl-C between two iterations: what is being done is finished and kept, and the run says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The user stopped a run at a place from which it can go on; the message says how."""


class Interruption:
    """Within the block the first SIGINT or SIGTERM only sets `asked`; a second one interrupts at once. A context manager.

    waiting_for: what is finished first, for the line on stderr.
    """

    def __init__(self, waiting_for: str) -> None:
        self.waiting_for = waiting_for
        self.asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python's own rule for signal handlers
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\nfinishing {self.waiting_for} first; once more to stop at once", file=sys.stderr, flush=True)
