"""Manifests and indexes: read as written, refused where altered, small at 10^8 samples; the tool that makes them."""

import json
import os
import pickle
import random
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tars import three_members, write_tar

from ldm.data.indexing import index_shard
from ldm.data.manifest import INDEXES_IN_MEMORY, MANIFEST_NAME, Manifest, ManifestError, ShardEntry, build_manifest
from ldm.data.shard_index import Damage, ShardIndex, index_path
from ldm.data.shards import write_shards
from tools.index_shards import main as index_shards


def build(folder: Path, shards: int = 3) -> Manifest:
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        write_tar(folder / f"s-{number}.tar", three_members(4 + number, seed=number))
    return build_manifest(folder, progress=False)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    manifest.encoder = {"weights": "abc", "resolution": 64}
    manifest.save()
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.counts == [4, 5, 6]
    assert [loaded.index(number).key(0) for number in range(3)] == ["0000"] * 3
    assert not list(tmp_path.glob("*tmp*"))


def test_indexing_again_keeps_the_encoders_identity(tmp_path: Path) -> None:
    build(tmp_path)
    build_manifest(tmp_path, {"weights": "abc"}, progress=False)
    assert build_manifest(tmp_path, progress=False).encoder == {"weights": "abc"}


def test_a_missing_manifest_or_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python tools/index_shards\.py"):
        Manifest.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar"):
        build_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(version=99),
        lambda stored: stored.update(version=1, shards=[]),
        lambda stored: stored.pop("names"),
        lambda stored: stored.pop("damage"),
        lambda stored: stored.update(unknown=1),
        lambda stored: stored["bytes"].pop(),
        lambda stored: stored["bytes"].__setitem__(0, "4096"),
        lambda stored: stored["samples"].__setitem__(1, 1.5),
        lambda stored: stored["samples"].__setitem__(1, -1),
        lambda stored: stored["index_xxh3"].__setitem__(0, "abc"),
        lambda stored: stored["tar_xxh3"].__setitem__(0, "x" * 16),
        lambda stored: stored["damage"].append([7, 0, "", "of a shard that is not there"]),
        lambda stored: stored["names"].__setitem__(0, "../outside.tar"),
        lambda stored: stored["names"].__setitem__(0, "/etc/passwd"),
        lambda stored: stored["names"].__setitem__(0, "s-1.tar"),
        lambda stored: stored["names"].__setitem__(0, 5),
    ],
)
def test_a_manifest_that_is_not_one_is_an_error_that_names_it(tmp_path: Path, change) -> None:
    build(tmp_path)
    path = tmp_path / MANIFEST_NAME
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_a_shard_of_another_size_is_warned_of_and_a_vanished_one_is_an_error(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest.check_files()
    os.truncate(manifest.path(1), 2000)
    with pytest.warns(UserWarning, match=r"s-1\.tar has 2,000 bytes"):
        manifest.check_files()
    manifest.path(2).unlink()
    with (
        pytest.warns(UserWarning, match=r"s-1\.tar"),
        pytest.raises(FileNotFoundError, match=r"s-2\.tar has vanished"),
    ):
        manifest.check_files()


def test_an_index_that_is_missing_or_not_the_manifests_is_an_error_and_is_made_again(tmp_path: Path) -> None:
    before = build(tmp_path)
    path = index_path(before.path(0))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="is not the index"):
        Manifest.load(tmp_path).index(0)
    path.unlink()
    with pytest.raises(ManifestError, match="is missing"):
        Manifest.load(tmp_path).index(0)
    path.write_bytes(content)
    assert build_manifest(tmp_path, progress=False) == before
    assert Manifest.load(tmp_path).index(0).key(3) == "0003"


