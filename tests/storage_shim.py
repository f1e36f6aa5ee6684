"""Storage that fails on purpose, below the program: the system calls of Python's own files, and file systems too small.

Enters: a Fault, drawn from a seed. Leaves: the calls as the program makes them, of which one (or all from one on) fails
as a kernel or a disk would. `small_disk` and `file_limit` are the kernel's own failures, nothing of ours between.
"""

import builtins
import ctypes
import errno
import io
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = ("write", "fsync", "replace", "mkdir", "link", "symlink", "unlink", "rmdir")
_CLONE_NEWNS, _CLONE_NEWUSER, _MS_REMOUNT = 0x20000, 0x10000000, 32


@dataclass
class Fault:
    """What goes wrong: the `number`th call of `call` (of any in CALLS, when it is empty)."""

    call: str = ""
    number: int = -1
    action: str = "error"
    """error (with `code`), full (this and all later writes), drop (bytes lost in silence), kill."""
    code: int = errno.EIO
    share: float = 0.5
    """Share of the bytes of a write that still gets there."""


class Shim:
    """Between `with` and its end, calls go through here: counted, and one of them at fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.counts: Counter[str] = Counter()
        self._full = False
        self._real = {name: getattr(os, name) for name in CALLS}
        self._open = io.open

    def __enter__(self) -> "Shim":
        for name in CALLS:
            setattr(os, name, self._write if name == "write" else self._call(name))
        io.open = builtins.open = self._opened
        return self

    def __exit__(self, *error: object) -> None:
        for name in CALLS:
            setattr(os, name, self._real[name])
        io.open = builtins.open = self._open

    def _due(self, name: str) -> bool:
        total = self.counts.total()
        self.counts[name] += 1
        place = self.counts[name] - 1 if self.fault.call else total
        return self.fault.call in ("", name) and place == self.fault.number

    def _strike(self, name: str) -> None:
        if self.fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.fault.code, os.strerror(self.fault.code))

    def _call(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._due(name):
                self._strike(name)
            return self._real[name](*args, **kwargs)

        return call

    def _write(self, descriptor: int, data: Any) -> int:
        due = self._due("write")
        if self._full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not due:
            return self._real["write"](descriptor, data)
        view = memoryview(data).cast("B")
        some = view[: int(len(view) * self.fault.share)]
        self._real["write"](descriptor, some)
        if self.fault.action == "drop":
            return len(view)
        self._full = self.fault.action == "full"
        self._strike("write")
        raise AssertionError("a strike does not return")

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "r" in mode or isinstance(file, int):
            return self._open(file, mode, *args, **kwargs)
        shim = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return shim._write(self.fileno(), data)

        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        names = dict(zip(("buffering", "encoding", "errors", "newline"), args, strict=False)) | kwargs
        if names.pop("buffering", -1) == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **{"encoding": "utf-8"} | names)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Files of this process can be `size` bytes long and no longer: the kernel's EFBIG at any write beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small_disk(folder: Path, size: int) -> Callable[[int], None] | None:
    """Mounts a file system in memory of `size` bytes on a folder, for this process alone; None where it may not.

    For a forked process with one thread only: it moves into a user namespace of its own. The function that comes back
    gives the file system another size.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        return None

    def mount(size: int, flags: int) -> bool:
        options = f"size={size}".encode()
        return libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options) == 0

    def resize(size: int) -> None:
        assert mount(size, _MS_REMOUNT), os.strerror(ctypes.get_errno())

    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return None
    return resize if mount(size, 0) else None
