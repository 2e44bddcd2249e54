"""The scores of single videos on disk: written by any number of processes, resumed after any end, merged by copying files.

    DIR/  evaluation.json  claims  scores/<host>-<process>-<random>.jsonl

Each process appends to a file of its own, a line for each video that is scored, and flushes it to the disk. A line says all that it is
about, and the fingerprint of the settings in evaluation.json. A torn last line, left by a process that was killed, counts as not written;
of a video that two processes have scored, the first line counts, by the files' names.

A process that makes a batch holds the lock on its videos' places in `claims`, so that no other makes one of them meanwhile, on the file
systems that `storage.locks` names. Over NFS a process may learn late of lines that another machine has written, and score their videos
again; the first line counts, as above.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from arcopo_fast.data.prompts import Prompt, Turn
from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import append, atomic_write
from arcopo_fast.storage.identity import require_same, values_digest
from arcopo_fast.storage.locks import lock

FORMAT = 1
STAMP = "evaluation.json"
SCORES = "scores"
CLAIMS = "claims"
BASE = "base"
"""The generator without an adapter."""
KINDS = ("total", "trained", "held out")


class Video(NamedTuple):
    """generator: BASE or an adapter's name@scale. prompt: its place in the set. number: among the prompt's videos. Both count from 0."""

    generator: str
    prompt: int
    number: int


class _Adapter(BaseModel):
    """The identity of an adapter, which tells it from others."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sha256: str
    alpha: FiniteFloat | None = None
    scale: FiniteFloat | None = None


class _Turn(BaseModel):
    """A later prompt of a video, from a latent frame on."""

    model_config = ConfigDict(strict=True, extra="forbid")
    frame: NonNegativeInt
    text: str
    extended: str | None


class _Line(BaseModel):
    """One video's scores as they stand on the disk; null: that score failed. segments: those of each segment of a long video."""

    model_config = ConfigDict(strict=True, extra="forbid")
    fingerprint: str
    generator: str = Field(min_length=1)
    prompt: NonNegativeInt
    number: NonNegativeInt
    text: str
    extended: str | None
    turns: list[_Turn] = []
    adapter: _Adapter | None
    scores: dict[str, FiniteFloat | None]
    segments: dict[str, list[FiniteFloat | None]] = {}


class VideoScores(NamedTuple):
    """The scores of one video by name, NaN for one that failed.

    whole: of the whole video, or the means over its segments. segments: of each segment, and what is measured of segments alone; empty
    for a video that was judged as a whole.
    """

    whole: dict[str, float]
    segments: dict[str, list[float]] = {}


@dataclass
class Scores:
    """The scores that are known, with their prompts and adapters.

    values, segments: of each video, those of the whole and of its segments, see `VideoScores`.
    prompts: by their place. adapters: what each generator's adapter is, by the generator's name; None: it has none.
    """

    values: dict[Video, dict[str, float]] = field(default_factory=dict)
    prompts: dict[int, Prompt] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    segments: dict[Video, dict[str, list[float]]] = field(default_factory=dict)

    def of(self, generator: str) -> dict[Video, dict[str, float]]:
        """Return the scores of one generator by video."""
        return {video: scores for video, scores in self.values.items() if video.generator == generator}


