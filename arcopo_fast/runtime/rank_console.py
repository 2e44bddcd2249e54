"""The consoles of a job's ranks: rank 0 speaks to the user, every other one keeps a log, and what ends a rank is heard at once.

Rank 0 prints what a process alone prints. What another one prints, its warnings and its progress, goes to DIR/logs/rank-N.log as soon as
the command has said where that is (`log_to`), and is kept in memory until then. So what all ranks say is printed once, and what only one
says stands in its log. An error that ends a rank goes to the terminal too, after "rank N: ", and to torchrun's summary.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from io import StringIO, TextIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from arcopo_fast.errors import UserError
from arcopo_fast.runtime.console import last_line
from arcopo_fast.runtime.place import Place
from arcopo_fast.storage.atomic import atomic_write

LOGS = "logs"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The variable that names the file from which torchrun reads what ended a process."""
NOTICED_LATER = 60
"""Seconds by which the end of a rank that only noticed another's is dated later than it was."""


class RankLog(TextIOBase):
    """The standard streams of a rank other than 0: text goes to its log, and is kept until that has a place."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._file: TextIO = StringIO()

    @property
    def kept(self) -> str:
        """Text that is in no file yet."""
        return self._file.getvalue() if isinstance(self._file, StringIO) else ""

    def move_to(self, directory: Path) -> None:
        """Write to a file of the directory from here on, after what it already holds."""
        path = directory / LOGS / f"rank-{self._place.rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        about = f"rank {self._place.rank} of {self._place.size}, process {os.getpid()} on {socket.gethostname()}"
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {about}\n{self.kept}")
        self._file.close()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return self._file.write(text)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def log_to(directory: Path) -> None:
    """Keep the log of this rank in a directory, which is made if need be. Does nothing on rank 0 and in a process alone."""
    if isinstance(sys.stderr, RankLog):
        sys.stderr.move_to(directory)


class Console:
    """The console of a command, as a context manager.

    place: of this process among the ranks of its job; None: it is alone, and nothing is changed.
    """

    def __init__(self, place: Place | None) -> None:
        self.place = place
        self._log = RankLog(place) if place and place.rank else None
        self._streams: tuple[Any, Any] = sys.stdout, sys.stderr

    def __enter__(self) -> Console:
        if self._log:
            sys.stdout = sys.stderr = self._log
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        sys.stdout, sys.stderr = self._streams
        if self._log:
            self._log.close()

    def fail(self, text: str, *, secondary: bool = False) -> None:
        """Say what ends this process, on the terminal and in its log.

        secondary: it follows from what has ended another rank.
        """
        terminal, place = self._streams[1], self.place
        lines = text if place is None else "\n".join(f"rank {place.rank}: {line}" for line in text.splitlines())
        last_line(terminal, lines)
        if self._log:
            with suppress(OSError):  # a full disk may be what is said
                self._log.write(text + "\n")
        if place and (path := os.environ.get(ERROR_FILE)):
            # torchrun takes the earliest for the cause, in whole seconds; who only noticed may well write it first.
            about = {"message": text, "extraInfo": {"timestamp": str(int(time.time()) + NOTICED_LATER * secondary)}}
            with suppress(OSError, UserError):  # whole or absent: torchrun reads it at any moment, and dies of half a file
                atomic_write(path, json.dumps({"message": about}))

    @property
    def kept(self) -> str:
        """Text that a rank's log holds, and no file: it would be lost with the process."""
        return self._log.kept if self._log else ""
