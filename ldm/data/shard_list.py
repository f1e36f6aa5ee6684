"""The shards of a manifest as columns: 100,000 of them are read in 0.1 s and take 20 MB.

In: entries, as indexing makes them; or the columns of a stored manifest.
Out: a sequence of `ShardEntry`, each made when it is asked for; the columns to store.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import xxhash

from ldm.data.shard_index import Damage, ManifestError

SHARD_NAME = re.compile(r"[^/\\\0\n]+\.tar")
COLUMNS = ("names", "bytes", "samples", "index_xxh3", "tar_xxh3", "damage")


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest."""

    name: str
    """File name in the manifest's folder, or under its base."""
    bytes: int
    samples: int
    index_xxh3: str
    """xxh3-64 of the index file, hexadecimal."""
    damage: tuple[Damage, ...] = ()
    tar_xxh3: str = ""
    """xxh3-64 of the whole tar, hexadecimal."""

    def __post_init__(self) -> None:
        _check_name(self.name)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise ManifestError(f"shard name {name!r}: expected the bare name of a .tar, without folders")


class ShardList(Sequence[ShardEntry]):
    """Entries of shards, held as columns; equal to any sequence of equal entries."""

    names: list[str]
    bytes: np.ndarray
    """(shards,) int64"""
    samples: np.ndarray
    """(shards,) int64"""
    index_xxh3: np.ndarray
    """(shards,) uint64"""
    tar_xxh3: np.ndarray
    """(shards,) uint64"""
    damage: dict[int, tuple[Damage, ...]]
    """By the number of the shard; most have none."""

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        entries = list(entries)
        self.names = [entry.name for entry in entries]
        self.bytes = np.array([entry.bytes for entry in entries], dtype=np.int64)
        self.samples = np.array([entry.samples for entry in entries], dtype=np.int64)
        self.index_xxh3 = _from_hex([entry.index_xxh3 for entry in entries])
        self.tar_xxh3 = _from_hex([entry.tar_xxh3 or "0" * 16 for entry in entries])
        self.damage = {number: entry.damage for number, entry in enumerate(entries) if entry.damage}
        self._check()

    @staticmethod
    def from_columns(stored: Mapping[str, Any]) -> "ShardList":
        """Inverse of `columns`.

        Raises:
            ValueError, KeyError, TypeError: not such columns; `ManifestError` among them.
        """
        shards = ShardList(())
        shards.names = stored["names"]
        shards.bytes, shards.samples = _whole_numbers(stored, "bytes"), _whole_numbers(stored, "samples")
        shards.index_xxh3, shards.tar_xxh3 = _from_hex(stored["index_xxh3"]), _from_hex(stored["tar_xxh3"])
        for number, *damage in stored["damage"]:
            shards.damage[number] = (*shards.damage.get(number, ()), Damage(*damage))
        shards._check()
        return shards

    def columns(self) -> dict[str, list]:
        """What is stored in the manifest: a list for each of `COLUMNS`."""
        return {
            "names": self.names,
            "bytes": self.bytes.tolist(),
            "samples": self.samples.tolist(),
            "index_xxh3": _to_hex(self.index_xxh3),
            "tar_xxh3": _to_hex(self.tar_xxh3),
            "damage": [[number, *astuple(one)] for number, several in self.damage.items() for one in several],
        }

    @cached_property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return self.samples.tolist()

    def digest(self) -> str:
        """xxh3-128 of the names, sizes, numbers of samples and indexes."""
        hashed = xxhash.xxh3_128(json.dumps(self.names).encode())
        for column in (self.bytes, self.samples, self.index_xxh3):
            hashed.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
        return hashed.hexdigest()

    def _check(self) -> None:
        lengths = {len(self.names), len(self.bytes), len(self.samples), len(self.index_xxh3), len(self.tar_xxh3)}
        if len(lengths) > 1:
            raise ManifestError(f"its columns differ in length: {sorted(lengths)}")
        for name in self.names:
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                _check_name(name)
        if len(set(self.names)) < len(self.names):
            raise ManifestError("a shard's name stands twice")
        if not all(number in range(len(self.names)) for number in self.damage):
            raise ManifestError(f"damage of shards {sorted(self.damage)}, but there are {len(self.names)}")
        if self.bytes.min(initial=0) < 0 or self.samples.min(initial=0) < 0:
            raise ManifestError("a shard has a negative size or number of samples")

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, number: slice) -> list[ShardEntry]: ...

    def __getitem__(self, number: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return ShardEntry(
            self.names[number],
            int(self.bytes[number]),
            int(self.samples[number]),
            f"{self.index_xxh3[number]:016x}",
            self.damage.get(number, ()),
            f"{self.tar_xxh3[number]:016x}",
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardList):
            return isinstance(other, Sequence) and self == ShardList(other)
        # An index holds the checksum of its tar and the damage found in it: where two are equal, these are.
        return self.names == other.names and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardList({len(self):,} shards, {int(self.samples.sum()):,} samples)"


def _whole_numbers(stored: Mapping[str, Any], name: str) -> np.ndarray:
    numbers = np.array(stored[name])
    if numbers.size and numbers.dtype.kind != "i":
        raise ManifestError(f"column {name!r} holds other things than whole numbers")
    return numbers.astype(np.int64)


def _from_hex(checksums: Sequence[str]) -> np.ndarray:
    stored = bytes.fromhex("".join(checksums))
    if len(stored) != 8 * len(checksums):
        raise ManifestError("a checksum has not 16 hexadecimal digits")
    return np.frombuffer(stored, dtype=">u8").astype(np.uint64)


def _to_hex(checksums: np.ndarray) -> list[str]:
    return [f"{checksum:016x}" for checksum in checksums.tolist()]
