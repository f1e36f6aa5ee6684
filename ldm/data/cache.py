"""Shards at URLs, kept on the node's disk while they are read, by all of its processes together.

In: a manifest and a shard's number; the shards that will be read next.
Out: the path of a whole shard, its checksum compared with the manifest; never more than the limit in the folder.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from ldm.data.locked_files import claim, locked, open_whole, release, remove_unlocked
from ldm.data.shard_index import ManifestError
from ldm.data.storage import DEFAULT_RETRIES, Retries, ShortBodyError, StorageError, filesystem, open_stream, retried

if TYPE_CHECKING:
    from ldm.data.manifest import Manifest

log = logging.getLogger(__name__)

PART = ".part"  # a file that is being downloaded; whoever does holds its lock
CHUNK = 1 << 20
POLL = 0.1  # seconds between looks whether other processes' downloads have ended
AHEAD_TRIES = 3
THREADS = 2  # downloads ahead at a time in each process; a node has many processes


@dataclass
class CacheConfig:
    """Where shards at URLs are kept on each node while they are read."""

    folder: str | None = None
    """Folder on the node's own disk; needed as soon as shards lie at a URL. Several runs may share it."""
    limit_gb: float = 100.0
    """Most that the folder holds, in 10^9 bytes, for all processes of the node; past it, what was used least recently
    goes. It should hold `shards_per_block` shards twice, or shards are fetched several times an epoch."""
    ahead: int = 16
    """How many of the shards to come are fetched while others are read."""
    attempts: int = 8
    """How often a URL is tried, with doubling waits, before the run stops."""
    timeout: float = 60.0
    """Seconds without a byte after which an attempt is given up."""

    def __post_init__(self) -> None:
        if self.limit_gb <= 0:
            raise ValueError(f"data.cache.limit_gb is {self.limit_gb}; allowed are numbers above 0")
        if self.ahead < 0:
            raise ValueError(f"data.cache.ahead is {self.ahead}; allowed are integers from 0")
        if self.attempts < 1:
            raise ValueError(f"data.cache.attempts is {self.attempts}; allowed are integers from 1")
        if self.timeout <= 0:
            raise ValueError(f"data.cache.timeout is {self.timeout}; allowed are numbers above 0")


def open_cache(config: CacheConfig) -> "ShardCache | None":
    """The cache of a config, or None where it names no folder."""
    if config.folder is None:
        return None
    return ShardCache(Path(config.folder), config.limit_gb, retries=Retries(config.attempts, config.timeout))


class ShardChangedError(StorageError):
    """A shard at a URL is another than the one that was indexed."""


class _File(NamedTuple):
    """A file to have in the cache, named by its content."""

    url: str
    name: str
    xxh3: str
    bytes: int | None
    remake: str
    """The command that indexes it anew."""


