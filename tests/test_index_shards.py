"""tools/index_shards.py over folders and URLs: one reading, the same index everywhere, resumption, verification."""

import os
import random
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
import xxhash
from faulty_server import FaultyServer
from tars import three_members, write_tar

from ldm.data.indexing import compare_stream, index_shard
from ldm.data.manifest import MANIFEST_NAME, Manifest, build_manifest
from ldm.data.remote_index import THREADS, in_threads
from ldm.data.shard_index import index_path
from ldm.data.storage import Retries
from tools.index_shards import main as index_shards

FAST = Retries(attempts=8, timeout=0.5, first_wait=0.005)
SHARDS = 6


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder as img2dataset leaves it: shards, their tables and their statistics."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(SHARDS):
        write_tar(folder / f"{number:05d}.tar", three_members(5 + number, seed=number))
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{number:05d}_stats.json").write_text('{"count": 5}')
    return folder


def test_the_digest_and_each_index_are_the_same_wherever_the_shards_lie(raw: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in raw.glob("*.tar"):
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    apart = build_manifest(raw, progress=False, out=tmp_path / "apart")
    assert not list(raw.glob("*.safetensors"))
    with FaultyServer(raw, 1, rate=0.4, in_a_row=4) as server:
        server.rate = 0.0  # sizes and listings cannot be told from cut ones
        listed = build_manifest(server.url, progress=False, out=tmp_path / "listed", retries=FAST)
        server.rate = 0.4
        server.faults = ("drop", "stall", "503", "longer", "announced", "unannounced", "refuse")
        braces = server.url + "/{00000..00005}.tar"
        named = build_manifest(braces, progress=False, out=tmp_path / "named", retries=FAST)
        assert sum(server.injected.values()) >= 3
    stored = build_manifest("memory://bucket", progress=False, out=tmp_path / "stored", retries=FAST)
    moved = shutil.copytree(raw, tmp_path / "moved")
    beside = build_manifest(moved, progress=False)
    everywhere = [apart, listed, named, stored, beside]
    assert {manifest.digest() for manifest in everywhere} == {beside.digest()}
    assert [manifest.base for manifest in everywhere] == [str(raw), server.url, server.url, "memory://bucket", None]
    for manifest in everywhere:
        assert Manifest.load(manifest.folder) == manifest
        assert manifest.damaged() == []
        assert manifest.counts == [5 + number for number in range(SHARDS)]
        assert [manifest.index(shard).to_bytes() for shard in range(SHARDS)] == [
            index_path(beside.path(shard)).read_bytes() for shard in range(SHARDS)
        ]


def test_whole_checksums_are_those_of_the_files_damaged_or_not(raw: Path) -> None:
    print("seed 2, 60 damaged files")
    rng = random.Random(2)
    path = raw / "00003.tar"
    stored = path.read_bytes()
    for trial in range(60):
        damaged = bytearray(stored)
        if trial % 2:
            damaged[rng.randrange(len(stored))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(stored)) :]
        path.write_bytes(damaged)
        index = index_shard(path)
        assert (index.tar_bytes, index.xxh3) == (len(damaged), xxhash.xxh3_64_hexdigest(damaged))
        with open(path, "rb") as file:
            found = compare_stream(file, index)
        assert found == ([], len(damaged), index.xxh3)
    manifest = build_manifest(raw, progress=False)
    for shard in manifest.shards:
        assert shard.tar_xxh3 == xxhash.xxh3_64_hexdigest((raw / shard.name).read_bytes())


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_shard_is_read_once(tmp_path: Path) -> None:
    rng = random.Random(3)
    members = [
        (f"{number}.{extension}", rng.randbytes(100_000)) for number in range(40) for extension in ("jpg", "txt")
    ]
    path = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "first").mkdir()
    write_tar(tmp_path / "first" / "b.tar", members[:2])
    build_manifest(tmp_path / "first", progress=False)  # what it imports is read, too
    before = bytes_read()
    build_manifest(tmp_path, progress=False)
    assert bytes_read() - before < 1.05 * path.stat().st_size
    with FaultyServer(tmp_path) as server:
        build_manifest(server.url, progress=False, out=tmp_path / "m", retries=FAST)
    assert server.requests["/a.tar"] == server.delivered["/a.tar"] == 1


def test_several_at_a_time_give_their_results_in_order_and_take_few_arguments_ahead() -> None:
    taken = 0

    def arguments() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    def call(number: int) -> int:
        time.sleep(0.01 * (number % 5))
        if number == 70:
            raise OSError("the 70th")
        return number

    results = in_threads(call, arguments())
    for number in range(70):
        assert next(results) == number
        assert taken <= number + 2 * THREADS
    with pytest.raises(OSError, match="the 70th"):
        next(results)


