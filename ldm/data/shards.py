"""WebDataset shards: written whole, read by offset.

In: samples as dicts of members to write; a shard's and a sample's number to read.
Out: tars with their index and manifest; a sample's members as bytes, their checksums compared.
"""

import contextlib
import errno
import io
import json
import mmap
import os
import resource
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ldm.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, shard_entry, shard_files
from ldm.data.members import Members
from ldm.data.quarantine import Quarantined
from ldm.data.shard_index import ShardIndex, index_path, leaves_folder, split_name

# Of this process or machine, not of the shard: as a ledger line it would make a run depend on where it runs.
_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def files_to_hold() -> int:
    """How many shards this process may hold open: half of its file descriptors, of which it first asks for all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 16 if limit == resource.RLIM_INFINITY else max(1, limit // 2)


class DamagedSample(Exception):
    """A sample that cannot be used: `shard` (file name), `key`, `reason`."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard = shard
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"

    def record(self, position: int, replacement: str) -> Quarantined:
        """The ledger line of this sample."""
        return Quarantined(self.shard, self.key, self.reason, position, replacement)


def named_damage(name: str, reason: str) -> DamagedSample:
    """The exception for the sample "shard/key"."""
    shard, _, key = name.partition("/")
    return DamagedSample(shard, key, reason)


def encode_member(value: bytes | str | dict | list | np.ndarray) -> bytes:
    """Bytes of a member: bytes as they are, text in UTF-8, dict and list as JSON, arrays as npy without pickles.

    Raises:
        TypeError: another type.
        ValueError: an array of objects.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    if isinstance(value, np.ndarray):
        stored = io.BytesIO()
        np.lib.format.write_array(stored, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
        return stored.getvalue()
    raise TypeError(f"a member is a {type(value).__name__}; allowed are bytes, str, dict, list and numpy.ndarray")


def _encode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with members as bytes, its key and extensions checked: what is written is what will be read."""
    key = sample.get("__key__")
    if not isinstance(key, str) or leaves_folder(key) or split_name(f"{key}.x") != (key, "x"):
        raise ValueError(
            f"sample key {key!r}: allowed are relative paths without '..' whose last part has no dot and is not empty"
        )
    members = {name: encode_member(value) for name, value in sample.items() if not name.startswith("__")}
    for name in members:
        if split_name(f"{key}.{name}") != (key, name):
            raise ValueError(f"sample {key!r}: extension {name!r}: allowed are lower-case names without slashes")
    if not members:
        raise ValueError(f"sample {key!r} has no members")
    return {"__key__": key, **members}


def write_shard(path: Path | str, samples: Iterable[dict[str, Any]]) -> ShardEntry:
    """Writes one tar and its index; the tar appears under its name only when it is complete.

    The bytes depend on the samples alone (fixed time, user and mode).

    Args:
        path: the tar to write; its folder must exist.
        samples: {"__key__": str, "png": bytes, "txt": str, "json": dict, "moments.npy": array, ...}; keys are relative
            paths whose base name has no dot, and no key stands twice.

    Raises:
        ValueError: a key or extension that cannot be read back as it is, or a key that stands twice.
        TypeError: a member that is neither bytes, str, dict, list nor array.
    """
    from webdataset import TarWriter  # imports torch: 2 s that readers of shards need not wait for

    path = Path(path)
    temporary = path.with_name(f".{path.name.removesuffix('.tar')}.tmp.tar")  # one writer a shard: no process id
    keys: set[str] = set()
    try:
        with open(temporary, "wb") as file:
            # PAX only where a name is long or not ASCII; other names give plain ustar headers.
            with TarWriter(file, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as writer:
                for sample in samples:
                    encoded = _encode_sample(sample)
                    if encoded["__key__"] in keys:
                        raise ValueError(f"sample key {encoded['__key__']!r} stands twice in {path.name}")
                    keys.add(encoded["__key__"])
                    writer.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        entry = shard_entry(temporary)
        index_path(temporary).rename(index_path(path))
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        index_path(temporary).unlink(missing_ok=True)
        raise
    os.utime(index_path(path))  # newer than the tar, so that `build_manifest` takes it as it is
    return replace(entry, name=path.name)


def write_shards(
    samples: Iterable[dict[str, Any]],
    folder: Path | str,
    *,
    prefix: str,
    samples_per_shard: int,
    encoder: dict[str, Any] | None = None,
) -> Manifest:
    """Writes samples into `PREFIX-000000.tar`, ... and their manifest; they appear in the folder when all are complete.

    Args:
        samples: as in `write_shard`; read once, one at a time.
        encoder: identity of what encoded them; None for raw pictures.

    Raises:
        FileExistsError: the folder already holds shards.
        ValueError: no samples, or one that `write_shard` refuses.
    """
    folder = Path(folder)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; allowed are integers from 1")
    if (folder / MANIFEST_NAME).exists() or shard_files(folder):
        raise FileExistsError(f"{folder} already holds shards: remove them or choose another folder")
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        entries = []
        for number, group in enumerate(_groups(iter(samples), samples_per_shard)):
            entries.append(write_shard(partial / f"{prefix}-{number:06d}.tar", group))
        if not entries:
            raise ValueError(f"no samples to write into {folder}")
        Manifest(partial, entries, encoder).save()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST_NAME):  # the manifest last
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest(folder, entries, encoder)


