"""Aspect-ratio buckets through the real loader: each step of one shape, cropped to it, validation too."""

import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_mixtures import (
    SHAPES,
    SQUARE,
    Case,
    bucket_sample,
    make_cases,
    picture_sample,
)
from tiny_shards import (
    COUNTS,
    config,
    loader_of,
)

from ldm.data.batch import Batch
from ldm.data.dataset import SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.loader import make_validation_loader, validation_batches


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("sources"))


@pytest.mark.filterwarnings("ignore:buckets with fewer samples")
def test_a_step_is_of_one_bucket_and_holds_the_pictures_of_its_aspect_cropped_to_it(cases: dict[str, Case]) -> None:
    case, seed = cases["buckets raw"], 3
    seen = set()
    batches = list(
        loader_of(case.manifests, case.settings, seed, micro_batch=4, accumulation=2, stop_step=20, latent_shape=SQUARE)
    )
    for step in range(20):
        assert batches[2 * step].noise.shape == batches[2 * step + 1].noise.shape
    for batch in batches:
        assert batch.images is not None
        height, width = batch.images.shape[2:]
        assert (height, width) in SHAPES
        assert batch.noise.shape == batch.posterior_noise.shape == (4, 2, height // 2, width // 2)
        seen.add((height, width))
        for row, position in enumerate(batch.positions.tolist()):
            shard, number = (int(one) for one in batch.captions[row].split()[1:])
            picture = Image.open(io.BytesIO(picture_sample(shard, number)["png"]))
            # The nearest bucket by the ratio of the aspects.
            ratios = [abs(np.log(picture.width / picture.height * h / w)) for h, w in SHAPES]
            assert ratios[SHAPES.index((height, width))] == pytest.approx(min(ratios))
            scale = max(height / picture.height, width / picture.width)
            size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            place = generator(seed, Purpose.CROP, position).random(2)
            top, left = int(place[0] * (size[1] - height + 1)), int(place[1] * (size[0] - width + 1))
            resized = np.asarray(picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture)
            wanted = resized[top : top + height, left : left + width]
            if generator(seed, Purpose.FLIP, position).random() < 0.5:
                wanted, left = wanted[:, ::-1], size[0] - width - left
            np.testing.assert_allclose(batch.images[row].permute(1, 2, 0), wanted / 127.5 - 1, atol=1e-6)
            assert batch.sizes[row].tolist() == [picture.height, picture.width, top, left, height, width]
            expected = generator(seed, Purpose.NOISE, position).standard_normal(batch.noise.shape[1:], dtype=np.float32)
            np.testing.assert_array_equal(batch.noise[row], expected)
    assert len(seen) >= 4


@pytest.mark.filterwarnings("ignore:buckets with fewer samples")
def test_encoded_buckets_give_the_moments_of_their_shape(cases: dict[str, Case]) -> None:
    case = cases["buckets of two sources"]
    seen = Counter()
    for batch in loader_of(case.manifests, case.settings, stop_step=30, latent_shape=SQUARE):
        assert batch.moments is not None
        height, width = 2 * batch.moments.shape[2], 2 * batch.moments.shape[3]
        assert batch.noise.shape == (8, 2, height // 2, width // 2)
        seen[height, width] += 1
        for row, position in enumerate(batch.positions.tolist()):
            shard, number = (int(one) for one in batch.captions[row].split()[1:])
            flip = generator(3, Purpose.FLIP, position).random() < 0.5
            expected = bucket_sample(shard, number)["flipped.npy" if flip else "moments.npy"]
            np.testing.assert_array_equal(batch.moments[row], expected)
            assert batch.sizes[row].tolist() == [10 * height, 10 * width, 0, shard, height, width]
            assert batch.keys[row].startswith(("0:s-", "1:s-"))
    assert set(seen) == set(SHAPES)
    assert not any(batch.quarantined for batch in loader_of(case.manifests, case.settings, latent_shape=SQUARE))


def test_a_batch_ofseveral_buckets_and_buckets_that_do_not_fit_are_errors(cases: dict[str, Case]) -> None:
    case = cases["buckets encoded"]
    dataset = SampleDataset(case.settings, case.manifests, 3, latent_shape=SQUARE, global_batch=8)
    with pytest.raises(ValueError, match="positions 0 to 79 are of several buckets"):
        dataset.__getitems__(range(80))
    with pytest.raises(ValueError, match="need a global batch"):
        SampleDataset(case.settings, case.manifests, 3, latent_shape=SQUARE)
    with pytest.raises(ValueError, match="multiples of 8, the autoencoder's downsample factor"):
        SampleDataset(case.settings, case.manifests, 3, latent_shape=(2, 2, 2), global_batch=8)


@pytest.mark.parametrize("kind", ["buckets raw", "buckets encoded"])
@pytest.mark.parametrize(
    ("samples", "world", "micro_batch"), [(None, 1, 8), (53, 2, 4), (20, 2, 3), (30, 4, 100), (53, 4, 1)]
)
def test_validation_with_buckets_covers_each_sample_once_in_batches_of_one_bucket(
    cases: dict[str, Case], kind: str, samples: int | None, world: int, micro_batch: int
) -> None:
    case = cases[kind]
    lengths, positions, noises = set(), [], {}
    for rank in range(world):
        loader = make_validation_loader(
            config(Path(), **vars(case.settings) | {"crop": "center"}),
            case.manifests,
            3,
            latent_shape=SQUARE,
            rank=rank,
            world=world,
            micro_batch=micro_batch,
            samples=samples,
        )
        batches: list[Batch] = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert 1 <= len(batch.keys) <= micro_batch + 1
            assert len({tuple(one) for one in batch.sizes[:, 4:].tolist()}) == 1
            positions += batch.positions.tolist()
            for position, key in zip(batch.positions.tolist(), batch.keys, strict=True):
                in_file_order = [
                    f"s-{shard}.tar/k{one:03d}" for shard, count in enumerate(COUNTS) for one in range(count)
                ]
                assert key == in_file_order[position]
            noises |= dict(zip(batch.positions.tolist(), batch.noise, strict=True))
    assert len(lengths) == 1
    assert sorted(positions) == list(range(samples or 53))
    own_seed = int(generator(3, Purpose.VALIDATION).bit_generator.random_raw())
    for position, noise in noises.items():
        expected = generator(own_seed, Purpose.NOISE, position).standard_normal(noise.shape, dtype=np.float32)
        np.testing.assert_array_equal(noise, expected)


def test_batches_of_2000_random_groups_cover_them_as_many_for_each_process() -> None:
    print("seed 6, 2,000 trials")
    rng = np.random.default_rng(6)
    none = 0
    for _ in range(2000):
        sizes = rng.integers(1, 30, rng.integers(1, 6)).tolist()
        starts = [0, *itertools.accumulate(sizes)]
        groups = [range(first, last) for first, last in itertools.pairwise(starts)]
        world, micro_batch = int(rng.integers(1, 9)), int(rng.integers(1, 12))
        batches = validation_batches(groups, world, micro_batch)
        if not batches:
            none += 1
            # No multiple of the number of processes lies between one batch a group and one a sample.
            assert not [count for count in range(len(groups), sum(sizes) + 1) if count % world == 0]
            continue
        assert len(batches) % world == 0
        assert list(itertools.chain(*batches)) == list(range(sum(sizes)))
        assert all(any(set(batch) <= set(group) for group in groups) for batch in batches)
        assert all(batch for batch in batches)
        if -(-sum(-(-size // micro_batch) for size in sizes) // world) * world <= sum(sizes):
            assert max(map(len, batches)) <= micro_batch
    assert 0 < none < 500