def test_shards_older_than_their_index_are_not_read_again(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    path, index = manifest.path(0), index_path(manifest.path(0))
    content = bytearray(path.read_bytes())
    content[512] ^= 255  # same size; told by its time
    path.write_bytes(content)
    os.utime(path, ns=(0, index.stat().st_mtime_ns - 1))
    assert build_manifest(tmp_path, progress=False).digest() == manifest.digest()
    os.utime(path, ns=(0, index.stat().st_mtime_ns + 1))
    assert build_manifest(tmp_path, progress=False).digest() != manifest.digest()


def test_the_digest_depends_on_the_shards_bytes_and_not_on_the_place_or_time(tmp_path: Path) -> None:
    first = build(tmp_path / "a")
    second = build(tmp_path / "b")
    assert first.digest() == second.digest()
    write_tar(tmp_path / "b" / "s-0.tar", three_members(4, seed=9))
    assert build_manifest(tmp_path / "b", progress=False).digest() != first.digest()


def test_a_manifest_pickles_without_its_indexes_and_holds_few_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.data.manifest.INDEXES_IN_MEMORY", 2)
    manifest = build(tmp_path, shards=5)
    for number in (0, 1, 2, 3, 4, 0, 4):
        assert len(manifest.index(number)) == 4 + number
        assert len(manifest._indexes) <= 2
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy == manifest
    assert len(copy._indexes) == 0


def test_the_command_line_indexes_verifies_and_tells_damage_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write_tar(tmp_path / f"s-{number}.tar", three_members(4, seed=number))
    assert index_shards([str(tmp_path)]) == 0
    assert "8 samples in 2 shards, 0 places damaged" in capsys.readouterr().out
    assert index_shards([str(tmp_path), "--verify"]) == 0
    manifest = Manifest.load(tmp_path)
    index = manifest.index(1)
    path = manifest.path(1)
    content = bytearray(path.read_bytes())
    content[int(index.offsets[index.starts[2]])] ^= 1
    path.write_bytes(content)
    assert index_shards([str(tmp_path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "s-1.tar/0002: member .json differs from its checksum" in out
    assert "8 samples in 2 shards read, 1 differ" in out
    os.truncate(path, int(index.offsets[index.starts[3]]) + 1)
    assert index_shards([str(tmp_path)]) == 1
    assert "s-1.tar: byte" in capsys.readouterr().out
    assert index_shards([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_damage_found_by_indexing_is_ledger_lines(tmp_path: Path) -> None:
    manifest = write_shards(
        ({"__key__": f"k{number}", "txt": "t" * 600} for number in range(5)), tmp_path, prefix="s", samples_per_shard=5
    )
    os.truncate(manifest.path(0), 512 + 1024 + 512 + 100)
    (record,) = build_manifest(tmp_path, progress=False).damaged()
    assert (record.shard, record.key, record.position, record.replacement) == ("s-000000.tar", "k1", -1, "")
    assert "byte 1,536: the file ends inside 'k1.txt': 100 of 600 bytes are there" in record.reason


def test_an_index_is_read_as_it_was_written_however_large_its_numbers(tmp_path: Path) -> None:
    small = index_shard(write_tar(tmp_path / "a.tar", three_members(300)))
    large = replace(
        small,
        offsets=small.offsets + 2**41,  # behind 2 TiB: more blocks than 32 bits count
        sizes=small.sizes.astype(np.int64) + 2**33,
        extension_ids=small.extension_ids.astype(np.uint16) + 300,
        damage=(Damage(7, "k\udcff", "reason"),),
    )
    for index in (small, large):
        found = ShardIndex.from_bytes(index.to_bytes(), tmp_path / "a")
        for name, value in vars(index).items():
            assert np.array_equal(getattr(found, name), value), name
            assert not isinstance(value, np.ndarray) or getattr(found, name).dtype == value.dtype, name
        assert index.to_bytes() == found.to_bytes()
    header = json.loads(small.to_bytes()[8 : 8 + int.from_bytes(small.to_bytes()[:8], "little")])
    types = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert types == {
        **dict.fromkeys(("starts", "blocks", "sizes", "key_starts"), "U32"),
        "checksums": "U64",
        "extension_ids": "U8",
        "key_bytes": "U8",
        "shapes": "I32",
    }
    assert len(small.to_bytes()) < 300 * 74 + 1000  # a sample: 4 + 3 * (4 + 4 + 8 + 1) + 4 + 4 + 8 bytes


def test_an_index_of_an_older_version_is_refused_and_made_again(tmp_path: Path) -> None:
    manifest = build(tmp_path, shards=1)
    path = index_path(manifest.path(0))
    stored = path.read_bytes()
    path.write_bytes(stored.replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    assert path.read_bytes() != stored
    with pytest.raises(ManifestError, match=r"not a shard index of version 2 \(its version is 1\).*index_shards\.py"):
        ShardIndex.from_bytes(path.read_bytes(), path)
    assert build_manifest(tmp_path, progress=False) == manifest
    assert path.read_bytes() == stored


@pytest.mark.parametrize(("shards", "samples"), [(10_000, 10_000), (100_000, 1_000)])
def test_100_million_samples_take_less_than_200_mb(tmp_path: Path, shards: int, samples: int) -> None:
    """The manifest whole, and as many indexes as are kept, of shards with three members a sample."""
    numbers = np.arange(3 * samples)
    index = ShardIndex(
        extensions=("jpg", "txt", "json"),
        starts=numbers[: samples + 1] * 3,
        offsets=numbers * 30_720,
        sizes=np.full(3 * samples, 30_000, np.uint32),
        checksums=numbers.astype(np.uint64) * 2**40,
        extension_ids=(numbers % 3).astype(np.uint8),
        shapes=np.full((samples, 2), 512, np.int32),
        key_bytes=np.zeros(9 * samples, np.uint8),
        key_starts=(numbers[: samples + 1] * 9).astype(np.uint32),
    )
    stored = index.to_bytes()
    checksum = xxhash.xxh3_64_hexdigest(stored)
    entries = [ShardEntry(f"shard-{number:06d}.tar", 10**9 + number, samples, checksum) for number in range(shards)]
    Manifest(tmp_path, entries).save()
    for number in range(INDEXES_IN_MEMORY + 2):
        index_path(tmp_path / f"shard-{number:06d}.tar").write_bytes(stored)
    del entries, index, numbers
    tracemalloc.start()
    try:
        manifest = Manifest.load(tmp_path)
        for number in range(INDEXES_IN_MEMORY + 2):
            manifest.index(number)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{shards:,} shards of {samples:,}: {held / 1e6:.0f} MB, {most / 1e6:.0f} MB at most")
    assert sum(manifest.counts) == 10**8
    assert most < 200e6
    assert len(pickle.dumps(manifest)) < 10e6


def test_shards_of_a_manifest_are_a_sequence_of_entries(tmp_path: Path) -> None:
    entries = [
        ShardEntry(f"{number}.tar", number * 1000, number, f"{number:016x}", (), f"{number + 2**60:016x}")
        for number in range(1, 6)
    ]
    entries[2] = replace(entries[2], damage=(Damage(1, "a", "x"), Damage(2, "", "y")))
    Manifest(tmp_path, entries).save()
    shards = Manifest.load(tmp_path).shards
    assert list(shards) == entries
    assert shards == entries
    assert shards != entries[:-1]
    assert shards != [*entries[:-1], replace(entries[-1], index_xxh3="f" * 16)]
    assert shards[-2] == entries[-2]
    assert shards[1:4] == entries[1:4]
    with pytest.raises(IndexError):
        shards[5]
    assert [record.reason for record in Manifest.load(tmp_path).damaged()] == ["byte 1: x", "byte 2: y"]


def test_200_random_flipped_bits_and_cuts_of_a_manifest_are_errors(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    path = manifest.folder / MANIFEST_NAME
    whole = path.read_bytes()
    seed, trials = 4, 200
    print(f"seed {seed}, {trials} flips and {trials} cuts")
    draw = random.Random(seed)
    for _ in range(trials):
        at = draw.randrange(len(whole) - 4)  # not in the closing lines, of which a space may become another
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(ManifestError):
            Manifest.load(manifest.folder)
        path.write_bytes(whole[: draw.randrange(len(whole) - 2)])
        with pytest.raises(ManifestError):
            Manifest.load(manifest.folder)
    path.write_bytes(whole)
    assert Manifest.load(manifest.folder).digest() == manifest.digest()
