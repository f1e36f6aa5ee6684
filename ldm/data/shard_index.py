"""Index of one shard: which bytes of the tar are which member of which sample, and their checksums.

In: a WebDataset tar, read once from end to end, whoever wrote it.
Out: a `ShardIndex`, kept beside the tar as a small safetensors file; what could not be used is recorded as damage.
"""

import json
import os
import re
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from safetensors.numpy import load, save

INDEX_VERSION = 1
INDEX_SUFFIX = ".index.safetensors"
META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes; its reader skips them too


class ManifestError(ValueError):
    """A manifest or an index that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Damage:
    """A part of a shard that indexing could not use."""

    byte: int
    """Offset in the shard's file."""
    key: str
    """Key of the sample that it costs; empty where nothing tells."""
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """Members of each sample of one shard; sample i has the members starts[i] .. starts[i + 1] - 1."""

    extensions: tuple[str, ...]
    """Extensions that occur, such as "png", "txt", "moments.npy"."""
    starts: np.ndarray
    """(samples + 1,) int64"""
    offsets: np.ndarray
    """(members,) int64, of the data in the tar, in bytes"""
    sizes: np.ndarray
    """(members,) int64, in bytes"""
    checksums: np.ndarray
    """(members,) uint64, xxh3-64 of the data"""
    extension_ids: np.ndarray
    """(members,) uint16, into `extensions`"""
    key_bytes: np.ndarray
    """(total,) uint8, all keys in UTF-8 without separator"""
    key_starts: np.ndarray
    """(samples + 1,) int64, into `key_bytes`"""
    tar_bytes: int = 0
    """Size of the tar that was indexed."""
    damage: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, sample: int) -> str:
        """Key of a sample, as webdataset's `__key__`."""
        stored = self.key_bytes[self.key_starts[sample] : self.key_starts[sample + 1]]
        return stored.tobytes().decode("utf-8", "surrogateescape")

    def to_bytes(self) -> bytes:
        """The index file: a safetensors file whose metadata hold extensions, damage and the tar's size."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = {
            "version": INDEX_VERSION,
            "extensions": self.extensions,
            "damage": [asdict(damage) for damage in self.damage],
            "tar_bytes": self.tar_bytes,
        }
        return save(arrays, {"shard_index": json.dumps(about)})  # one entry: safetensors writes several in random order

    @staticmethod
    def from_bytes(stored: bytes, path: Path) -> "ShardIndex":
        """Inverse of `to_bytes`; `path` is for the error.

        Raises:
            ManifestError: not an index of this version.
        """
        try:
            arrays = load(stored)
            header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
            about = json.loads(header["__metadata__"]["shard_index"])
            if about["version"] != INDEX_VERSION:
                raise ValueError(f"its version is {about['version']!r}")
            return ShardIndex(
                extensions=tuple(about["extensions"]),
                damage=tuple(Damage(**damage) for damage in about["damage"]),
                tar_bytes=about["tar_bytes"],
                **{name: arrays[name] for name in _ARRAYS},
            )
        except Exception as error:
            raise ManifestError(
                f"{path} is not a shard index of version {INDEX_VERSION} ({error}): make it again with "
                f"`python tools/index_shards.py {path.parent}`"
            ) from error


_ARRAYS = ("starts", "offsets", "sizes", "checksums", "extension_ids", "key_bytes", "key_starts")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by webdataset's convention, or None for a name that has no such parts.

    The key is the path up to the first dot of the base name, the extension is the rest in lower case:
    "a.b/cat.seg.PNG" has key "a.b/cat" and extension "seg.png".
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return folder + slash + stem, extension.lower()


def leaves_folder(name: str) -> bool:
    """Whether a path would leave the folder that it is relative to."""
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)


def index_path(tar: Path) -> Path:
    """The index file of a shard: shard-000000.tar -> shard-000000.index.safetensors."""
    return tar.with_name(tar.name.removesuffix(".tar") + INDEX_SUFFIX)


class _Members:
    """The growing lists behind a ShardIndex."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.rows: list[tuple[int, int, int, int]] = []  # offset, size, checksum, extension
        self.extensions: dict[str, int] = {}
        self.damage: list[Damage] = []

    def add(self, key: str, extension: str, offset: int, size: int, checksum: int) -> None:
        number = self.extensions.setdefault(extension, len(self.extensions))
        if not self.keys or key != self.keys[-1]:
            self.keys.append(key)
            self.starts.append(len(self.rows))
        elif any(row[3] == number for row in self.rows[self.starts[-1] :]):
            self.damage.append(Damage(offset, key, f"a second member .{extension} in the same sample, left out"))
            return
        self.rows.append((offset, size, checksum, number))

    def drop_last(self, key: str) -> None:
        """Takes back the sample `key` where it is the last one and incomplete."""
        if self.keys and self.keys[-1] == key:
            self.keys.pop()
            del self.rows[self.starts.pop() :]

    def index(self, tar_bytes: int) -> ShardIndex:
        keys = [key.encode("utf-8", "surrogateescape") for key in self.keys]
        columns = list(zip(*self.rows, strict=True)) if self.rows else [(), (), (), ()]
        return ShardIndex(
            extensions=tuple(self.extensions),
            starts=np.array([*self.starts, len(self.rows)], dtype=np.int64),
            offsets=np.array(columns[0], dtype=np.int64),
            sizes=np.array(columns[1], dtype=np.int64),
            checksums=np.array(columns[2], dtype=np.uint64),
            extension_ids=np.array(columns[3], dtype=np.uint16),
            key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_starts=np.cumsum([0, *map(len, keys)], dtype=np.int64),
            tar_bytes=tar_bytes,
            damage=tuple(self.damage),
        )


