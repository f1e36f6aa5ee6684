"""Shards that we write against the stock webdataset reader; reading by offset, also of damaged files."""

import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ldm.data.manifest import Manifest, build_manifest
from ldm.data.shards import DamagedSample, SampleViews, ShardReader, write_shard, write_shards


def samples(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "__key__": f"group{number % 2}/k{number:03d}",
            "moments.npy": rng.standard_normal((2, 3, 4)).astype(np.float16),
            "png": rng.bytes(int(rng.integers(1, 1500))),
            "txt": f"caption {number}: é 日本",
            "json": {"size": [3, number], "ü": None},
        }
        for number in range(count)
    ]


def encoded(sample: dict) -> dict:
    """What the members of `samples` are in a shard, by the standard library's and NumPy's own readers."""
    values = dict(sample)
    values["txt"] = sample["txt"].encode()
    return values


def decoded(members: dict) -> dict:
    values = dict(members)
    values["moments.npy"] = np.load(__import__("io").BytesIO(members["moments.npy"]), allow_pickle=False)
    values["json"] = json.loads(members["json"])
    return values


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_the_stock_reader_gives_the_keys_and_bytes_that_our_reader_gives(tmp_path: Path) -> None:
    wanted = samples(11)
    wanted[3]["__key__"] = "deep/" * 20 + "y" * 150
    wanted[5]["__key__"] = "ключ/日本"
    manifest = write_shards(wanted, tmp_path, prefix="s", samples_per_shard=4)
    assert manifest.counts == [4, 4, 3]
    assert [shard.name for shard in manifest.shards] == [f"s-{number:06d}.tar" for number in range(3)]
    reader = ShardReader(Manifest.load(tmp_path))
    read = []
    for shard in range(3):
        stock = webdataset.WebDataset(str(manifest.path(shard)), shardshuffle=False)
        for sample, theirs in enumerate(stock):
            ours = reader.members(shard, sample)
            assert ours == {name: value for name, value in theirs.items() if not name.startswith("__")}
            assert theirs["__key__"] == manifest.index(shard).key(sample)
            read.append({"__key__": theirs["__key__"], **decoded(ours)})
    assert len(read) == 11
    assert all(same(one, encoded(other)) for one, other in zip(read, wanted, strict=True))


def test_the_bytes_of_a_shard_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first = write_shards(samples(5), tmp_path / "a", prefix="s", samples_per_shard=5)
    second = write_shards(iter(samples(5)), tmp_path / "b", prefix="s", samples_per_shard=5)
    assert first.path(0).read_bytes() == second.path(0).read_bytes()
    assert first.digest() == second.digest()
    with tarfile.open(first.path(0)) as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


def test_a_manifest_written_with_the_shards_is_that_of_indexing_them(tmp_path: Path) -> None:
    written = write_shards(samples(7), tmp_path, prefix="s", samples_per_shard=3, encoder={"weights": "abc"})
    assert Manifest.load(tmp_path) == written
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert build_manifest(tmp_path, progress=False) == written


def test_nothing_appears_in_the_folder_until_all_is_complete(tmp_path: Path) -> None:
    def failing() -> Iterator[dict]:
        for number, sample in enumerate(samples(10)):
            assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
            if number == 7:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path, prefix="s", samples_per_shard=3)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "one.tar", failing())
    assert list(tmp_path.iterdir()) == []
    # What a killed process leaves behind is no obstacle.
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "s-000000.tar").write_bytes(b"half")
    assert write_shards(samples(3), tmp_path, prefix="s", samples_per_shard=3).counts == [3]
    assert not (tmp_path / ".partial").exists()


def test_one_shard_with_its_index_is_taken_by_the_manifest_without_reading_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = write_shard(tmp_path / "part-7.tar", samples(4))
    monkeypatch.setattr("ldm.data.manifest.index_shard", lambda path: pytest.fail(f"{path} is read again"))
    manifest = build_manifest(tmp_path, {"weights": "abc"}, progress=False)
    assert manifest.shards == [entry]
    assert (entry.name, entry.samples) == ("part-7.tar", 4)
    assert write_shard.__doc__


