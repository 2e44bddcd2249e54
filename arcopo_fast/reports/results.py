"""A run read back from its directory: its settings, its metrics, and how each reward and held-out metric changed.

evaluation.json of a run directory is

    {"before": {name: {"mean": m, "std": s, "values": [...]}}, "after": {...},
     "filters": {filter: {name: ...}}, "few_steps": {number of steps: {"before": {name: ...}, "after": {name: ...}}},
     "videos": [{"prompt": text, "seed": n, "before": "samples/before-00.mp4", "after": ..., "reward_before": r, "reward_after": r}]}

with "reward" among the names for the weighted sum that is trained on, and the values of one video at the same place before and after; null
for a score that failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError, shorten
from arcopo_fast.evaluation.changes import Change, Summary, changes
from arcopo_fast.storage.metrics import FILE, LARGEST, Number, number, read_metrics
from arcopo_fast.storage.textfiles import Document, read_document

DEVICE = "device.json"  # what a run ran on: device, versions, ceilings, and by pivot the seconds below which no stage of an iteration gets
RENAMED_STAGES = {"optimiser": "optimizer"}  # as runs of former versions have it: as it is called now
Record = Mapping[str, Any]


# What files hold -------------------------------------------------------------------------------------------------------------------


class Sample(Document):
    """A video that was written before and after; both names are relative to the run's directory."""

    prompt: str
    seed: int | None = None
    before: str | None = None
    after: str | None = None
    reward_before: Number = None
    reward_after: Number = None


class _Evaluation(Document):
    before: dict[str, Summary] = {}
    after: dict[str, Summary] = {}
    videos: list[Sample] = []
    filters: dict[str, dict[str, Summary]] = {}
    few_steps: dict[str, dict[Literal["before", "after"], dict[str, Summary]]] = {}


_Amount = Annotated[float, Field(ge=0, le=LARGEST)]


class _Attention(Document):
    """The backend of the generator's attention and the reason for it; runs of former versions do not name it."""

    name: str = ""
    reason: str = ""


class _Device(Document):
    device: str
    attention: _Attention = _Attention()
    dtype: str
    matmul: _Amount
    bandwidth: _Amount
    floor: dict[str, dict[str, _Amount]] = {}


# What they say ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run directory; what the run did not come to is empty. left_out: sentences on what is there and not shown."""

    directory: Path
    config: Config
    records: Sequence[Record]
    evaluation: Mapping[str, Any]
    device: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @cached_property
    def changes(self) -> list[Change]:
        """Changes of its scores from before to after, as `evaluation.changes` gives them."""
        return changes(self.config, self.evaluation)

    @property
    def iterations(self) -> int:
        """So many are done."""
        return max((record["step"] for record in self.records if isinstance(record.get("step"), int)), default=0)

    @property
    def ended(self) -> bool:
        """True if the run did all its iterations and its last evaluation."""
        return bool(self.changes) and self.iterations >= self.config.train.iterations


def read_run(directory: str | Path) -> Run:
    """Read what a run directory holds.

    Raises:
        UserError: there is no such run, or a file of it is broken.
    """
    directory = Path(directory)
    if not (directory / "config.yaml").is_file():
        problem = "holds no config.yaml" if directory.is_dir() else "is not a directory"
        raise UserError(f"{directory} is not a run: it {problem}; give the directory that a run has made, as in runs/toy")
    config = load_config(str(directory / "config.yaml"))
    records = read_metrics(directory) if (directory / FILE).is_file() else []
    evaluation = _read(directory / "evaluation.json", _Evaluation, "the evaluation of a run")
    left_out, strangers = [], []
    for entry in evaluation.get("videos", ()):
        for side in ("before", "after"):
            if entry[side] is not None and not _is_own_video(directory, entry[side]):
                strangers.append(shorten(entry[side]))
                entry[side] = None
    if strangers:
        names = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        left_out.append(f"{directory / 'evaluation.json'} names what is no mp4 file inside the run's directory: {names}.")
    device: Mapping[str, Any] = {}
    try:
        device = _read(directory / DEVICE, _Device, "what a run says of its device")
    except UserError as error:  # it only adds to what is shown
        left_out.append(f"{error}.")
    return Run(directory, config, records, evaluation, device, left_out)


def _read(path: Path, kind: type[Document], what: str) -> dict[str, Any]:
    """Empty if there is none."""
    return read_document(path, kind, what).model_dump() if path.is_file() else {}


def _is_own_video(directory: Path, name: str) -> bool:
    """Whether a name leads to an mp4 inside the directory, or to none at all, and by no link out of it."""
    try:
        path = (directory / name).resolve()
        return path.suffix.lower() == ".mp4" and path.is_relative_to(directory.resolve()) and (path.is_file() or not path.exists())
    except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
        return False


def points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    """(iteration, value) of a metric, by iteration; of one that was logged twice, as after a crash, the later. Finite numbers only."""
    found = {record.get("step"): number(record.get(name)) for record in records}
    return sorted((step, value) for step, value in found.items() if isinstance(step, int) and math.isfinite(value))


def stage_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of an iteration by stage, in the order in which they come."""
    timed = [record["time"] for record in records if isinstance(record.get("time"), Mapping) and record["time"]]
    sums: dict[str, float] = {}
    for times in timed:
        for name, seconds in times.items():
            if math.isfinite(number(seconds)):
                name = RENAMED_STAGES.get(name, name)
                sums[name] = sums.get(name, 0.0) + seconds
    return {name: seconds / len(timed) for name, seconds in sums.items()}


def stage_floors(records: Sequence[Record], device: Mapping[str, Any]) -> dict[str, float]:
    """Mean seconds below which no stage of these iterations could get, by stage, of the pivots that they had; empty if that is unknown."""
    floor = {pivot: seconds for pivot, seconds in (device.get("floor") or {}).items() if seconds}
    timed = [record for record in records if isinstance(record.get("time"), Mapping) and record["time"]]
    pivots = [str(int(record["pivot"])) for record in timed if number(record.get("pivot")).is_integer()]
    if not timed or len(pivots) < len(timed) or not set(pivots) <= floor.keys():  # groups of one iteration that had several pivots
        pivots = list(floor) if timed else []
    sums: dict[str, float] = {}
    for pivot in pivots:
        for name, seconds in floor[pivot].items():
            name = RENAMED_STAGES.get(name, name)
            sums[name] = sums.get(name, 0.0) + seconds
    return {name: seconds / len(pivots) for name, seconds in sums.items()}
