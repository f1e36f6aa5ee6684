"""What a batch holds: the samples of the order, with the draws of the generator at their positions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import (
    COUNTS,
    LATENT,
    config,
    encoded_sample,
    loader_of,
    png,
    raw_sample,
    write,
)

from ldm.data.dataset import SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.manifest import Manifest
from ldm.data.order import Order
from ldm.data.samples import draw


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("encoded"))


def test_a_batch_holds_the_samples_of_the_order_and_the_draws_of_the_generator(encoded: Manifest) -> None:
    seed, settings = 3, config(encoded.folder, flip=0.5, caption_dropout=0.5)
    order = Order(COUNTS, seed, 2)
    (batch,) = loader_of(encoded, settings, seed, start_step=9, stop_step=10)
    assert batch.positions.tolist() == list(range(72, 80))
    flips = 0
    for row, position in enumerate(range(72, 80)):
        _, shard, number = order.locate(position)
        sample = encoded_sample(shard, number)
        assert batch.keys[row] == f"s-{shard}.tar/{sample['__key__']}"
        assert batch.captions[row] == sample["txt"]
        assert batch.sizes[row].tolist() == [100 + shard, 200 + number, shard, number, 8, 8]
        flip = generator(seed, Purpose.FLIP, position).random() < 0.5
        flips += flip
        assert batch.moments is not None
        assert batch.text_states is not None
        np.testing.assert_array_equal(batch.moments[row], sample["flipped.npy" if flip else "moments.npy"])
        np.testing.assert_array_equal(batch.text_states[row], sample["text.npy"])
        assert batch.u[row] == generator(seed, Purpose.TIMESTEP, position).random()
        assert bool(batch.dropped[row]) == (generator(seed, Purpose.DROPOUT, position).random() < 0.5)
        for tensor, purpose in ((batch.noise, Purpose.NOISE), (batch.posterior_noise, Purpose.POSTERIOR)):
            np.testing.assert_array_equal(
                tensor[row], generator(seed, purpose, position).standard_normal(LATENT, dtype=np.float32)
            )
    assert 0 < flips < 8
    assert batch.images is None
    assert (batch.moments.dtype, batch.text_states.dtype) == (torch.float32, torch.float16)
    assert (batch.u.dtype, batch.noise.dtype, batch.dropped.dtype) == (torch.float64, torch.float32, torch.bool)


def test_noise_and_timesteps_differ_between_samples_ranks_and_steps(encoded: Manifest) -> None:
    settings = config(encoded.folder)
    batches = [
        batch
        for rank in range(2)
        for batch in loader_of(encoded, settings, rank=rank, world=2, micro_batch=4, stop_step=20)
    ]
    noise = torch.cat([batch.noise for batch in batches] + [batch.posterior_noise for batch in batches]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(noise) == 2 * 160
    assert len(torch.unique(torch.cat([batch.u for batch in batches]))) == 160
    # The same sample in the next epoch gets other noise as well.
    correlation = (noise @ noise.T / noise.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9
    other = loader_of(encoded, settings, seed=4, micro_batch=4, stop_step=1)
    assert not torch.equal(next(iter(other)).noise, batches[0].noise)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_configured_rate_over_10000_positions(encoded: Manifest, rate: float) -> None:
    settings = config(encoded.folder, caption_dropout=rate)
    dropped = np.array([one.dropped for one in draw(settings, 0, range(10_000), encoded=True)])
    assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 10_000)


def test_other_captions_are_dropped_in_each_epoch_and_the_text_stays(encoded: Manifest) -> None:
    settings = config(encoded.folder, caption_dropout=0.3)
    total = sum(COUNTS)
    batches = list(loader_of(encoded, settings, micro_batch=total, stop_step=8))
    epochs = []
    for batch in batches:
        assert all(caption.startswith("caption") for caption in batch.captions)
        epochs.append({key for key, dropped in zip(batch.keys, batch.dropped.tolist(), strict=True) if dropped})
    assert len({frozenset(epoch) for epoch in epochs}) == 8
    # Bernoulli(0.3) in 8 epochs: a sample is dropped in none or in all with probability 0.058.
    counts = Counter(key for epoch in epochs for key in epoch)
    assert len(counts) > 0.8 * total
    assert max(counts.values()) < 8


def test_images_are_in_minus_one_to_one(tmp_path: Path) -> None:
    def sample(_: int, number: int) -> dict:
        pixels = np.full((8, 8, 3), (0, 255, 51, 204)[number], dtype=np.uint8)
        return {"__key__": f"k{number}", "png": png(pixels), "txt": "a"}

    manifest = write(tmp_path, sample, [4])
    dataset = SampleDataset(config(tmp_path), manifest, 0, latent_shape=LATENT, shuffle=False)
    batch = dataset.__getitems__([0, 1, 2, 3])
    assert batch.moments is None
    assert batch.images is not None
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    for image, value in zip(batch.images, (-1.0, 1.0, -0.6, 0.6), strict=True):
        torch.testing.assert_close(image, torch.full((3, 8, 8), value))


def test_flip_and_random_crop_of_pictures_follow_their_draws(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 30, 3), dtype=np.uint8)  # shorter side = resolution
    manifest = write(tmp_path, lambda _, number: {"__key__": f"k{number}", "png": png(pixels), "txt": "a"}, [50])
    settings = config(tmp_path, flip=0.5, crop="random")
    batch = SampleDataset(settings, manifest, 1, latent_shape=LATENT).__getitems__(list(range(50)))
    lefts, flips = set(), 0
    assert batch.images is not None
    for position, (image, sizes) in enumerate(zip(batch.images, batch.sizes.tolist(), strict=True)):
        left = int(generator(1, Purpose.CROP, position).random(2)[1] * 23)
        flip = generator(1, Purpose.FLIP, position).random() < 0.5
        wanted = pixels[:, left : left + 8]
        wanted = wanted[:, ::-1] if flip else wanted
        np.testing.assert_allclose(image.permute(1, 2, 0), wanted / 127.5 - 1, atol=1e-6)
        assert sizes == [8, 30, 0, 22 - left if flip else left, 8, 8]
        lefts.add(left)
        flips += flip
    assert 0 in lefts or 1 in lefts
    assert 22 in lefts or 21 in lefts
    assert len(lefts) > 10
    assert 12 < flips < 38


@pytest.mark.parametrize("target", [{}, {"target": [8, 8]}], ids=["read at once", "read one by one"])
def test_sizes_of_encoded_samples_are_those_of_the_mirrored_picture_where_it_is_taken(tmp_path: Path, target) -> None:
    def sample(shard: int, number: int) -> dict:
        width = 80 + 5 * number  # resized to a tenth, so that each other spare width is odd
        left = (round(width / 10) - 8 + 1) // 2
        about = {"size": [80, width], "crop": [0, left]} | target
        return encoded_sample(shard, number) | {"json": about}

    manifest = write(tmp_path, sample, [24])
    batch = SampleDataset(config(tmp_path, flip=0.5), manifest, 1, latent_shape=LATENT).__getitems__(list(range(48)))
    seen = Counter()
    for position, (key, sizes) in enumerate(zip(batch.keys, batch.sizes.tolist(), strict=True)):
        width = 80 + 5 * int(key[-3:])
        spare = round(width / 10) - 8
        flip = generator(1, Purpose.FLIP, position).random() < 0.5
        assert sizes == [80, width, 0, spare // 2 if flip else (spare + 1) // 2, 8, 8]
        seen[flip, spare % 2] += 1
    assert min(seen[flip, odd] for flip in (False, True) for odd in (0, 1)) > 3


def test_one_of_several_captions_is_drawn_anew_in_each_epoch(tmp_path: Path) -> None:
    captions = ["one", "two", "three"]

    def sample(_: int, number: int) -> dict:
        return raw_sample(0, number) | {"json": {"captions": captions, "original_width": 640, "original_height": 480}}

    manifest = write(tmp_path, sample, [4])
    dataset = SampleDataset(config(tmp_path), manifest, 1, latent_shape=LATENT)
    batch = dataset.__getitems__(list(range(400)))
    drawn = [captions[int(generator(1, Purpose.CAPTION, position).random() * 3)] for position in range(400)]
    assert batch.captions == drawn
    assert min(Counter(drawn).values()) > 100
    assert batch.sizes[0, :2].tolist() == [480, 640]
