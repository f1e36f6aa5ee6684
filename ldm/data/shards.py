"""WebDataset shards: written whole, read by offset.

In: samples as dicts of members to write; a shard's and a sample's number to read.
Out: tars with their index and manifest; a sample's members as bytes, their checksums compared.
"""

import io
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ldm.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, shard_entry, shard_files
from ldm.data.quarantine import Quarantined
from ldm.data.shard_index import index_path, leaves_folder, split_name

OPEN_FILES = 64


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
    return ShardEntry(path.name, entry.bytes, entry.samples, entry.index_xxh3, entry.damage)


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


class ShardReader:
    """Reads samples of a manifest's shards by offset.

    One `pread` a sample, and not a memory map: a file that shrinks or a disk that fails under a map is a SIGBUS, which
    ends the worker without a word about the shard; here it is a ledger line, for 3 us a sample. Files are opened at
    the first read in each process, at most 64 at a time; pickles without them.

    Args:
        manifest: of the shards' folder.
        verify: compare each member's checksum.
    """

    def __init__(self, manifest: Manifest, verify: bool = True) -> None:
        self.manifest = manifest
        self.verify = verify
        self._files: OrderedDict[int, int] = OrderedDict()

    def members(self, shard: int, sample: int) -> dict[str, bytes]:
        """All members of a sample, by extension.

        Raises:
            DamagedSample: the bytes are not there, or are not those that were indexed.
            FileNotFoundError: the shard has vanished.
        """
        index = self.manifest.index(shard)
        first, last = index.starts[sample : sample + 2].tolist()
        offsets = index.offsets[first:last].tolist()
        sizes = index.sizes[first:last].tolist()
        checksums = index.checksums[first:last].tolist()
        start, end = offsets[0], offsets[-1] + sizes[-1]
        try:
            block = os.pread(self._file(shard), end - start, start)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.manifest.path(shard)} has vanished since the run began") from None
        except OSError as error:
            raise self.damaged(shard, sample, f"the shard cannot be read: {error}") from error
        if len(block) < end - start:
            reason = f"the shard is cut short: the sample's bytes are {start:,} to {end:,}, the file ends before"
            raise self.damaged(shard, sample, reason)
        members = {}
        for offset, size, checksum, name in zip(
            offsets, sizes, checksums, index.extension_ids[first:last].tolist(), strict=True
        ):
            data = block[offset - start : offset - start + size]
            extension = index.extensions[name]
            if self.verify and xxhash.xxh3_64_intdigest(data) != checksum:
                raise self.damaged(shard, sample, f"member .{extension} differs from its checksum")
            members[extension] = data
        return members

    def damaged(self, shard: int, sample: int, reason: str) -> DamagedSample:
        """The exception that names a sample."""
        return DamagedSample(self.manifest.shards[shard].name, self.manifest.index(shard).key(sample), reason)

    def _file(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            file = os.open(self.manifest.path(shard), os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = file
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return file

    def close(self) -> None:
        """Closes the open files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}
