"""The manifest beside the shards: where each sample's members lie, and their checksums.

In: a folder of WebDataset tars, read once from end to end, whoever wrote them.
Out: `manifest.json` and one `NAME.index.safetensors` a shard; in training, a sample's offsets, loaded lazily.
"""

import contextlib
import json
import os
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from ldm.data.quarantine import Quarantined
from ldm.data.shard_index import Damage, ManifestError, ShardIndex, index_path, index_shard

VERSION = 1
MANIFEST_NAME = "manifest.json"
# 1 MB for a shard of 10,000 samples with three members each; a block of shards and its successor fit.
INDEXES_IN_MEMORY = 48


@dataclass(frozen=True)
class ShardEntry:
    """One shard's line in the manifest."""

    name: str
    """File name in the manifest's folder."""
    bytes: int
    samples: int
    index_xxh3: str
    """xxh3-64 of the index file, hexadecimal."""
    damage: tuple[Damage, ...] = ()

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or not self.name.endswith(".tar"):
            raise ManifestError(f"shard name {self.name!r}: expected the bare name of a .tar in the manifest's folder")


@dataclass
class Manifest:
    """The shards of a folder, in order, and who encoded them.

    `encoder` is None for raw pictures, otherwise the identity of the autoencoder and the text encoder that made the
    moments and states (weights hash, resolution, ...). Pickles small, without the indexes in memory.
    """

    folder: Path
    shards: list[ShardEntry]
    encoder: dict[str, Any] | None = None
    _indexes: OrderedDict[int, ShardIndex] = field(default_factory=OrderedDict, repr=False, compare=False)

    @staticmethod
    def load(folder: Path | str) -> "Manifest":
        """The manifest of a folder of shards.

        Raises:
            FileNotFoundError: there is none; the message names the command that makes it.
            ManifestError: it is not of this version, or damaged.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: expected one with shards and their manifest")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: make it with `python tools/index_shards.py {folder}`")
        try:
            stored = json.loads(path.read_text("utf-8"))
            if stored["version"] != VERSION:
                raise ValueError(f"version is {stored['version']!r}, expected {VERSION}")
            shards = [
                ShardEntry(**shard | {"damage": tuple(Damage(**damage) for damage in shard["damage"])})
                for shard in stored["shards"]
            ]
            return Manifest(folder, shards, stored["encoder"])
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{path} cannot be used ({type(error).__name__}: {error}): remove it; for raw shards "
                f"`python tools/index_shards.py {folder}` makes it again, encoded ones are encoded again, since their "
                "encoder's identity stood in it"
            ) from error

    def save(self) -> None:
        """Writes `manifest.json`, under a temporary name first."""
        shards = [asdict(shard) for shard in self.shards]
        stored = {"version": VERSION, "encoder": self.encoder, "shards": shards}
        write_whole(self.folder / MANIFEST_NAME, (json.dumps(stored, indent=1) + "\n").encode())

    @property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.shards]

    def path(self, shard: int) -> Path:
        """The shard's tar."""
        return self.folder / self.shards[shard].name

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, of which the last ones used stay in memory.

        Raises:
            ManifestError: the index file is missing, or is not the one that the manifest was made with.
        """
        index = self._indexes.get(shard)
        if index is not None:
            self._indexes.move_to_end(shard)
            return index
        path = index_path(self.path(shard))
        again = f"run `python tools/index_shards.py {self.folder}`"
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing though the manifest names its shard: {again}") from None
        if xxhash.xxh3_64_hexdigest(stored) != self.shards[shard].index_xxh3:
            raise ManifestError(f"{path} is not the index that {MANIFEST_NAME} was made with: {again}")
        index = self._indexes[shard] = ShardIndex.from_bytes(stored, path)
        if len(self._indexes) > INDEXES_IN_MEMORY:
            self._indexes.popitem(last=False)
        return index

    def digest(self) -> str:
        """xxh3-128 of all that determines which sample is which: a resumed run compares it with its own."""
        parts = [(shard.name, shard.bytes, shard.samples, shard.index_xxh3) for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def check_files(self) -> None:
        """Compares the shards' files with the manifest: warns of each size that differs.

        Raises:
            FileNotFoundError: a shard has vanished; the message names it.
        """
        for number, shard in enumerate(self.shards):
            try:
                size = self.path(number).stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self.path(number)} has vanished, though {MANIFEST_NAME} names it: bring it back, or leave it "
                    f"out with `python tools/index_shards.py {self.folder}`"
                ) from None
            if size != shard.bytes:
                warnings.warn(
                    f"{self.path(number)} has {size:,} bytes, the manifest says {shard.bytes:,}: samples that do not "
                    f"match their checksums go to the quarantine ledger; `python tools/index_shards.py {self.folder}` "
                    "indexes it as it is now",
                    stacklevel=2,
                )

    def damaged(self) -> list[Quarantined]:
        """What indexing could not use, as lines of the quarantine ledger: position -1 and no replacement."""
        return [
            Quarantined(shard.name, damage.key, f"byte {damage.byte:,}: {damage.reason}", -1, "")
            for shard in self.shards
            for damage in shard.damage
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict()}


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, flushes it to the disk and renames it, so that it is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def shard_files(folder: Path) -> list[Path]:
    """The tars of a folder by name, without those that are still being written."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def shard_entry(tar: Path, known: ShardEntry | None = None) -> ShardEntry:
    """Entry of one shard, whose index is written beside it.

    A readable index that is newer than the tar and of its size is taken as it is, so that the shards of a large
    folder are read once and not at each new one; where the shard is `known`, its index has to be the one known.
    """
    path, status = index_path(tar), tar.stat()
    if path.exists() and path.stat().st_mtime_ns >= status.st_mtime_ns:
        stored = path.read_bytes()
        if known is None or known.index_xxh3 == xxhash.xxh3_64_hexdigest(stored):
            with contextlib.suppress(ManifestError):
                index = ShardIndex.from_bytes(stored, path)
                if index.tar_bytes == status.st_size:
                    return _entry(tar.name, index, stored)
    index = index_shard(tar)
    stored = index.to_bytes()
    write_whole(path, stored)
    return _entry(tar.name, index, stored)


def _entry(name: str, index: ShardIndex, stored: bytes) -> ShardEntry:
    return ShardEntry(name, index.tar_bytes, len(index), xxhash.xxh3_64_hexdigest(stored), index.damage)


def build_manifest(folder: Path | str, encoder: dict[str, Any] | None = None, progress: bool = True) -> Manifest:
    """Indexes the tars of a folder, in the order of their names, and writes the manifest.

    Args:
        encoder: identity of what encoded the shards; None keeps that of a manifest that is already there.
        progress: show a bar.

    Raises:
        FileNotFoundError: the folder holds no tar.
        ManifestError: the manifest that is there is damaged, and with it the encoder's identity.
    """
    folder = Path(folder)
    tars = shard_files(folder)
    if not tars:
        raise FileNotFoundError(f"{folder} holds no .tar: expected WebDataset shards")
    before = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else Manifest(folder, [])
    known = {shard.name: shard for shard in before.shards}
    entries = [
        shard_entry(tar, known.get(tar.name)) for tar in tqdm(tars, "indexing", unit="shard", disable=not progress)
    ]
    manifest = Manifest(folder, entries, before.encoder if encoder is None else encoder)
    manifest.save()
    return manifest
