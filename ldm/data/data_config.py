"""The settings of a run's data: which shards, and how samples come out of them.

In: the section `data` of the run's config. Out: a checked DataConfig, which loader and dataset read.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from ldm.data.buckets import BucketConfig
from ldm.data.cache import CacheConfig
from ldm.data.stream_shards import StreamConfig


@dataclass(kw_only=True)
class SourceConfig:
    """One of several sources of samples."""

    shards: str
    """Folder or URL of its manifest."""
    weight: float | None = None
    """Share of the samples that come from it, in any unit; unset: its number of samples, for all sources or none."""


@dataclass(kw_only=True)
class DataConfig:
    """Which shards a run reads, and how."""

    shards: str | list[SourceConfig] | None = None
    """Folder or URL of the training shards' manifest: raw pictures, or moments from tools/encode_latents.py. Several,
    all raw or all encoded: a list of `shards` and `weight`."""
    stream: StreamConfig | None = None
    """Instead of `shards`: tars that nobody can index first. Such a run is not exact, and says so."""
    validation: str | None = None
    """Folder or URL of held-out shards of the same kind; without it no validation loss is computed."""
    resolution: int
    """Height and width in pixels; raw pictures are resized (shorter side) and cropped to it."""
    buckets: BucketConfig | None = None
    """Train at several aspect ratios, each of about resolution^2 pixels; unset, all pictures are squares."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where shards at URLs are kept while they are read."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, drawn anew for each sample in each epoch; needed for guidance."""
    flip: float = 0.0
    """Probability of mirroring a picture left to right; captions that say left or right then lie."""
    crop: Literal["center", "random"] = "center"
    """Where raw pictures are cropped to a square. Encoded ones were cropped when they were encoded."""
    workers: int = 2
    """Processes that read and decode, for each training process; 0 reads in the training process itself."""
    prefetch: int = 4
    """Micro-batches that each worker keeps ready."""
    shards_per_block: int = 16
    """Shards whose samples are shuffled among each other; more mix better and keep more files in use at a time."""
    verify: bool = True
    """Compare the checksum of all that is read."""
    quarantine_limit: float = 0.01
    """Share of samples that may be unusable before the run stops; they are listed in quarantine.jsonl."""

    def __post_init__(self) -> None:
        for name, low in (("resolution", 1), ("workers", 0), ("prefetch", 1), ("shards_per_block", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"data.{name} is {getattr(self, name)}; allowed are integers from {low}")
        for name in ("caption_dropout", "flip", "quarantine_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; allowed are 0 to 1")
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop is {self.crop!r}; allowed are 'center' and 'random'")
        if (self.shards is None) == (self.stream is None):
            given = "neither is" if self.shards is None else "both are"
            raise ValueError(f"data.shards and data.stream: {given} set; set one, data.shards for a run that is exact")
        if self.stream is not None and self.buckets is not None:
            raise ValueError("data.buckets is set, but data.stream has no sizes of pictures beforehand: unset one")
        if self.shards is not None and not self.sources:
            raise ValueError(
                "data.shards is an empty list; allowed are a folder or URL, or a list of at least one source"
            )
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"data.shards: the weights are {weights}; set all of them or none")
        if any(weight is not None and not (isfinite(weight) and weight > 0) for weight in weights):
            raise ValueError(f"data.shards: the weights are {weights}; allowed are numbers above 0")

    @property
    def sources(self) -> list[SourceConfig]:
        """The sources, also where there is but one."""
        return [SourceConfig(shards=self.shards)] if isinstance(self.shards, str) else self.shards or []
