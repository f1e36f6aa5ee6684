"""Aspect-ratio buckets: shapes of about the same area to which pictures are resized and cropped instead of to a square.

In: a resolution, a `BucketConfig`, and the heights and widths of pictures out of the shards' indexes.
Out: the buckets' shapes, the bucket of each sample, and how many samples of each bucket a shard holds.
"""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from safetensors.numpy import load, save
from tqdm import tqdm

from ldm.data.manifest import Manifest
from ldm.data.storage import write_whole

Shape = tuple[int, int]
"""Height and width in pixels."""


@dataclass
class BucketConfig:
    """Pictures keep about their shape: each global batch has one height and width out of a list."""

    step: int = 64
    """Heights and widths are multiples of this many pixels; a multiple of the autoencoder's factor that divides
    data.resolution."""
    max_aspect: float = 2.0
    """Longest side of a bucket by its shortest, at most; pictures beyond are cropped."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"data.buckets.step is {self.step}; allowed are integers from 1")
        if not 1 <= self.max_aspect <= 8:
            raise ValueError(f"data.buckets.max_aspect is {self.max_aspect}; allowed are 1 to 8")


def bucket_shapes(resolution: int, config: BucketConfig, factor: int = 1) -> list[Shape]:
    """Heights and widths of the buckets, from the tallest to the widest, the square one in the middle.

    For each short side, from `resolution` down in steps, the longest side that keeps the area within resolution^2 and
    the aspect within `max_aspect`, as long as aspects grow; both orientations. At 1024 with steps of 64 each is one of
    SDXL's (Podell et al. 2023, appendix I): 1024 x 1024, 960 x 1088, 896 x 1152, 832 x 1216, 768 x 1344, 704 x 1408.

    A picture whose aspect lies between two neighbours loses at most 1 - sqrt(narrower / wider) of its area when it is
    cropped to the nearer one: 12.2 % at 512, 8.7 % at 1024 with the default config; a square crop takes 50 % of 2:1.

    Args:
        resolution: side of the square bucket, in pixels.
        factor: pixels a side of one position of the autoencoder's latent.

    Raises:
        ValueError: `config.step` does not divide the resolution, or the factor does not divide the step.
    """
    step = config.step
    if step % factor:
        raise ValueError(
            f"data.buckets.step is {step}; allowed are multiples of {factor}, the autoencoder's downsample factor"
        )
    if resolution % step:
        raise ValueError(f"data.buckets.step is {step}; allowed are divisors of data.resolution, {resolution}")
    tall: list[Shape] = []  # from the square to the tallest
    for short in range(resolution, 0, -step):
        long = int(min(resolution**2 // short, short * config.max_aspect)) // step * step
        if not tall or long * tall[-1][1] > short * tall[-1][0]:
            tall.append((long, short))
    wide = [(short, long) for long, short in tall]
    return tall[:0:-1] + wide


def assign(shapes: np.ndarray, buckets: Sequence[Shape]) -> np.ndarray:
    """The bucket of each picture, (n,) int64: that of the nearest aspect, by ratio; the square one where unknown.

    Divisions and square roots alone, which IEEE 754 rounds in one way: the same buckets on every machine.

    Args:
        shapes: (n, 2) heights and widths in any unit, upright; 0, 0 where unknown.
        buckets: as `bucket_shapes` gives them.
    """
    aspects = np.array([width / height for height, width in buckets])  # ascending
    borders = np.sqrt(aspects[:-1] * aspects[1:])
    heights, widths = np.asarray(shapes, dtype=np.float64).reshape(-1, 2).T
    known = (heights > 0) & (widths > 0)
    return np.searchsorted(borders, np.where(known, widths, 1) / np.where(known, heights, 1), side="right")


@dataclass
class BucketMembers:
    """The bucket of each sample of a shard, by (source, shard): what `mixing.RunOrder` asks for.

    Encoded samples are assigned by the shapes of their moments, which have the aspects of their buckets.
    """

    manifests: Sequence[Manifest]
    buckets: Sequence[Shape]

    def __call__(self, source: int, shard: int) -> np.ndarray:
        """(samples,) int64, from the shapes in the shard's index. Raises as `Manifest.index` does."""
        return assign(self.manifests[source].index(shard).shapes, self.buckets)


def bucket_counts(manifest: Manifest, buckets: Sequence[Shape], progress: bool = True) -> np.ndarray:
    """Samples of each shard in each bucket, (shards, buckets) int64: one pass over the indexes.

    The counts are kept in a small file beside the manifest, under a name that its digest and the buckets give, and
    taken from there the next time; in a folder that cannot be written they are counted each time.

    Args:
        progress: show a bar.

    Raises:
        ManifestError: an index is missing or altered.
    """
    shapes = np.array(buckets, dtype=np.int32)
    name = xxhash.xxh3_64_hexdigest(manifest.digest().encode() + shapes.tobytes())
    path = manifest.folder / f"buckets-{name}.safetensors"
    with contextlib.suppress(Exception):  # absent, or cut short by a full disk: counted again
        stored = load(path.read_bytes())["counts"].astype(np.int64)
        if stored.sum(axis=1).tolist() == manifest.counts:
            return stored
    members = BucketMembers([manifest], buckets)
    numbers = tqdm(range(len(manifest.shards)), "sorting into buckets", unit="shard", disable=not progress)
    counts = np.array([np.bincount(members(0, shard), minlength=len(buckets)) for shard in numbers])
    with contextlib.suppress(OSError):
        write_whole(path, save({"counts": counts.astype(np.int32)}))
    return counts


def warn_of_small_buckets(buckets: Sequence[Shape], counts: Sequence[np.ndarray], global_batch: int) -> None:
    """Warns of buckets whose samples do not fill a global batch, which then holds some of them twice or more often.

    Args:
        counts: for each source, as `bucket_counts` gives them.
    """
    totals = sum(one.sum(axis=0) for one in counts)
    small = [
        f"{h} x {w} ({n:,})" for (h, w), n in zip(buckets, np.atleast_1d(totals), strict=True) if 0 < n < global_batch
    ]
    if small:
        warnings.warn(
            f"buckets with fewer samples than the global batch of {global_batch:,} repeat them within a batch: "
            f"{', '.join(small)}; a larger data.buckets.step or a smaller data.buckets.max_aspect joins them to others",
            stacklevel=2,
        )
