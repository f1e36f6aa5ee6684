"""The manifest of a set of shards: where each sample's members lie, and their checksums.

In: `manifest.json` and one `NAME.index.safetensors` a shard, beside the shards or apart, in a folder or at a URL.
Out: sizes and counts of the shards; a sample's offsets, loaded lazily; all of it made by `build_manifest`.
"""

import contextlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from tqdm import tqdm

from ldm.data.indexing import index_shard
from ldm.data.quarantine import Quarantined
from ldm.data.remote_index import announced_size, find_shards, in_threads, index_url
from ldm.data.shard_index import ManifestError, ShardIndex, index_path
from ldm.data.shard_list import COLUMNS, ShardEntry, ShardList
from ldm.data.storage import DEFAULT_RETRIES, Retries, is_http, is_url, join, list_files, read_bytes, size, write_whole

if TYPE_CHECKING:
    from ldm.data.cache import ShardCache

VERSION = 2
MANIFEST_NAME = "manifest.json"
_OWN_XXH3 = b',\n "xxh3": '  # of all bytes before it
# 0.9 MB for a shard of 10,000 samples with three members each; a block of shards and its successor fit.
INDEXES_IN_MEMORY = 48


@dataclass
class Manifest:
    """The shards of a folder or URL, in order, and who encoded them.

    `encoder` is None for raw pictures, otherwise the identity of the autoencoder and the text encoder that made the
    moments and states (weights hash, resolution, ...). Pickles small, without the indexes in memory.
    """

    folder: Path
    """Where manifest.json and the indexes lie; of a manifest at a URL, where this node keeps a copy of it."""
    shards: Sequence[ShardEntry]
    encoder: dict[str, Any] | None = None
    base: str | None = None
    """Folder or URL of the shards; None where they lie beside the manifest."""
    cache: "ShardCache | None" = field(default=None, repr=False, compare=False)
    """Where shards and indexes at URLs are kept on this node."""
    source: str | None = field(default=None, compare=False)
    """URL of the folder with the manifest and the indexes; None where that is `folder`."""
    _indexes: OrderedDict[int, ShardIndex] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardList):
            self.shards = ShardList(self.shards)

    @staticmethod
    def load(folder: Path | str, cache: "ShardCache | None" = None) -> "Manifest":
        """The manifest of a folder of shards, or of one apart from them.

        Args:
            folder: the folder that manifest.json lies in, or its URL.
            cache: where shards and indexes at URLs are kept; needed for a manifest at a URL.

        Raises:
            FileNotFoundError: there is none; the message names the command that makes it.
            ManifestError: it is not of this version, or damaged.
            ValueError: a URL, and no cache.
            StorageError: the URL cannot be read.
        """
        if is_url(folder):
            return Manifest._load_url(str(folder).rstrip("/"), cache)
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: expected one with shards and their manifest")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: make it with `python tools/index_shards.py {folder}`")
        return Manifest._parse(path.read_bytes(), folder, folder, cache)

    @staticmethod
    def _load_url(url: str, cache: "ShardCache | None") -> "Manifest":
        if cache is None:
            raise ValueError(
                f"{url} is not a local folder: set data.cache.folder to one on this node's disk, where its shards are "
                "kept while they are read"
            )
        folder = cache.folder / "manifests" / xxhash.xxh3_64_hexdigest(url.encode())
        try:
            stored, manifest = Manifest._fetch(url, folder, cache)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}: make a manifest with `python tools/index_shards.py {url} --out FOLDER`, and name FOLDER "
                "instead of the URL, or copy its content beside the shards"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MANIFEST_NAME, stored)
        manifest.source = url
        manifest.base = manifest.base or url
        return manifest

    @staticmethod
    def _fetch(url: str, folder: Path, cache: "ShardCache") -> tuple[bytes, "Manifest"]:
        """The file at a URL and its manifest, fetched again where it was cut short or altered on its way."""
        for _ in range(cache.retries.attempts - 1):
            stored = read_bytes(join(url, MANIFEST_NAME), cache.retries)
            with contextlib.suppress(ManifestError):
                return stored, Manifest._parse(stored, folder, url, cache)
        stored = read_bytes(join(url, MANIFEST_NAME), cache.retries)
        return stored, Manifest._parse(stored, folder, url, cache)

    @staticmethod
    def _parse(stored: bytes, folder: Path, where: Path | str, cache: "ShardCache | None") -> "Manifest":
        try:
            fields = json.loads(stored)
            if fields["version"] != VERSION:
                raise ValueError(f"version is {fields['version']!r}, expected {VERSION}")
            if unknown := fields.keys() - {"version", "encoder", "base", "xxh3", *COLUMNS}:
                raise ValueError(f"unknown entries {sorted(unknown)}")
            if fields["xxh3"] != xxhash.xxh3_64_hexdigest(stored[: stored.rfind(_OWN_XXH3)]):
                raise ValueError("its content is not that of its xxh3: it was damaged, or changed by hand")
            return Manifest(folder, ShardList.from_columns(fields), fields["encoder"], fields["base"], cache)
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{where}/{MANIFEST_NAME} cannot be used ({type(error).__name__}: {error}): remove it; for raw shards "
                f"`python tools/index_shards.py {where}` makes it again, encoded ones are encoded again, since their "
                "encoder's identity stood in it"
            ) from error

    def save(self) -> None:
        """Writes `manifest.json` into `folder`, under a temporary name first; a line an entry, its own xxh3 last."""
        stored = {"version": VERSION, "encoder": self.encoder, "base": self.base, **self._columns.columns()}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in stored.items()]
        content = ("{\n" + ",\n".join(lines)).encode()
        own = _OWN_XXH3 + json.dumps(xxhash.xxh3_64_hexdigest(content)).encode()
        write_whole(self.folder / MANIFEST_NAME, content + own + b"\n}\n")

    @property
    def _columns(self) -> ShardList:
        assert isinstance(self.shards, ShardList)
        return self.shards

    @property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return self._columns.counts

    @property
    def remote(self) -> bool:
        """Whether the shards lie at a URL and are read through the cache."""
        return self.base is not None and is_url(self.base)

    def path(self, shard: int) -> Path:
        """The shard's tar.

        Raises:
            ValueError: it lies at a URL.
        """
        if self.remote:
            raise ValueError(f"{self.url(shard)} has no local path: it is read through the cache")
        return (self.folder if self.base is None else Path(self.base)) / self._columns.names[shard]

    def url(self, shard: int) -> str:
        """The shard's URL; of local shards the path."""
        name = self._columns.names[shard]
        return join(self.base, name) if self.base is not None and is_url(self.base) else str(self.path(shard))

    def location(self, shard: int) -> str:
        """Where the shard is, for messages: its path or URL."""
        return self.url(shard)

    @property
    def remake(self) -> str:
        """The command that makes this manifest again."""
        if self.base is None or self.base == self.source:
            return (
                f"`python tools/index_shards.py {self.source or self.folder}{' --out FOLDER' if self.source else ''}`"
            )
        return f"`python tools/index_shards.py {self.base} --out {self.source or self.folder}`"

    def index(self, shard: int) -> ShardIndex:
        """The shard's index, of which the last ones used stay in memory.

        Raises:
            ManifestError: the index file is missing, or is not the one that the manifest was made with.
            StorageError: it lies at a URL and cannot be read.
        """
        index = self._indexes.get(shard)
        if index is not None:
            self._indexes.move_to_end(shard)
            return index
        path = index_path(self.folder / self._columns.names[shard])
        expected = self._columns[shard].index_xxh3
        place = str(path) if self.source is None else join(self.source, path.name)
        try:
            stored = (
                path.read_bytes()
                if self.cache is None or self.source is None
                else self.cache.read(place, expected, self.remake)
            )
        except FileNotFoundError:
            raise ManifestError(f"{place} is missing though the manifest names its shard: run {self.remake}") from None
        if xxhash.xxh3_64_hexdigest(stored) != expected:
            raise ManifestError(f"{place} is not the index that {MANIFEST_NAME} was made with: run {self.remake}")
        index = self._indexes[shard] = ShardIndex.from_bytes(stored, path)
        if len(self._indexes) > INDEXES_IN_MEMORY:
            self._indexes.popitem(last=False)
        return index

    def digest(self) -> str:
        """xxh3-128 of all that determines which sample is which, wherever the shards lie.

        A resumed run compares it with its own.
        """
        return self._columns.digest()

    def check_files(self) -> None:
        """Compares the shards with the manifest: warns of each size that differs.

        Local shards and those whose storage lists sizes (not HTTP) are all looked at; of others the first one is, so
        that a wrong URL is an error at once, and each of the rest when it is fetched.

        Raises:
            FileNotFoundError: a shard has vanished; the message names it.
            StorageError: the URL cannot be read.
        """
        for number, found in self._sizes():
            if found is None:
                raise FileNotFoundError(
                    f"{self.location(number)} has vanished, though {MANIFEST_NAME} names it: bring it back, or leave "
                    f"it out with {self.remake}"
                )
            if found != (expected := int(self._columns.bytes[number])):
                then = (
                    "reading it will be an error"
                    if self.remote
                    else "samples that do not match their checksums go to the quarantine ledger"
                )
                warnings.warn(
                    f"{self.location(number)} has {found:,} bytes, the manifest says {expected:,}: {then}; "
                    f"{self.remake} indexes it as it is now",
                    stacklevel=2,
                )

    def _sizes(self) -> Iterator[tuple[int, int | None]]:
        """Number and present size of each shard that can be looked at; None for one that is not there."""
        if not self.remote:
            for number in range(len(self.shards)):
                try:
                    yield number, os.stat(self.path(number)).st_size
                except FileNotFoundError:
                    yield number, None
            return
        assert self.base is not None
        retries = DEFAULT_RETRIES if self.cache is None else self.cache.retries
        if is_http(self.base):
            try:
                found = size(self.url(0), retries)
            except FileNotFoundError:
                yield 0, None
                return
            if found is not None:
                yield 0, found
            return
        there = list_files(self.base, retries)
        for number, name in enumerate(self._columns.names):
            if name not in there:
                yield number, None
            elif (found := there[name]) is not None:
                yield number, found

    def damaged(self) -> list[Quarantined]:
        """What indexing could not use, as lines of the quarantine ledger: position -1 and no replacement."""
        return [
            Quarantined(self._columns.names[number], damage.key, f"byte {damage.byte:,}: {damage.reason}", -1, "")
            for number, several in self._columns.damage.items()
            for damage in several
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict()}


