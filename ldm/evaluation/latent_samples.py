"""Latents of shards with their captions, as training knows them: what a checkpoint's likelihood is estimated on.

Enters: a Pipeline, a folder of raw or encoded shards, how many samples. Leaves: batches of scaled latents with their
conditioning, each sample a function of seed and shards alone; and a line for each sample that could not be used.
Walk: places -> members -> moments, caption, text -> LatentBatch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.draws import Purpose, generator, normal
from ldm.data.encoding import EncodingConfig, encoder_identity, identity_problems
from ldm.data.manifest import Manifest
from ldm.data.members import (
    MOMENTS,
    POOLED,
    TEXT,
    Members,
    decode_caption,
    decode_floats,
    decode_json,
    float_form,
    original_size,
    size_and_crop,
    two_pairs,
)
from ldm.data.order import permute
from ldm.data.pictures import decode_picture, normalize
from ldm.data.shards import DamagedSample, ShardReader
from ldm.models.autoencoder import sample_posterior, scale_latents
from ldm.models.conditioning import Conditioning
from ldm.pipeline.pipeline import Pipeline


class LatentSample(NamedTuple):
    """One sample, decoded."""

    number: int
    """Of all samples of the shards, in file order: the address of its draws."""
    key: str
    """shard/key"""
    caption: str
    array: np.ndarray
    """Pixels (H, W, 3) uint8, or moments (2C, h, w)."""
    sizes: tuple[float, ...]
    """Original height and width, crop top and left, target height and width, in pixels."""
    text: np.ndarray | None
    """(L, D) text states, and (P,) pooled text, where the shards have them."""
    pooled: np.ndarray | None

    @property
    def form(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes that a batch has in common."""
        return tuple(None if one is None else one.shape for one in (self.array, self.text, self.pooled))


@dataclass
class LatentBatch:
    """B samples of one shape, on the pipeline's device."""

    numbers: list[int]
    keys: list[str]
    captions: list[str]
    latents: Tensor
    """(B, C, h, w) float32, drawn from their posteriors and scaled."""
    conditioning: Conditioning


def likelihood_seed(seed: int) -> int:
    """The seed of all draws below: another than any training's with the same seed."""
    return int(generator(seed, Purpose.LIKELIHOOD).bit_generator.random_raw())


def latent_batches(
    pipeline: Pipeline,
    shards: Path,
    *,
    samples: int,
    seed: int,
    batch_size: int,
    passed_over: Callable[[str], object],
) -> Iterator[LatentBatch]:
    """Yields up to `samples` different samples of the shards (all, if fewer), in an order that the seed draws.

    The first caption of several conditions; pictures are cropped in their middle, never mirrored. `passed_over` is told
    shard, key and reason of each sample that cannot be used; the next in order takes its place.

    Raises:
        FileNotFoundError, ManifestError: no usable manifest in the folder.
        ValueError: latents of another autoencoder or text encoder than the pipeline's, or not one usable sample.
    """
    manifest = Manifest.load(shards)
    check_encoder(pipeline, manifest)
    seed = likelihood_seed(seed)
    waiting: list[LatentSample] = []
    found = 0
    for sample in usable_samples(pipeline, manifest, seed, passed_over):
        if waiting and (len(waiting) == batch_size or sample.form != waiting[0].form):
            yield batch_of(pipeline, waiting, seed)
            waiting = []
        waiting.append(sample)
        found += 1
        if found == samples:
            break
    if not found:
        raise ValueError(f"shards: {shards} has not one usable sample")
    yield batch_of(pipeline, waiting, seed)


def check_encoder(pipeline: Pipeline, manifest: Manifest) -> None:
    """Raises ValueError where encoded shards were made by another autoencoder or text encoder; names what differs."""
    found = manifest.encoder
    if not found:  # raw shards
        return
    text = found.get("text_encoder") is not None
    side = int(found.get("resolution") or 0)
    expected = encoder_identity(pipeline.autoencoder, pipeline.text_encoder, side, EncodingConfig(), text_states=text)
    # Latents of any shape have a likelihood.
    problems = identity_problems(found, expected | {"buckets": found.get("buckets")})
    if problems:
        raise ValueError(
            f"shards: {manifest.folder} does not belong to this checkpoint:\n  "
            + "\n  ".join(line.replace("this run", "this checkpoint") for line in problems)
        )