def _groups(samples: Iterator[dict], size: int) -> Iterator[Iterator[dict]]:
    """Consecutive groups of `size` samples, each read to its end before the next is asked for."""
    for first in samples:
        yield chain([first], islice(samples, size - 1))


class SampleViews:
    """The members of n samples, as views of their shards' maps, by row."""

    def __init__(self, rows: int) -> None:
        self.names = [""] * rows
        """ "shard/key" """
        self.members: list[Members | None] = [None] * rows
        """By extension; None for a damaged sample."""
        self.checksums: list[list[int]] = [[]] * rows
        """xxh3-64 of each of the members, in their order"""
        self.damaged: dict[int, DamagedSample] = {}

    def verify(self, rows: range) -> None:
        """Compares the checksums of some rows' members: a sample with one that differs is damaged."""
        part = slice(rows.start, rows.stop)
        found = [xxhash.xxh3_64_intdigest(view) for one in self.members[part] if one for view in one.values()]
        wanted = list(chain.from_iterable(self.checksums[part]))
        if found == wanted:
            return
        digests = iter(found)
        for row in rows:
            members = self.members[row] or {}
            pairs = zip(members, islice(digests, len(members)), self.checksums[row], strict=True)
            differing = [extension for extension, one, other in pairs if one != other]
            if differing:
                self.refuse(row, f"member .{differing[0]} differs from its checksum")

    def copy(self) -> None:
        """Takes the members' bytes out of the maps, for work that takes long: files may shrink meanwhile."""
        for row, members in enumerate(self.members):
            if members is not None:
                self.members[row] = {extension: bytes(view) for extension, view in members.items()}

    def refuse(self, row: int, reason: str) -> None:
        """Records that a sample cannot be used."""
        self.damaged[row] = named_damage(self.names[row], reason)
        self.members[row] = None
        self.checksums[row] = []


