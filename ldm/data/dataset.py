"""From positions to a batch: the one place where shards, order and draws meet.

In: the sources' manifests, the run's seed, a config, and the positions of a micro-batch.
Out: their `Batch`, the same in any process and at any time; what could not be used is recorded in it.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.batch import Batch
from ldm.data.buckets import BucketMembers, Shape, bucket_counts, bucket_shapes
from ldm.data.data_config import DataConfig
from ldm.data.manifest import Manifest
from ldm.data.members import FLIPPED, MOMENTS, POOLED, TEXT, float_form
from ldm.data.mixing import Place, Places, RunOrder
from ldm.data.pictures import RAW_EXTENSIONS
from ldm.data.quarantine import Quarantined
from ldm.data.samples import Contents, Draws, Form, Sample, collate, decode_sample, draw
from ldm.data.shards import DamagedSample, SampleViews, ShardReader, files_to_hold, named_damage

# At a quarantine limit of 1 %, 16 bad ones in a row have a chance of 1e-32: then the shards are at fault.
RESERVES = 16


class SampleDataset(Dataset[Batch]):
    """Batches by position: `dataset[p]` is the batch of one position, `dataset.__getitems__(positions)` of several.

    All draws are keyed by (seed, purpose, position). A sample that cannot be used is recorded and replaced: attempt
    a = 0, 1, ... takes the sample at an index drawn from (seed, RESERVE, position, a), of the same bucket; the draws
    stay the position's.

    Args:
        manifests: of the sources in `config.shards`, in their order; whether they are raw or encoded is read from their
            members.
        seed: the run's, 0 .. 2^64 - 1.
        latent_shape: (C, h, w) of the noises of a square picture, and of half its moments. With buckets, those of
            another shape have its h and w in the same proportion.
        shuffle: False takes the samples in the order of the files, as validation does.
        global_batch: samples of a step; needed with buckets.
        offset: draw the offsets of offset noise, too.
        more_noise: channels that the noise has more than the latents.
        progress: show a bar where it takes long.

    Raises:
        ValueError: the shards are neither raw nor encoded, differ in that, or lack what the config asks for.
        FileNotFoundError: a shard has vanished.
        StorageError: a shard at a URL cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        manifests: Manifest | Sequence[Manifest],
        seed: int,
        *,
        latent_shape: tuple[int, int, int],
        shuffle: bool = True,
        global_batch: int | None = None,
        offset: bool = False,
        more_noise: int = 0,
        progress: bool = False,
    ) -> None:
        self.config = config
        self.manifests = [manifests] if isinstance(manifests, Manifest) else list(manifests)
        self.seed = seed
        weights = [source.weight for source in config.sources] if shuffle else None
        factor = config.resolution // latent_shape[1]
        self.buckets: list[Shape] = [(config.resolution, config.resolution)]
        counts: list[Sequence[int] | np.ndarray] = [manifest.counts for manifest in self.manifests]
        members = None
        if config.buckets is not None:
            self.buckets = bucket_shapes(config.resolution, config.buckets, factor)
            counts = [bucket_counts(manifest, self.buckets, progress) for manifest in self.manifests]
            members = BucketMembers(self.manifests, self.buckets)
        self.order = RunOrder(
            counts,
            seed,
            weights=weights,
            shards_per_block=config.shards_per_block,
            global_batch=global_batch,
            shuffle=shuffle,
            members=members,
        )
        # The buckets of a source may be a block apart, and a batch may lie across two blocks.
        open_shards = min(4 * max(16, config.shards_per_block), max(1, files_to_hold() // len(self.manifests)))
        labels = [""] if len(self.manifests) == 1 else [f"{number}:" for number in range(len(self.manifests))]
        self.readers = [
            ShardReader(manifest, config.verify, open_shards, label)
            for manifest, label in zip(self.manifests, labels, strict=True)
        ]
        square = self._form(latent_shape)._replace(offset=offset, more_noise=more_noise)
        self.forms = [
            square._replace(pixels=(h, w), latent=(latent_shape[0], h // factor, w // factor)) for h, w in self.buckets
        ]
        for reader in self.readers:
            reader.close()  # forked workers would share what is open

    def __len__(self) -> int:
        """Samples of all sources; positions go on beyond."""
        return len(self.order)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        draws = draw(self.config, self.seed, positions, self.forms[0].encoded)
        contents, quarantined = self.read(positions, draws)
        return collate(self.seed, positions, draws, contents, quarantined)

    def read(self, positions: Sequence[int], draws: Sequence[Draws]) -> tuple[Contents, list[Quarantined]]:
        """Stages 2, 3 and 5: the positions' samples, with reserves for what cannot be used, which is recorded.

        Raises:
            ValueError: positions of several buckets.
        """
        self._fetch_ahead(positions[0])
        places = self.order.locate_many(np.asarray(positions))
        bucket = int(places.buckets[0])
        if (places.buckets != bucket).any():
            raise ValueError(f"positions {positions[0]} to {positions[-1]} are of several buckets: no batch")
        contents = Contents(len(positions), self.forms[bucket])
        quarantined: list[Quarantined] = []
        for row, damaged in sorted(self._decode(contents, places, draws).items()):
            contents.put(row, self._reserve(positions[row], bucket, draws[row], damaged, quarantined))
        return contents, quarantined

    def _fetch_ahead(self, position: int) -> None:
        """Has shards at URLs downloaded that are read from `position` on."""
        cache = next((manifest.cache for manifest in self.manifests if manifest.remote), None)
        if cache is not None and self.config.cache.ahead:
            in_use = self.config.shards_per_block * len(self.manifests)
            coming = self.order.upcoming(position, in_use + self.config.cache.ahead)
            cache.prefetch((self.manifests[source], shard) for source, shard in coming)

    def _decode(self, contents: Contents, places: Places, draws: Sequence[Draws]) -> dict[int, DamagedSample]:
        """Reads samples into `contents`; what cannot be used, by row."""
        views = SampleViews(len(draws))
        for source, reader in enumerate(self.readers):
            rows = np.flatnonzero(places.sources == source)
            reader.read(views, rows, places.shards[rows], places.samples[rows])
        if not contents.form.encoded:
            views.copy()  # pictures take milliseconds to decode
        taken: list[bool] = []
        for part in contents.parts():
            if self.config.verify:
                views.verify(part)
            self._heal(views, part, places)
            taken += contents.decode_arrays(part, views.members, draws)
        for row, error in contents.decode(views.names, views.members, draws, taken).items():
            views.refuse(row, str(error))
        return views.damaged

    def _heal(self, views: SampleViews, rows: range, places: Places) -> None:
        """Reads damaged samples of shards at URLs once more, by themselves."""
        for row in [row for row in rows if row in views.damaged]:
            reader = self.readers[places.sources[row]]
            if reader.manifest.remote:
                try:
                    views.members[row] = reader.members(int(places.shards[row]), int(places.samples[row]))
                except DamagedSample as damaged:
                    views.damaged[row] = damaged
                else:
                    del views.damaged[row]

    def _reserve(
        self, position: int, bucket: int, draws: Draws, damaged: DamagedSample, quarantined: list[Quarantined]
    ) -> Sample:
        """The first reserve of the position that can be used; it and what could not be used are recorded."""
        reasons = [damaged]
        for attempt in range(RESERVES):
            place = self.order.reserve(position, attempt, bucket)
            try:
                sample = self._sample(place, draws)
            except DamagedSample as error:
                reasons.append(error)
            else:
                quarantined += [one.record(position, sample.name) for one in reasons]
                return sample
        raise RuntimeError(
            f"position {position}: the sample and {RESERVES} reserves cannot be used; the first reasons:\n"
            + "\n".join(f"  {one}" for one in reasons[:5])
        )

    def _sample(self, place: Place, draws: Draws) -> Sample:
        reader = self.readers[place.source]
        members = reader.members(place.shard, place.sample)
        name = reader.name(place.shard, place.sample)
        try:
            return decode_sample(name, members, draws, self.forms[place.bucket])
        except ValueError as error:
            raise named_damage(name, str(error)) from error

    def _form(self, latent_shape: tuple[int, int, int]) -> Form:
        """What the samples of all sources are, as squares.

        Raises:
            ValueError: they differ in it, or in what the config asks for.
        """
        forms = []
        # What is stored is widened on the device: half the memory to fill here, and half the bytes on the way.
        stored = {(manifest.encoder or {}).get("dtype") for manifest in self.manifests}
        moments_dtype = torch.float16 if stored == {"float16"} else torch.float32
        for reader in self.readers:
            first = next(number for number, count in enumerate(reader.manifest.counts) if count)
            extensions = set(reader.manifest.index(first).extensions)
            self._check(reader.manifest, extensions)
            form = Form(MOMENTS in extensions, self.buckets[0], latent_shape, moments_dtype=moments_dtype)
            if form.encoded and TEXT in extensions:
                shape, dtype = first_floats(reader, TEXT)
                form = form._replace(text=shape, text_dtype=dtype)
                if POOLED in extensions:
                    shape, dtype = first_floats(reader, POOLED)
                    form = form._replace(pooled=shape, pooled_dtype=dtype)
            forms.append(form)
        for number, form in enumerate(forms):
            if form != forms[0]:
                one, other = self.manifests[0].folder, self.manifests[number].folder
                raise ValueError(
                    f"data.shards: {one} has {_kind(forms[0])}, {other} has {_kind(form)}: the sources of a run are "
                    "all raw, or all encoded in the same way"
                )
        return forms[0]

    def _check(self, manifest: Manifest, extensions: set[str]) -> None:
        encoded = MOMENTS in extensions
        where = f"{manifest.folder}: the first shard has members {', '.join(sorted(extensions))}"
        if not encoded and not extensions & set(RAW_EXTENSIONS):
            raise ValueError(f"{where}; expected pictures ({', '.join(RAW_EXTENSIONS)}) or .{MOMENTS}")
        if encoded and self.config.flip > 0 and FLIPPED not in extensions:
            raise ValueError(
                f"data.flip is {self.config.flip}, but {where} and no .{FLIPPED}: encode them with encoding.flipped "
                "set, or set data.flip to 0"
            )
        if encoded and self.config.crop == "random":
            raise ValueError(f"data.crop is 'random', but {where}: encoded pictures are cropped already; use 'center'")
        identity = manifest.encoder or {}
        pair = identity.get("text_encoder_2") is not None
        if encoded and TEXT in extensions and identity.get("text_encoder") and pair != (POOLED in extensions):
            raise ValueError(
                f"{where}, but its manifest names {'a' if pair else 'no'} second text encoder, whose pooled text would "
                f"be .{POOLED}: encode the raw shards again with tools/encode_latents.py"
            )
        if encoded and manifest.encoder is None:
            warnings.warn(
                f"{where}, but its manifest does not say what encoded them: nobody can tell whether they fit this run",
                stacklevel=5,
            )


def first_floats(reader: ShardReader, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the member `name` of the first sample where it can be read: all samples share them.

    Raises:
        ValueError: none can.
    """
    for shard, count in enumerate(reader.manifest.counts):
        for sample in range(count):
            try:
                return float_form(reader.members(shard, sample)[name], name)
            except (DamagedSample, KeyError, ValueError):
                continue  # recorded when its position comes
    raise ValueError(f"{reader.manifest.folder}: none of the members .{name} is readable")


def _kind(form: Form) -> str:
    if not form.encoded:
        return "pictures"
    if form.text is None:
        return "moments without text states"
    pooled = "" if form.pooled is None else f" with {form.pooled_dtype} pooled text {form.pooled}"
    return f"moments and {form.text_dtype} text states {form.text}{pooled}"


def damage_of_indexing(manifests: Sequence[Manifest]) -> list[Quarantined]:
    """What indexing could not use, as lines of the run's ledger; shards are named as in training."""
    if len(manifests) == 1:
        return manifests[0].damaged()
    return [
        dataclasses.replace(one, shard=f"{number}:{one.shard}")
        for number, manifest in enumerate(manifests)
        for one in manifest.damaged()
    ]
