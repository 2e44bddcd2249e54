"""The numbers that a run measures: one JSON line for each step, and the same numbers as TensorBoard scalars.

A line depends on the run's seed alone, times aside: keys are sorted, and everything measured in seconds lies under "time".
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import append, atomic_write

if TYPE_CHECKING:
    from arcopo_fast.storage.events import Events

FILE = "metrics.jsonl"
TOTAL = "reward"  # the weighted sum of the rewards, in metrics.jsonl and evaluation.json
ANCHOR = "anchor"  # the same of the branches that are the baseline of advantages, in metrics.jsonl
LARGEST = 1e150  # its square is a float too
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)] | None
"""A measured number; null where it was not finite."""


@dataclass(frozen=True)
class Chart:
    """A number of each iteration, or of each update of an iteration, that is worth a chart in the report.

    Attributes:
        title, note: above and below the chart.
        name: its key in metrics.jsonl; with `each_update`, after "update<n>/".
        each_update: one line for each update of an iteration.
        smooth: its moving mean is drawn, since single iterations scatter.
        if_any: no chart where it is always 0.
    """

    title: str
    note: str
    name: str
    each_update: bool = False
    smooth: bool = False
    if_any: bool = False


class _Record(BaseModel):
    """A line of metrics.jsonl: whatever was measured, by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, bool | Number | str | dict[str, Number]] = Field(init=False)
    step: Annotated[int, Field(ge=1, lt=1 << 53)]
    time: dict[str, Annotated[float, Field(ge=0, le=LARGEST)] | None] | None = None


class MetricsWriter:
    """Appends to metrics.jsonl in a run directory; a context manager.

    after: the last step that an earlier part of the run has kept: of each step up to this one the line stays, and no other; stderr names
    those that are missing. None: whatever is there stays, but for a line that was torn when a process was killed. tensorboard: also write
    events to tensorboard/.
    """

    def __init__(self, directory: str | Path, *, after: int | None = None, tensorboard: bool = True) -> None:
        path = Path(directory) / FILE
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # after the last newline: nothing, or a torn line
        if after is not None:
            lines = _done(lines, after, path)
        if path.exists():
            atomic_write(path, b"".join(line + b"\n" for line in lines))
        # Unbuffered: what could not be written is not tried again when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._events: Events | None = None
        if tensorboard:
            from arcopo_fast.storage.events import Events

            self._events = Events(Path(directory) / "tensorboard", after=after or 0)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line, complete or not at all.

        Args:
            step: the iteration.
            metrics: numbers (or tensors of one element), texts, and mappings of them; seconds under the key "time". NaN and infinity
                become null, because JSON has no other way to say them.
        """
        record = {"step": step} | {name: _plain(metrics[name]) for name in sorted(metrics)}
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        append(self._file, line)
        if self._events is not None:
            self._events.write(step, {name: value for name, value in _numbers(record) if name != "step"})

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


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
        record = _read(line)
        if record is None:
            raise UserError(f"{path}:{number}: not a JSON record of a step; the file was changed by something else than a run")
        records.append(record)
    return records


def number(value: Any) -> float:
    """Return a float; NaN for anything that is not a finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _read(line: bytes) -> dict[str, Any] | None:
    """A line's record; None if it is not one."""
    try:
        return _Record.model_validate_json(line).model_dump(exclude_unset=True)
    except ValidationError:
        return None


def _done(lines: Sequence[bytes], after: int, path: Path) -> list[bytes]:
    """The line of each step up to `after`, in order; of one that was logged twice, the later. Says what is missing."""
    found: dict[int, bytes] = {}
    broken = []
    for number, line in enumerate(lines, start=1):
        record = _read(line)
        if record is None:
            broken.append(number)
        else:
            found[record["step"]] = line
    missing = [step for step in range(1, after + 1) if step not in found]
    if missing or broken:
        cause = f", for lines {_listed(broken)} were damaged" if broken else ""
        what = f"iterations {_listed(missing)} are missing{cause}" if missing else f"lines {_listed(broken)} were damaged, and are removed"
        print(f"{path}: {what}; the run continues, and its curves show the other iterations", file=sys.stderr)
    return [found[step] for step in range(1, after + 1) if step in found]


def _listed(numbers: Sequence[int]) -> str:
    """Increasing numbers with ranges, as in 1-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


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
