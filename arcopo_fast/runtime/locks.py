"""Locks between processes that the kernel drops when their holder ends, however it ends: nothing stays locked by the dead.

They hold wherever processes see each other's locks: local file systems, NFS (but not mounted with nolock or local_lock), Lustre mounted
with flock, CephFS, GPFS. Lock files stay where they are: to remove one that another process is about to lock would let two hold the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcopo_fast.errors import UserError

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