class ShardCache:
    """Whole shards out of URLs, on disk, shared by the processes of a node and bounded.

    A shard is downloaded under a temporary name, which is locked (flock) by the process that does, so that others wait
    for it and a killed one's lock ends with it; when its size and xxh3 are the manifest's it is flushed and renamed.
    Files are named by their content: one of another manifest, or of an older one, is never taken for it. The size of a
    download is reserved before it begins, and least recently used files go, those that no `open` holds first. One that
    goes while it is read stays readable, and takes space, until it is closed.

    Pickles without its threads and works in forked and in spawned processes.

    Args:
        folder: on a disk of the node; made where it is missing.
        limit_gb: most that it holds, in 10^9 bytes.
        retries: how URLs are tried.
    """

    def __init__(self, folder: Path | str, limit_gb: float, *, retries: Retries = DEFAULT_RETRIES) -> None:
        self.folder = Path(folder)
        self.limit = int(limit_gb * 1e9)
        self.retries = retries
        self._ahead: _Ahead | None = None

    def path(self, manifest: "Manifest", shard: int) -> Path:
        """Path of a whole shard, downloaded where it is not there yet; of a local one its own path.

        Where the limit holds few shards, the file may be gone before it is opened: `open` has no such gap.

        Raises:
            ShardChangedError: the URL's bytes are not those that were indexed, at each attempt.
            FileNotFoundError: the shard has vanished.
            StorageError: it cannot be read, or not be stored.
            ValueError: it is larger than the limit.
        """
        if not manifest.remote:
            return manifest.path(shard)
        wanted = _shard_file(manifest, shard)
        release(self._obtain(wanted))
        return self._store / wanted.name

    def open(self, manifest: "Manifest", shard: int) -> int:
        """File descriptor of a whole shard, for reading; until it is closed, other files are evicted first.

        Raises:
            As `path`.
        """
        if not manifest.remote:
            return os.open(manifest.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._obtain(_shard_file(manifest, shard))

    def read(self, url: str, xxh3: str, remake: str) -> bytes:
        """Content of a small file such as an index.

        Args:
            remake: the command that makes it anew, for errors.

        Raises:
            As `path`.
        """
        wanted = _File(url, f"{xxh3}.index", xxh3, None, remake)
        while True:
            descriptor = self._obtain(wanted)
            try:
                with open(descriptor, "rb", closefd=False) as file:
                    content = file.read()
            finally:
                release(descriptor)
            if xxhash.xxh3_64_hexdigest(content) == xxh3:
                return content
            (self._store / wanted.name).unlink(missing_ok=True)  # it went bad on this disk

    def discard(self, manifest: "Manifest", shard: int) -> None:
        """Removes a shard whose bytes on the disk went bad, so that the next `path` downloads it again."""
        if manifest.remote:
            (self._store / _shard_file(manifest, shard).name).unlink(missing_ok=True)

    def prefetch(self, pairs: "Iterable[tuple[Manifest, int]]") -> None:
        """Downloads shards in the background, in order; replaces what an earlier call asked for and has not begun.

        Those that fit under the limit together are kept and fetched, so that `pairs` begins with the shards in use. A
        failure is logged, and raised when `path` comes to that shard.

        Raises:
            StorageError: no driver for the URL.
        """
        by_name, room = {}, self.limit
        for manifest, shard in pairs:
            if manifest.remote and (file := _shard_file(manifest, shard)).name not in by_name:
                room -= file.bytes or 0
                if room < 0:
                    break
                by_name[file.name] = file
        wanted = list(by_name.values())
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = _Ahead(self._fetch_ahead)
        if wanted and wanted != self._ahead.wanted:
            filesystem(wanted[0].url)
            for file in reversed(wanted):  # the first is evicted last
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._store / file.name)
            self._ahead.want(wanted)

    def close(self) -> None:
        """Ends the background threads after the downloads that they are at."""
        if self._ahead is not None and self._ahead.process == os.getpid():
            self._ahead.want([])
        self._ahead = None

    def _fetch_ahead(self, wanted: _File) -> None:
        # Again, because eviction looks at temporary files too: for an instant its lock is like another process's.
        for _ in range(AHEAD_TRIES):
            descriptor = self._try_to_obtain(wanted, wait=False)
            if descriptor is not None:
                release(descriptor)
                return
            time.sleep(POLL)

    @property
    def _store(self) -> Path:
        return self.folder / "files"

    def _obtain(self, wanted: _File) -> int:
        while (descriptor := self._try_to_obtain(wanted)) is None:
            pass
        return descriptor

    def _try_to_obtain(self, wanted: _File, wait: bool = True) -> int | None:
        """Descriptor of a file that is there or was downloaded; None where another process was at it or evicted it.

        Args:
            wait: for the other process to end.
        """
        target = self._store / wanted.name
        part = target.with_name(wanted.name + PART)
        if (descriptor := open_whole(target, wanted.bytes)) is not None:
            return descriptor
        self._store.mkdir(parents=True, exist_ok=True)
        claimed = claim(part, wait)
        if claimed is None:
            return None
        try:
            if not target.exists():  # another process may have finished between the two looks
                self._download(wanted, claimed)
                os.rename(part, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(part), os.fstat(claimed)):
                    part.unlink()
            release(claimed)
        return open_whole(target, wanted.bytes)

    def _download(self, wanted: _File, descriptor: int) -> None:
        """Writes the file's verified bytes."""
        found: tuple[int, str] | None = None
        os.ftruncate(descriptor, 0)  # a killed process may have left it, with a size that would count

        def once() -> bytes:
            nonlocal found
            found = None
            os.lseek(descriptor, 0, os.SEEK_SET)
            checksum, count, kept = xxhash.xxh3_64(), 0, []
            with open_stream(wanted.url, self.retries.timeout) as stream:
                while (wanted.bytes is None or count <= wanted.bytes) and (part := stream.read(CHUNK)):
                    checksum.update(part)
                    count += len(part)
                    if wanted.bytes is None:
                        kept.append(part)
                    elif count <= wanted.bytes:
                        self._write(descriptor, part)
            found = count, checksum.hexdigest()
            if found != (wanted.bytes or count, wanted.xxh3):
                raise ShortBodyError(f"{count:,} bytes with xxh3 {found[1]} came")
            return b"".join(kept)

        if wanted.bytes is not None:
            self._reserve(descriptor, wanted.bytes)
        try:
            small = retried(wanted.url, once, self.retries)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{wanted.url} has vanished, though the manifest names it: bring it back, or leave it out with "
                f"{wanted.remake}"
            ) from error
        except StorageError as error:
            if found is None:
                raise
            size = "" if wanted.bytes is None else f"{wanted.bytes:,} bytes with "
            raise ShardChangedError(
                f"{wanted.url} has changed since it was indexed, or its server cuts it short: expected {size}xxh3 "
                f"{wanted.xxh3}, found {found[0]:,} bytes with xxh3 {found[1]} at the last of {self.retries.attempts} "
                f"attempts. Bring the old one back, or index it as it is now: remove its index, then {wanted.remake}"
            ) from error
        if wanted.bytes is None:
            self._reserve(descriptor, len(small))
            self._write(descriptor, small)
        with self._writing():
            os.fdatasync(descriptor)  # or a power failure leaves a file of the right size with other bytes

    def _write(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        with self._writing():
            while rest:
                rest = rest[os.write(descriptor, rest) :]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells this disk's failures, which stop a run, from the URL's, which are tried again."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot be written: {error}. data.cache.limit_gb allows it {self.limit / 1e9:g} GB"
            ) from error

    def _reserve(self, descriptor: int, size: int) -> None:
        """Evicts until `size` more bytes fit, and gives the temporary file that size, so that others count it."""
        if size > self.limit:
            raise ValueError(
                f"data.cache.limit_gb is {self.limit / 1e9:g}, but a shard has {size:,} bytes: it has to hold one at "
                "least, and should hold twice data.shards_per_block"
            )
        while True:
            with locked(self.folder / "lock"):
                if self._evict(self.limit - size):
                    with self._writing():
                        os.ftruncate(descriptor, size)
                    return
            time.sleep(POLL)  # the rest is other processes' downloads, which end

    def _evict(self, allowed: int) -> bool:
        """Removes killed processes' temporaries, and files until no more than `allowed` bytes are left; whether so."""
        total, files = 0, []
        for entry in os.scandir(self._store):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(PART) and remove_unlocked(entry.path):
                    continue
                total += status.st_size
                if not entry.name.endswith(PART):
                    files.append((status.st_mtime_ns, entry.path, status.st_size))
        held = []
        for _, path, size in sorted(files):
            if total <= allowed:
                break
            if remove_unlocked(path):
                total -= size
            else:
                held.append((path, size))
        for path, size in held:
            if total <= allowed:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total <= allowed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}


