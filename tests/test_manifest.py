"""Indexes and manifests of shards that others wrote, whole and damaged, against tarfile and the stock reader."""

import json
import os
import pickle
import random
import tarfile
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from tars import add, three_members, write_tar

from ldm.data.indexing import index_shard
from ldm.data.manifest import INDEXES_IN_MEMORY, MANIFEST_NAME, Manifest, ManifestError, ShardEntry, build_manifest
from ldm.data.shard_index import Damage, ShardIndex, index_path, split_name
from ldm.data.shards import write_shards
from tools.index_shards import main as index_shards


def contents(path: Path, index: ShardIndex) -> list[dict]:
    """What an index says of a tar: samples with key, data of each member; its checksums compared on the way."""
    stored = path.read_bytes()
    assert index.shapes.shape == (len(index), 2)
    samples = []
    for sample in range(len(index)):
        members = {}
        for row in range(index.starts[sample], index.starts[sample + 1]):
            data = stored[index.offsets[row] : index.offsets[row] + index.sizes[row]]
            assert xxhash.xxh3_64_intdigest(data) == index.checksums[row]
            members[index.extensions[index.extension_ids[row]]] = data
        samples.append({"__key__": index.key(sample), **members})
    return samples


def stock(path: Path) -> list[dict]:
    """The samples that webdataset itself reads."""
    reader = webdataset.WebDataset(str(path), shardshuffle=False)
    return [{k: v for k, v in one.items() if k == "__key__" or not k.startswith("__")} for one in reader]


ODD_NAMES = [
    ("plain.png", b"1"),
    ("plain.txt", b"2"),
    ("with.many.dots.PNG", b"3"),
    ("with.seg.png", b"4"),
    ("folder.with.dot/name.JPG", b"5"),
    ("folder.with.dot/name.cls", b""),
    ("./dotted/start.txt", b"6"),
    ("umlaut-ä-日本/ключ.txt", "ü".encode()),
    ("x" * 120 + "/" + "y" * 150 + ".txt", b"long"),
    ("plain.json", b"again, not consecutive"),
]


def test_odd_names_give_the_keys_extensions_and_bytes_of_the_stock_reader(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "odd.tar", ODD_NAMES)
    index = index_shard(path)
    assert index.damage == ()
    assert contents(path, index) == stock(path)
    assert len(index) == 7


def test_tars_of_webdatasets_own_writer_are_read_as_the_stock_reader_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(20):
            picture = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
            array = rng.standard_normal(3)
            writer.write(
                {"__key__": f"k{number}", "png": picture, "txt": f"é {number}", "json": {"n": 1}, "a.npy": array}
            )
    manifest = build_manifest(tmp_path, progress=False)
    assert manifest.counts == [7, 7, 6]
    assert manifest.damaged() == []
    for number in range(3):
        assert contents(manifest.path(number), manifest.index(number)) == stock(manifest.path(number))


