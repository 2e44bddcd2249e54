"""The directory a run leaves behind, which one process at a time works on.

    runs/<name>/  config.yaml  inputs.json  device.json  metrics.jsonl  tensorboard/  samples/  checkpoints/step-N/
                  adapter/  evaluation.json  report.html  logs/rank-N.log  job

A checkpoint holds SHA256SUMS, which `sha256sum -c SHA256SUMS` reads too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import (
    atomic_directory,
    atomic_write,
    folder_made,
    hidden_directory,
    remove_directory,
    settle,
    take_place,
    to_disk,
    why_not,
)
from arcopo_fast.storage.identity import file_digest
from arcopo_fast.storage.locks import Owner

SUMS = "SHA256SUMS"
JOB = "job"
"""Names the launcher of a job of several ranks, so that it goes on with the run when it starts the ranks again."""


# Names, without their endings, of what a run writes: what a killed process left of them is removed.
_OWN = r"config|inputs|device|metrics|evaluation|report|adapter|README|trace\.json|step-\d+|(?:before|after)-\d+"


@dataclass(frozen=True)
class RunDirectory:
    """path: where the run's files lie. keep: how many checkpoints stay. owner: set while this process owns the directory."""

    path: Path
    keep: int = 1
    owner: Owner | None = None

    @staticmethod
    def check(config: Config) -> None:
        """Raise `UserError` if a run could not be created; writes nothing that stays. For failing before the slow part of a start."""
        parent = Path(config.run.directory)
        if problem := why_not(parent):
            raise _cannot_make(parent / config.name, problem)
        if config.run.overwrite and (earlier := _earlier(parent / config.name)):
            earlier.release()

    @classmethod
    def create(cls, config: Config, job: str | None = None) -> RunDirectory:
        """Make the directory of a new run, with its resolved config.yaml, complete or absent; this process owns it.

        The name is `run.directory`/`name`; if that is taken, -2, -3 and so on is added and said on stderr, or, with `run.overwrite`, the
        earlier run is replaced.

        Args:
            job: names the launcher that started this process, which may start it again: see `begun_by`.

        Raises:
            UserError: the directory cannot be made, or what would be overwritten is not a run, or is one that is still going on.
        """
        cls.check(config)
        wanted = Path(config.run.directory) / config.name
        try:
            with folder_made(wanted.parent):
                settle(wanted.parent, rf"{re.escape(wanted.name)}(?:-\d+)?")
                with hidden_directory(wanted) as partial:
                    owner = Owner(partial)
                    try:
                        (partial / "samples").mkdir()
                        atomic_write(partial / "config.yaml", resolved_yaml(config))
                        if job is not None:
                            atomic_write(partial / JOB, job)
                        path = _replace(partial, wanted) if config.run.overwrite else _take_free_place(partial, wanted)
                    except BaseException:
                        owner.release()
                        raise
        except OSError as error:
            raise _cannot_make(wanted, error.strerror or str(error)) from None
        owner.directory = path
        if path != wanted:
            print(f"{wanted} exists already: this run goes to {path}", file=sys.stderr)
        return cls(path, config.train.keep_checkpoints, owner)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An earlier run, to go on with.

        Raises:
            UserError: it is no run, or it is complete.
        """
        path = Path(path)
        if not path.exists():
            settle(path.parent, re.escape(path.name))  # it may have been put aside by a process that was killed then
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not a run: it has no config.yaml; give the directory that a run made")
        run = cls(path, load_config(str(path / "config.yaml")).train.keep_checkpoints)
        run.check_incomplete()
        return run

    @classmethod
    def begun_by(cls, job: str, config: Config) -> RunDirectory | None:
        """Return the run that a job began in an earlier attempt, to go on with; None: it did not come to that."""
        wanted = Path(config.run.directory) / config.name
        runs = [path.parent for path in wanted.parent.glob(f"{wanted.name}*/{JOB}") if path.read_text(encoding="utf-8") == job]
        return cls.open(max(runs, key=lambda path: path.stat().st_mtime)) if runs else None

    def checkpoint_path(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.path / "checkpoints" / f"step-{step}"

    def check_incomplete(self) -> None:
        """Raise `UserError` if there is nothing to go on with. A run whose report is missing has that to write."""
        if self.evaluated and (self.path / "report.html").is_file():
            raise UserError(f"{self.path} is complete; for a longer run start one with a larger train.iterations")

    @property
    def evaluated(self) -> bool:
        """Everything but the report is there."""
        return (self.path / "evaluation.json").is_file()

    @contextmanager
    def owned(self) -> Iterator[RunDirectory]:
        """Own the directory within the block. What killed processes left half-done is removed first.

        Raises:
            UserError: another process owns it, or has completed it.
        """
        owner = self.owner or Owner(self.path)
        with owner:
            if self.owner is None:
                self.check_incomplete()
            for folder in (".", "samples", "checkpoints", "adapter", "profile"):
                settle(self.path / folder, _OWN, owned=True)
            yield replace(self, owner=owner)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run, atomically; returns its path."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
        return path

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A directory to fill, which becomes checkpoints/step-<step> at the end of the block; then the oldest are removed."""
        with atomic_directory(self.checkpoint_path(step)) as directory:
            yield directory
            lines = (f"{digest}  {name}\n" for name, digest in _digests(directory).items())  # as sha256sum writes them
            (directory / SUMS).write_text("".join(lines), encoding="utf-8")
        for old in self.checkpoints()[: -self.keep]:
            remove_directory(old)

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first, but for those found damaged."""
        folder = self.path / "checkpoints"
        found = [entry for entry in folder.iterdir() if re.fullmatch(r"step-\d+", entry.name)] if folder.is_dir() else []
        return sorted(found, key=step_of)

    def restore(self, load: Callable[[Path], None]) -> int:
        """Load the newest whole checkpoint; returns its iteration, 0 if none was saved. Damaged ones are named on stderr, and put away.

        Raises:
            UserError: none is whole.
        """
        damaged: list[tuple[Path, str]] = []
        for checkpoint in reversed(self.checkpoints()):
            problem = damage(checkpoint)
            if problem is None:
                checked = (checkpoint / SUMS).exists()
                if not checked:
                    print(f"{checkpoint} has no {SUMS}, because an earlier version wrote it: it is used unchecked", file=sys.stderr)
                try:
                    load(checkpoint)
                except Exception as error:  # of bytes that nobody has checked the set is open
                    if checked:
                        raise
                    problem = f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            if problem is None:
                for path, reason in damaged:
                    print(
                        f"{path} is damaged: {reason}; it is now {_put_away(path).name}, and the run continues from {checkpoint.name}",
                        file=sys.stderr,
                    )
                return step_of(checkpoint)
            damaged.append((checkpoint, problem))
        if damaged:
            raise UserError(
                f"no checkpoint of {self.path} is whole: {damaged[0][0]} is damaged: {damaged[0][1]}; put one back from a copy, or remove "
                f"{self.path / 'checkpoints'} to begin with the first iteration"
            )
        return 0


# Checkpoints -----------------------------------------------------------------------------------------------------------------------


def _put_away(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more; returns its new path."""
    number, path = 1, checkpoint.with_name(f"{checkpoint.name}.damaged")
    while path.exists():
        number += 1
        path = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    checkpoint.rename(path)
    return path