def index_shard(path: Path) -> ShardIndex:
    """Index of one tar, read once from end to end.

    What cannot be used is recorded as damage with its byte offset: a header that does not parse, a file that ends
    inside a member or without the end-of-archive mark, data after that mark, a member without extension or whose
    name leaves the folder. The samples before it are kept; one whose member is cut is not.

    Raises:
        OSError: the file cannot be read.
    """
    members = _Members()
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
                end = _read_members(tar, file, total, members)
        except tarfile.TarError as error:
            end = None
            members.damage.append(Damage(file.tell(), "", f"not readable as a tar from here on: {error}"))
        if end is not None and (reason := _bad_end(file, end, total)):
            members.damage.append(Damage(end, "", reason))
    return members.index(total)


def _read_members(tar: tarfile.TarFile, file: BinaryIO, total: int, members: _Members) -> int | None:
    """Adds the tar's members; returns where tarfile stopped, or None where the file ends inside a member."""
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise, 1 KB each
        parts = split_name(info.name)
        if info.isdir() or META_MEMBER.match(info.name):
            continue
        if not info.isreg():
            members.damage.append(Damage(info.offset, "", f"{info.name!r} is a link or device, left out"))
        elif leaves_folder(info.name):
            members.damage.append(Damage(info.offset, "", f"the name {info.name!r} leaves the folder, left out"))
        elif parts is None:
            members.damage.append(Damage(info.offset, "", f"{info.name!r} has no key and extension, left out"))
        elif info.offset_data + info.size > total:
            here = max(0, total - info.offset_data)
            reason = f"the file ends inside {info.name!r}: {here:,} of {info.size:,} bytes are there"
            members.damage.append(Damage(info.offset, parts[0], reason))
            members.drop_last(parts[0])
            return None
        else:
            data = os.pread(file.fileno(), info.size, info.offset_data)
            members.add(*parts, info.offset_data, info.size, xxhash.xxh3_64_intdigest(data))
        if tar.offset > total:  # only the padding is missing: tarfile would raise
            return total
    return tar.offset


def _bad_end(file: BinaryIO, end: int, total: int) -> str | None:
    """What is wrong at `end`, where tarfile stopped: it stops at damage as quietly as at the end of the archive."""
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if len(block) < tarfile.BLOCKSIZE:
        return "the file ends here without the end-of-archive mark: it is cut short"
    if block.count(0) < tarfile.BLOCKSIZE:
        return f"a corrupt header: the remaining {total - end:,} bytes are not read"
    for start in range(end, total, 1 << 20):
        rest = os.pread(file.fileno(), 1 << 20, start)
        if rest.count(0) < len(rest):
            return f"data after the end-of-archive mark: the remaining {total - end:,} bytes are not read"
    return None