def test_longer_headers_of_other_tar_programs_are_read(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            add(tar, "folder", b"", type=tarfile.DIRTYPE)
            add(tar, "folder/" + "n" * 80 + ".txt", b"text", mtime=12.5)
            add(tar, "__note__", b"webdataset skips this")
        index = index_shard(path)
        assert index.damage == ()
        assert contents(path, index) == stock(path) == [{"__key__": "folder/" + "n" * 80, "txt": b"text"}]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", "png")),
        ("a/b.c/d.Seg.PNG", ("a/b.c/d", "seg.png")),
        ("noextension", None),
        ("a.b/c", None),
        (".hidden", None),
        ("ends.", None),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_base_name(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts
    stock_parts = webdataset.tariterators.base_plus_ext(name)
    assert parts is None or stock_parts == (parts[0], name[len(parts[0]) + 1 :])


def test_150_random_truncations_keep_the_complete_samples_and_note_the_place(tmp_path: Path) -> None:
    print("seed 1, 150 truncations")
    rng = random.Random(1)
    whole = write_tar(tmp_path / "whole.tar", three_members(12))
    index, stored = index_shard(whole), whole.read_bytes()
    samples = contents(whole, index)
    ends = index.offsets + index.sizes
    archive_end = -(-int(ends[-1]) // 512) * 512
    for _ in range(150):
        cut = rng.randrange(1, archive_end + 512)
        path = tmp_path / "cut.tar"
        path.write_bytes(stored[:cut])
        found = index_shard(path)
        kept = contents(path, found)
        complete = [one for number, one in enumerate(samples) if ends[index.starts[number + 1] - 1] <= cut]
        assert kept[: len(complete)] == complete, cut
        # At a member's end nothing tells that the sample goes on: it is kept, and lacks a caption.
        assert len(kept) <= len(complete) + 1
        assert all("txt" not in one for one in kept[len(complete) :])
        assert len(found.damage) == 1, cut
        assert found.damage[0].byte <= cut
        assert "file ends" in found.damage[0].reason or "readable" in found.damage[0].reason


def test_a_cut_member_costs_its_sample_and_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", three_members(3))
    index = index_shard(path)
    row = int(index.starts[1]) + 1
    os.truncate(path, int(index.offsets[row] + index.sizes[row]) - 1)
    found = index_shard(path)
    assert [found.key(sample) for sample in range(len(found))] == ["0000"]
    (damage,) = found.damage
    assert damage.key == "0001"
    assert damage.byte == index.offsets[row] - 512
    assert "ends inside '0001.png'" in damage.reason


def test_150_random_bits_flipped_in_headers_lose_nothing_in_silence(tmp_path: Path) -> None:
    print("seed 2, 150 flipped bits")
    rng = random.Random(2)
    whole = write_tar(tmp_path / "whole.tar", three_members(10))
    index, stored = index_shard(whole), whole.read_bytes()
    samples = contents(whole, index)
    noted = 0
    for _ in range(150):
        row = rng.randrange(len(index.offsets))
        byte = int(index.offsets[row]) - 512 + rng.randrange(512)
        flipped = bytearray(stored)
        flipped[byte] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.tar"
        path.write_bytes(flipped)
        found = index_shard(path)
        kept = contents(path, found)
        if found.damage == ():  # the one byte of a header that no reader looks at: the blank after its checksum
            assert kept == samples
            continue
        noted += 1
        sample = int(np.searchsorted(index.starts, row, "right")) - 1
        assert kept[:sample] == samples[:sample]
        assert (
            f"the remaining {len(stored) - (int(index.offsets[row]) - 512):,} bytes" in found.damage[0].reason
            or row == 0
        )
    assert noted >= 145


def test_padding_and_archive_ends_are_checked(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"12345")])
    stored = path.read_bytes()
    path.write_bytes(stored[: 512 + 5])
    index = index_shard(path)
    assert contents(path, index) == [{"__key__": "a", "txt": b"12345"}]
    assert "without the end-of-archive mark" in index.damage[0].reason
    path.write_bytes(stored + stored)
    index = index_shard(path)
    assert len(index) == 1
    assert "data after the end-of-archive mark" in index.damage[0].reason
    for content in (b"", b"not a tar" * 100, os.urandom(2048)):
        path.write_bytes(content)
        index = index_shard(path)
        assert len(index) == 0
        assert len(index.damage) == 1


def test_members_that_are_unsafe_or_have_no_place_are_left_out_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../escape.png", b"1")
        add(tar, "/etc/absolute.png", b"2")
        add(tar, "inside/../../escape.png", b"3")
        add(tar, "README", b"4")
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "good.png", b"5")
        add(tar, "good.PNG", b"6")
    index = index_shard(path)
    assert contents(path, index) == [{"__key__": "good", "png": b"5"}]
    reasons = [damage.reason for damage in index.damage]
    assert len(reasons) == 6
    assert [("leaves the folder" in one) for one in reasons] == [True, True, True, False, False, False]
    assert "no key and extension" in reasons[3]
    assert "link" in reasons[4]
    assert "second member .png" in reasons[5]


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
