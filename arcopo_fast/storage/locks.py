"""Locks between processes that the kernel drops when their holder ends, however it ends: nothing stays locked by the dead.

They hold wherever processes see each other's locks: local file systems, NFS (but not mounted with nolock or local_lock), Lustre mounted
with flock, CephFS, GPFS. The files of `lock` stay where they are: to remove one that another process is about to lock would let two hold
the same. `Owner` looks again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import folder_made

LOCK = ".lock"  # of an owner, in its directory
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def lock(path: Path, what: str, *, wait: bool, span: range | None = None) -> Iterator[bool]:
    """Hold a lock on a file, which is made if need be; False if another process holds it and `wait` is off.

    Args:
        what: the directory that the lock is for, in an error.
        span: lock these bytes, which need not exist, instead of the whole file. Such locks belong to the process: its own do not exclude
            each other, and all of a file go when the process closes that file, so it holds one at a time.

    Raises:
        UserError: the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    locked = False
    try:
        try:
            if span is None:
                fcntl.flock(descriptor, operation)
            else:
                fcntl.lockf(descriptor, operation, len(span), span.start)
            locked = True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(f"the file system of {path.parent} has no locks ({error.strerror}); put the {what} on another") from None
        yield locked
    finally:
        if locked and span is None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a forked child still has the descriptor
        os.close(descriptor)


class Owner:
    """The only process that writes to a directory, until `release` or the end of the process, however it ends.

    The kernel keeps the lock, on the file `.lock` in the directory, which says who holds it and goes away with `release`. The lock stays
    with the directory when that is renamed.

    Raises:
        UserError: another process owns the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptor = self._lock()

    def _lock(self) -> int:
        path = self.directory / LOCK
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _try_lock(descriptor, path):
                    holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
                    raise UserError(f"{self.directory} is in use by {holder}; wait until that ends, or stop it")
                if _same_file(descriptor, path):  # else its former owner has just removed it
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self) -> None:
        """Let others own the directory, wherever it is by now. May be called twice."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                if _same_file(descriptor, self.directory / LOCK):
                    (self.directory / LOCK).unlink()
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # as in `lock`
            os.close(descriptor)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a directory within the block. It is made if need be, and goes away again if it is empty at the end.

    Raises:
        UserError: another process owns it.
    """
    with folder_made(directory), Owner(directory):
        yield


def _try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file; False if another process has done so. Says where the file system cannot, which keeps nobody out."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"the file system of {path.parent} has no locks: make sure yourself that no other process uses it", file=sys.stderr)
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is what lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