def test_indexing_goes_on_where_it_stopped(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    with FaultyServer(raw) as server:
        server.always["/00004.tar"] = 403
        words = [server.url, "--out", str(out)]
        assert index_shards(words) == 2
        assert f"{server.url}/00004.tar cannot be read" in capsys.readouterr().err
        assert not (out / MANIFEST_NAME).exists()
        done = {name for name, count in server.delivered.items() if name.endswith(".tar") and count}
        server.always.clear()
        assert index_shards(words) == 0
        assert "45 samples in 6 shards, 0 places damaged" in capsys.readouterr().out
        for name in done:
            assert server.delivered[name] == 1
        asked = dict(server.delivered)
        assert index_shards(words) == 0
        assert server.delivered == asked  # HEAD alone tells that nothing changed
        path = raw / "00001.tar"
        path.write_bytes(path.read_bytes() + bytes(512))
        before = Manifest.load(out).digest()
        assert index_shards(words) == 0
        assert server.delivered["/00001.tar"] == asked["/00001.tar"] + 1
        assert Manifest.load(out).digest() != before
        write_tar(raw / "00006.tar", three_members(3))
        assert index_shards(words) == 0
        assert sum(Manifest.load(out).counts) == 48


def test_damage_of_a_shard_is_told_from_that_of_its_transfer(raw: Path, tmp_path: Path) -> None:
    os.truncate(raw / "00002.tar", 5000)
    expected = build_manifest(raw, progress=False, out=tmp_path / "local")
    assert len(expected.damaged()) == 1
    with FaultyServer(raw, 4, rate=0.5, faults=("unannounced",), in_a_row=4) as server:
        for name in ("/00000.tar", "/00002.tar"):
            server.always["HEAD " + name] = 405  # so that no size gives a cut body away
        urls = server.url + "/0000{0,2}.tar"
        found = build_manifest(urls, progress=False, out=tmp_path / "m", retries=Retries(12, 0.3, 0.005))
        assert server.injected["unannounced"] >= 1
    assert found.shards[0] == expected.shards[0]
    assert found.shards[1] == expected.shards[2]


def test_urls_that_cannot_be_indexed_are_errors_that_say_what_to_do(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*words: object) -> str:
        assert index_shards([str(word) for word in words]) == 2
        return capsys.readouterr().err

    out = tmp_path / "m"
    with FaultyServer(raw) as server:
        assert "add --out FOLDER" in error_of(server.url)
        assert "in 2 folders" in error_of(server.url + "/{a,b}/0.tar", "--out", out)
        assert "ends in .tar" in error_of(server.url + "/{0,1}.parquet", "--out", out)
        assert "is not there" in error_of(server.url + "/nowhere", "--out", out)
        assert f"{server.url}/9.tar is not there" in error_of(server.url + "/9.tar", "--out", out)
        (raw / "empty").mkdir()
        assert "/empty/{00000..00099}.tar" in error_of(server.url + "/empty", "--out", out)
        assert index_shards([server.url, "--out", str(out)]) == 0
        elsewhere = error_of(raw, "--out", out)
        assert f"is of the shards in {server.url}, not of those in {raw}" in elsewhere
    if find_spec("s3fs") is None:
        assert "pip install s3fs" in error_of("s3://bucket/shards", "--out", out)


def test_verifying_remote_shards_names_what_differs(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    with FaultyServer(raw) as server:
        words = [server.url, "--out", str(out), "--verify"]
        assert index_shards(words[:3]) == 0
        assert index_shards(words) == 0
        assert "45 samples in 6 shards read, 0 differ" in capsys.readouterr().out
        assert index_shards([str(out), "--verify"]) == 0
        manifest = Manifest.load(out)
        for shard, sample, member in ((1, 2, 1), (1, 2, 2), (4, 8, 0)):
            index, path = manifest.index(shard), raw / f"{shard:05d}.tar"
            content = bytearray(path.read_bytes())
            content[int(index.offsets[index.starts[sample] + member])] ^= 1
            path.write_bytes(content)
        with open(raw / "00003.tar", "r+b") as file:
            file.seek(0)
            file.write(b"9")  # a header, which no reading by offset sees
        capsys.readouterr()
        assert index_shards(words) == 1
        lines = capsys.readouterr().out
        assert "00001.tar/0002: member .png differs from its checksum" in lines
        assert "00004.tar/0008: member .json differs from its checksum" in lines
        assert "00003.tar: all samples are as indexed, but not the bytes around them" in lines
        assert "45 samples in 6 shards read, 2 differ, in 3 changed shards" in lines
        (raw / "00005.tar").unlink()
        assert index_shards(words) == 2
        assert f"{server.url}/00005.tar is not there" in capsys.readouterr().err


def test_verifying_a_manifest_at_a_url_needs_no_folder(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_manifest(raw, progress=False)
    with FaultyServer(raw) as server:
        assert index_shards([server.url, "--verify"]) == 0
        os.truncate(raw / "00005.tar", 9000)
        assert index_shards([server.url, "--verify"]) == 1
    assert "the shard is cut short: a member's bytes are" in capsys.readouterr().out


def test_samples_cut_off_a_local_shard_are_each_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = build_manifest(raw, progress=False)
    index = manifest.index(5)
    os.truncate(raw / "00005.tar", int(index.offsets[index.starts[7] + 1]))
    with pytest.warns(UserWarning, match=r"00005\.tar has"):
        assert index_shards([str(raw), "--verify"]) == 1
    out = capsys.readouterr().out
    assert [f"00005.tar/{sample:04d}: the shard is cut short" in out for sample in range(10)] == [False] * 7 + [
        True
    ] * 3
    assert "45 samples in 6 shards read, 3 differ, in 1 changed shards" in out