def shard_files(folder: Path) -> list[Path]:
    """The tars of a folder by name, without those that are still being written."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def shard_entry(tar: Path, known: ShardEntry | None = None, index_file: Path | None = None) -> ShardEntry:
    """Entry of one shard, whose index is written beside it, or as `index_file`.

    A readable index that is newer than the tar and of its size is taken as it is, so that the shards of a large
    folder are read once and not at each new one; where the shard is `known`, its index has to be the one known.
    """
    path, status = index_file or index_path(tar), tar.stat()
    if path.exists() and path.stat().st_mtime_ns >= status.st_mtime_ns:
        taken = _kept_entry(tar.name, path, status.st_size, known)
        if taken is not None:
            return taken
    return _new_entry(tar.name, path, index_shard(tar))


def _kept_entry(name: str, path: Path, tar_bytes: int, known: ShardEntry | None) -> ShardEntry | None:
    """Entry by an index file that is there, or None where it is not of a tar of this size, or not the one known."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    if known is None or known.index_xxh3 == xxhash.xxh3_64_hexdigest(stored):
        with contextlib.suppress(ManifestError):
            index = ShardIndex.from_bytes(stored, path)
            if index.tar_bytes == tar_bytes:
                return _entry(name, index, stored)
    return None


def _new_entry(name: str, path: Path, index: ShardIndex) -> ShardEntry:
    stored = index.to_bytes()
    write_whole(path, stored)
    return _entry(name, index, stored)