class _OpenShard:
    """A shard's file as a memory map, which ends where the file ended when it was opened, and its index.

    Args:
        file: descriptor, closed here; the map has one of its own, which keeps the file's lock.
    """

    def __init__(self, file: int, name: str, index: ShardIndex) -> None:
        self.name = name
        self.index = index
        self.keys = index.key_bytes.data
        try:
            self.map = mmap.mmap(file, 0, prot=mmap.PROT_READ) if os.fstat(file).st_size else None
        finally:
            os.close(file)
        self.view = memoryview(self.map or b"")

    def read(self, samples: np.ndarray, rows: list[int], views: SampleViews) -> None:
        """Fills rows of `views` with samples; those behind the end of the file are damaged."""
        index = self.index
        firsts, lasts = index.starts[samples], index.starts[samples + 1]
        counts = lasts - firsts
        ends = counts.cumsum()
        each = np.repeat(lasts - ends, counts) + np.arange(ends[-1])  # the samples' members, one after the other
        starts = index.offsets[each]
        stops = starts + index.sizes[each]
        length = min(len(self.view), self.map.size() if self.map else 0)
        data = [self.view[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        extensions = [index.extensions[number] for number in index.extension_ids[each].tolist()]
        members, checksums = zip(extensions, data, strict=True), iter(index.checksums[each].tolist())
        for row, name, count in zip(rows, self.names(samples), counts.tolist(), strict=True):
            views.names[row] = name
            views.members[row] = dict(islice(members, count))
            views.checksums[row] = list(islice(checksums, count))
        if length < index.tar_bytes:
            for at in np.flatnonzero(np.maximum.reduceat(stops, ends - counts) > length).tolist():
                first, last = int(starts[ends[at] - counts[at]]), int(stops[ends[at] - 1])
                reason = f"the shard is cut short: the sample's bytes are {first:,} to {last:,}, the file ends before"
                views.refuse(rows[at], reason)

    def names(self, samples: np.ndarray) -> list[str]:
        """ "shard/key" of each sample."""
        starts, stops = self.index.key_starts[samples].tolist(), self.index.key_starts[samples + 1].tolist()
        keys = [
            str(self.keys[start:stop], "utf-8", "surrogateescape") for start, stop in zip(starts, stops, strict=True)
        ]
        return [f"{self.name}/{key}" for key in keys]


class ShardReader:
    """Reads samples of a manifest's shards by offset, out of memory maps.

    Touching a page behind the end of a file that shrank is a SIGBUS, which ends the process without a word about the
    shard. So the file's size is asked for before each read of a shard, and what lies behind its end is a ledger line;
    what remains is a file that shrinks in the moment between the two. Shards are opened at the first read in each
    process, and the last ones used stay open; pickles without them.

    Args:
        manifest: of the shards; of those at URLs with a cache.
        verify: compare each member's checksum.
        open_shards: at most so many stay open, each with its index in memory.
        label: put before the shards' names, to tell sources apart.

    Raises:
        ValueError: shards at a URL, and no cache.
    """

    def __init__(self, manifest: Manifest, verify: bool = True, open_shards: int = 64, label: str = "") -> None:
        if manifest.remote and manifest.cache is None:
            raise ValueError(
                f"{manifest.folder}: its shards lie at {manifest.base}: set data.cache.folder to a folder on this "
                "node's disk, where they are kept while they are read"
            )
        self.manifest = manifest
        self.verify = verify
        self.open_shards = open_shards
        self.label = label
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def members(self, shard: int, sample: int) -> dict[str, bytes]:
        """All members of a sample, by extension. A damaged shard out of a cache is fetched again, once.

        Raises:
            DamagedSample: the bytes are not there, or are not those that were indexed.
            FileNotFoundError: the shard has vanished.
            StorageError: a shard at a URL cannot be read, or has changed.
        """
        views = self._alone(shard, sample)
        if views.damaged and self.manifest.cache is not None and self.manifest.remote:
            # The whole shard was right when it was downloaded: it went bad on this node's disk.
            self._open.pop(shard, None)
            self.manifest.cache.discard(self.manifest, shard)
            views = self._alone(shard, sample)
        if views.damaged:
            raise views.damaged[0]
        return {extension: bytes(view) for extension, view in (views.members[0] or {}).items()}

    def _alone(self, shard: int, sample: int) -> SampleViews:
        views = SampleViews(1)
        self.read(views, np.array([0]), np.array([shard]), np.array([sample]))
        views.copy()
        if self.verify:
            views.verify(range(1))
        return views

    def read(self, views: SampleViews, rows: np.ndarray, shards: np.ndarray, samples: np.ndarray) -> None:
        """Fills rows of `views` with samples, not yet verified.

        Args:
            rows: (n,)
            shards: (n,) numbers of their shards, in any order.
            samples: (n,) numbers of the samples in them.

        Raises:
            FileNotFoundError, StorageError: as `members`.
        """
        order = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1)).tolist()
        for first, last in pairwise(edges):
            chosen = order[first:last]
            shard = int(shards[chosen[0]])
            try:
                self._shard(shard).read(samples[chosen], rows[chosen].tolist(), views)
            except OSError as error:
                if self.manifest.remote:
                    raise  # the cache's message names the URL
                if error.errno in _OWN_FAULTS:
                    raise
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{self.manifest.path(shard)} has vanished since the run began") from None
                for row, sample in zip(rows[chosen].tolist(), samples[chosen].tolist(), strict=True):
                    views.names[row] = self.name(shard, sample)
                    views.refuse(row, f"the shard cannot be read: {error}")

    def name(self, shard: int, sample: int) -> str:
        """ "shard/key" of a sample."""
        return f"{self.label}{self.manifest.shards[shard].name}/{self.manifest.index(shard).key(sample)}"

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        manifest = self.manifest
        index = manifest.index(shard)
        if manifest.cache is not None:
            file = manifest.cache.open(manifest, shard)
        else:
            file = os.open(manifest.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        opened = self._open[shard] = _OpenShard(file, self.label + manifest.shards[shard].name, index)
        if len(self._open) > self.open_shards:
            self._open.popitem(last=False)
        return opened

    def close(self) -> None:
        """Closes the open shards; the next read opens them again."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}
