"""From positions to a batch: the one place where shards, order and draws meet.

In: a manifest, the run's seed, a config, and the positions of a micro-batch.
Out: their `Batch`, the same in any process and at any time; what could not be used is recorded in it.
"""

import itertools
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.batch import Batch
from ldm.data.draws import Purpose, generator, normal, uniform
from ldm.data.manifest import Manifest
from ldm.data.members import (
    FLIPPED,
    MOMENTS,
    TEXT,
    decode_array,
    decode_caption,
    decode_floats,
    decode_json,
    original_size,
)
from ldm.data.order import Order
from ldm.data.pictures import RAW_EXTENSIONS, decode_picture, normalize
from ldm.data.quarantine import Quarantined
from ldm.data.shards import DamagedSample, ShardReader

# At a quarantine limit of 1 %, 16 bad ones in a row have a chance of 1e-32: then the shards are at fault.
RESERVES = 16


@dataclass(kw_only=True)
class DataConfig:
    """Which shards a run reads, and how."""

    shards: str
    """Folder of the training shards and their manifest: raw pictures, or moments from tools/encode_latents.py."""
    validation: str | None = None
    """Folder of held-out shards of the same kind; without it no validation loss is computed."""
    resolution: int
    """Height and width in pixels; raw pictures are resized (shorter side) and cropped to it."""
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


class Draws(NamedTuple):
    """The draws of one position that decide which sample comes out; those that fill tensors are drawn in place."""

    place: tuple[float, float]  # of the crop, each in [0, 1)
    flip: bool
    caption: float  # [0, 1)
    dropped: bool


class Sample(NamedTuple):
    """A sample ready to be put into a batch."""

    name: str
    caption: str
    sizes: tuple[float, ...]
    array: np.ndarray  # pixels (R, R, 3) uint8, or moments (2C, h, w)
    text_states: np.ndarray  # (L, D), empty without


NO_STATES = np.empty(0, dtype=np.float16)


def _sizes(size: Any, crop: Any, resolution: int) -> tuple[float, ...]:
    try:
        (height, width), (top, left) = size, crop
        return float(height), float(width), float(top), float(left), float(resolution), float(resolution)
    except (TypeError, ValueError):
        raise ValueError(f'member .json: "size" is {size}, "crop" is {crop}; expected two numbers each') from None


