"""The cache when processes are killed or forked: its locks, its temporaries, and who goes on."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from tars import three_members, write_tar
from tiny_cache import DOWNLOAD, FAST, KILLS, SAMPLES, SHARDS, content, parts, read_all, remote, wait_until

from ldm.data import locked_files
from ldm.data.cache import ShardCache
from ldm.data.locked_files import open_whole, release, remove_unlocked
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.storage import Retries


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
            read_all(cache, manifest, raw, kill)
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
            wait_until(lambda: server.requests["/s-0.tar"] == 1)  # the stalled one is the parent's
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            start = time.monotonic()
            assert content(cache, manifest, 0) == local.path(0).read_bytes()
            assert time.monotonic() - start < 20
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(read_end)
            os.close(write_end)


def test_a_fork_between_opening_a_temporary_and_locking_it_keeps_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that comes after the fork would be the child's too."""
    part, forked = tmp_path / "shard.tar.part", threading.Event()
    lock = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        forked.wait()
        lock(descriptor, kind)

    monkeypatch.setattr(locked_files.fcntl, "flock", late)
    claimed: list[int | None] = []
    thread = threading.Thread(target=lambda: claimed.append(locked_files.claim(part, False)))
    thread.start()
    wait_until(part.exists)
    read_end, write_end = os.pipe()
    alive_read, alive_write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write_end)
        os.write(alive_write, b".")
        os.read(read_end, 1)  # lives on until it is told to end
        os._exit(0)
    os.read(alive_read, 1)
    forked.set()
    thread.join()
    try:
        assert claimed[0] is not None
        os.close(claimed[0])  # as a killed process's descriptors are closed: nothing unlocks it
        locked_files.HELD.discard(claimed[0])
        other = os.open(part, os.O_RDWR)
        lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    finally:
        for end in (write_end, read_end, alive_read, alive_write):
            os.close(end)
        os.waitpid(child, 0)


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
