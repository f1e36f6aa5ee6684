"""Work shared by processes that have nothing in common but a folder: each item has one holder, each file appears once.

Enters: a folder that all of them see, and names of items. Leaves: `Claim`s, of which a name has one at a time while its
holder lives; and files that appear whole, under a name that nobody had taken.

A claim is a file, NAME.0, that its holder touches now and then. Left untouched for `patience` seconds, by the clock of
whoever watches it (clocks of hosts and storage are never compared), or held by a process of this machine that is gone,
it is given up, and NAME.1 follows it: of several who make that file one succeeds. A holder who was only slow may go on:
work done twice costs time and changes nothing, since the result appears by `appear_once`, for one of them.
"""

import contextlib
import errno
import json
import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
TOUCHES = 6  # in `patience` seconds: storage that stalls for a while costs no claim


def appear_once(temporary: Path, target: Path) -> bool:
    """Gives a whole file its name, if nobody has it: of several processes one is told True. `temporary` is gone then.

    Raises:
        OSError: the file system knows no hard links, or the file cannot be linked for another reason.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise OSError(
            error.errno,
            f"{target.parent} is on a file system without hard links, by which processes share their work (a mounted "
            "bucket has none): choose a folder on a local disk, NFS, Lustre or the like",
        ) from error
    finally:
        temporary.unlink()
    return True


def write_once(path: Path, content: bytes) -> bool:
    """Writes a small file whole, if there is none of its name; whether it was this process that did."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return appear_once(temporary, path)


@dataclass(frozen=True)
class Claim:
    """An item that this process works on; a context manager, at whose end the item is free for others."""

    path: Path
    claims: "Claims"

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the item, done or not: nobody waits for a holder who has."""
        self.claims.held.discard(self.path)
        self.path.unlink(missing_ok=True)

    def is_there(self) -> bool:
        """Whether the claim's file is still there, and this process's: it goes with its folder when others are done."""
        with contextlib.suppress(FileNotFoundError):
            found, own = json.loads(self.path.read_bytes()), _holder()
            return all(found[name] == own[name] for name in ("host", "machine", "pid"))  # a clock may have been set
        return False

    def finish(self) -> None:
        """Removes all claims there ever were on the item: its result is there."""
        stem, _, number = self.path.name.rpartition(".")
        self.release()
        for earlier in reversed(range(int(number))):
            self.path.with_name(f"{stem}.{earlier}").unlink(missing_ok=True)


class Claims:
    """The claims of one process in a folder; a context manager, within which a thread touches them.

    Args:
        folder: exists, and is on a file system with hard links that all processes see.
        patience: seconds after which an untouched claim of another machine is given up; hosts whose storage hides
            changes from each other for some seconds need more than that.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder = folder
        self.patience = patience
        self.held: set[Path] = set()
        self._watched: dict[Path, tuple[int, float]] = {}
        """Other processes' claims: when they were touched last, by the storage, and when this process first saw it."""
        self._ended = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> "Claims":
        self._toucher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._toucher.join()
        for path in list(self.held):
            Claim(path, self).release()

    def take(self, name: str) -> Claim | None:
        """A claim on an item, or None where another process works on it. A claim that was given up is taken over."""
        number = self._number(name)
        if number and not self._given_up(self.folder / f"{name}.{number - 1}"):
            return None
        path = self.folder / f"{name}.{number}"
        with contextlib.suppress(FileNotFoundError):  # the folder: whoever finished the last item removed it
            if write_once(path, json.dumps(_holder()).encode()):
                self.held.add(path)
                return Claim(path, self)
        return None

    def holder(self, name: str) -> str:
        """Who works on an item, for a message; empty where nobody does."""
        with contextlib.suppress(FileNotFoundError):
            found = json.loads((self.folder / f"{name}.{self._number(name) - 1}").read_bytes())
            return f"process {found['pid']} on {found['host']}"
        return ""

    def _number(self, name: str) -> int:
        """How many claims there were on an item."""
        number = 0
        while (self.folder / f"{name}.{number}").exists():
            number += 1
        return number

    def _given_up(self, path: Path) -> bool:
        if path in self.held:
            return False
        try:
            # Not os.stat: storage on a network may answer it from memory, but asks its server when a file is opened.
            with open(path, "rb") as file:
                touched, content = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return True
        seen = self._watched.get(path)
        if seen is None or seen[0] != touched:
            seen = self._watched[path] = (touched, time.monotonic())
        return time.monotonic() - seen[1] > self.patience or _is_gone(json.loads(content))

    def _touch(self) -> None:
        while not self._ended.wait(self.patience / TOUCHES):
            for path in list(self.held):
                with contextlib.suppress(OSError):  # taken away with its folder, or a storage that fails for a while
                    os.utime(path)


def _holder() -> dict[str, str | int | float]:
    """Who this process is, among all processes of all machines."""
    me = psutil.Process()
    return {"host": platform.node(), "pid": me.pid, "began": me.create_time(), "machine": _machine()}


def _machine() -> str:
    """What processes have in common that see each other's process ids: one start of one system, one container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""  # a system that does not tell: its processes wait out each other's patience


def _is_gone(holder: dict[str, str | int | float]) -> bool:
    """Whether a claim's holder is a process of this machine that has ended, if only by its number's second life."""
    if not holder["machine"] or holder["machine"] != _machine():
        return False
    try:
        process = psutil.Process(int(holder["pid"]))
        # A parent that has not collected its dead child keeps the number; clocks that are set move the time a little.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(holder["began"])) > 5
    except psutil.NoSuchProcess:
        return True
