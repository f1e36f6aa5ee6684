"""Tiny shards of several sources and of several shapes, and their reference batches."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tiny_shards import (
    config,
    encoded_sample,
    global_batches,
    png,
    raw_sample,
    write,
)

from ldm.data.buckets import BucketConfig
from ldm.data.data_config import DataConfig, SourceConfig
from ldm.data.manifest import Manifest

SQUARE = (2, 8, 8)  # latents of 16 x 16 pixels, two pixels a side each
BUCKETS = BucketConfig(step=4, max_aspect=2.0)
SHAPES = [(16, 8), (20, 12), (16, 16), (12, 20), (8, 16)]  # the buckets of 16 x 16 pixels in steps of 4


def other_sample(shard: int, number: int) -> dict:
    """Of a second source: the same keys, other content."""
    return encoded_sample(shard + 100, number)


def picture_sample(shard: int, number: int) -> dict:
    """A picture of one of several aspects, with pixels that tell which."""
    height, width = [(40, 20), (20, 40), (33, 33), (24, 18), (16, 24), (90, 20)][(shard + number) % 6]
    pixels = np.random.default_rng([shard, number]).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return {"__key__": f"k{number:03d}", "png": png(pixels), "txt": f"caption {shard} {number}"}


def bucket_sample(shard: int, number: int) -> dict:
    """Moments of one of the buckets' shapes."""
    height, width = SHAPES[(2 * shard + number) % 5]
    rng = np.random.default_rng([shard, number])
    return {
        "__key__": f"k{number:03d}",
        "moments.npy": rng.standard_normal((4, height // 2, width // 2)).astype(np.float16),
        "flipped.npy": rng.standard_normal((4, height // 2, width // 2)).astype(np.float16),
        "txt": f"caption {shard} {number}",
        "json": {"size": [10 * height, 10 * width], "crop": [0, shard]},
    }


class Case(NamedTuple):
    manifests: Any
    settings: DataConfig
    changes: dict[str, Any]


def make_cases(root: Path) -> dict[str, Case]:
    """Shards of every kind under `root`, and the settings with which they are read."""
    encoded, raw = write(root / "encoded"), write(root / "raw", raw_sample)
    other = write(root / "other", other_sample, [9, 3])
    pictures, moments = write(root / "pictures", picture_sample, encoder=None), write(root / "moments", bucket_sample)
    more = write(root / "more", bucket_sample, [11, 4])
    two: dict[str, Any] = {"shards": [SourceConfig(shards="a", weight=1), SourceConfig(shards="b", weight=2)]}
    any_shape: dict[str, Any] = {"resolution": 16, "buckets": BUCKETS, "flip": 0.5}
    square = {"latent_shape": SQUARE}
    return {
        "encoded": Case(encoded, config(root, flip=0.5), {}),
        "raw": Case(raw, config(root, flip=0.5, crop="random"), {}),
        "two sources": Case([encoded, other], config(root, flip=0.5, **two), {}),
        "buckets raw": Case(pictures, config(root, crop="random", **any_shape), square),
        "buckets encoded": Case(moments, config(root, **any_shape), square),
        "buckets of two sources": Case([moments, more], config(root, **any_shape, **two), square),
    }


KINDS = ["encoded", "raw", "two sources", "buckets raw", "buckets encoded", "buckets of two sources"]
_references: dict[str, list[dict]] = {}


def reference(kind: str, case: Case) -> list[dict]:
    """Sixteen steps of 8 in one process, in one piece."""
    if kind not in _references:
        _references[kind] = global_batches(case.manifests, case.settings, 1, 0, 16, **case.changes)
    return _references[kind]


def several(manifests: Manifest | list[Manifest]) -> list[Manifest]:
    return [manifests] if isinstance(manifests, Manifest) else manifests
