"""Samples: the draws of their positions, what their members decode to, and the batch that they make.

In: members as they lie in a shard, the run's seed, the positions in the run.
Out: `Draws` and `Sample`, one a position, and the `Batch` of them; where the members come from does not matter.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.draws import Purpose, generator, normal, uniforms
from ldm.data.members import (
    FLIPPED,
    MOMENTS,
    POOLED,
    TEXT,
    Members,
    decode_caption,
    decode_floats,
    decode_floats_into,
    decode_json,
    original_size,
    plain_captions,
    plain_sizes_and_crops,
    size_and_crop,
    two_pairs,
)
from ldm.data.pictures import decode_picture, mirror_center_crops, normalize
from ldm.data.quarantine import Quarantined

BYTES_AT_ONCE = 1 << 18


class Draws(NamedTuple):
    """The draws of one position that decide which sample comes out; noises are drawn into the batch's tensors."""

    place: tuple[float, float]
    """Of the crop, vertical and horizontal, each in [0, 1)"""
    flip: bool
    caption: float
    """In [0, 1), which caption of several"""
    dropped: bool
    u: float
    """In [0, 1), for the timestep"""


class Form(NamedTuple):
    """What all samples of a batch have in common."""

    encoded: bool
    """Moments out of encoded shards, or pixels out of raw ones"""
    pixels: tuple[int, int]
    """Height and width of the pictures"""
    latent: tuple[int, int, int]
    """(C, h, w) of the latents' noise, and of half the moments"""
    text: tuple[int, ...] | None = None
    """(L, D) of the text states; None where the shards have none"""
    text_dtype: torch.dtype = torch.float16
    pooled: tuple[int, ...] | None = None
    """(P,) of the pooled text; None where the shards have none"""
    pooled_dtype: torch.dtype = torch.float16
    moments_dtype: torch.dtype = torch.float32
    offset: bool = False
    """Whether offsets of the noise are drawn"""
    more_noise: int = 0
    """Channels that the noise has more than the latents"""

    @property
    def moments(self) -> tuple[int, int, int]:
        """(2C, h, w)"""
        channels, height, width = self.latent
        return 2 * channels, height, width

    @property
    def noise(self) -> tuple[int, int, int]:
        """(C, h, w), or with more channels"""
        channels, height, width = self.latent
        return channels + self.more_noise, height, width


class Sample(NamedTuple):
    """A sample ready to be put into a batch."""

    name: str
    caption: str
    sizes: tuple[float, ...]
    """Original height and width, crop top and left, in pixels: of the mirrored picture where it was flipped"""
    array: np.ndarray
    """Pixels (H, W, 3) uint8, or moments (2C, h, w) float16 or float32"""
    text_states: np.ndarray | None = None
    """(L, D)"""
    text_pooled: np.ndarray | None = None
    """(P,)"""


def draw(config: DataConfig, seed: int, positions: Sequence[int], encoded: bool) -> list[Draws]:
    """The draws of each position; one that the config does not ask for is not computed."""
    purposes = [Purpose.CAPTION, Purpose.DROPOUT, Purpose.TIMESTEP, Purpose.FLIP][: 4 if config.flip > 0 else 3]
    caption, dropout, timestep, *flip = uniforms(seed, purposes, np.asarray(positions, dtype=np.int64))
    flips = (flip[0] < config.flip).tolist() if flip else [False] * len(positions)
    places = [(0.5, 0.5)] * len(positions)
    if config.crop == "random" and not encoded:
        places = [tuple(generator(seed, Purpose.CROP, one).random(2).tolist()) for one in positions]
    dropped = (dropout < config.caption_dropout).tolist()
    return list(map(Draws, places, flips, caption.tolist(), dropped, timestep.tolist()))


def decode_sample(name: str, members: Members, draws: Draws, form: Form) -> Sample:
    """The sample out of its members.

    Raises:
        ValueError: it cannot be used; says why.
    """
    caption = decode_caption(members, draws.caption)
    if not form.encoded:
        whole = {extension: bytes(one) for extension, one in members.items()}  # no copy of what is bytes
        picture = decode_picture(whole, form.pixels, draws.place)
        picture = picture.mirrored() if draws.flip else picture
        size = original_size(decode_json(members), picture.size)
        return Sample(name, caption, two_pairs(size, picture.crop), picture.pixels)
    name_of = FLIPPED if draws.flip else MOMENTS
    moments = decode_floats(members, name_of, form.moments)
    if moments.itemsize > form.moments_dtype.itemsize:
        raise ValueError(f"member .{name_of} is {moments.dtype}, its manifest says {form.moments_dtype}")
    states = None if form.text is None else _text(members, TEXT, form.text, form.text_dtype)
    pooled = None if form.pooled is None else _text(members, POOLED, form.pooled, form.pooled_dtype)
    return Sample(name, caption, _encoded_sizes(members, draws, form), moments, states, pooled)


def _encoded_sizes(members: Members, draws: Draws, form: Form) -> tuple[float, ...]:
    sizes = size_and_crop(members, form.pixels)
    return tuple(mirror_center_crops(np.array([sizes]), form.pixels)[0].tolist()) if draws.flip else sizes