def usable_samples(
    pipeline: Pipeline, manifest: Manifest, seed: int, passed_over: Callable[[str], object]
) -> Iterator[LatentSample]:
    """Samples in drawn order, each once."""
    ends = np.cumsum(manifest.counts)
    total = int(ends[-1]) if len(ends) else 0
    reader = ShardReader(manifest)
    try:
        for i in range(total):
            number = permute(i, total, seed)
            shard = int(np.searchsorted(ends, number, side="right"))
            place = number - int(ends[shard]) + manifest.counts[shard]
            name = f"{manifest.shards[shard].name}/{manifest.index(shard).key(place)}"
            try:
                yield decode(pipeline, number, name, reader.members(shard, place))
            except DamagedSample as error:
                passed_over(str(error))
            except ValueError as error:
                passed_over(f"{name}: {error}")
    finally:
        reader.close()


def decode(pipeline: Pipeline, number: int, name: str, members: Members) -> LatentSample:
    """A sample out of its members; raises ValueError where it cannot be used."""
    caption, factor = decode_caption(members), pipeline.autoencoder.downsample_factor
    if MOMENTS not in members:
        side = pipeline.latent_shape[1] * factor
        picture = decode_picture({extension: bytes(one) for extension, one in members.items()}, side)
        sizes = two_pairs(original_size(decode_json(members), picture.size), picture.crop)
        return LatentSample(number, name, caption, picture.pixels, (*sizes, side, side), None, None)
    (_, *sides), _ = float_form(members[MOMENTS], MOMENTS)
    channels = 2 * pipeline.autoencoder.config.latent_channels
    moments = decode_floats(members, MOMENTS, (channels, *sides[:2]))
    pixels = moments.shape[1] * factor, moments.shape[2] * factor
    text, pooled = (
        decode_floats(members, one, float_form(members[one], one)[0]) if one in members else None
        for one in (TEXT, POOLED)
    )
    return LatentSample(number, name, caption, moments, (*size_and_crop(members, pixels), *pixels), text, pooled)


@torch.no_grad()
def batch_of(pipeline: Pipeline, samples: Sequence[LatentSample], seed: int) -> LatentBatch:
    """Samples of one form, encoded where they are pixels, drawn from their posteriors with the noise of each's number.

    Latents are scaled here, once.
    """
    arrays = np.stack([one.array for one in samples])
    if arrays.dtype == np.uint8:
        moments = pipeline.autoencoder.encode(normalize(arrays).to(pipeline.device))
    else:
        moments = torch.from_numpy(arrays).to(pipeline.device)
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    noise = np.stack([normal(seed, Purpose.POSTERIOR, one.number, shape=shape) for one in samples])
    latents = sample_posterior(moments, torch.from_numpy(noise).to(pipeline.device))
    captions = [one.caption for one in samples]
    sizes = torch.tensor([one.sizes for one in samples])
    return LatentBatch(
        [one.number for one in samples],
        [one.key for one in samples],
        captions,
        scale_latents(latents, pipeline.autoencoder.config),
        text_of(pipeline, samples, captions, sizes),
    )


def text_of(
    pipeline: Pipeline, samples: Sequence[LatentSample], captions: Sequence[str], sizes: Tensor
) -> Conditioning:
    """The captions' conditioning: stored states where the shards have them, else the text encoder's."""
    if samples[0].text is None:
        given = pipeline.text_encoder.encode(captions)
    else:
        text = torch.from_numpy(np.stack([one.text for one in samples if one.text is not None]))
        pooled = None
        if samples[0].pooled is not None:
            pooled = torch.from_numpy(np.stack([one.pooled for one in samples if one.pooled is not None]))
        given = Conditioning(text, pooled)
    return Conditioning(given.text, given.pooled, sizes).to(pipeline.device, torch.float32)
