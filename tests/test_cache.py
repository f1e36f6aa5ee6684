"""The cache of remote shards over a real HTTP server that fails, with several processes, killed ones among them."""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from faulty_server import FAULTS, FaultyServer
from tars import three_members, write_tar

from ldm.data.cache import CacheConfig, ShardCache, ShardChangedError, open_cache
from ldm.data.locked_files import open_whole, release, remove_unlocked
from ldm.data.manifest import MANIFEST_NAME, Manifest, ManifestError, build_manifest
from ldm.data.shard_index import index_path
from ldm.data.storage import Retries, StorageError

FAST = Retries(attempts=8, timeout=0.5, first_wait=0.005)
TRIALS = int(os.environ.get("LDM_REMOTE_TRIALS", "3"))
KILLS = int(os.environ.get("LDM_CACHE_KILLS", "5"))
SHARDS = 10
SAMPLES = 12


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


def remote(local: Manifest, url: str, cache: ShardCache | None = None) -> Manifest:
    """The manifest of the same shards at a URL."""
    return Manifest(local.folder, local.shards, base=url, cache=cache)


def content(cache: ShardCache, manifest: Manifest, shard: int) -> bytes:
    descriptor = cache.open(manifest, shard)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def held_bytes(cache: ShardCache) -> int:
    """Bytes in the folder at one instant: two looks that see the same."""
    before = None
    while True:
        sizes = {}
        for path in cache.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size if path.is_file() else 0
        if sizes == before:
            return sum(sizes.values())
        before = sizes


def parts(cache: ShardCache) -> list[str]:
    return [path.name for path in cache.folder.rglob("*.part")]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def _read_all(cache: ShardCache, manifest: Manifest, raw: Path, seed: int) -> None:
    for shard in random.Random(seed).sample(range(SHARDS), SHARDS):
        assert content(cache, manifest, shard) == (raw / f"s-{shard}.tar").read_bytes()


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
        readers = [context.Process(target=_read_all, args=(cache, manifest, raw, seed)) for seed in range(4)]
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
        readers = [context.Process(target=_read_all, args=(cache, manifest, raw, seed)) for seed in range(3)]
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


DOWNLOAD = """
import sys, time
from pathlib import Path
from ldm.data.cache import ShardCache
from ldm.data.manifest import Manifest
from ldm.data.storage import Retries

folder, base, cache_folder, timeout, *shards = sys.argv[1:]
local = Manifest.load(folder)
manifest = Manifest(local.folder, local.shards, base=base)
cache = ShardCache(cache_folder, 1.0, retries=Retries(8, float(timeout), 0.005))
print("ready", flush=True)
for shard in map(int, shards):
    path = cache.path(manifest, shard)
    assert path.read_bytes() == (Path(local.base) / local.shards[shard].name).read_bytes()
    print(shard, flush=True)
"""


