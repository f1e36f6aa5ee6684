"""Batches out of tars that nobody can index first, through webdataset: not exact, but for positions and draws.

In: a StreamConfig, the run's seed, and the positions of one process's micro-batches, as with indexed shards.
Out: the same `Batch`, its draws keyed by position; which sample takes a position depends on what came when.

    1. reader             -> shards              webdataset.ResampledShards, with replacement, seeded by the reader
    2. shard              -> members             stream_shards.read_shard: fsspec or a command, forward, once
    3. members            -> samples             webdataset.group_by_keys, then webdataset.shuffle
    4. position           -> draws               samples.draw, as in loader.py
    5. sample and draws   -> Batch               samples; a bad one is recorded, and the stream's next takes its place
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.loader import loader_options
from ldm.data.members import FLIPPED, MOMENTS, POOLED, TEXT, decode_array, float_form
from ldm.data.pictures import RAW_EXTENSIONS
from ldm.data.positions import Positions
from ldm.data.quarantine import Quarantined
from ldm.data.samples import Contents, Draws, Form, Sample, collate, decode_sample, draw
from ldm.data.shards import DamagedSample
from ldm.data.stream_shards import (
    SHARDS_IN_A_ROW,
    StreamConfig,
    Streamed,
    StreamError,
    StreamReader,
    is_pipe,
    listed,
    read_shard,
    shard_names,
)

PEEKED = 16  # samples of a shard that are looked at: one may be damaged, or have no picture


def stream_lines(stream: StreamConfig) -> list[str]:
    """What a run over a stream says in its first lines: that it is not exact, what follows from it, and what holds."""
    tars = stream.tars
    lines = [
        f"data.stream: {len(tars):,} tars without a manifest, drawn at random with replacement through webdataset: the "
        "order of the samples is NOT exact",
        "  not exact: a sample may come twice before another comes once, or never; a resumed run goes on with other "
        "samples than one that was not interrupted; so does one with another number of processes or workers, or where "
        "a tar could not be read",
        "  nothing is compared with a checksum: what the source sends is what is trained on, where it decodes",
        "  still exact: crop, flip, choice and dropout of the caption, timestep and noises are drawn by position, as "
        "with indexed shards",
    ]
    if pipes := sum(map(is_pipe, tars)):
        lines.append(f"  data.stream.allow_pipe is set: {pipes:,} of the tars are programs that run here")
    return lines


class StreamDataset(IterableDataset[Batch]):
    """One process's micro-batches in order; worker w of W gives those numbered w, w + W, ...

    Args:
        form: what the samples are, as `first_form` finds it.
    """

    def __init__(
        self,
        config: DataConfig,
        stream: StreamConfig,
        seed: int,
        form: Form,
        positions: Positions,
    ) -> None:
        self.config = config
        self.stream = stream
        self.seed = seed
        self.form = form
        self.positions = positions

    def __len__(self) -> int:
        """Micro-batches of all workers together."""
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = self.positions
        reader = StreamReader(
            self.stream, self.seed, start_step=own.start_step, rank=own.rank, worker=worker, workers=workers
        )
        with closing(reader):
            # The DataLoader asks its workers in turn and takes their batches in that order.
            for number in range(worker, len(self), workers):
                yield self.batch(reader, own.of(number))

    def batch(self, reader: StreamReader, positions: Sequence[int]) -> Batch:
        """The batch of these positions, out of the stream's next samples.

        Raises:
            StreamError: nothing comes that can be used.
        """
        draws = draw(self.config, self.seed, positions, self.form.encoded)
        contents = Contents(len(positions), self.form)
        quarantined: list[Quarantined] = []
        for row, (position, own) in enumerate(zip(positions, draws, strict=True)):
            sample, lost = reader.take(partial(self._decode, own))
            contents.put(row, sample)
            quarantined += [one.record(position, sample.name) for one in lost]
        return collate(self.seed, positions, draws, contents, quarantined)

    def _decode(self, draws: Draws, found: Streamed) -> Sample:
        return decode_sample(found.name, found.members, draws, self.form)


def first_form(
    config: DataConfig,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
    text_shape: Sequence[int] | None,
    pooled_size: int | None,
) -> Form:
    """What the stream's samples are, out of the first one that tells: raw or encoded, and shape and type of its texts.

    Reads the beginning of the first tar, and of further ones while that gives nothing.

    Raises:
        ValueError: they are neither, or do not fit the config, `latent_shape`, `text_shape` or `pooled_size`.
        StreamError: none of the first tars gives a sample.
    """
    names, causes = shard_names(stream.tars), []
    for url in list(names)[:SHARDS_IN_A_ROW]:
        lost: list[DamagedSample] = []
        found: set[str] = set()
        with closing(read_shard(url, names[url], stream.retries, lost.append)) as samples:
            for sample in islice(samples, PEEKED):
                found |= set(sample.members)
                try:
                    form = _form(config, sample, latent_shape)
                except ValueError as error:
                    lost.append(DamagedSample(sample.shard, sample.key, str(error)))
                    continue
                if form is not None:
                    _check(config, sample, form, text_shape, pooled_size)
                    return form
        if found and MOMENTS not in found and not found & set(RAW_EXTENSIONS):
            raise ValueError(
                f"data.stream: the first samples of {names[url]} have members {', '.join(sorted(found))}; expected "
                f"pictures ({', '.join(RAW_EXTENSIONS)}) or .{MOMENTS}"
            )
        causes += lost or [DamagedSample(names[url], "", "it holds no sample")]
    raise StreamError("data.stream: none of the first tars gives a sample that can be used:\n" + listed(causes[:5]))


def _form(config: DataConfig, sample: Streamed, latent_shape: tuple[int, int, int]) -> Form | None:
    """Form of a sample, None where it is neither raw nor encoded; raises ValueError where an array is damaged."""
    pixels, members = (config.resolution, config.resolution), sample.members
    if MOMENTS not in members:
        return Form(False, pixels, latent_shape) if set(members) & set(RAW_EXTENSIONS) else None
    decode_array(members[MOMENTS], MOMENTS)
    if TEXT not in members:
        return Form(True, pixels, latent_shape)
    form = Form(True, pixels, latent_shape, *float_form(members[TEXT], TEXT))
    if POOLED not in members:
        return form
    shape, dtype = float_form(members[POOLED], POOLED)
    return form._replace(pooled=shape, pooled_dtype=dtype)


def _check(
    config: DataConfig, sample: Streamed, form: Form, text_shape: Sequence[int] | None, pooled_size: int | None
) -> None:
    """Raises ValueError where the encoded samples do not fit what trains on them."""
    where = f"data.stream: the first sample, {sample.name}, has members {', '.join(sorted(sample.members))}"
    if not form.encoded:
        return
    shape = decode_array(sample.members[MOMENTS], MOMENTS).shape
    if shape != form.moments:
        raise ValueError(
            f"{where}; its .{MOMENTS} has shape {shape}, expected {form.moments}: another autoencoder or resolution"
        )
    if form.text is not None and form.text != tuple(text_shape or form.text):
        raise ValueError(
            f"{where}; its .{TEXT} has shape {form.text}, expected {tuple(text_shape or ())}: another text encoder"
        )
    if form.text is not None and pooled_size is not None and form.pooled != ((pooled_size,) if pooled_size else None):
        found = "no" if form.pooled is None else f"shape {form.pooled} of"
        expected = f"({pooled_size},)" if pooled_size else "none"
        raise ValueError(f"{where}; found {found} .{POOLED}, expected {expected}: another second text encoder")
    if config.flip > 0 and FLIPPED not in sample.members:
        raise ValueError(f"data.flip is {config.flip}, but {where} and no .{FLIPPED}: set data.flip to 0")
    if config.crop == "random":
        raise ValueError(f"data.crop is 'random', but {where}: encoded pictures are cropped already; use 'center'")


def make_stream_loader(
    config: DataConfig,
    stream: StreamConfig,
    seed: int,
    positions: Positions,
    *,
    latent_shape: tuple[int, int, int],
    offset: bool = False,
    more_noise: int = 0,
    context: str | None = None,
    text_shape: tuple[int, int] | None = None,
    pooled_size: int | None = None,
) -> DataLoader[Batch]:
    """Micro-batches of one process as `make_loader` gives them, but for the samples: those come from the stream.

    Args:
        latent_shape: (C, h, w).
        offset: draw the offsets of offset noise, too.
        more_noise: channels that the noise has more than the latents.
        context: how workers start, "fork", "spawn" or "forkserver"; None is the platform's way.
        text_shape: (L, D) of the states that the text encoder gives; None where nothing is known of it.
        pooled_size: P of the pooled text that a second text encoder gives, 0 without one; None where nothing is known.

    Raises:
        ValueError: the stream's samples do not fit the config.
        StreamError: none of the first tars gives a sample; while iterating, nothing comes any more.
    """
    form = first_form(config, stream, latent_shape, text_shape, pooled_size)._replace(
        offset=offset, more_noise=more_noise
    )
    if form.encoded and positions.rank == 0:
        warnings.warn(
            "data.stream: the samples are encoded, and nothing tells what encoded them: nobody can tell whether they "
            "fit this run",
            stacklevel=2,
        )
    dataset = StreamDataset(config, stream, seed, form, positions)
    # Without a batch size: the dataset gives whole batches.
    return DataLoader(dataset, batch_size=None, **loader_options(config, context))
