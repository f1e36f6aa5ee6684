"""Several sources in one order: which source a position of the run belongs to, and which sample of it.

In: a weight for each source, the counts of their shards, the run's seed, and a position.
Out: (source, epoch of the source, shard, sample, bucket): a pure function, O(1) memory in the number of samples.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isfinite
from typing import NamedTuple

import numpy as np

from ldm.data.draws import Purpose, uniform
from ldm.data.interleaving import Mix
from ldm.data.order import Order


class Place(NamedTuple):
    """The sample at a position of the run."""

    source: int
    epoch: int
    """Of the source, or of the bucket in the source; -1 for a reserve, which belongs to none."""
    shard: int
    sample: int
    """Its number in the shard."""
    bucket: int
    """0 without buckets"""


class Places(NamedTuple):
    """The fields of many `Place`s, int64 arrays (n,)."""

    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    samples: np.ndarray
    buckets: np.ndarray


class _Members(NamedTuple):
    """The samples of one shard by bucket."""

    buckets: np.ndarray  # (samples,) bucket of each
    samples: np.ndarray  # (samples,) numbers, those of bucket 0 first, each bucket's in the order of the file
    starts: list[int]  # where each bucket begins in `samples`


class RunOrder:
    """Which sample of which source stands at a position of the run; with buckets, of which bucket.

    Sources: `Mix` deals the positions to the sources by their weights, and each source reads what it gets in an
    `Order` of its own: each of its samples exactly once in each of its epochs, whatever the others do. One source
    alone is read in the order of `Order`. Without weights the shares are the numbers of samples, so that an epoch of
    the run is an epoch of each source.

    Buckets: global batch k, positions kB to (k + 1)B - 1, holds samples of one bucket. A `Mix` deals the batches to
    the buckets by their expected shares of the samples; batch m of a bucket takes its items mB to (m + 1)B - 1, which
    a `Mix` of their own deals to the sources. Each sample stands exactly once in each epoch of its bucket. No batch
    is partial and nothing is left out: a bucket's last batch of an epoch is filled up from its next epoch, so that a
    bucket of fewer than B samples repeats them within a batch. The buckets of a source read the same blocks of shards
    at about the same time: a shard is read while its block lasts for the slowest of them. The order depends on B,
    which is part of a run's config, and not on the number of processes.

    In any prefix of the run each source has its share within 1.68 samples (0.5 for two sources); with buckets each
    bucket has its share of the batches within 1.68 batches, and each source that of a bucket's samples within 1.68.

    Without shuffle: the order of the files, source after source, and neither weights nor buckets alter it; whoever
    makes the batches groups them by `Place.bucket`.

    Args:
        counts: for each source samples in each shard (shards,); with buckets (shards, buckets).
        seed: the run's, 0 .. 2^64 - 1.
        weights: of the sources, in any unit; None, or None for each, is their numbers of samples.
        shards_per_block: of each source: see `Order`.
        global_batch: samples in a step, B; needed with several buckets.
        shuffle: False reads the files in order.
        members: with several buckets, the bucket of each sample of a shard (samples,) by (source, shard):
            `buckets.BucketMembers`. Asked when a shard's first sample is located; the last ones stay in memory.

    Raises:
        ValueError: a source without samples, weights that do not fit the sources, or no global batch or members
            though there are several buckets.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int] | np.ndarray],
        seed: int,
        *,
        weights: Sequence[float | None] | None = None,
        shards_per_block: int = 16,
        global_batch: int | None = None,
        shuffle: bool = True,
        members: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        arrays = [np.asarray(one, dtype=np.int64) for one in counts]
        self.counts = [one.reshape(len(one), -1) for one in arrays]  # (shards, buckets) of each source
        self.buckets = max(one.shape[1] for one in self.counts)
        if self.buckets > 1 and (members is None or (shuffle and (global_batch is None or global_batch < 1))):
            raise ValueError(
                f"{self.buckets} buckets need a global batch from 1 on (found {global_batch}) and the samples' buckets"
            )
        self.seed = seed
        self.shuffle = shuffle
        self.batch = global_batch if self.buckets > 1 and global_batch is not None else 1
        self._lookup = members if self.buckets > 1 else None
        self._members: OrderedDict[tuple[int, int], _Members] = OrderedDict()
        self._members_kept = 4 * shards_per_block * len(self.counts)  # buckets may be a block apart
        totals = np.stack([one.sum(axis=0) for one in self.counts])  # (sources, buckets)
        shares = _shares(totals.sum(axis=1).tolist(), weights)
        self.samples = int(totals.sum())
        self._offsets = np.cumsum([0, *map(len, self.counts)])  # shards before each source
        if not shuffle:
            self._files = Order(np.concatenate([one.sum(axis=1) for one in self.counts]), seed, shuffle=False)
            return
        each = [[share * int(n) / int(row.sum()) for n in row] for share, row in zip(shares, totals, strict=True)]
        by_bucket = list(zip(*each, strict=True))
        self._bucket_mix = Mix([sum(one, start=Fraction(0)) for one in by_bucket])
        self._source_mixes = {bucket: Mix(one) for bucket, one in enumerate(by_bucket) if any(one)}
        self._orders = {
            (source, bucket): Order(array[:, bucket], seed, shards_per_block, stream=source, part=bucket)
            for source, array in enumerate(self.counts)
            for bucket in range(self.buckets)
            if totals[source, bucket]
        }

    def __len__(self) -> int:
        """Samples of all sources."""
        return self.samples

    def bucket_of(self, position: int) -> int:
        """Bucket of the sample at `position`; that of its whole global batch where the order is shuffled."""
        if not self.shuffle:
            return self.locate(position).bucket
        return self._bucket_mix.place(position // self.batch)[0]

    def locate(self, position: int) -> Place:
        """The sample at `position`, 0 .. of the whole run.

        Raises:
            ValueError: negative position.
        """
        return Place(*(int(one[0]) for one in self.locate_many(np.array([position]))))

    def locate_many(self, positions: np.ndarray) -> Places:
        """`locate` of each of the positions (n,).

        Raises:
            ValueError: a negative position.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and (lowest := int(positions.min())) < 0:
            raise ValueError(f"position is {lowest}; allowed are integers from 0")
        if not self.shuffle:
            return self._locate_in_files(positions)
        batches, rows = np.divmod(positions, self.batch)
        if self.buckets > 1:
            some, inverse = np.unique(batches, return_inverse=True)
            buckets, batches = (one[inverse] for one in self._bucket_mix.places(some))
        else:
            buckets = np.zeros_like(positions)
        sources, epochs, shards, samples = np.empty((4, len(positions)), dtype=np.int64)
        items = batches * self.batch + rows
        for bucket in np.unique(buckets).tolist():
            chosen = np.flatnonzero(buckets == bucket)
            sources[chosen], items[chosen] = self._source_mixes[bucket].places(items[chosen])
            for source in np.unique(sources[chosen]).tolist():
                here = chosen[sources[chosen] == source]
                epochs[here], shards[here], samples[here] = self._orders[source, bucket].locate_many(items[here])
                if self._lookup is not None:
                    samples[here] = self._sample_numbers(source, shards[here], bucket, samples[here])
        return Places(sources, epochs, shards, samples, buckets)

    def reserve(self, position: int, attempt: int, bucket: int = 0) -> Place:
        """What stands in at `position` for a sample that cannot be used, at the `attempt`-th try (0, 1, ...).

        Uniform over the samples of the bucket in all sources, each as often as another whatever the weights: a draw
        keyed by (seed, RESERVE, position, attempt).
        """
        starts = np.concatenate([[0], *(array[:, bucket] for array in self.counts)]).cumsum()
        rank = int(uniform(self.seed, Purpose.RESERVE, position, attempt) * int(starts[-1]))
        number = int(starts.searchsorted(rank, side="right")) - 1
        source, shard = self._source_of(number)
        sample = np.array([rank - int(starts[number])])
        if self._lookup is not None:
            sample = self._sample_numbers(source, np.array([shard]), bucket, sample)
        return Place(source, -1, shard, int(sample[0]), bucket)

    def upcoming(self, position: int, limit: int) -> list[tuple[int, int]]:
        """At most `limit` shards (source, shard) in the order in which they are read from `position` on, each once.

        First those of the blocks that are open at `position`, then block after block as they are opened.
        """
        if not self.shuffle:
            return [self._source_of(number) for number in self._files.upcoming(position, limit)]
        total = min(limit, sum(int(np.count_nonzero(array.sum(axis=1))) for array in self.counts))
        batch, row = divmod(position, self.batch)
        running, _ = self._bucket_mix.place(batch)
        opened = []
        for (source, bucket), order in self._orders.items():
            items = self._bucket_mix.count(bucket, batch) * self.batch + (row if bucket == running else 0)
            next_one = self._source_mixes[bucket].count(source, items)
            blocks = order.blocks_from(next_one)
            opened.append((self._position(source, bucket, next_one), source, bucket, next(blocks)[1], blocks))
        heapq.heapify(opened)
        found: dict[tuple[int, int], None] = {}
        while len(found) < total:
            _, source, bucket, shards, blocks = opened[0]
            found.update(dict.fromkeys((source, shard) for shard in shards))
            first, shards = next(blocks)
            heapq.heapreplace(opened, (self._position(source, bucket, first), source, bucket, shards, blocks))
        return list(found)[:total]

    def _position(self, source: int, bucket: int, ordinal: int) -> int:
        """Where the `ordinal`-th sample of the bucket in the source stands."""
        batch, row = divmod(self._source_mixes[bucket].item(source, ordinal), self.batch)
        return self._bucket_mix.item(bucket, batch) * self.batch + row

    def _locate_in_files(self, positions: np.ndarray) -> Places:
        epochs, numbers, samples = self._files.locate_many(positions)
        sources = self._offsets.searchsorted(numbers, side="right") - 1
        shards, buckets = numbers - self._offsets[sources], np.zeros_like(positions)
        if self._lookup is not None:
            for number in np.unique(numbers).tolist():
                rows = numbers == number
                buckets[rows] = self._shard_members(*self._source_of(number)).buckets[samples[rows]]
        return Places(sources, epochs, shards, samples, buckets)

    def _source_of(self, number: int) -> tuple[int, int]:
        source = int(self._offsets.searchsorted(number, side="right")) - 1
        return source, number - int(self._offsets[source])

    def _sample_numbers(self, source: int, shards: np.ndarray, bucket: int, ordinals: np.ndarray) -> np.ndarray:
        """Numbers in their shards of the `ordinals`-th samples of the bucket in each."""
        members = {shard: self._shard_members(source, shard) for shard in set(shards.tolist())}
        pairs = zip(shards.tolist(), ordinals.tolist(), strict=True)
        return np.array([members[shard].samples[members[shard].starts[bucket] + one] for shard, one in pairs])

    def _shard_members(self, source: int, shard: int) -> _Members:
        members = self._members.get((source, shard))
        if members is not None:
            self._members.move_to_end((source, shard))
            return members
        assert self._lookup is not None
        buckets = np.asarray(self._lookup(source, shard))
        counts = np.bincount(buckets, minlength=self.buckets)
        if not np.array_equal(counts, self.counts[source][shard]):
            raise ValueError(
                f"source {source}, shard {shard}: its buckets hold {counts.tolist()} samples, but the order was made "
                f"for {self.counts[source][shard].tolist()}"
            )
        samples = np.argsort(buckets, kind="stable").astype(np.int32)
        members = _Members(buckets.astype(np.int16), samples, [0, *counts.cumsum().tolist()])
        self._members[source, shard] = members
        if len(self._members) > self._members_kept:
            self._members.popitem(last=False)
        return members


def _shares(samples: Sequence[int], weights: Sequence[float | None] | None) -> list[Fraction]:
    """Weight of each source, checked."""
    given = [None] * len(samples) if weights is None else list(weights)
    if len(given) != len(samples) or not all(samples):
        raise ValueError(f"{len(given)} weights for sources of {list(samples)} samples: each source needs some of both")
    if all(one is None for one in given):
        return [Fraction(one) for one in samples]
    if any(one is None or not isfinite(one) or one <= 0 for one in given):
        raise ValueError(f"the sources' weights are {given}; allowed are positive numbers, or none for any of them")
    return [Fraction(str(float(one))) for one in given if one is not None]
