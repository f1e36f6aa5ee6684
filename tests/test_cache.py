"""The cache of remote shards over a real HTTP server that fails, with several processes."""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import FAULTS, FaultyServer
from tars import three_members, write_tar
from tiny_cache import DOWNLOAD, FAST, SAMPLES, SHARDS, TRIALS, content, held_bytes, parts, read_all, remote

from ldm.data.cache import ShardCache, ShardChangedError
from ldm.data.manifest import Manifest, ManifestError, build_manifest
from ldm.data.storage import StorageError


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


def test_all_shards_through_faults_have_the_bytes_of_the_fault_free_ones(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    injected: dict[str, int] = {}
    print(f"seeds 0 to {TRIALS - 1}, {SHARDS} shards each, 60 % of the requests fail in one of {len(FAULTS)} ways")
    for seed in range(TRIALS):
        with FaultyServer(raw, seed, rate=0.6, in_a_row=5) as server:
            cache = ShardCache(tmp_path / str(seed), 1.0, retries=FAST)
            manifest = remote(local, server.url)
            for shard in random.Random(seed).sample(range(SHARDS), SHARDS):
                assert content(cache, manifest, shard) == local.path(shard).read_bytes(), (seed, shard)
                assert cache.path(manifest, shard).read_bytes() == local.path(shard).read_bytes()
            assert parts(cache) == []
        injected = {fault: injected.get(fault, 0) + count for fault, count in server.injected.items()} | {
            fault: count for fault, count in injected.items() if fault not in server.injected
        }
    print(injected)
    if TRIALS >= 3:
        assert injected.keys() == set(FAULTS)


@pytest.mark.parametrize(("method", "rate"), [("fork", 0.0), ("fork", 0.4), ("spawn", 0.4)])
def test_several_processes_fetch_each_shard_once(
    raw: Path, local: Manifest, tmp_path: Path, method: str, rate: float
) -> None:
    print("seed 5, 4 processes, each reads all shards in an order of its own")
    context = multiprocessing.get_context(method)
    with FaultyServer(raw, 5, rate, faults=("drop", "503", "longer")) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url)
        content(cache, manifest, 0)  # its connections and threads are there before the fork
        cache.prefetch([(manifest, 1), (manifest, 2)])
        readers = [context.Process(target=read_all, args=(cache, manifest, raw, seed)) for seed in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
            assert reader.exitcode == 0
    assert dict(server.delivered) == {f"/s-{shard}.tar": 1 for shard in range(SHARDS)}
    assert parts(cache) == []


def test_eviction_stays_within_the_limit_at_any_time_with_several_processes(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    largest = max(entry.bytes for entry in local.shards)
    limit = 3.5 * largest
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held_bytes(cache))

    with FaultyServer(raw, 6, 0.2, faults=("drop",)) as server:
        cache = ShardCache(tmp_path, limit / 1e9, retries=FAST)
        manifest = remote(local, server.url)
        context = multiprocessing.get_context("fork")
        readers = [context.Process(target=read_all, args=(cache, manifest, raw, seed)) for seed in range(3)]
        for reader in readers:
            reader.start()
        watcher = threading.Thread(target=watch)
        watcher.start()
        for reader in readers:
            reader.join(60)
        done.set()
        watcher.join()
        assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert 2 * largest < most <= limit
    assert sum(server.delivered.values()) > SHARDS


def test_the_least_recently_used_goes_first_and_what_is_open_goes_last(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    limit = sum(entry.bytes for entry in local.shards[:3]) + 20_000
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, limit / 1e9, retries=FAST)
        manifest = remote(local, server.url)

        def there() -> set[int]:
            names = {path.name for path in (tmp_path / "files").iterdir()}
            return {shard for shard in range(SHARDS) if f"{local.shards[shard].tar_xxh3}.tar" in names}

        for shard in (0, 1, 2, 0):
            cache.path(manifest, shard)
        assert there() == {0, 1, 2}
        cache.path(manifest, 3)
        assert there() == {0, 2, 3}
        held = cache.open(manifest, 2)
        for shard in (4, 5, 6):
            cache.path(manifest, shard)
        assert there() == {2, 5, 6}
        more = [cache.open(manifest, shard) for shard in (5, 6)]
        cache.path(manifest, 7)  # all are open: the first used goes, and stays readable
        assert there() == {5, 6, 7}
        with os.fdopen(held, "rb") as file:
            assert file.read() == local.path(2).read_bytes()
        for descriptor in more:
            os.close(descriptor)


def test_a_shard_larger_than_the_limit_is_an_error_that_names_the_setting(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1e-6, retries=FAST)
        with pytest.raises(ValueError, match=r"data\.cache\.limit_gb is 1e-06, but a shard has"):
            cache.path(remote(local, server.url), 0)
    assert parts(cache) == []
    assert sum(server.requests.values()) == 0


@pytest.mark.parametrize("how", ["same size", "shorter", "longer"])
def test_a_changed_shard_is_an_error_that_names_it_and_what_to_do(
    raw: Path, local: Manifest, tmp_path: Path, how: str
) -> None:
    served = tmp_path / "served"
    shutil.copytree(raw, served)
    path = served / "s-3.tar"
    stored = path.read_bytes()
    changed = {"same size": stored[:-600] + b"x" + stored[-599:], "shorter": stored[:-512], "longer": stored + b"x"}
    path.write_bytes(changed[how])
    with FaultyServer(served) as server:
        cache = ShardCache(tmp_path / "cache", 1.0, retries=FAST)
        manifest = remote(local, server.url)
        with pytest.raises(ShardChangedError) as raised:
            cache.path(manifest, 3)
        message = str(raised.value)
        assert f"{server.url}/s-3.tar has changed" in message
        assert f"expected {len(stored):,} bytes with xxh3 {local.shards[3].tar_xxh3}" in message
        assert how == "longer" or f"found {len(changed[how]):,} bytes" in message
        assert f"python tools/index_shards.py {server.url} --out {local.folder}" in message
        assert server.requests["/s-3.tar"] == FAST.attempts
        assert list((tmp_path / "cache" / "files").iterdir()) == []
        path.write_bytes(stored)
        assert content(cache, manifest, 3) == stored


def test_a_vanished_shard_is_an_error_that_names_it_and_what_to_do(raw: Path, local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url + "/moved")
        with pytest.raises(FileNotFoundError, match=r"moved/s-1\.tar has vanished.*index_shards\.py http"):
            cache.path(manifest, 1)
        assert server.requests["/moved/s-1.tar"] == 1
        with pytest.raises(FileNotFoundError, match=r"moved/s-0\.tar has vanished"):
            manifest.check_files()
        server.always["/s-2.tar"] = 403
        with pytest.raises(PermissionError, match=r"s-2\.tar"):
            cache.path(remote(local, server.url), 2)
        server.always["/s-2.tar"] = 500
        with pytest.raises(StorageError, match=r"s-2\.tar was not read in 8 attempts.*500"):
            cache.path(remote(local, server.url), 2)
    assert parts(cache) == []


def test_a_manifest_without_checksums_of_its_shards_is_an_error_that_names_the_command(
    local: Manifest, tmp_path: Path
) -> None:
    entries = [replace(entry, tar_xxh3="") for entry in local.shards]
    with pytest.raises(ManifestError, match=r"no checksum of s-2\.tar: run .*index_shards\.py memory://b --out"):
        ShardCache(tmp_path, 1.0).path(Manifest(local.folder, entries, base="memory://b"), 2)


def test_a_file_of_the_cache_that_is_not_whole_is_fetched_again(raw: Path, local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url)
        os.truncate(cache.path(manifest, 0), 1000)
        assert content(cache, manifest, 0) == local.path(0).read_bytes()
        path = cache.path(manifest, 0)
        path.write_bytes(
            b"x" * path.stat().st_size
        )  # went bad on the disk: the reader sees it by the members' checksums
        cache.discard(manifest, 0)
        assert content(cache, manifest, 0) == local.path(0).read_bytes()
    assert server.delivered["/s-0.tar"] == 3


def test_a_full_disk_is_an_error_that_names_the_folder_and_is_not_tried_again(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    """A file system of 40 kB in a mount namespace of its own."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=40k none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    with FaultyServer(raw) as server:
        words = [sys.executable, "-c", DOWNLOAD, str(local.folder), server.url, str(tmp_path), "60", "0"]
        done = subprocess.run([*small, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{tmp_path} cannot be written: [Errno 28] No space left on device" in done.stderr
    assert server.requests["/s-0.tar"] == 1
