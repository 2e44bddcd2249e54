"""Files and directories that are complete or absent.

Everything is written under a hidden name in the same folder, `.NAME.TOKEN`, flushed to the disk and renamed: what has its final name is
complete. What a killed process leaves under such a name, `settle` removes. Nothing here knows what is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path

from arcopo_fast.errors import UserError

ASIDE = ".old"  # ends the hidden name of a directory that is being replaced

_HARDLY_ANYTHING = 1 << 16  # bytes; a failed write leaves less than a block free


# Writing ---------------------------------------------------------------------------------------------------------------------------


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file, or leave what was there before as it was. Text is UTF-8."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def append(file: RawIOBase, content: bytes, *, flush: bool = False) -> None:
    """Append bytes to an unbuffered file, all of them or, after an error or an interrupt, none. flush: to the disk, before it returns."""
    start = file.tell()
    try:
        while content:
            content = content[file.write(content) :]
        if flush:
            os.fsync(file.fileno())
    except BaseException:
        os.truncate(file.fileno(), start)
        file.seek(start)
        raise


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
        to_disk(partial)
        os.replace(partial, path)
    except BaseException as error:
        full = _disk_full(error, partial)
        partial.unlink(missing_ok=True)
        if full:
            raise full from error
        raise
    to_disk(path.parent)


@contextmanager
def atomic_directory(path: str | Path, *, only_same: bool = False) -> Iterator[Path]:
    """A hidden directory beside `path` to fill; it becomes `path`, in the place of what was there, at the end of the block.

    If the block fails, the hidden directory goes away and `path` is as it was before.

    only_same: replace a directory only if it holds nothing but names that are written anew.

    Raises:
        UserError: a file is in the way, or with `only_same` a file that would be lost.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path.parent, re.escape(path.name))
    with hidden_directory(path) as partial:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            to_disk(entry)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give a directory to write to")
        if only_same and path.is_dir():
            written = {entry.name for entry in partial.iterdir()}
            if strangers := sorted(entry.name for entry in path.iterdir() if entry.name not in written):
                more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
                raise UserError(f"{path} holds other files ({', '.join(strangers[:3])}{more}); move them away, or give a new directory")
        take_place(partial, path)


@contextmanager
def hidden_directory(path: Path) -> Iterator[Path]:
    """A new hidden directory beside `path`, to be renamed within the block; if the block fails, it goes away."""
    partial, descriptor = _make_hidden(path)
    try:
        yield partial
    except BaseException as error:
        full = _disk_full(error, path.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise full from error
        raise
    finally:
        os.close(descriptor)


def take_place(new: Path, path: Path) -> None:
    """Rename a directory to `path`. A directory that stands there is put aside first and removed after."""
    if path.is_dir() and any(path.iterdir()):
        hidden = path.with_name(_hidden_name(path))
        aside = hidden.with_name(hidden.name + ASIDE)
        descriptor = _open_in_use(path)
        try:
            try:
                os.rename(path, aside)
                os.rename(new, path)
            except BaseException:
                if aside.exists() and not path.exists():
                    os.rename(aside, path)
                raise
            to_disk(path.parent)
            os.rename(aside, hidden)  # from here on nobody puts it back
            shutil.rmtree(hidden, ignore_errors=True)
        finally:
            os.close(descriptor)
    else:
        os.rename(new, path)
    to_disk(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory of which no reader may find a part: it is hidden first."""
    hidden = path.with_name(_hidden_name(path))
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def settle(folder: Path, names: str, *, owned: bool = False) -> None:
    """Remove what killed processes left in a folder under hidden names, and give back its name to what they had only put aside.

    Args:
        names: regular expression for the names, endings of files left out, of what they were making.
        owned: no other process writes here. Else only directories whose maker is known to be dead are touched.

    What may not be read or removed, such as another user's, stays.
    """
    pattern = re.compile(rf"\.(?P<name>{names})\.[a-z0-9_]{{8}}(?P<ending>\.\w+)?")
    for entry in _entries(folder):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        with suppress(OSError):
            if not entry.is_dir():
                if owned:
                    entry.unlink()
                continue
            with _abandoned(entry, unknown=owned) as abandoned:
                if abandoned and match["ending"] == ASIDE and not (folder / match["name"]).exists():
                    os.rename(entry, folder / match["name"])
                elif abandoned:
                    shutil.rmtree(entry, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not there, or one that may be written to but not listed
        return []


def to_disk(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden_name(path: Path) -> str:
    return f".{path.name}.{os.urandom(4).hex()}"


def _make_hidden(path: Path) -> tuple[Path, int]:
    """A new hidden directory beside `path`, and the descriptor that keeps it."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            partial.chmod(0o777 & ~_umask())  # mkdtemp makes directories that only their owner can read
            descriptor = _open_in_use(partial)
        except FileNotFoundError:  # `settle` of another process came in between
            continue
        if partial.exists():
            return partial, descriptor
        os.close(descriptor)


def _open_in_use(directory: Path) -> int:
    """A descriptor; until it is closed, `settle` leaves the directory alone, where the file system can lock directories."""
    descriptor = os.open(directory, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextmanager
def _abandoned(directory: Path, *, unknown: bool) -> Iterator[bool]:
    """Whether no living process is making a directory. unknown: what to say where the file system cannot lock directories."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield unknown
        else:
            yield True
    finally:
        os.close(descriptor)


def _disk_full(error: BaseException, place: Path) -> OSError | None:
    """Return what a full disk should have raised, if a library raised something else: torch.save complains about a place in its file."""
    if isinstance(error, (OSError, UserError)) or not isinstance(error, Exception):
        return None
    disk = os.statvfs(place)
    full = disk.f_bavail * disk.f_frsize < _HARDLY_ANYTHING
    folder = place if place.is_dir() else place.parent
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) if full else None


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def folder_made(path: Path) -> Iterator[None]:
    """Make a directory with its parents; those that are new and empty at the end of the block go away again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


# Places to write to ----------------------------------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Raise `UserError` if `out` could not be made or written to; leaves nothing. For failing before the slow part."""
    if problem := why_not(out):
        raise UserError(f"cannot write to {out}: {problem}; give another --out")


def why_not(path: Path) -> str | None:
    """Return what keeps a directory from being made or written to; None: nothing."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        return f"{existing} is not a directory"
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
