"""Shards at URLs through the loader: batches are those of the same shards on a local path, and nothing is hidden."""

import os
import shutil
import time
from pathlib import Path

import pytest
from tiny_shards import LATENT, config, flat, global_batches, loader_of, write

from ldm.data.cache import CacheConfig, ShardCache, ShardChangedError, open_cache
from ldm.data.data_config import DataConfig
from ldm.data.dataset import SampleDataset
from ldm.data.manifest import Manifest
from ldm.data.storage import Retries


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return write(tmp_path / "shards")


def remote(local: Manifest, cache: Path, limit_gb: float = 1.0) -> Manifest:
    """The same shards by their URL."""
    return Manifest.load(f"file://{local.folder}", ShardCache(cache, limit_gb, retries=Retries(2, 5.0, 0.01)))


def settings_of(cache: Path, **changes: object) -> DataConfig:
    return config(Path("unused"), flip=0.5, cache=CacheConfig(folder=str(cache), ahead=2), **changes)


def cached(cache: Path) -> list[Path]:
    return sorted((cache / "files").glob("*.tar"))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (4, 1)])
def test_batches_of_shards_at_a_url_are_those_of_local_ones(
    local: Manifest, tmp_path: Path, world: int, workers: int
) -> None:
    expected = global_batches(local, config(Path("unused"), flip=0.5), 1, 0, 14)
    cache = tmp_path / "cache"
    # Two or three of the six shards fit, so that they are fetched again and again.
    limit = 2.5 * max(entry.bytes for entry in local.shards) / 1e9
    found = global_batches(remote(local, cache, limit), settings_of(cache, workers=workers), world, 0, 14)
    assert found == expected
    assert sum(path.stat().st_size for path in cached(cache)) <= limit * 1e9


def test_spawned_workers_read_through_the_cache(local: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = [flat([batch]) for batch in loader_of(local, config(Path("unused"), flip=0.5), stop_step=2)]
    loader = loader_of(remote(local, cache), settings_of(cache, workers=1), stop_step=2, context="spawn")
    assert [flat([batch]) for batch in loader] == expected


def test_the_shards_to_come_are_fetched_before_they_are_read(local: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    manifest = remote(local, cache)
    dataset = SampleDataset(settings_of(cache, shards_per_block=1), manifest, 3, latent_shape=LATENT)
    coming = dataset.order.upcoming(0, 3)  # one in use and two ahead
    dataset[0]
    names = {f"{manifest.shards[shard].tar_xxh3}.tar" for _, shard in coming}
    first = {f"{manifest.shards[0].tar_xxh3}.tar"}  # read at the start, for the shape of the text states
    deadline = time.monotonic() + 20
    while {path.name for path in cached(cache)} != names | first:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cached_shard_that_goes_bad_on_the_disk_is_fetched_again_and_no_sample_is_lost(
    local: Manifest, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    expected = global_batches(local, config(Path("unused")), 1, 0, 7)
    settings = config(Path("unused"), cache=CacheConfig(folder=str(cache)))
    assert global_batches(remote(local, cache), settings, 1, 0, 7) == expected
    for path in cached(cache):
        content = bytearray(path.read_bytes())
        for byte in range(512, len(content), 1024):
            content[byte] ^= 1
        path.write_bytes(content)
    assert global_batches(remote(local, cache), settings, 1, 0, 7) == expected
    for path in cached(cache):  # cut short under readers that have them open
        os.truncate(path, path.stat().st_size // 2)
    assert global_batches(remote(local, cache), settings, 1, 0, 7) == expected


def test_a_changed_and_a_vanished_shard_are_errors_that_name_the_url_and_no_ledger_lines(
    local: Manifest, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    manifest = remote(local, cache)
    content = bytearray(local.path(4).read_bytes())
    content[600] ^= 1
    local.path(4).write_bytes(content)
    with pytest.raises(ShardChangedError, match=r"file://.*s-4\.tar has changed since it was indexed"):
        list(loader_of(manifest, settings_of(cache), micro_batch=53, stop_step=1))
    local.path(4).unlink()
    with pytest.raises(FileNotFoundError, match=r"file://.*s-4\.tar has vanished"):
        list(loader_of(remote(local, tmp_path / "other"), settings_of(cache), micro_batch=53, stop_step=1))


def test_an_error_in_a_worker_names_the_url_too(local: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    loader = loader_of(remote(local, cache), settings_of(cache, workers=1), micro_batch=53, stop_step=1)
    local.path(2).write_bytes(local.path(2).read_bytes()[:-1])
    with pytest.raises(Exception, match=r"file://.*s-2\.tar has changed since it was indexed"):
        list(loader)


def test_shards_at_a_url_without_a_cache_are_an_error_that_names_the_setting(local: Manifest, tmp_path: Path) -> None:
    assert open_cache(CacheConfig()) is None
    with pytest.raises(ValueError, match=r"set data\.cache\.folder"):
        Manifest.load(f"file://{local.folder}", None)
    apart = tmp_path / "apart"
    shutil.copytree(local.folder, apart, ignore=shutil.ignore_patterns("*.tar"))
    manifest = Manifest(apart, local.shards, local.encoder, f"file://{local.folder}")
    manifest.save()
    with pytest.raises(ValueError, match=r"its shards lie at file://.*: set data\.cache\.folder"):
        loader_of(Manifest.load(apart), config(Path("unused")))