class SampleDataset(Dataset[Batch]):
    """Batches by position: `dataset[p]` is the batch of one position, `dataset.__getitems__(positions)` of several.

    All draws are keyed by (seed, purpose, position). A sample that cannot be used is recorded and replaced: attempt
    a = 0, 1, ... takes the sample at an index drawn from (seed, RESERVE, position, a); the draws stay the position's.

    Args:
        manifest: of the shards; whether they are raw or encoded is read from their members.
        seed: the run's, 0 .. 2^64 - 1.
        latent_shape: (C, h, w) of the noises, and of half the moments.
        shuffle: False takes the samples in the order of the files, as validation does.

    Raises:
        ValueError: the shards are neither raw nor encoded, or lack what the config asks for.
        FileNotFoundError: a shard has vanished.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        seed: int,
        *,
        latent_shape: tuple[int, int, int],
        shuffle: bool = True,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.seed = seed
        self.latent_shape = tuple(latent_shape)
        self.order = Order(manifest.counts, seed, config.shards_per_block, shuffle)
        self.reader = ShardReader(manifest, config.verify)
        self._starts = list(itertools.accumulate(manifest.counts, initial=0))
        first = next(number for number, count in enumerate(manifest.counts) if count)
        extensions = set(manifest.index(first).extensions)
        self.encoded = MOMENTS in extensions
        self.text_shape = self._first_text_shape(first) if self.encoded and TEXT in extensions else None
        self._check(extensions)

    def __len__(self) -> int:
        """Samples in an epoch; positions go on beyond it."""
        return len(self.order)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        quarantined: list[Quarantined] = []
        drawn = [self.draw(position) for position in positions]
        samples = [self._usable(*pair, quarantined) for pair in zip(positions, drawn, strict=True)]
        noises = np.empty((2, len(positions), *self.latent_shape), dtype=np.float32)
        for row, position in enumerate(positions):
            normal(self.seed, Purpose.POSTERIOR, position, shape=self.latent_shape, out=noises[0, row])
            normal(self.seed, Purpose.NOISE, position, shape=self.latent_shape, out=noises[1, row])
        posterior_noise, noise = torch.from_numpy(noises)  # one storage, sent once
        images = moments = text_states = None
        if self.encoded:
            moments = torch.from_numpy(np.stack([sample.array for sample in samples], dtype=np.float32))
        else:
            images = normalize(np.stack([sample.array for sample in samples]))
        if self.text_shape is not None:
            text_states = torch.from_numpy(np.stack([sample.text_states for sample in samples]))
        return Batch(
            positions=torch.tensor(positions, dtype=torch.int64),
            keys=[sample.name for sample in samples],
            captions=[sample.caption for sample in samples],
            dropped=torch.tensor([draws.dropped for draws in drawn]),
            images=images,
            moments=moments,
            text_states=text_states,
            sizes=torch.tensor([sample.sizes for sample in samples], dtype=torch.float32),
            u=torch.tensor([uniform(self.seed, Purpose.TIMESTEP, one) for one in positions], dtype=torch.float64),
            posterior_noise=posterior_noise,
            noise=noise,
            quarantined=quarantined,
        )

    def draw(self, position: int) -> Draws:
        """Stage 4: the position's draws; one that the config does not ask for is not computed."""
        config, seed = self.config, self.seed
        place = (0.5, 0.5)
        if config.crop == "random" and not self.encoded:
            place = tuple(generator(seed, Purpose.CROP, position).random(2).tolist())
        return Draws(
            place=place,
            flip=config.flip > 0 and uniform(seed, Purpose.FLIP, position) < config.flip,
            caption=uniform(seed, Purpose.CAPTION, position),
            dropped=uniform(seed, Purpose.DROPOUT, position) < config.caption_dropout,
        )

    def _usable(self, position: int, draws: Draws, quarantined: list[Quarantined]) -> Sample:
        """Stages 2, 3 and 5, with reserves for what cannot be used."""
        damaged: list[DamagedSample] = []
        _, shard, sample = self.order.locate(position)
        for attempt in range(RESERVES + 1):
            try:
                usable = self._read(shard, sample, draws)
            except DamagedSample as error:
                damaged.append(error)
                rank = int(uniform(self.seed, Purpose.RESERVE, position, attempt) * len(self.order))
                shard = bisect_right(self._starts, rank) - 1
                sample = rank - self._starts[shard]
            else:
                quarantined += [one.record(position, usable.name) for one in damaged]
                return usable
        raise RuntimeError(
            f"position {position}: the sample and {RESERVES} reserves cannot be used; the first reasons:\n"
            + "\n".join(f"  {one}" for one in damaged[:5])
        )

    def _read(self, shard: int, sample: int, draws: Draws) -> Sample:
        members = self.reader.members(shard, sample)
        name = f"{self.manifest.shards[shard].name}/{self.manifest.index(shard).key(sample)}"
        try:
            caption = decode_caption(members, draws.caption)
            if self.encoded:
                return self._decode_encoded(name, caption, members, draws)
            return self._decode_raw(name, caption, members, draws)
        except ValueError as error:
            raise self.reader.damaged(shard, sample, str(error)) from error

    def _decode_raw(self, name: str, caption: str, members: dict[str, bytes], draws: Draws) -> Sample:
        resolution = self.config.resolution
        picture = decode_picture(members, resolution, draws.place)
        about = decode_json(members)
        pixels = picture.pixels[:, ::-1] if draws.flip else picture.pixels
        size = original_size(about, picture.size)
        return Sample(name, caption, _sizes(size, picture.crop, resolution), pixels, NO_STATES)

    def _decode_encoded(self, name: str, caption: str, members: dict[str, bytes], draws: Draws) -> Sample:
        """Its .json has "size" [height, width] of the original and "crop" [top, left]: see tools/encode_latents.py."""
        resolution = self.config.resolution
        channels, height, width = self.latent_shape
        moments = decode_floats(members, FLIPPED if draws.flip else MOMENTS, (2 * channels, height, width))
        states = NO_STATES if self.text_shape is None else decode_floats(members, TEXT, self.text_shape)
        about = decode_json(members)
        sizes = _sizes(about.get("size", (resolution, resolution)), about.get("crop", (0, 0)), resolution)
        return Sample(name, caption, sizes, moments, states)

    def _first_text_shape(self, shard: int) -> tuple[int, ...]:
        """Shape of the text states, which all samples share: that of the first sample that can be read."""
        for sample in range(self.manifest.counts[shard]):
            try:
                return decode_array(self.reader.members(shard, sample)[TEXT], TEXT).shape
            except (DamagedSample, KeyError, ValueError):
                continue  # recorded when its position comes
        raise ValueError(f"{self.manifest.path(shard)}: none of its members .{TEXT} is readable")

    def _check(self, extensions: set[str]) -> None:
        where = f"{self.manifest.folder}: the first shard has members {', '.join(sorted(extensions))}"
        if not self.encoded and not extensions & set(RAW_EXTENSIONS):
            raise ValueError(f"{where}; expected pictures ({', '.join(RAW_EXTENSIONS)}) or .{MOMENTS}")
        if self.encoded and self.config.flip > 0 and FLIPPED not in extensions:
            raise ValueError(
                f"data.flip is {self.config.flip}, but {where} and no .{FLIPPED}: encode them with encoding.flipped "
                "set, or set data.flip to 0"
            )
        if self.encoded and self.config.crop == "random":
            raise ValueError(f"data.crop is 'random', but {where}: encoded pictures are cropped already; use 'center'")
        if self.encoded and self.manifest.encoder is None:
            warnings.warn(
                f"{where}, but its manifest does not say what encoded them: nobody can tell whether they fit this run",
                stacklevel=4,
            )
