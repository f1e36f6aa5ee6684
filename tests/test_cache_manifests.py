"""Shards fetched ahead, manifests at URLs, and caches that a config asks for."""

import json
import logging
import pickle
import shutil
import time
from pathlib import Path

import fsspec
import pytest
from faulty_server import FaultyServer
from tars import three_members, write_tar
from tiny_cache import FAST, SAMPLES, SHARDS, content, held_bytes, parts, remote, wait_until

from ldm.data.cache import CacheConfig, ShardCache, ShardChangedError, open_cache
from ldm.data.manifest import MANIFEST_NAME, Manifest, ManifestError, build_manifest
from ldm.data.shard_index import index_path


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of about 36 kB."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(SHARDS):
        write_tar(folder / f"s-{number}.tar", three_members(SAMPLES, seed=number))
    return folder


@pytest.fixture(scope="module")
def local(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_manifest(raw, progress=False, out=tmp_path_factory.mktemp("local"))


def test_what_is_fetched_ahead_is_there_without_another_request(raw: Path, local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url)
        cache.prefetch([(local, 0), *((manifest, shard) for shard in (5, 3, 8, 3))])
        wait_until(lambda: sum(server.delivered.values()) == 3 and not parts(cache))
        for shard in (8, 3, 5):
            assert content(cache, manifest, shard) == local.path(shard).read_bytes()
        assert set(server.requests) == {"/s-5.tar", "/s-3.tar", "/s-8.tar"}
        assert set(server.requests.values()) == {1}
        copy = pickle.loads(pickle.dumps((cache, manifest)))
        assert content(copy[0], copy[1], 5) == local.path(5).read_bytes()
        cache.close()


def test_no_more_is_fetched_ahead_than_fits_and_what_is_in_use_stays(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    limit = sum(entry.bytes for entry in local.shards[:4]) + 100
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, limit / 1e9, retries=FAST)
        manifest = remote(local, server.url)
        for shard in (3, 9):
            cache.path(manifest, shard)
        cache.prefetch([(manifest, shard) for shard in range(SHARDS)])
        wait_until(lambda: len(server.delivered) == 5 and not parts(cache))
        time.sleep(0.2)
        assert set(server.delivered) == {"/s-9.tar", *(f"/s-{shard}.tar" for shard in range(4))}
        assert server.delivered["/s-3.tar"] == 1  # wanted, if last: not evicted, though used before 9
        assert held_bytes(cache) <= limit


def test_a_failure_ahead_is_logged_and_raised_when_it_is_read(
    raw: Path, local: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyServer(raw) as server, caplog.at_level(logging.WARNING, "ldm.data.cache"):
        server.always["/s-0.tar"] = 404
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url)
        cache.prefetch([(manifest, 0), (manifest, 1)])
        wait_until(lambda: "s-0.tar was not fetched ahead" in caplog.text and server.delivered["/s-1.tar"] == 1)
        with pytest.raises(FileNotFoundError, match="has vanished"):
            cache.path(manifest, 0)


def test_a_manifest_at_a_url_is_read_with_its_indexes_as_they_are_needed(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(raw, served)
    beside = build_manifest(served, {"weights": "abc"}, progress=False)
    with pytest.raises(ValueError, match=r"set data\.cache\.folder"):
        Manifest.load("http://127.0.0.1:9/")
    with FaultyServer(served, 8, rate=0.4, in_a_row=4) as server:
        cache = ShardCache(tmp_path / "cache", 1.0, retries=FAST)
        manifest = Manifest.load(server.url + "/", cache)
        assert manifest.remote
        assert manifest.digest() == beside.digest() == local.digest()
        assert manifest.encoder == {"weights": "abc"}
        assert manifest.location(2) == manifest.url(2) == f"{server.url}/s-2.tar"
        assert (manifest.folder / MANIFEST_NAME).is_file()
        assert not any(name.endswith(".safetensors") for name in server.requests)
        for shard in range(SHARDS):
            assert manifest.index(shard).to_bytes() == beside.index(shard).to_bytes()
        with pytest.raises(ValueError, match="read through the cache"):
            manifest.path(0)
        assert cache.path(manifest, 1).read_bytes() == local.path(1).read_bytes()
        copy = pickle.loads(pickle.dumps(manifest))
        asked = sum(server.requests.values())
        assert copy.index(0).key(0) == "0000"
        assert sum(server.requests.values()) == asked  # in the cache
        for path in (tmp_path / "cache/files").glob("*.index"):
            path.write_bytes(b"gone bad on this disk")
        assert [pickle.loads(pickle.dumps(manifest)).index(shard).key(0) for shard in range(3)] == ["0000"] * 3
        server.rate = 0
        path = index_path(served / "s-0.tar")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        shutil.rmtree(tmp_path / "cache/files")
        with pytest.raises(ShardChangedError, match=r"s-0\.index\.safetensors has changed"):
            Manifest.load(server.url, cache).index(0)


def test_a_manifest_that_is_not_at_the_url_names_the_command(raw: Path, tmp_path: Path) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        with pytest.raises(FileNotFoundError, match=rf"index_shards\.py {server.url} --out FOLDER"):
            Manifest.load(server.url, cache)
        (raw / "cut").mkdir()
        (raw / "cut" / MANIFEST_NAME).write_text('{"version": 2, "names')
        try:
            with pytest.raises(ManifestError, match=rf"{server.url}/cut/manifest\.json cannot be used"):
                Manifest.load(server.url + "/cut", cache)
        finally:
            shutil.rmtree(raw / "cut")


def test_shards_in_fsspecs_memory_are_indexed_and_read(raw: Path, local: Manifest, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.store.clear()
    for shard in range(SHARDS):
        files.pipe_file(f"/bucket/shards/s-{shard}.tar", local.path(shard).read_bytes())
    manifest = build_manifest("memory://bucket/shards", progress=False, out=tmp_path / "m", retries=FAST)
    assert manifest.digest() == local.digest()
    manifest.check_files()
    cache = ShardCache(tmp_path / "cache", 1.0, retries=FAST)
    for shard in range(SHARDS):
        assert content(cache, manifest, shard) == local.path(shard).read_bytes()
    files.pipe_file("/bucket/shards/s-1.tar", b"short")
    files.rm("/bucket/shards/s-2.tar")
    with (
        pytest.warns(UserWarning, match=r"memory://bucket/shards/s-1\.tar has 5 bytes"),
        pytest.raises(FileNotFoundError, match=r"s-2\.tar has vanished"),
    ):
        manifest.check_files()


def test_the_config_makes_a_cache_or_none_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    assert open_cache(CacheConfig()) is None
    cache = open_cache(CacheConfig(str(tmp_path), 2.5, attempts=3, timeout=7.0))
    assert cache is not None
    assert cache.folder == tmp_path
    assert cache.limit == 2_500_000_000
    assert (cache.retries.attempts, cache.retries.timeout) == (3, 7.0)
    for name, value in {"limit_gb": 0.0, "ahead": -1, "attempts": 0, "timeout": 0.0}.items():
        with pytest.raises(ValueError, match=rf"data\.cache\.{name} is {value}"):
            CacheConfig(**{name: value})


def test_a_manifest_apart_from_local_shards_reads_them_where_they_are(raw: Path, local: Manifest) -> None:
    stored = json.loads((local.folder / MANIFEST_NAME).read_text())
    assert stored["base"] == str(raw)
    loaded = Manifest.load(local.folder)
    assert not loaded.remote
    assert loaded.path(3) == raw / "s-3.tar"
    assert loaded.location(3) == str(raw / "s-3.tar")
    loaded.check_files()
    cache = ShardCache(local.folder / "unused", 1.0)
    assert cache.path(loaded, 3) == raw / "s-3.tar"
    assert content(cache, loaded, 3) == (raw / "s-3.tar").read_bytes()
    assert not (local.folder / "unused").exists()
    assert list(raw.glob("*.safetensors")) == []
