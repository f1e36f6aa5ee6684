"""A run's data: its sources, opened and told apart, and the batches that each process takes out of them.

Enters: the section `data` of the config. Leaves: manifests to be checked against the run's other parts, a digest that a
resumed run compares, and loaders of training and held-out batches.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ldm.data.batch import Batch
from ldm.data.cache import open_cache
from ldm.data.data_config import DataConfig
from ldm.data.dataset import damage_of_indexing
from ldm.data.loader import make_loader, make_validation_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.data.quarantine import Quarantined
from ldm.data.streaming import make_stream_loader, stream_lines
from ldm.training.distributed import BatchSplit


@dataclass(frozen=True)
class Share:
    """What one process takes: its rank, the split of the global batch, and the run's seed and latents."""

    rank: int
    split: BatchSplit
    seed: int
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a square picture"""
    text_shape: tuple[int, int]
    """(L, D) of the text encoder's states"""
    pooled_size: int
    """Features P of pooled text; zero where there is none"""
    offset: bool
    """Whether the objective has offset noise, whose draws the batches then hold"""
    more_noise: int
    """Channels that the batches' noise has more than the latents, for a corruption that takes them"""


@dataclass
class RunData:
    """The sources of a run's samples: indexed shards, or a stream that nobody could index."""

    config: DataConfig
    manifests: list[Manifest] = field(default_factory=list)
    """Of the sources, in their order; none for a stream."""
    held_out: Manifest | None = None
    """Validation shards; None where no validation loss is computed."""

    @staticmethod
    def open(config: DataConfig, validating: bool) -> "RunData":
        """Loads the manifests that the config names.

        Raises:
            FileNotFoundError, ManifestError, StorageError, ValueError: one is missing, damaged, out of reach, or at a
                URL without data.cache.folder.
        """
        cache = open_cache(config.cache)
        manifests = [] if config.stream else [Manifest.load(source.shards, cache) for source in config.sources]
        held_out = Manifest.load(config.validation, cache) if validating and config.validation is not None else None
        return RunData(config, manifests, held_out)

    def lines(self) -> list[str]:
        """What the run's first lines say of its data."""
        lines = stream_lines(self.config.stream) if self.config.stream else []
        for source, manifest in zip(self.config.sources, self.manifests, strict=bool(self.manifests)):
            kind = "raw" if manifest.encoder is None else "encoded"
            weight = "" if source.weight is None else f", weight {source.weight:g}"
            lines.append(
                f"{sum(manifest.counts):,} {kind} samples in {len(manifest.counts):,} shards of {source.shards}{weight}"
            )
        if self.held_out is None:
            lines.append("no validation loss: data.validation is not set, or validation.every is 0")
        return lines

    def card_lines(self) -> list[str]:
        """What the model card says of the training data: counts, kinds and weights, without places of this machine."""
        if self.config.stream:
            return ["a stream of shards, in no order that could be repeated"]
        lines = []
        for source, manifest in zip(self.config.sources, self.manifests, strict=True):
            kind = "raw" if manifest.encoder is None else "encoded"
            weight = "" if source.weight is None else f", weight {source.weight:g}"
            name = source.shards.rstrip("/").rsplit("/", 1)[-1]
            lines.append(f"{sum(manifest.counts):,} {kind} samples in {len(manifest.counts):,} shards ({name}{weight})")
        return lines

    def all_manifests(self) -> list[Manifest]:
        """Those of the sources and of the held-out shards."""
        return self.manifests + ([] if self.held_out is None else [self.held_out])

    def damaged(self) -> list[Quarantined]:
        """What indexing could not use, as ledger lines."""
        return damage_of_indexing(self.manifests) + (self.held_out.damaged() if self.held_out else [])

    def digest(self) -> str:
        """What the order of samples depends on: manifests and weights; constant for a stream, which has no order."""
        if self.config.stream:
            return "stream"
        digests: list[Any] = [manifest.digest() for manifest in self.manifests]
        if len(digests) == 1:
            return str(digests[0])
        weighted = [[digest, one.weight] for digest, one in zip(digests, self.config.sources, strict=True)]
        return xxhash.xxh3_128_hexdigest(json.dumps(weighted).encode())

    def training_batches(self, share: Share, start_step: int, stop_step: int) -> Iterator[Batch]:
        """One process's micro-batches from step `start_step` up to but without `stop_step`, in order."""
        positions = Positions(
            rank=share.rank,
            world=share.split.processes,
            micro_batch=share.split.micro_batch,
            accumulation=share.split.accumulation,
            start_step=start_step,
            stop_step=max(start_step, stop_step),  # a run may have done more steps than are asked for now
        )
        if self.config.stream:
            loader = make_stream_loader(
                self.config,
                self.config.stream,
                share.seed,
                positions,
                latent_shape=share.latent_shape,
                offset=share.offset,
                more_noise=share.more_noise,
                text_shape=share.text_shape,
                pooled_size=share.pooled_size,
            )
        else:
            loader = make_loader(
                self.config,
                self.manifests,
                share.seed,
                positions,
                latent_shape=share.latent_shape,
                offset=share.offset,
                more_noise=share.more_noise,
            )
        return iter(loader)

    def validation_batches(self, share: Share, samples: int) -> Iterable[Batch] | None:
        """One process's share of the held-out batches, with draws that never change; None where there are none."""
        if self.held_out is None:
            return None
        return make_validation_loader(
            self.config,
            self.held_out,
            share.seed,
            latent_shape=share.latent_shape,
            rank=share.rank,
            world=share.split.processes,
            micro_batch=share.split.micro_batch,
            samples=samples,
            offset=share.offset,
            more_noise=share.more_noise,
        )