def _text(members: Members, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Text states or pooled text, of no wider a type than `dtype`, since a batch would narrow it in silence."""
    array = decode_floats(members, name, shape)
    if array.itemsize > dtype.itemsize:
        raise ValueError(f"member .{name} is {array.dtype}, the first sample's is {dtype}")
    return array


class Contents:
    """What the shards give to a batch: rows of names, captions, pictures or moments, text and sizes.

    Args:
        rows: samples of the batch.
    """

    def __init__(self, rows: int, form: Form) -> None:
        self.form = form
        self.keys = [""] * rows
        self.captions = [""] * rows
        self.sizes = torch.empty(rows, 6)
        self.sizes[:, 4:] = torch.tensor(form.pixels)
        self.pixels = None if form.encoded else torch.empty(rows, *form.pixels, 3, dtype=torch.uint8)
        self.moments = torch.empty(rows, *form.moments, dtype=form.moments_dtype) if form.encoded else None
        self.text_states = None if form.text is None else torch.empty(rows, *form.text, dtype=form.text_dtype)
        self.text_pooled = None if form.pooled is None else torch.empty(rows, *form.pooled, dtype=form.pooled_dtype)

    def parts(self) -> list[range]:
        """The rows, cut where they are best decoded: what a part takes stays in the processor's cache."""
        rows = len(self.keys)
        stored = 1 if self.moments is None else self.moments.nbytes // max(rows, 1)
        step = max(1, BYTES_AT_ONCE // stored)
        return [range(first, min(first + step, rows)) for first in range(0, rows, step)]

    def put(self, row: int, sample: Sample) -> None:
        """Takes one sample."""
        self.keys[row], self.captions[row] = sample.name, sample.caption
        self.sizes[row, :4] = torch.tensor(sample.sizes)
        array = self.moments if self.pixels is None else self.pixels
        assert array is not None
        array[row] = torch.from_numpy(np.array(sample.array))  # a copy: torch takes no array that cannot be written
        if self.text_states is not None:
            self.text_states[row] = torch.from_numpy(np.array(sample.text_states))
        if self.text_pooled is not None:
            self.text_pooled[row] = torch.from_numpy(np.array(sample.text_pooled))

    def decode_arrays(self, rows: range, members: Sequence[Members | None], draws: Sequence[Draws]) -> list[bool]:
        """Takes moments and text of some rows at once; whether each row is so taken, and not to be decoded."""
        part = slice(rows.start, rows.stop)
        if self.moments is None:
            return [False] * len(rows)
        wanted = [FLIPPED if one.flip else MOMENTS for one in draws[part]]
        taken = decode_floats_into(self.moments[part], members[part], wanted)
        for name, array in ((TEXT, self.text_states), (POOLED, self.text_pooled)):
            if array is not None:
                also = decode_floats_into(array[part], members[part], [name] * len(rows))
                taken = [one and other for one, other in zip(taken, also, strict=True)]
        return taken

    def decode(
        self, names: list[str], members: Sequence[Members | None], draws: Sequence[Draws], taken: Sequence[bool]
    ) -> dict[int, ValueError]:
        """Takes `decode_sample` of all rows.

        Args:
            members: None where there are none, for a row that `put` fills.
            taken: whether `decode_arrays` took the arrays already; not so of rows without members.

        Returns:
            why a row cannot be used, by row; `put` is to fill these too.
        """
        self.keys = names
        captions, sizes = None, None
        if all(taken):
            given = [one for one in members if one is not None]
            captions, sizes = plain_captions(given), plain_sizes_and_crops(given)
        if captions is not None:
            self.captions = captions
        if sizes is not None:
            flipped = [own.flip for own in draws]
            sizes[flipped] = mirror_center_crops(sizes[flipped], self.form.pixels)
            self.sizes[:, :4] = torch.from_numpy(sizes)
        if captions is not None and sizes is not None:
            return {}
        errors: dict[int, ValueError] = {}
        all_sizes = self.sizes.numpy()
        for row, (name, one, own, whole) in enumerate(zip(names, members, draws, taken, strict=True)):
            try:
                if one is not None and whole:
                    if captions is None:
                        self.captions[row] = decode_caption(one, own.caption)
                    if sizes is None:
                        all_sizes[row, :4] = _encoded_sizes(one, own, self.form)
                elif one is not None:
                    self.put(row, decode_sample(name, one, own, self.form))
            except ValueError as error:
                errors[row] = error
        return errors


def collate(
    seed: int,
    positions: Sequence[int],
    draws: Sequence[Draws],
    contents: Contents,
    quarantined: list[Quarantined],
) -> Batch:
    """The batch, with its noises drawn."""
    shapes = [(len(positions), *one) for one in (contents.form.latent, contents.form.noise)]
    sizes = [math.prod(shape) for shape in shapes]
    noises = torch.empty(sum(sizes)).split(sizes)  # one storage, sent once
    posterior_noise, noise = (one.view(shape) for one, shape in zip(noises, shapes, strict=True))
    for purpose, drawn in ((Purpose.POSTERIOR, posterior_noise.numpy()), (Purpose.NOISE, noise.numpy())):
        for row, position in enumerate(positions):
            normal(seed, purpose, position, shape=drawn.shape[1:], out=drawn[row])
    channels = contents.form.latent[0]
    offset = torch.from_numpy(_offsets(seed, positions, channels)) if contents.form.offset else None
    return Batch(
        positions=torch.tensor(positions, dtype=torch.int64),
        keys=contents.keys,
        captions=contents.captions,
        dropped=torch.tensor([one.dropped for one in draws]),
        images=None if contents.pixels is None else normalize(contents.pixels),
        moments=contents.moments,
        text_states=contents.text_states,
        text_pooled=contents.text_pooled,
        sizes=contents.sizes,
        u=torch.tensor([one.u for one in draws], dtype=torch.float64),
        posterior_noise=posterior_noise,
        noise=noise,
        offset=offset,
        quarantined=quarantined,
    )


def _offsets(seed: int, positions: Sequence[int], channels: int) -> np.ndarray:
    """Standard normal draws of each position, (B, C) float32."""
    drawn = np.empty((len(positions), channels), dtype=np.float32)
    for row, position in enumerate(positions):
        normal(seed, Purpose.OFFSET, position, shape=(channels,), out=drawn[row])
    return drawn