def test_an_empty_shard_is_written_and_read(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "empty.tar", []).samples == 0
    assert build_manifest(tmp_path, progress=False).damaged() == []


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        ({"__key__": "../escape", "txt": "a"}, "sample key"),
        ({"__key__": "/absolute", "txt": "a"}, "sample key"),
        ({"__key__": "a/../../b", "txt": "a"}, "sample key"),
        ({"__key__": "has.dot", "txt": "a"}, "sample key"),
        ({"__key__": "", "txt": "a"}, "sample key"),
        ({"__key__": "folder/", "txt": "a"}, "sample key"),
        ({"txt": "a"}, "sample key"),
        ({"__key__": "a"}, "no members"),
        ({"__key__": "a", "PNG": b"1"}, "extension"),
        ({"__key__": "a", "x/y": b"1"}, "extension"),
        ({"__key__": "a", "txt": 5}, "a member is a int"),
        ({"__key__": "a", "x.npy": np.array([{}], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_a_sample_that_would_not_be_read_back_is_refused(tmp_path: Path, sample: dict, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        write_shards([sample], tmp_path, prefix="s", samples_per_shard=3)


def test_a_key_twice_in_a_shard_no_samples_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stands twice"):
        write_shards([*samples(2), *samples(1)], tmp_path, prefix="s", samples_per_shard=3)
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path, prefix="s", samples_per_shard=3)
    write_shards(samples(2), tmp_path, prefix="s", samples_per_shard=3)
    with pytest.raises(FileExistsError, match="already holds shards"):
        write_shards(samples(2), tmp_path, prefix="other", samples_per_shard=3)


def test_300_random_flipped_bits_damage_exactly_the_samples_that_hold_them(tmp_path: Path) -> None:
    print("seed 3, 300 flipped bits")
    rng = random.Random(3)
    manifest = write_shards(samples(20), tmp_path, prefix="s", samples_per_shard=20)
    reader, index, path = ShardReader(manifest), manifest.index(0), manifest.path(0)
    whole = path.read_bytes()
    expected = [reader.members(0, sample) for sample in range(20)]
    hit = 0
    for _ in range(300):
        byte = rng.randrange(len(whole))
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(bytes([whole[byte] ^ (1 << rng.randrange(8))]))
        rows = np.flatnonzero((index.offsets <= byte) & (byte < index.offsets + index.sizes))
        holders = {int(np.searchsorted(index.starts, row, "right")) - 1 for row in rows}
        hit += len(holders)
        for sample in range(20):
            if sample in holders:
                with pytest.raises(DamagedSample, match="differs from its checksum") as caught:
                    reader.members(0, sample)
                assert (caught.value.shard, caught.value.key) == ("s-000000.tar", index.key(sample))
            else:
                assert reader.members(0, sample) == expected[sample]
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(whole[byte : byte + 1])
    assert hit > 30


def test_a_shard_cut_short_under_the_reader_costs_the_samples_behind_the_cut(tmp_path: Path) -> None:
    manifest = write_shards(samples(10), tmp_path, prefix="s", samples_per_shard=10)
    reader, index = ShardReader(manifest), manifest.index(0)
    expected = [reader.members(0, sample) for sample in range(10)]
    ends = index.offsets + index.sizes
    os.truncate(manifest.path(0), int(ends[index.starts[6] - 1]) + 3)  # while the file is open
    for sample in range(6):
        assert reader.members(0, sample) == expected[sample]
    for sample in range(6, 10):
        with pytest.raises(DamagedSample, match="cut short") as caught:
            reader.members(0, sample)
        assert caught.value.key == index.key(sample)
        assert caught.value.record(5, "r").key == index.key(sample)


def test_a_batch_of_samples_is_the_samples_one_by_one_also_where_some_are_damaged(tmp_path: Path) -> None:
    print("seed 5, 100 batches of 1 to 40 out of 3 shards, one cut short, one with flipped bits, one unreadable")
    rng = random.Random(5)
    manifest = write_shards(samples(40), tmp_path, prefix="s", samples_per_shard=10)
    index = manifest.index(1)
    os.truncate(manifest.path(1), int(index.offsets[index.starts[6]]) + 1)
    content = bytearray(manifest.path(2).read_bytes())
    for sample in (2, 7):
        content[int(manifest.index(2).offsets[manifest.index(2).starts[sample] + 1])] ^= 1
    manifest.path(2).write_bytes(content)
    manifest.path(3).unlink()
    manifest.path(3).mkdir()

    def alone(shard: int, sample: int) -> object:
        try:
            return ShardReader(manifest).members(shard, sample)
        except DamagedSample as damaged:
            return str(damaged)

    expected = {(shard, sample): alone(shard, sample) for shard in range(4) for sample in range(10)}
    assert sum(isinstance(one, str) for one in expected.values()) == 4 + 2 + 10
    reader = ShardReader(manifest)
    for _ in range(100):
        places = np.array([(rng.randrange(4), rng.randrange(10)) for _ in range(rng.randrange(1, 41))])
        views = SampleViews(len(places))
        split = rng.randrange(len(places) + 1)
        for rows in (np.arange(split), np.arange(split, len(places))):  # as with several sources
            reader.read(views, rows, places[rows, 0], places[rows, 1])
        if rng.random() < 0.5:
            views.copy()
        views.verify(range(len(places)))
        for row, (shard, sample) in enumerate(places.tolist()):
            members = views.members[row]
            found = str(views.damaged[row]) if members is None else {name: bytes(one) for name, one in members.items()}
            assert found == expected[shard, sample]
            assert views.names[row] == f"s-{shard:06d}.tar/{manifest.index(shard).key(sample)}"
            assert (row in views.damaged) == (members is None)


def test_a_shard_cut_short_between_two_batches_is_no_bus_error(tmp_path: Path) -> None:
    """In a process of its own, which a SIGBUS would end."""
    manifest = write_shards(samples(200), tmp_path, prefix="s", samples_per_shard=200)  # 150 kB: many pages
    half = manifest.path(0).stat().st_size // 2
    code = f"""if True:
        import os, numpy as np
        from ldm.data.manifest import Manifest
        from ldm.data.shards import SampleViews, ShardReader
        manifest = Manifest.load({str(tmp_path)!r})
        reader = ShardReader(manifest)
        for size in (os.path.getsize(manifest.path(0)), {half}, 0):
            os.truncate(manifest.path(0), size)
            views = SampleViews(200)
            reader.read(views, np.arange(200), np.zeros(200, int), np.arange(200))
            views.verify(range(200))
            print(len(views.damaged), {{one.reason.split(":")[0] for one in views.damaged.values()}})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    index = manifest.index(0)
    ends = (index.offsets + index.sizes)[index.starts[1:] - 1]
    expected = [0, int((ends > half).sum()), 200]
    assert 50 < expected[1] < 150
    cut = {"the shard is cut short"}
    assert done.stdout.splitlines() == [f"{number} {cut if number else set()}" for number in expected], done.stderr
    assert done.returncode == 0


def test_a_vanished_shard_is_an_error_that_names_it_and_no_ledger_line(tmp_path: Path) -> None:
    manifest = write_shards(samples(4), tmp_path, prefix="s", samples_per_shard=2)
    manifest.path(1).unlink()
    with pytest.raises(FileNotFoundError, match=r"s-000001\.tar has vanished"):
        ShardReader(manifest).members(1, 0)


def test_checksums_are_compared_only_when_asked_for(tmp_path: Path) -> None:
    manifest = write_shards(samples(1), tmp_path, prefix="s", samples_per_shard=2)
    content = bytearray(manifest.path(0).read_bytes())
    offset = int(manifest.index(0).offsets[-1])
    content[offset] ^= 1
    manifest.path(0).write_bytes(content)
    assert ShardReader(manifest, verify=False).members(0, 0)["txt"][0] == content[offset]
    with pytest.raises(DamagedSample):
        ShardReader(manifest).members(0, 0)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    manifest = write_shards(samples(12), tmp_path, prefix="s", samples_per_shard=1)
    reader = ShardReader(manifest, open_shards=3)
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*range(12), 3, 11, 0]:
        assert reader.members(shard, 0)["txt"] == f"caption {shard}: é 日本".encode()
    assert len(os.listdir("/proc/self/fd")) - before == 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def _read_all(reader: ShardReader, connection) -> None:
    connection.send([reader.members(0, sample) for sample in range(5)])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_reader_that_was_used_reads_in_another_process(tmp_path: Path, context: str) -> None:
    reader = ShardReader(write_shards(samples(5), tmp_path, prefix="s", samples_per_shard=5))
    expected = [reader.members(0, sample) for sample in range(5)]
    assert pickle.loads(pickle.dumps(reader))._open == {}
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(context).Process(target=_read_all, args=(reader, theirs))
    process.start()
    assert ours.recv() == expected
    process.join()
    assert process.exitcode == 0
