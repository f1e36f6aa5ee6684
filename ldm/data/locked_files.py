"""Files that the processes of a node write, read and remove together, by locks that end with a killed process.

In: the path of a file of a cache, or of the temporary file that will become it.
Out: descriptors that hold a lock (flock): alone on a temporary file, together with other readers on a whole one.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Descriptors with a lock that is this process's alone. A fork inherits them, and with them the lock, which would then
# outlive this process: the child closes its copies.
HELD: set[int] = set()
_opening = threading.Lock()  # so that no fork comes between opening a descriptor and noting it


def _close_inherited() -> None:
    for descriptor in HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    HELD.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_close_inherited)


def _open_alone(path: Path | str, flags: int) -> int:
    """Descriptor that no fork keeps; for `release`."""
    with _opening:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        HELD.add(descriptor)
    return descriptor


def claim(part: Path, wait: bool) -> int | None:
    """Descriptor of a temporary file with its lock, or None, where another process has it, after its end (`wait`)."""
    descriptor = _open_alone(part, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        release(descriptor)
        return None
    except OSError:
        HELD.discard(descriptor)
        os.close(descriptor)
        raise
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(part), os.fstat(descriptor)):
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
        descriptor = _open_alone(path, os.O_RDONLY)
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
    descriptor = _open_alone(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        release(descriptor)
