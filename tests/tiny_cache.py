"""A cache of tiny remote shards: settings of its trials, and what lies in its folder."""

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from ldm.data.cache import ShardCache
from ldm.data.manifest import Manifest
from ldm.data.storage import Retries

FAST = Retries(attempts=8, timeout=0.5, first_wait=0.005)
TRIALS = int(os.environ.get("LDM_REMOTE_TRIALS", "3"))
KILLS = int(os.environ.get("LDM_CACHE_KILLS", "5"))
SHARDS = 10
SAMPLES = 12


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


def read_all(cache: ShardCache, manifest: Manifest, raw: Path, seed: int) -> None:
    for shard in random.Random(seed).sample(range(SHARDS), SHARDS):
        assert content(cache, manifest, shard) == (raw / f"s-{shard}.tar").read_bytes()


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
