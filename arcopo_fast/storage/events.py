"""TensorBoard's event file. Apart from `metrics`, because importing TensorBoard takes a while, and only a run that writes needs it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """Scalars, written at once: TensorBoard's own writer does it in a thread, where a full disk is a traceback and no exception.

    directory: made if it is not there; each writer has a file of its own in it. after: readers drop later steps of earlier writers.
    """

    def __init__(self, directory: Path, *, after: int = 0) -> None:
        resumed = directory.is_dir() and any(directory.iterdir())
        directory.mkdir(exist_ok=True)
        path = directory / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if resumed:
            start = SessionLog(status=SessionLog.START)
            self._records.write(Event(wall_time=time.time(), step=after + 1, session_log=start).SerializeToString())

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
        self._records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
