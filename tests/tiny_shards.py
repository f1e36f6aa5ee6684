"""Tiny shards, raw and encoded, and the batches that the real loader makes of them, in a form that can be compared."""

import dataclasses
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.positions import Positions
from ldm.data.shards import write_shard

LATENT = (2, 4, 4)
COUNTS = [7, 0, 12, 1, 21, 12]
ENCODER = {"weights": "test"}


def png(pixels: np.ndarray) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def encoded_sample(shard: int, number: int, text: bool = True) -> dict:
    rng = np.random.default_rng([shard, number])
    sample = {
        "__key__": f"k{number:03d}",
        "moments.npy": rng.standard_normal((4, 4, 4)).astype(np.float16),
        "flipped.npy": rng.standard_normal((4, 4, 4)).astype(np.float16),
        "txt": f"caption {shard} {number}",
        "json": {"size": [100 + shard, 200 + number], "crop": [shard, number]},
    }
    if text:
        sample["text.npy"] = rng.standard_normal((3, 5)).astype(np.float16)
    return sample


def raw_sample(shard: int, number: int) -> dict:
    rng = np.random.default_rng([shard, number])
    return {
        "__key__": f"k{number:03d}",
        "png": png(rng.integers(0, 255, (9, 8 + number % 3, 3), dtype=np.uint8)),
        "txt": f"caption {shard} {number}",
    }


def write(
    folder: Path,
    make: Callable[[int, int], dict] = encoded_sample,
    counts: list[int] = COUNTS,
    encoder: dict | None = ENCODER,
) -> Manifest:
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate(counts):
        write_shard(folder / f"s-{shard}.tar", (make(shard, number) for number in range(count)))
    return build_manifest(folder, encoder if make is not raw_sample else None, progress=False)


def config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"shards": str(folder), "resolution": 8, "workers": 0, "shards_per_block": 2} | changes)


def positions_of(**changes: int) -> Positions:
    """Six steps of one process with one micro-batch of 8, but for `changes`."""
    split = {"rank": 0, "world": 1, "micro_batch": 8, "accumulation": 1, "start_step": 0, "stop_step": 6}
    return Positions(**split | changes)


def loader_of(
    manifest: Manifest | list[Manifest],
    settings: DataConfig,
    seed: int = 3,
    *,
    latent_shape: tuple[int, int, int] = LATENT,
    offset: bool = False,
    context: str | None = None,
    **changes: int,
) -> torch.utils.data.DataLoader[Batch]:
    return make_loader(
        settings, manifest, seed, positions_of(**changes), latent_shape=latent_shape, offset=offset, context=context
    )


def flat(batches: list[Batch]) -> dict[str, object]:
    """Batches one after the other, each field as one value that can be compared."""
    joined: dict[str, object] = {}
    for field in dataclasses.fields(Batch):
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], torch.Tensor):
            joined[field.name] = (values[0].dtype, torch.cat(values).tolist())
        elif values[0] is None:
            joined[field.name] = None
        else:
            joined[field.name] = list(itertools.chain(*values))
    return joined


def global_batches(
    manifest: Manifest | list[Manifest], settings: DataConfig, world: int, start: int, stop: int, **changes: Any
) -> list[dict]:
    """Each step's global batch, put together from the loaders of all ranks; the split of 8 differs by world."""
    accumulation = {1: 2, 2: 1, 4: 2}[world]
    micro_batch = 8 // (world * accumulation)
    ranks = []
    for rank in range(world):
        loader = loader_of(
            manifest,
            settings,
            rank=rank,
            world=world,
            micro_batch=micro_batch,
            accumulation=accumulation,
            start_step=start,
            stop_step=stop,
            **changes,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == (stop - start) * accumulation
        assert all(len(batch.keys) == micro_batch for batch in batches)
        ranks.append(batches)
    return [
        flat([batch for batches in ranks for batch in batches[step * accumulation : (step + 1) * accumulation]])
        for step in range(stop - start)
    ]
