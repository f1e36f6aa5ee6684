"""The real DataLoader: equal batches whatever the processes, workers and resumes; each sample once an epoch."""

import dataclasses
import itertools
import json
import pickle
import warnings
from pathlib import Path

import pytest
from tiny_shards import (
    COUNTS,
    ENCODER,
    config,
    encoded_sample,
    flat,
    global_batches,
    loader_of,
    raw_sample,
    write,
)

from ldm.data.data_config import DataConfig
from ldm.data.manifest import Manifest, build_manifest


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("raw"), raw_sample)


@pytest.fixture(scope="module")
def reference(encoded: Manifest) -> list[dict]:
    """Eight steps of 8: more than one epoch of the 53 samples."""
    return global_batches(encoded, config(encoded.folder, flip=0.5), world=1, start=0, stop=8)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_are_equal_for_1_2_4_processes_and_0_1_2_workers(
    encoded: Manifest, reference: list[dict], world: int, workers: int
) -> None:
    settings = config(encoded.folder, flip=0.5, workers=workers)
    assert global_batches(encoded, settings, world, 0, 8) == reference


@pytest.mark.parametrize("start", range(1, 8))
def test_a_resume_at_any_step_goes_on_with_the_same_batches(
    encoded: Manifest, reference: list[dict], start: int
) -> None:
    settings = config(encoded.folder, flip=0.5)
    assert global_batches(Manifest.load(encoded.folder), settings, (1, 2, 4)[start % 3], start, 8) == reference[start:]


def test_a_resume_with_workers_goes_on_with_the_same_batches(encoded: Manifest, reference: list[dict]) -> None:
    settings = config(encoded.folder, flip=0.5, workers=2, prefetch=1)
    assert global_batches(encoded, settings, 1, 5, 8) == reference[5:]


@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_spawned_workers_give_the_same_batches(kind: str, request: pytest.FixtureRequest) -> None:
    manifest = request.getfixturevalue(kind)
    expected = [flat([batch]) for batch in loader_of(manifest, config(manifest.folder), stop_step=2)]
    spawned = loader_of(manifest, config(manifest.folder, workers=1), stop_step=2, context="spawn")
    assert [flat([batch]) for batch in spawned] == expected


def test_each_sample_comes_exactly_once_an_epoch_through_the_loader(encoded: Manifest) -> None:
    total = sum(COUNTS)
    every = {f"s-{shard}.tar/k{number:03d}" for shard, count in enumerate(COUNTS) for number in range(count)}
    batches = list(loader_of(encoded, config(encoded.folder, workers=2), micro_batch=5, stop_step=3 * total // 5 + 1))
    keys = list(itertools.chain(*(batch.keys for batch in batches)))
    epochs = [keys[epoch * total : (epoch + 1) * total] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == total
        assert set(epoch) == every
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_the_shards_cannot_give_is_an_error_at_start(tmp_path: Path, encoded: Manifest) -> None:
    def unflipped(shard: int, number: int) -> dict:
        sample = encoded_sample(shard, number)
        del sample["flipped.npy"]
        return sample

    write(tmp_path / "a", unflipped)
    manifest = build_manifest(tmp_path / "a", ENCODER, progress=False)
    with pytest.raises(ValueError, match=r"data\.flip is 0\.5, but .*flipped"):
        loader_of(manifest, config(tmp_path, flip=0.5))
    with pytest.raises(ValueError, match=r"data\.crop is 'random'"):
        loader_of(encoded, config(encoded.folder, crop="random"))
    other = write(tmp_path / "b", lambda _, number: {"__key__": f"k{number}", "gif": b"1"})
    with pytest.raises(ValueError, match=r"members gif; expected pictures"):
        loader_of(other, config(tmp_path))
    manifest.path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"s-2\.tar has vanished"):
        loader_of(manifest, config(tmp_path))


def test_encoded_shards_without_identity_are_warned_of(tmp_path: Path) -> None:
    manifest = write(tmp_path, encoder=None)
    with pytest.warns(UserWarning, match="does not say what encoded them"):
        loader_of(manifest, config(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 0},
        {"workers": -1},
        {"prefetch": 0},
        {"shards_per_block": 0},
        {"caption_dropout": 1.1},
        {"flip": -0.1},
        {"quarantine_limit": 2},
        {"crop": "corner"},
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(change: dict) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(change))} is .*allowed are"):
        DataConfig(**{"shards": "s", "resolution": 8} | change)


def test_a_batch_moves_as_a_whole_and_pickles(encoded: Manifest) -> None:
    batch = next(iter(loader_of(encoded, config(encoded.folder))))
    moved = batch.to("meta")
    assert moved.noise.device.type == moved.u.device.type == "meta"
    assert moved.keys == batch.keys
    assert moved.images is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that cannot be written
        copy = pickle.loads(pickle.dumps(batch))
    assert flat([copy]) == flat([batch])
    assert json.dumps([dataclasses.asdict(one) for one in batch.quarantined]) == "[]"