class ScoreDirectory:
    """See `create` for evaluating and `open` for reading. settings: everything that all scores depend on, by dotted keys."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.fingerprint = values_digest(settings)
        self._judges = {key.partition(".")[2] for key in settings if key.startswith(("rewards.", "code_and_weights."))}
        self._segments = len(settings.get("segments.frames", ()))

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, Any]) -> ScoreDirectory:
        """A new directory, or one that is there if it has the same settings.

        Raises:
            UserError: it holds something else, or scores with other settings.
        """
        settings = json.loads(json.dumps(settings))  # as they are read back
        if not (path / STAMP).is_file():
            expected = {STAMP, SCORES, CLAIMS}  # another process may be creating it
            if path.exists() and any(file.name not in expected and not file.name.startswith(".evaluation.") for file in path.iterdir()):
                raise UserError(f"{path} holds something else than an evaluation (it has no {STAMP}); give another --out")
            (path / SCORES).mkdir(parents=True, exist_ok=True)
            with lock(path / CLAIMS, "evaluation", wait=True, span=_CREATION):
                if not (path / STAMP).exists():
                    atomic_write(path / STAMP, json.dumps({"format": FORMAT, "settings": settings}, indent=2) + "\n")
        found = cls.open(path)
        require_same(f"{path} holds scores with other settings", found.settings, settings, "give another --out")
        return found

    @classmethod
    def open(cls, path: Path) -> ScoreDirectory:
        """An earlier evaluation.

        Raises:
            UserError: there is none.
        """
        file = path / STAMP
        try:
            document = json.loads(file.read_bytes())
            version, settings = document["format"], document["settings"]
            directory = cls(path, {**settings})
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} is no evaluation: it has no {STAMP}; give the --out of python -m arcopo_fast.evaluate") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{file} is damaged, so what its scores depend on is unknown; restore it, or evaluate into another --out"
            ) from None
        if version != FORMAT:
            raise UserError(f"{file} has format {version!r}, and this version reads {FORMAT}; evaluate into another --out")
        return directory

    def unscored(self, batches: Iterable[list[Video]], pause: Callable[[int], object]) -> Iterator[tuple[list[Video], Scores]]:
        """Claim, one after the other, the batches of which a video is not scored; append each one's scores before asking for the next.

        What other processes have claimed is skipped, and waited for at the end: it is scored then, or, if its process ended, claimed here.

        Args:
            batches: each of one generator's videos, in their order; other processes may cut them in another way.
            pause: called again and again, with the number of batches, while other processes are making all that is left.

        Yields:
            a batch, and all that was scored when it was claimed.
        """
        scores, left = Scores(), list(batches)
        while left:
            others = []
            for batch in left:
                if scores.values.keys() >= {*batch}:
                    continue
                span = range(_place(batch[0]), _place(batch[-1]) + 1)
                with lock(self.path / CLAIMS, "evaluation", wait=False, span=span) as claimed:
                    if not claimed:
                        others.append(batch)
                    elif not (scores := self.read()).values.keys() >= {*batch}:
                        yield batch, scores
            if others == left:
                pause(len(others))
            left = others

    def read(self) -> Scores:
        """Every video that is scored.

        Raises:
            UserError: a line that is broken, of other settings, or that disagrees with another one on a prompt or an adapter.
        """
        found = Scores()
        for file in sorted((self.path / SCORES).glob("*.jsonl")):
            for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):  # after the last newline: nothing, or a torn line
                self._take(found, line, f"{file}:{number}")
        # In an order that does not depend on who wrote what, so that sums do not either.
        return Scores(_sorted(found.values), _sorted(found.prompts), _sorted(found.adapters), _sorted(found.segments))

    def _take(self, found: Scores, text: bytes, place: str) -> None:
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{place}: not a line of scores ({where and f'{where}: '}{problem['msg']}); the file was changed by something else than an "
                "evaluation: restore it, or delete it to score its videos again"
            ) from None
        stamp, adapter = line.fingerprint, line.adapter.model_dump(exclude_unset=True) if line.adapter else None
        turns = tuple(Turn(turn.frame, Prompt(turn.text, turn.extended)) for turn in line.turns)
        video, prompt = Video(line.generator, line.prompt, line.number), Prompt(line.text, line.extended, turns)
        values = {name: _number(value) for name, value in line.scores.items()}
        segments = {name: [_number(value) for value in column] for name, column in line.segments.items()}
        if stamp != self.fingerprint:
            raise UserError(
                f"{place}: belongs to an evaluation with other settings ({stamp}, and {self.path / STAMP} says {self.fingerprint}); "
                "move the file into a directory of its own"
            )
        if (former := found.prompts.setdefault(video.prompt, prompt)) != prompt:
            raise UserError(f"{place}: prompt {video.prompt} is {prompt.text!r}, elsewhere {former.text!r}; keep sets of prompts apart")
        if (other := found.adapters.setdefault(video.generator, adapter)) != adapter:
            raise UserError(
                f"{place}: {video.generator} is another adapter than elsewhere ({_short(adapter)}, {_short(other)}); rename one"
            )
        if missing := sorted(self._judges - values.keys()):
            raise UserError(f"{place}: there is no score {missing[0]}; restore the file, or delete it to score its videos again")
        if any(len(column) != self._segments for column in segments.values()) or (self._segments and self._judges - segments.keys()):
            raise UserError(f"{place}: there are not {self._segments} segments; restore the file, or delete it to score its videos again")
        if video not in found.values:
            found.values[video] = values
            if segments:
                found.segments[video] = segments

    def check(self, scores: Scores, prompts: Sequence[Prompt], adapters: Mapping[str, dict[str, Any] | None]) -> None:
        """Refuse to add to `scores` what would contradict them.

        Raises:
            UserError: another prompt has the same place, or another adapter the same name.
        """
        for place, prompt in enumerate(prompts):
            if (known := scores.prompts.get(place, prompt)) != prompt:
                held, given = (_told_apart(entry, other) for entry, other in ((known, prompt), (prompt, known)))
                problem = f"{self.path} holds scores of other prompts: number {place} is {held!r}, here {given!r}"
                raise UserError(f"{problem}; give another --out")
        for name, adapter in adapters.items():
            if (known_adapter := scores.adapters.get(name, adapter)) != adapter:
                raise UserError(
                    f"{self.path} holds scores of another {name} (SHA-256 {_short(known_adapter)}, here {_short(adapter)}); give "
                    "the adapter another NAME=, or another --out"
                )

    def add_files(self, other: ScoreDirectory) -> None:
        """Copy the files of another evaluation, complete or not at all; one that is here already is left alone.

        Raises:
            UserError: it has other settings.
        """
        places = f"in {other.path}", f"in {self.path}"
        require_same("the evaluations have different settings", self.settings, other.settings, "give another --out", places=places)
        for file in sorted((other.path / SCORES).glob("*.jsonl")):
            target = self.path / SCORES / file.name
            # A longer file of the same name is a later state of the same one: files only grow.
            if not target.exists() or target.stat().st_size < file.stat().st_size:
                atomic_write(target, file.read_bytes())


class ScoreWriter:
    """Appends to a new file of a directory, which is made with the first line. A context manager."""

    def __init__(self, directory: ScoreDirectory) -> None:
        self._stamp = directory.fingerprint
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._path = directory.path / SCORES / name
        self._file: Any = None

    def append(self, videos: Iterable[tuple[Video, Prompt, VideoScores]], adapters: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Write lines and flush them to the disk; after an error of the disk, none of them is there.

        videos: with their prompts and scores; a score that is not finite becomes null. adapters: by the generator's name.
        """
        lines = b"".join(self._line(video, prompt, scores, adapters[video.generator]) for video, prompt, scores in videos)
        if self._file is None:
            # Unbuffered: what could not be written is not tried again when the file is closed.
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115
        append(self._file, lines, flush=True)

    def _line(self, video: Video, prompt: Prompt, scores: VideoScores, adapter: Mapping[str, Any] | None) -> bytes:
        record = {
            "fingerprint": self._stamp,
            **video._asdict(),
            "text": prompt.text,
            "extended": prompt.extended,
            "adapter": adapter,
            "scores": {name: _or_null(value) for name, value in scores.whole.items()},
        }
        if prompt.turns:
            record["turns"] = [{"frame": frame, "text": later.text, "extended": later.extended} for frame, later in prompt.turns]
        if scores.segments:
            record["segments"] = {name: [_or_null(value) for value in column] for name, column in scores.segments.items()}
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def _sorted(part: Mapping[Any, Any]) -> dict[Any, Any]:
    return dict(sorted(part.items()))


def _told_apart(prompt: Prompt, other: Prompt) -> str:
    """Return what of a prompt differs from another one."""
    if prompt.text != other.text:
        return prompt.text
    if prompt.for_generator != other.for_generator:
        return prompt.for_generator
    return "; ".join(f"{frame}: {part.for_generator}" for frame, part in prompt.parts)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


_CREATION = range(1)
"""The place in the file of claims that is held while evaluation.json is written; those of videos begin behind it."""


def _place(video: Video) -> int:
    """A video's place in the file of claims: those of a generator are beside each other, in the order of prompt and number."""
    generator = int.from_bytes(hashlib.sha256(video.generator.encode()).digest()[:3], "big")  # two with the same digits wait in vain
    return 1 + (generator << 38) + (video.prompt << 16) + video.number


def _short(adapter: Mapping[str, Any] | None) -> str:
    return str(adapter["sha256"])[:16] if adapter else "none"