def _shard_file(manifest: "Manifest", shard: int) -> _File:
    entry = manifest.shards[shard]
    if not int(entry.tar_xxh3 or "0", 16):
        raise ManifestError(f"the manifest has no checksum of {entry.name}: run {manifest.remake}")
    return _File(manifest.url(shard), f"{entry.tar_xxh3}.tar", entry.tar_xxh3, entry.bytes, manifest.remake)


class _Ahead:
    """Threads of one process that fetch what is wanted, in order."""

    def __init__(self, fetch: Callable[[_File], None]) -> None:
        self.process = os.getpid()
        self.fetch = fetch
        self.wanted: Sequence[_File] = ()
        self._left: deque[_File] = deque()
        self._running = 0
        self._lock = threading.Lock()

    def want(self, wanted: Sequence[_File]) -> None:
        """Replaces what is left to fetch."""
        with self._lock:
            self.wanted = wanted
            self._left = deque(wanted)
            start = min(THREADS, len(wanted)) - self._running
            self._running += max(0, start)
        for _ in range(start):
            threading.Thread(target=self._run, name="shard-cache", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._running -= 1
                    return
                wanted = self._left.popleft()
            try:
                self.fetch(wanted)
            except Exception as error:
                log.warning("%s was not fetched ahead (%s); it is tried again when it is read", wanted.url, error)