def start_download(
    local: Manifest, url: str, cache: Path, shards: range | list[int], timeout: float = 60.0
) -> subprocess.Popen[str]:
    words = [local.folder, url, cache, timeout, *shards]
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_downloaders_killed_at_random_instants_leave_the_cache_usable(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    """Each is killed while it reads all shards from a server that now and then falls silent in mid-body."""
    print(f"seed 7, {KILLS} kills")
    rng = random.Random(7)
    left = 0
    for kill in range(KILLS):
        cache = ShardCache(tmp_path / str(kill), 1.0, retries=FAST)
        with FaultyServer(raw, kill, rate=0.3, faults=("stall",), stall=0.5) as server:
            process = start_download(local, server.url, cache.folder, range(SHARDS))
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
            process.wait()
            process.stdout.close()
            left += len(parts(cache))
            whole = {local.shards[shard].tar_xxh3: local.path(shard).read_bytes() for shard in range(SHARDS)}
            for path in (cache.folder / "files").glob("*.tar"):
                assert path.read_bytes() == whole[path.stem], kill
            manifest = remote(local, server.url)
            assert content(cache, manifest, kill % SHARDS) == local.path(kill % SHARDS).read_bytes()
            _read_all(cache, manifest, raw, kill)
            assert parts(cache) == [], kill
    print(f"{left} of {KILLS} kills left a temporary file")
    assert left >= KILLS // 4


def test_who_waits_for_a_killed_process_goes_on_by_itself(raw: Path, local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(raw, rate=1.0, faults=("stall",), in_a_row=1, stall=60) as server:
        first = start_download(local, server.url, tmp_path, [4])
        wait_until(lambda: server.requests["/s-4.tar"] == 1)
        second = start_download(local, server.url, tmp_path, [4])
        assert second.stdout is not None
        assert first.stdout is not None
        second.stdout.readline()
        time.sleep(0.3)
        assert second.poll() is None
        assert server.requests["/s-4.tar"] == 1  # it waits for the first
        first.kill()
        assert second.wait(20) == 0
        first.wait()
        assert second.stdout.read() == "4\n"
        first.stdout.close()
        second.stdout.close()
    assert server.requests["/s-4.tar"] == 2


def test_a_child_that_was_forked_during_a_download_does_not_keep_its_lock(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    """A loader's worker inherits the descriptors of its parent's downloads, and with them the locks."""
    with FaultyServer(raw, rate=1.0, faults=("stall",), in_a_row=1, stall=60) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        manifest = remote(local, server.url)
        # The parent of the child: a process that is killed in mid-download while its own child lives on.
        read_end, write_end = os.pipe()
        parent = os.fork()
        if parent == 0:
            try:
                slow = ShardCache(tmp_path, 1.0, retries=Retries(1, 60.0))
                slow.prefetch([(manifest, 0)])
                wait_until(lambda: bool(parts(slow)))
                if child := os.fork():
                    os.write(write_end, str(child).encode())
                time.sleep(60)
            finally:
                os._exit(0)
        child = int(os.read(read_end, 100))
        try:
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            start = time.monotonic()
            assert content(cache, manifest, 0) == local.path(0).read_bytes()
            assert time.monotonic() - start < 20
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(read_end)
            os.close(write_end)


def test_a_lock_that_was_released_is_gone_though_a_fork_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    path.write_bytes(b"x")
    descriptor = open_whole(path, 1)
    assert descriptor is not None
    child = os.fork()
    if child == 0:
        try:
            time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert not remove_unlocked(str(path))
        release(descriptor)
        assert remove_unlocked(str(path))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_that_is_evicted_while_its_lock_is_waited_for_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    path.write_bytes(b"x")
    found: list[int | None] = []
    with open(path, "rb") as evicting:
        fcntl.flock(evicting, fcntl.LOCK_EX)
        reader = threading.Thread(target=lambda: found.append(open_whole(path, 1)))
        reader.start()
        time.sleep(0.3)
        assert found == []
        path.unlink()
        fcntl.flock(evicting, fcntl.LOCK_UN)
        reader.join()
    assert found == [None]


def test_temporaries_that_nobody_holds_are_removed_at_the_next_download_and_held_ones_stay(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.0, retries=FAST)
        (tmp_path / "files").mkdir(parents=True)
        left, held = tmp_path / "files/left.tar.part", tmp_path / "files/held.tar.part"
        left.write_bytes(b"x" * 100)
        held.write_bytes(b"x" * 100)
        with open(held, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cache.path(remote(local, server.url), 0)
            assert not left.exists()
            assert held.exists()


def test_what_a_killed_process_had_reserved_for_a_shard_does_not_count_beside_it(
    raw: Path, local: Manifest, tmp_path: Path
) -> None:
    size = local.shards[0].bytes
    with FaultyServer(raw) as server:
        cache = ShardCache(tmp_path, 1.5 * size / 1e9, retries=FAST)
        (tmp_path / "files").mkdir(parents=True)
        (tmp_path / f"files/{local.shards[0].tar_xxh3}.tar.part").write_bytes(b"x" * (size + 5))
        assert content(cache, remote(local, server.url), 0) == local.path(0).read_bytes()


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