def _entry(name: str, index: ShardIndex, stored: bytes) -> ShardEntry:
    checksum = xxhash.xxh3_64_hexdigest(stored)
    return ShardEntry(name, index.tar_bytes, len(index), checksum, index.damage, index.xxh3)


def build_manifest(
    folder: Path | str,
    encoder: dict[str, Any] | None = None,
    progress: bool = True,
    *,
    out: Path | str | None = None,
    retries: Retries = DEFAULT_RETRIES,
) -> Manifest:
    """Indexes the tars of a folder or at a URL, in the order of their names, and writes the manifest.

    Run again, it goes on where it stopped: shards that have an index of their size already are not read again.

    Args:
        folder: a folder, a URL of one, or a URL with braces.
        encoder: identity of what encoded the shards; None keeps that of a manifest that is already there.
        progress: show a bar.
        out: local folder for the manifest and the indexes; None writes them beside local shards.
        retries: how URLs are tried.

    Raises:
        FileNotFoundError: no tar there.
        ManifestError: the manifest that is there is damaged, and with it the encoder's identity.
        ValueError: a URL and no `out`; a manifest in `out` of other shards.
        StorageError: a URL cannot be read.
    """
    if is_url(folder):
        if out is None:
            raise ValueError(f"{folder}: shards at a URL need a local folder for their manifest: add --out FOLDER")
        base: str | None
        base, sizes = find_shards(str(folder), retries)
        names = list(sizes)
    else:
        folder = Path(folder)
        names = [tar.name for tar in shard_files(folder)]
        if not names:
            raise FileNotFoundError(f"{folder} holds no .tar: expected WebDataset shards")
        beside = out is None or Path(out).resolve() == folder.resolve()
        base = None if beside else str(folder.resolve())
    home = Path(folder if out is None else out)
    home.mkdir(parents=True, exist_ok=True)
    before = Manifest.load(home) if (home / MANIFEST_NAME).exists() else Manifest(home, [], base=base)
    if before.base != base:
        raise ValueError(
            f"{home}/{MANIFEST_NAME} is of the shards in {before.base or home}, not of those in {base or home}: choose "
            "another folder, or remove what is in it"
        )
    known = {shard.name: shard for shard in before.shards}

    def local(name: str) -> ShardEntry:
        return shard_entry(Path(folder) / name, known.get(name), index_path(home / name))

    def remote(name: str) -> ShardEntry:
        url, path = join(str(base), name), index_path(home / name)
        there = announced_size(url, sizes[name], retries)
        kept = None if there is None else _kept_entry(name, path, there, known.get(name))
        return kept or _new_entry(name, path, index_url(url, retries, there))

    with tqdm(total=len(names), desc="indexing", unit="shard", disable=not progress) as bar:
        entries = []
        for entry in in_threads(remote, names) if is_url(folder) else map(local, names):
            entries.append(entry)
            bar.update()
    manifest = Manifest(home, entries, before.encoder if encoder is None else encoder, base)
    manifest.save()
    return manifest
