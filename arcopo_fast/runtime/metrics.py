"""What a run measures: one JSON line for each step, and the same numbers as TensorBoard scalars.

A line depends on the run's seed alone, times aside: keys are sorted, and everything measured in seconds lies under "time".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from arcopo_fast.errors import UserError
from arcopo_fast.runtime.run_dir import atomic_write

if TYPE_CHECKING:
    from arcopo_fast.runtime.events import Events

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to metrics.jsonl in a run directory; a context manager.

    after: of what an earlier part of the run wrote, keep the steps up to this one only; None: all. A line that was torn when a process was
    killed is dropped. tensorboard: also write events to tensorboard/.
    """

    def __init__(self, directory: str | Path, *, after: int | None = None, tensorboard: bool = True) -> None:
        path = Path(directory) / FILE
        if path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            atomic_write(path, b"".join(line for line in lines if after is None or json.loads(line)["step"] <= after))
        # Unbuffered: what could not be written is not tried again when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._events: Events | None = None
        if tensorboard:
            from arcopo_fast.runtime.events import Events

            self._events = Events(Path(directory) / "tensorboard")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line, complete or not at all.

        Args:
            step: the iteration.
            metrics: numbers (or tensors of one element), texts, and mappings of them; seconds under the key "time". NaN and infinity
                become null, because JSON has no other way to say them.
        """
        record = {"step": step} | {name: _plain(metrics[name]) for name in sorted(metrics)}
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        start = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._cut(start)
            raise
        if self._events is not None:
            self._events.write(step, {name: value for name, value in _numbers(record) if name != "step"})

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        os.truncate(self._file.fileno(), size)
        self._file.seek(0, os.SEEK_END)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, or of a run directory's. A last line that was torn by a crash is left out.

    Raises:
        UserError: there is no such file, or another line is not a record.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON record; the file was changed by something else than a run")
        records.append(record)
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name]) for name in sorted(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)  # also numpy's numbers and tensors of one element
    return number if math.isfinite(number) else None


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number of a record with its name, nested ones as outer/inner."""
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (bool, int, float)):
            found.append((prefix + name, float(value)))
    return found
