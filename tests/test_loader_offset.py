"""Offsets of the noise in batches: NumPy's Philox at their address, for all kinds of shards and any split; or none."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_streams
import torch
from tiny_shards import LATENT, config, encoded_sample, flat, global_batches, loader_of, positions_of, raw_sample, write

from ldm.data.batch import Batch
from ldm.data.buckets import BucketConfig
from ldm.data.dataset import SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.loader import make_loader, make_validation_loader
from ldm.data.streaming import make_stream_loader

SEED, CHANNELS = 3, LATENT[0]
OFFSET = 13


def philox(position: int, seed: int = SEED, purpose: int = OFFSET) -> np.ndarray:
    """Key (seed, purpose), counter (0, position): spelled out, without draws.py."""
    key, counter = np.array([seed, purpose], dtype=np.uint64), np.array([0, position, 0, 0], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).standard_normal(CHANNELS, dtype=np.float32)


def of_kind(kind: str, folder: Path, *, offset: bool = True, workers: int = 0) -> list[Batch]:
    """Steps 2 to 4 of one process with each way that a run's samples come in."""
    positions = positions_of(start_step=2, stop_step=4)
    if kind.startswith("stream"):
        raw = kind.endswith("raw")
        tars = tiny_streams.write_tars(folder / "tars", tiny_streams.raw_sample if raw else tiny_streams.encoded_sample)
        source = tiny_streams.stream(tiny_streams.all_of(tars))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "data.stream: the samples are encoded")
            settings = tiny_streams.config(workers=workers)
            return list(make_stream_loader(settings, source, SEED, positions, latent_shape=LATENT, offset=offset))
    manifest = write(folder / "shards", raw_sample if "raw" in kind else encoded_sample)
    settings = config(manifest.folder, workers=workers)
    if kind == "buckets raw":
        settings = replace(settings, buckets=BucketConfig(step=2, max_aspect=2.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "buckets with fewer samples")
        return list(make_loader(settings, manifest, SEED, positions, latent_shape=LATENT, offset=offset))


@pytest.mark.parametrize("kind", ["raw", "encoded", "buckets raw", "stream raw", "stream encoded"])
def test_the_offsets_of_a_batch_are_philox_at_seed_purpose_and_position(kind: str, tmp_path: Path) -> None:
    assert Purpose.OFFSET == OFFSET, "a part of a run's format"
    for batch in of_kind(kind, tmp_path):
        assert batch.offset is not None
        assert batch.offset.dtype == torch.float32
        expected = np.stack([philox(position) for position in batch.positions.tolist()])
        np.testing.assert_array_equal(batch.offset, expected)
        for purpose in (7, 9):  # not the beginning of another draw
            assert not np.allclose(batch.offset[0], philox(int(batch.positions[0]), purpose=purpose))


@pytest.mark.parametrize("kind", ["raw", "encoded", "buckets raw", "stream raw", "stream encoded"])
def test_a_run_without_offset_noise_has_none_and_all_else_is_the_same(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with_offset = flat(of_kind(kind, tmp_path / "a"))
    without = flat(of_kind(kind, tmp_path / "b", offset=False))
    assert without.pop("offset") is None
    assert with_offset.pop("offset") is not None
    assert with_offset == without


def test_the_offsets_of_a_step_are_the_same_for_1_2_and_4_processes_and_any_workers(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    settings = config(tmp_path)

    def offsets(world: int, workers: int) -> list[Any]:
        found = global_batches(manifest, replace(settings, workers=workers), world, 1, 3, offset=True)
        return [(batch["positions"], batch["offset"]) for batch in found]

    alone = offsets(1, 0)
    assert [offsets(2, 0), offsets(4, 0), offsets(1, 2), offsets(2, 1)] == [alone] * 4


def test_a_run_that_goes_on_later_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    manifest = write(tmp_path)

    def offsets(start: int) -> list[torch.Tensor | None]:
        return [batch.offset for batch in loader_of(manifest, config(tmp_path), SEED, offset=True, start_step=start)]

    whole = offsets(0)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], offsets(4), strict=True))
    drawn = torch.cat(whole)
    assert len(torch.unique(drawn)) == drawn.numel(), "each sample and channel has its own"


def test_offsets_of_held_out_samples_never_change_and_are_of_their_own_seed(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    own_seed = int(generator(SEED, Purpose.VALIDATION).bit_generator.random_raw())
    found = []
    for micro_batch in (4, 10):
        loader = make_validation_loader(
            config(tmp_path), manifest, SEED, latent_shape=LATENT, rank=0, world=1, micro_batch=micro_batch,
            samples=20, offset=True,
        )  # fmt: skip
        for _ in range(2):
            found.append(torch.cat([batch.offset for batch in loader]))
    expected = np.stack([philox(position, own_seed) for position in range(20)])
    for one in found:
        np.testing.assert_array_equal(one, expected)


def test_offsets_move_to_the_device_with_the_batch(tmp_path: Path) -> None:
    dataset = SampleDataset(config(tmp_path), write(tmp_path), SEED, latent_shape=LATENT, offset=True)
    moved = dataset[5].to("meta")
    assert moved.offset is not None
    assert moved.offset.device.type == "meta"
    assert dataset[5].offset.shape == (1, CHANNELS)
    assert next(iter(loader_of(dataset.manifests[0], config(tmp_path)))).to("meta").offset is None
