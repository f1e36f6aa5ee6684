"""From raw shards to encoded shards: posterior moments, captions, text, and the identity of what encoded them.

Enters: raw shards with a manifest, an autoencoder, text encoders. Leaves: one encoded shard for each raw one, under
its name only when it is complete, and what a manifest says of who encoded it, so that training can refuse others.

Stages: 1. shards, asked for as they are needed (encoding_folder.py) -> 2. pictures decoded by workers, batches of one
shape within one shard -> 3. moments (and those of the mirrored picture), text states and pooled text on the device ->
4. one tar, in the order of the raw one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, tee
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.buckets import BucketConfig, Shape, assign, bucket_shapes
from ldm.data.loader import start_worker
from ldm.data.manifest import Manifest
from ldm.data.members import FLIPPED, MOMENTS, POOLED, TEXT, decode_caption, decode_json, original_size
from ldm.data.pictures import Picture, decode_picture, normalize
from ldm.data.quarantine import Ledger, Quarantined
from ldm.data.shards import DamagedSample, ShardReader, write_shard
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pretrained import weights_hash
from ldm.models.text_conditioner import TextConditioner


@dataclass
class EncodingConfig:
    """What `tools/encode_latents.py` reads and stores; it writes to `data.shards` (and `data.validation`)."""

    shards: str | None = None
    """Folder of the raw shards and their manifest."""
    validation: str | None = None
    """Folder of raw held-out shards, encoded into `data.validation`."""
    text_states: bool = False
    """Store the text encoder's states too, and of a pair the pooled text: training runs no text encoder, disks hold
    L x D (and P) more numbers a sample."""
    flipped: bool = False
    """Store the moments of the mirrored picture too, which `data.flip` needs with encoded shards."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type in which moments and states are stored; float16 rounds them by 0.05 %."""
    batch_size: int = 32
    """Pictures that the autoencoder encodes at once, on each process."""
    workers: int = 1
    """Processes that decode pictures, for each encoding process; 0 decodes in the same."""
    patience: float = 60.0
    """Seconds without a sign of life after which another host's process is given up and its shard encoded by another;
    one of the same machine that is gone is noticed at once."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"encoding.{name}: found {getattr(self, name)}, expected {least} or more")
        if self.patience <= 0:
            raise ValueError(f"encoding.patience: found {self.patience}, expected a positive number of seconds")


def encoder_identity(
    autoencoder: AutoencoderKL,
    text_encoder: TextConditioner,
    resolution: int,
    config: EncodingConfig,
    *,
    text_states: bool,
    buckets: BucketConfig | None = None,
) -> dict[str, Any]:
    """What encoded samples depend on besides the raw ones: written into the manifest, compared by training.

    Raises:
        ValueError: data.buckets.step fits neither the resolution nor the autoencoder.
    """
    shapes = None if buckets is None else bucket_shapes(resolution, buckets, autoencoder.downsample_factor)
    return {
        "autoencoder": {
            "weights": weights_hash(autoencoder.state_dict().items()),
            "config": xxhash.xxh3_128_hexdigest(json.dumps(autoencoder.config.to_dict(), sort_keys=True).encode()),
        },
        "resolution": resolution,
        "pixel_range": [-1.0, 1.0],
        "latent_channels": autoencoder.config.latent_channels,
        "downsample_factor": autoencoder.downsample_factor,
        "crop": "center",
        "buckets": None if shapes is None else [list(shape) for shape in shapes],
        "flipped": config.flipped,
        "dtype": config.dtype,
    } | {name: one if text_states else None for name, one in text_encoder.identity().items()}


# How moments are stored does not change what they are moments of.
_STORAGE_FIELDS = ("flipped", "dtype")


def identity_problems(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Fields in which shards (`found`) and a run (`expected`) differ, a sentence each; text fields only if stored."""
    problems: list[str] = []
    for key, value in expected.items():
        if key in _STORAGE_FIELDS:
            continue
        stored = found.get(key)
        if isinstance(stored, dict) and isinstance(value, dict):
            names = sorted(stored.keys() | value.keys())
            pairs = [(f"{key}.{name}", stored.get(name), value.get(name)) for name in names]
        else:
            pairs = [(key, _brief(stored), _brief(value))]
        problems += [f"the shards were encoded with {name} {a}, but this run has {b}" for name, a, b in pairs if a != b]
    return problems


def _brief(value: Any) -> Any:
    """A model's identity as its class alone, where it stands against none."""
    return value.get("class", "one") if isinstance(value, dict) else value


class Decoded(NamedTuple):
    """A raw sample, ready to be encoded."""

    key: str
    caption: str
    picture: Picture
    note: dict[str, Any]
    """The raw sample's own .json."""


class Wanted(NamedTuple):
    """A raw sample by its place, and the height and width at which it is encoded."""

    shard: int
    sample: int
    shape: Shape


