"""The directory a run leaves behind, and writing to it so that a reader never finds half a file.

    runs/<name>/  config.yaml  metrics.jsonl  tensorboard/  samples/  checkpoints/step-N/  adapter/  evaluation.json  report.html

Everything is written under a hidden name in the same folder, flushed to the disk and renamed: what has its final name is complete.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from arcopo_fast.config import Config
from arcopo_fast.errors import UserError
from arcopo_fast.recipe import load_config, resolved_yaml

_HARDLY_ANYTHING = 1 << 16  # bytes; a failed write leaves less than a block free


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file, or leave what was there before as it was. Text is UTF-8."""
    path = Path(path)
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A hidden file with the same ending beside `path`, for a writer that wants a name; it becomes `path` at the end of the block.

    If the block fails, the hidden file goes away and `path` is as it was before.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        _to_disk(partial)
        os.replace(partial, path)
    except BaseException as error:
        full = _disk_full(error, partial)
        partial.unlink(missing_ok=True)
        if full:
            raise full from error
        raise
    _to_disk(path.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A hidden directory beside `path` to fill; it becomes `path`, in the place of what was there, at the end of the block.

    If the block fails, the hidden directory goes away and `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for entry in [*partial.rglob("*"), partial]:
            _to_disk(entry)
        _take_place(partial, path)
    except BaseException as error:
        full = _disk_full(error, partial)
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise full from error
        raise


def check_out(out: Path) -> None:
    """Raise `UserError` if `out` could not be made or written to; leaves nothing. For failing before the slow part."""
    if problem := _why_not(out):
        raise UserError(f"cannot write to {out}: {problem}; give another --out")


def _why_not(path: Path) -> str | None:
    """What keeps a directory from being made or written to; None: nothing."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        return f"{existing} is not a directory"
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _disk_full(error: BaseException, partial: Path) -> OSError | None:
    """What a full disk should have raised, if it made a library raise something else: torch.save complains about a position in its file."""
    if isinstance(error, OSError) or not isinstance(error, Exception):
        return None
    disk = os.statvfs(partial)
    full = disk.f_bavail * disk.f_frsize < _HARDLY_ANYTHING
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial.parent)) if full else None


def _take_place(new: Path, path: Path) -> None:
    """Rename a directory to `path`. A directory that stands there is put aside first and removed after."""
    if path.is_dir() and any(path.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside, path)
            aside.parent.rmdir()
            raise
        shutil.rmtree(aside.parent, ignore_errors=True)
    else:
        os.rename(new, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class RunDirectory:
    """path: where the run's files lie. keep: how many checkpoints stay."""

    path: Path
    keep: int = 1

    @staticmethod
    def check(config: Config) -> None:
        """Raise `UserError` if a run could not be created; writes nothing that stays. For failing before the slow part of a start."""
        parent = Path(config.run.directory)
        if problem := _why_not(parent):
            raise _cannot_make(parent / config.name, problem)
        if config.run.overwrite:
            _check_replaceable(parent / config.name)

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make the directory of a new run, with its resolved config.yaml: complete or absent.

        The name is `run.directory`/`name`; if that is taken, -2, -3 and so on is added and said on stderr, or, with `run.overwrite`, the
        earlier run is replaced.

        Raises:
            UserError: the directory cannot be made, or what would be overwritten is not a run.
        """
        cls.check(config)
        wanted = Path(config.run.directory) / config.name
        made = _missing_parents(wanted)
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{config.name}.", dir=wanted.parent))
            try:
                partial.chmod(0o777 & ~_umask())
                (partial / "samples").mkdir()
                atomic_write(partial / "config.yaml", resolved_yaml(config))
                path = wanted
                if config.run.overwrite:
                    _take_place(partial, wanted)
                else:
                    path = _take_free_place(partial, wanted)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        except BaseException as error:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise _cannot_make(wanted, error.strerror or str(error)) from None
            raise
        if path != wanted:
            print(f"{wanted} exists already: this run goes to {path}", file=sys.stderr)
        return cls(path, config.train.keep_checkpoints)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An earlier run, to go on with.

        Raises:
            UserError: it is no run, or it is complete.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not a run: it has no config.yaml; give the directory that a run made")
        if (path / "evaluation.json").is_file():
            raise UserError(f"{path} is complete; for a longer run start one with a larger train.iterations")
        return cls(path, load_config(str(path / "config.yaml")).train.keep_checkpoints)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run, atomically; returns its path."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
        return path

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A directory to fill, which becomes checkpoints/step-<step> at the end of the block; then the oldest are removed."""
        with atomic_directory(self.path / "checkpoints" / f"step-{step}") as directory:
            yield directory
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        found = [entry for entry in folder.iterdir() if re.fullmatch(r"step-\d+", entry.name)] if folder.is_dir() else []
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def _missing_parents(path: Path) -> list[Path]:
    """The folders above `path` that do not exist, innermost first."""
    return [folder for folder in path.parents if not folder.exists()]


def _check_replaceable(path: Path) -> None:
    """Only a run is ever deleted, never a folder of something else."""
    if path.exists() and not (path / "config.yaml").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path} is not an earlier run (it has no config.yaml), so it is not overwritten; choose another name or run.directory"
        )


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
        _to_disk(path.parent)
        return path


def _cannot_make(path: Path, problem: str) -> UserError:
    return UserError(f"cannot make the run directory {path}: {problem}; set run.directory to a place that can be written")