def step_of(checkpoint: Path) -> int:
    """The iteration after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, by their checksums; None: nothing, or an earlier version wrote no checksums."""
    if not (checkpoint / SUMS).exists() and (checkpoint / "trainer.pt").exists():
        return None
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        present = _digests(checkpoint)
    except (OSError, ValueError) as error:
        return f"cannot be read ({error.strerror if isinstance(error, OSError) else f'{SUMS} is not text'})"
    written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if wrong := [name for name in sorted({*written, *present}) if written.get(name) != present.get(name)]:
        problem = "is missing" if wrong[0] not in present else "is not as it was written"
        return f"{wrong[0]} {problem}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    return None


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file below a directory, by its path there."""
    files = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    return {name: file_digest(directory / name) for name in files if name != SUMS}


# A new directory -------------------------------------------------------------------------------------------------------------------


def _earlier(path: Path) -> Owner | None:
    """The ownership of the run that is to be overwritten, if there is one. Only a run is ever deleted, never a folder of something else.

    Raises:
        UserError: it is no run, or another process owns it.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is not an earlier run (it has no config.yaml), so it is not overwritten; choose another name or run.directory"
        )
    return Owner(path)


def _replace(new: Path, wanted: Path) -> Path:
    """Rename to `wanted`, in the place of an earlier run, which nobody else owns."""
    earlier = _earlier(wanted)
    if earlier is None:
        os.rename(new, wanted)  # fails if a run is made there at this moment
        to_disk(wanted.parent)
    else:
        with earlier:
            take_place(new, wanted)
    return wanted


def _take_free_place(new: Path, wanted: Path) -> Path:
    """Rename to the first free of wanted, wanted-2, ... Renaming claims the place, so runs that start together get different ones."""
    number = 1
    while True:
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        number += 1
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            continue
        try:
            os.rename(new, path)
        except OSError:
            if not path.exists():
                raise
            continue
        to_disk(path.parent)
        return path


def _cannot_make(path: Path, problem: str) -> UserError:
    return UserError(f"cannot make the run directory {path}: {problem}; set run.directory to a place that can be written")
