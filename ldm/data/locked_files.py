"""Files that the processes of a node write, read and remove together, by locks that end with a killed process.

In: the path of a file of a cache, or of the temporary file that will become it.
Out: descriptors that hold a lock (flock): alone on a temporary file, together with other readers on a whole one.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Descriptors of temporaries that this process downloads into. A fork inherits them, and with them the lock, which would
# then outlive this process: the child closes its copies.
HELD: set[int] = set()
_at_fork: list[Callable[[], None]] = []


def _close_inherited() -> None:
    for descriptor in HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    HELD.clear()


def claim(part: Path, wait: bool) -> int | None:
    """Descriptor of a temporary file with its lock, or None, where another process has it, after its end (`wait`)."""
    if not _at_fork:
        _at_fork.append(_close_inherited)
        os.register_at_fork(after_in_child=_close_inherited)
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        release(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(part), os.fstat(descriptor)):
            HELD.add(descriptor)
            return descriptor
    release(descriptor)  # it was renamed or removed between opening and locking
    return None


def open_whole(target: Path, size: int | None) -> int | None:
    """Descriptor of a file of the cache with a shared lock, used now; None where it is not there, or not whole."""
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if status.st_nlink and size in (None, status.st_size):
        os.utime(descriptor)
        return descriptor
    if status.st_nlink:
        target.unlink(missing_ok=True)
    release(descriptor)
    return None


def release(descriptor: int) -> None:
    """Unlocks and closes; a lock whose descriptor a fork inherited outlives closing alone."""
    HELD.discard(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def remove_unlocked(path: str) -> bool:
    """Removes a file that nobody has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        release(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes and threads out of a section; `path` is the lock, an empty file that stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        release(descriptor)
