"""Buckets: their shapes against SDXL's table, nearest aspects, what a crop costs, and counts of real shards."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from ldm.data.buckets import (
    BucketConfig,
    BucketMembers,
    Shape,
    assign,
    bucket_counts,
    bucket_shapes,
    warn_of_small_buckets,
)
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.mixing import RunOrder
from ldm.data.pictures import resize

# Podell et al. 2023, "SDXL", appendix I: one orientation.
SDXL = {
    *((512, width) for width in (2048, 1984, 1920, 1856)),
    *((576, width) for width in (1792, 1728, 1664)),
    *((640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280)),
    *((832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
}
SETTINGS = [
    (512, 64, 2.0),
    (1024, 64, 4.0),
    (768, 64, 2.0),
    (256, 32, 2.0),
    (64, 8, 3.0),
    (512, 8, 1.5),
    (256, 256, 8.0),
]


def shapes(resolution: int, step: int, max_aspect: float) -> list[Shape]:
    return bucket_shapes(resolution, BucketConfig(step, max_aspect))


def test_at_512_the_buckets_are_those_that_people_train_with() -> None:
    wide = [(512, 512), (448, 576), (384, 640), (320, 640)]
    assert bucket_shapes(512, BucketConfig()) == [(w, h) for h, w in wide[:0:-1]] + wide


def test_at_1024_every_bucket_is_in_the_table_of_sdxl() -> None:
    for max_aspect in (2.0, 4.0):
        found = {(min(one), max(one)) for one in shapes(1024, 64, max_aspect)}
        assert found <= SDXL
        assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344)} <= found
    assert {(640, 1600), (576, 1792), (512, 2048)} <= found


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_shapes_keep_area_aspect_and_step_and_both_orientations(resolution: int, step: int, max_aspect: float) -> None:
    found = shapes(resolution, step, max_aspect)
    aspects = [width / height for height, width in found]
    assert aspects == sorted(set(aspects))
    assert found[len(found) // 2] == (resolution, resolution)
    assert [(width, height) for height, width in reversed(found)] == found
    for height, width in found:
        short, long = min(height, width), max(height, width)
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert long <= short * max_aspect
        # A step more would leave the area or the aspect.
        assert short * (long + step) > resolution**2 or long + step > short * max_aspect


@pytest.mark.parametrize(
    ("resolution", "config", "factor", "message"),
    [
        (512, BucketConfig(48), 1, r"data.buckets.step is 48; allowed are divisors of data.resolution, 512"),
        (512, BucketConfig(4), 8, r"data.buckets.step is 4; allowed are multiples of 8, the autoencoder's"),
        (96, BucketConfig(), 8, r"data.buckets.step is 64; allowed are divisors of data.resolution, 96"),
    ],
)
def test_a_step_that_does_not_fit_is_an_error(resolution: int, config: BucketConfig, factor: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bucket_shapes(resolution, config, factor)


@pytest.mark.parametrize(("field", "value"), [("step", 0), ("max_aspect", 0.5), ("max_aspect", 9.0)])
def test_settings_out_of_range_are_errors_that_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"data.buckets.{field} is {value}; allowed are"):
        BucketConfig(**{field: value})


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_a_picture_goes_to_the_nearest_aspect_over_2000_random_sizes(
    resolution: int, step: int, max_aspect: float
) -> None:
    seed = 31
    print(f"seed {seed}, 2000 sizes from 30 to 8000 pixels")
    buckets = shapes(resolution, step, max_aspect)
    sizes = np.exp(np.random.default_rng(seed).uniform(np.log(30), np.log(8000), (2000, 2))).astype(int)
    distances = np.abs(np.log(sizes[:, 1] / sizes[:, 0])[:, None] - [np.log(w / h) for h, w in buckets])
    found = assign(sizes, buckets)
    np.testing.assert_allclose(distances[np.arange(2000), found], distances.min(axis=1), atol=1e-12)
    # Moments are smaller than their pictures by one factor, and have the same bucket.
    np.testing.assert_array_equal(assign(np.array(buckets) // step, buckets), np.arange(len(buckets)))
    for own in ([0, 0], [0, 40], [40, 0], [70, 70]):
        assert buckets[int(assign(np.array([own]), buckets)[0])] == (resolution, resolution)


@pytest.mark.parametrize(("resolution", "largest_loss"), [(512, 0.122), (1024, 0.087)])
def test_a_crop_to_the_bucket_costs_no_more_than_stated_over_500_random_sizes(
    resolution: int, largest_loss: float
) -> None:
    seed = 32
    rng = np.random.default_rng(seed)
    buckets = shapes(resolution, 64, 2.0)
    sizes = np.stack([rng.integers(200, 400, 500), np.zeros(500)], axis=1)
    sizes[:, 1] = sizes[:, 0] * np.exp(rng.uniform(-np.log(2), np.log(2), 500))
    sizes = sizes.round().astype(int)
    losses, square = [], []
    for (height, width), bucket in zip(sizes.tolist(), assign(sizes, buckets).tolist(), strict=True):
        resized = resize(Image.new("L", (width, height)), buckets[bucket])
        losses.append(1 - buckets[bucket][0] * buckets[bucket][1] / (resized.width * resized.height))
        square.append(1 - min(height, width) / max(height, width))
    print(
        f"seed {seed}, 500 pictures between 1:2 and 2:1 at {resolution}: a crop takes {np.mean(losses):.1%} of the "
        f"picture, at most {max(losses):.1%}; to a square {np.mean(square):.1%}, at most {max(square):.1%}"
    )
    assert max(losses) <= largest_loss + 0.002  # sizes are rounded to whole pixels
    assert np.mean(losses) < largest_loss / 2


SIZES = [(40, 40), (40, 80), (80, 40), (41, 39), (64, 48), (30, 90), (48, 64), (20, 31)]
"""Heights and widths of the pictures in the shards below"""
BUCKETS = bucket_shapes(64, BucketConfig(8))


@pytest.fixture
def sized_shards(tmp_path: Path) -> Path:
    """Three shards of 8, 5 and 1 pictures; one picture is not a picture, so that nothing tells its shape."""
    for number, count in enumerate((8, 5, 1)):
        with TarWriter(str(tmp_path / f"shard-{number:06d}.tar")) as writer:
            for sample, (height, width) in enumerate(SIZES[:count]):
                out = io.BytesIO()
                Image.new("RGB", (width, height)).save(out, "PNG")
                data = b"no picture" if (number, sample) == (1, 1) else out.getvalue()
                writer.write({"__key__": f"{number}-{sample}", "png": data, "txt": b"a picture"})
    build_manifest(tmp_path, progress=False)
    return tmp_path


def expected_counts() -> np.ndarray:
    nearest = [int(np.argmin([abs(np.log(w / h * b[0] / b[1])) for b in BUCKETS])) for h, w in SIZES]
    rows = [np.bincount(nearest[:count], minlength=len(BUCKETS)) for count in (8, 5, 1)]
    rows[1][nearest[1]] -= 1
    rows[1][BUCKETS.index((64, 64))] += 1
    return np.array(rows)


def test_counts_come_from_the_pictures_and_a_second_time_from_the_file(sized_shards: Path) -> None:
    manifest = Manifest.load(sized_shards)
    np.testing.assert_array_equal(bucket_counts(manifest, BUCKETS, progress=False), expected_counts())
    (kept,) = sized_shards.glob("buckets-*.safetensors")
    for index in sized_shards.glob("*.index.safetensors"):
        index.rename(index.with_suffix(".away"))
    np.testing.assert_array_equal(bucket_counts(Manifest.load(sized_shards), BUCKETS), expected_counts())
    for others in (BUCKETS[1:-1], [(2 * height, width) for height, width in BUCKETS]):  # other buckets are counted anew
        with pytest.raises(ValueError, match="is missing though the manifest names its shard"):
            bucket_counts(Manifest.load(sized_shards), others)
    for index in sized_shards.glob("*.away"):
        index.rename(index.with_suffix(".safetensors"))
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5])
    np.testing.assert_array_equal(bucket_counts(Manifest.load(sized_shards), BUCKETS), expected_counts())
    assert kept.read_bytes() == whole


def test_where_the_counts_cannot_be_kept_they_are_counted_each_time(sized_shards: Path) -> None:
    bucket_counts(Manifest.load(sized_shards), BUCKETS, progress=False)
    (kept,) = sized_shards.glob("buckets-*.safetensors")
    kept.unlink()
    kept.mkdir()
    for _ in range(2):
        np.testing.assert_array_equal(bucket_counts(Manifest.load(sized_shards), BUCKETS), expected_counts())


def test_a_run_over_real_shards_gives_each_sample_once_in_batches_of_its_bucket(sized_shards: Path) -> None:
    manifests = [Manifest.load(sized_shards), Manifest.load(sized_shards)]
    counts = [bucket_counts(one, BUCKETS, progress=False) for one in manifests]
    order = RunOrder(counts, 3, global_batch=4, members=BucketMembers(manifests, BUCKETS))
    places = [order.locate(position) for position in range(200)]
    for one in places:
        shape = manifests[one.source].index(one.shard).shapes[one.sample]
        assert assign(shape, BUCKETS)[0] == one.bucket
    assert all(len({one.bucket for one in places[k : k + 4]}) == 1 for k in range(0, 200, 4))
    first = [(one.source, one.shard, one.sample) for one in places if one.epoch == 0]
    assert len(set(first)) == len(first) == 28


def test_buckets_that_do_not_fill_a_batch_are_warned_of() -> None:
    counts = [np.array([[3, 0, 9], [1, 0, 0]]), np.array([[1, 0, 4]])]
    buckets = [(640, 384), (512, 512), (384, 640)]
    with pytest.warns(UserWarning, match=r"global batch of 10 .*: 640 x 384 \(5\); a larger data.buckets.step"):
        warn_of_small_buckets(buckets, counts, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_small_buckets(buckets, counts, 5)