class RawSamples(Dataset[Decoded | Quarantined]):
    """Raw samples by place: center crop, no draws. One that cannot be used is a ledger line instead."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.reader = ShardReader(manifest)

    def __getitem__(self, wanted: Wanted) -> Decoded | Quarantined:
        shard, sample, shape = wanted
        key = self.manifest.index(shard).key(sample)
        try:
            members = self.reader.members(shard, sample)
            return Decoded(key, decode_caption(members), decode_picture(members, shape), decode_json(members))
        except DamagedSample as damage:
            reason = damage.reason
        except ValueError as error:
            reason = str(error)
        return Quarantined(self.manifest.shards[shard].name, key, reason, -1, "")


class Batch(NamedTuple):
    """Samples of one shape, within one shard; without any, a shard that holds none."""

    shard: int
    samples: list[Wanted]


class WrittenShard(NamedTuple):
    """An encoded shard that is complete, where it was written."""

    number: int
    path: Path
    quarantined: list[Quarantined]
    """Samples that the raw shard has and this one has not."""
    truncated: int
    """Captions that were longer than the text encoder takes."""


def batches_of(manifest: Manifest, shards: Iterable[int], buckets: Sequence[Shape], batch_size: int) -> Iterator[Batch]:
    """All samples of the shards, shard after shard; the next shard is asked for when the last one's are given out."""
    for shard in shards:
        numbers = np.zeros(manifest.counts[shard], dtype=np.int64)
        if not len(numbers):
            yield Batch(shard, [])
        if len(buckets) > 1:
            numbers = assign(manifest.index(shard).shapes, buckets)
        for number in np.unique(numbers).tolist():
            samples = np.flatnonzero(numbers == number).tolist()
            for first in range(0, len(samples), batch_size):
                some = samples[first : first + batch_size]
                yield Batch(shard, [Wanted(shard, sample, buckets[number]) for sample in some])


@torch.inference_mode()
def encode_shards(
    manifest: Manifest,
    shards: Iterable[int],
    out: Path,
    autoencoder: AutoencoderKL,
    text_encoder: TextConditioner | None,
    ledger: Ledger,
    *,
    resolution: int,
    config: EncodingConfig,
    device: torch.device,
    buckets: BucketConfig | None = None,
    written: Callable[[WrittenShard], None] | None = None,
) -> Iterator[int]:
    """Encodes the shards one after the other into `out`; yields the number of samples done after each batch.

    Pictures are decoded by the workers while the device encodes. Samples that cannot be used are lines of the ledger
    and missing from the encoded shard. A shard's encoded samples are held in memory until it is written, in the order
    of the raw shard.

    Args:
        shards: their numbers, asked for one at a time while the samples of the one before are still on their way.
        resolution: of the square, to which pictures are cropped without buckets.
        buckets: each picture is encoded at the height and width of its own, by its shape in the shard's index.
        written: called with each shard as soon as it is complete.
    """
    with torch.inference_mode(False):  # else the weights could never be trained again
        # A fifth to a third faster on CPU, and what convolutions on tensor cores want.
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shapes = [(resolution, resolution)]
    if buckets is not None:
        shapes = bucket_shapes(resolution, buckets, autoencoder.downsample_factor)
    batches, wanted = tee(batches_of(manifest, shards, shapes, config.batch_size))
    loader = DataLoader(
        RawSamples(manifest),
        batch_sampler=(batch.samples for batch in wanted),
        collate_fn=list,
        num_workers=config.workers,
        worker_init_fn=start_worker,
        prefetch_factor=2 if config.workers else None,
    )
    encode = partial(encode_batch, autoencoder=autoencoder, text_encoder=text_encoder, config=config, device=device)
    for shard, group in groupby(zip(loader, batches, strict=True), key=lambda pair: pair[1].shard):
        samples: dict[int, dict[str, Any]] = {}
        lost: list[Quarantined] = []
        cut = text_encoder.truncated if text_encoder is not None else 0
        for decoded, batch in group:
            ledger.append([one for one in decoded if isinstance(one, Quarantined)], seen=len(decoded))
            ledger.check()
            lost += [one for one in decoded if isinstance(one, Quarantined)]
            pairs = zip(batch.samples, decoded, strict=True)
            usable = [(one.sample, raw) for one, raw in pairs if isinstance(raw, Decoded)]
            encoded = encode([raw for _, raw in usable]) if usable else []
            for (sample, _), done in zip(usable, encoded, strict=True):
                if buckets is not None:
                    done["json"]["target"] = batch.samples[0].shape
                samples[sample] = done
            yield len(decoded)
        path = out / manifest.shards[shard].name
        write_shard(path, [samples[sample] for sample in sorted(samples)])
        if written is not None:
            cut = text_encoder.truncated - cut if text_encoder is not None else 0
            written(WrittenShard(shard, path, lost, cut))


def encode_batch(
    batch: Sequence[Decoded],
    autoencoder: AutoencoderKL,
    text_encoder: TextConditioner | None,
    config: EncodingConfig,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Encoded samples as `write_shard` takes them: raw moments (2C, h, w), neither sampled nor scaled."""
    images = normalize(np.stack([one.picture.pixels for one in batch])).to(device)  # (B, 3, H, W) in [-1, 1]
    moments = _stored(autoencoder.encode(images), config.dtype)
    flipped = _stored(autoencoder.encode(images.flip(3)), config.dtype) if config.flipped else None
    text: dict[str, np.ndarray] = {}
    if text_encoder is not None:
        given = text_encoder.encode([one.caption for one in batch])
        text = {
            name: _stored(values, config.dtype)
            for name, values in ((TEXT, given.text), (POOLED, given.pooled))
            if values is not None
        }
    samples = []
    for i, one in enumerate(batch):
        sample: dict[str, Any] = {"__key__": one.key, MOMENTS: moments[i], "txt": one.caption}
        if flipped is not None:
            sample[FLIPPED] = flipped[i]
        sample |= {name: values[i] for name, values in text.items()}
        sample["json"] = one.note | {"size": original_size(one.note, one.picture.size), "crop": one.picture.crop}
        samples.append(sample)
    return samples


def _stored(values: Tensor, dtype: str) -> np.ndarray:
    """Raises OverflowError where float16 cannot hold the values: a shard with infinities would train nothing."""
    array: np.ndarray = values.float().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise OverflowError(
            f"encoded values up to {values.abs().max().item():.3g} do not fit {dtype}: set encoding.dtype to float32"
        )
    return array
