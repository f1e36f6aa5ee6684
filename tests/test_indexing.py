"""Indexing: what the stock reader finds in good tars, and every damage noted with its place."""

import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from tars import add, three_members, write_tar

from ldm.data.indexing import index_shard
from ldm.data.manifest import build_manifest
from ldm.data.shard_index import ShardIndex, split_name


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
