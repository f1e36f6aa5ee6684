"""Index of one shard: which bytes of the tar are which member of which sample, their checksums, the pictures' sizes.

In: the bytes of an index file, a small safetensors file that indexing.py makes in one pass over the tar.
Out: a `ShardIndex`, 90 bytes in memory for a sample of three members; what indexing could not use is in its damage.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

INDEX_VERSION = 2
INDEX_SUFFIX = ".index.safetensors"
BLOCK = 512  # a tar is made of such: each member's data begins at a multiple


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
    """(members,) uint32, or int64 where a member has 4 GiB, in bytes"""
    checksums: np.ndarray
    """(members,) uint64, xxh3-64 of the data"""
    extension_ids: np.ndarray
    """(members,) uint8 or uint16, into `extensions`"""
    shapes: np.ndarray
    """(samples, 2) int32, height and width of the raw picture in pixels, upright, or of the moments; 0, 0 if unknown"""
    key_bytes: np.ndarray
    """(total,) uint8, all keys in UTF-8 without separator"""
    key_starts: np.ndarray
    """(samples + 1,) uint32, into `key_bytes`"""
    tar_bytes: int = 0
    """Size of the tar that was indexed."""
    xxh3: str = ""
    """xxh3-64 of the whole tar, hexadecimal."""
    damage: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, sample: int) -> str:
        """Key of a sample, as webdataset's `__key__`."""
        stored = self.key_bytes[self.key_starts[sample] : self.key_starts[sample + 1]]
        return stored.tobytes().decode("utf-8", "surrogateescape")

    def to_bytes(self) -> bytes:
        """The index file: a safetensors file whose metadata hold extensions, damage, the tar's size and checksum."""
        arrays = {name: getattr(self, name) for name in _AS_THEY_ARE}
        arrays["starts"] = compact(self.starts)
        arrays["blocks"] = compact(self.offsets // BLOCK)
        about = {
            "version": INDEX_VERSION,
            "extensions": self.extensions,
            "damage": [asdict(damage) for damage in self.damage],
            "tar_bytes": self.tar_bytes,
            "xxh3": self.xxh3,
        }
        return save(arrays, {"shard_index": json.dumps(about)})  # one entry: safetensors writes several in random order

    @staticmethod
    def from_bytes(stored: bytes, path: Path) -> "ShardIndex":
        """Inverse of `to_bytes`; `path` is for the error.

        Raises:
            ManifestError: not an index of this version.
        """
        try:
            header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
            about = json.loads(header["__metadata__"]["shard_index"])
            if about["version"] != INDEX_VERSION:
                raise ValueError(f"its version is {about['version']!r}")
            arrays = load(stored)
            return ShardIndex(
                extensions=tuple(about["extensions"]),
                damage=tuple(Damage(**damage) for damage in about["damage"]),
                tar_bytes=about["tar_bytes"],
                xxh3=about["xxh3"],
                starts=arrays["starts"].astype(np.int64),
                offsets=arrays["blocks"].astype(np.int64) * BLOCK,
                **{name: arrays[name] for name in _AS_THEY_ARE},
            )
        except Exception as error:
            raise ManifestError(
                f"{path} is not a shard index of version {INDEX_VERSION} ({error}): make it again with "
                f"`python tools/index_shards.py {path.parent}`"
            ) from error


_AS_THEY_ARE = ("sizes", "checksums", "extension_ids", "shapes", "key_bytes", "key_starts")


def compact(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 as uint32 where they fit, else as int64."""
    return numbers.astype(np.uint32 if numbers.size == 0 or numbers.max() < 2**32 else np.int64)


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
