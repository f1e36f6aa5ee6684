"""The order of samples as a pure function: which sample stands at a position of the run.

In: the number of samples in each shard, the run's seed, and a position (0, 1, 2, ... over the whole run).
Out: (epoch, shard, sample in the shard); memory is O(shards) and never O(samples), and any position costs the same.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from ldm.data.draws import Purpose, generator

# Few elements mix slowly: among 6, pairs are uneven at 16 rounds (chi-square over 30,000 keys), from 16 elements on
# even at 8. A round costs 0.4 us.
SMALL = 256
ROUNDS_SMALL = 24
ROUNDS = 8
MASK = 2**64 - 1


@lru_cache(maxsize=64)
def _round_keys(key: int, rounds: int) -> tuple[int, ...]:
    return tuple(_mix(2 * number, key) << 32 | _mix(2 * number + 1, key) for number in range(rounds))


def _mix(value: Any, key: int) -> Any:
    """32 bits out of (value, key): SplitMix64 (Steele et al. 2014), for an int or an array of uint64."""
    z = (value * 0x9E3779B97F4A7C15 + key) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z >> 32


def _feistel(value: Any, rows: Any, columns: Any, keys: Sequence[Any]) -> Any:
    """Bijection on range(rows * columns), for an int or an array of uint64 (Black & Rogaway 2002, section 5)."""
    left, right = value // columns, value % columns
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right, even)) % rows
        right = (right + _mix(left, odd)) % columns
    return left * columns + right


def _network(size: int, key: int) -> tuple[int, int, tuple[int, ...]]:
    """Sides of the near-square grid that holds `size` (fewer than sqrt(size) cells too many), and the round keys."""
    rows = isqrt(size - 1) + 1
    return rows, -(-size // rows), _round_keys(key, ROUNDS_SMALL if size < SMALL else ROUNDS)


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under the permutation of range(size) that `key` selects, in O(1) memory.

    A Feistel network on a near-square grid; an image outside of range(size) is mapped again until it is inside
    (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: 0 .. size - 1.
        size: at least 1.
        key: 0 .. 2^64 - 1.

    Raises:
        ValueError: index outside of range(size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index is {index}; allowed are 0 to {size - 1}")
    network = _network(size, key)
    image = _feistel(index, *network)
    while image >= size:
        image = _feistel(image, *network)
    return image


def permutation(size: int, key: int) -> np.ndarray:
    """All of `permute` at once: int64 array (size,) whose entry i is permute(i, size, key)."""
    return _permute_in_sets(np.arange(size), np.zeros(size, dtype=np.intp), [size], [key])


def _permute_in_sets(indices: np.ndarray, sets: np.ndarray, sizes: Sequence[int], keys: Sequence[int]) -> np.ndarray:
    """permute(indices[i], sizes[sets[i]], keys[sets[i]]) for each i, as int64."""
    networks = [_network(size, key) for size, key in zip(sizes, keys, strict=True)]
    rounds = np.array([len(network[2]) for network in networks])
    images = indices.astype(np.uint64)
    for number in np.unique(rounds):  # one or two: sets of fewer than SMALL elements take more rounds
        chosen = np.flatnonzero(rounds == number)
        rows = [(sizes[one], *networks[one][:2], *networks[one][2]) for one in chosen.tolist()]
        table = np.array(rows, dtype=np.uint64)  # (chosen, 3 + rounds)
        walking = np.flatnonzero(rounds[sets] == number)
        while len(walking):
            size, height, width, *round_keys = table[np.searchsorted(chosen, sets[walking])].T
            images[walking] = _feistel(images[walking], height, width, round_keys)
            walking = walking[images[walking] >= size]
    return images.astype(np.int64)


@lru_cache(maxsize=8)
def _shard_order(shards: int, key: int) -> np.ndarray:
    """Read-only `permutation`; cached, since the buckets of a source share it."""
    order = permutation(shards, key)
    order.flags.writeable = False
    return order


class Location(NamedTuple):
    """Where a sample lies: the epoch that asks for it, the shard's number, the sample's number in the shard."""

    epoch: int
    shard: int
    sample: int


class _Epoch(NamedTuple):
    shards: np.ndarray  # shard numbers in this epoch's order
    starts: np.ndarray  # samples before each of them, and the total
    blocks: np.ndarray  # samples before each block, and the total
    keys: dict[int, int]  # of the blocks used last


class Order:
    """Block shuffle: each sample exactly once an epoch, each shard's reads inside one block of the epoch.

    In each epoch the shards are permuted, cut into blocks of about `shards_per_block` consecutive ones, and the
    samples of each block are permuted among themselves. Shards may differ in size and may be empty. The run's
    positions go on over the ends of epochs, so that no batch is partial and no sample is left out: a batch may hold
    the last samples of one epoch and the first of the next.

    Args:
        counts: samples in each shard.
        seed: the run's seed; unused without shuffle.
        shards_per_block: how many shards are mixed with each other, and about how many are open at a time; blocks
            are made even, so that no short last block is left nearly in file order.
        shuffle: False gives the order of the files, again in each epoch.
        stream: 0 .. 2^32 - 1; another one is another order under the same seed.
        part: 0 .. 2^32 - 1; orders that differ in it alone read the same blocks of shards, each in an order of its
            own: parts of the samples of the same shards.

    Raises:
        ValueError: no samples at all, a negative count, or fewer than one shard a block.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        seed: int,
        shards_per_block: int = 16,
        shuffle: bool = True,
        *,
        stream: int = 0,
        part: int = 0,
    ) -> None:
        self.counts = np.array(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        if (self.counts < 0).any() or self.samples == 0:
            raise ValueError(f"the {len(self.counts)} shards hold {self.samples} samples; at least 1 is needed")
        if shards_per_block < 1:
            raise ValueError(f"shards_per_block is {shards_per_block}; allowed are integers from 1")
        self.seed = seed
        self.shuffle = shuffle
        self.stream = stream
        self.part = part
        self.blocks = -(-len(self.counts) // shards_per_block)
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.samples

    def locate(self, position: int) -> Location:
        """Location of the sample at `position`, 0 .. of the whole run.

        Raises:
            ValueError: negative position.
        """
        if position < 0:
            raise ValueError(f"position is {position}; allowed are integers from 0")
        number, rest = divmod(position, self.samples)
        epoch = self._epoch(number)
        if self.shuffle:
            block = _last_at_or_before(epoch.blocks, rest)
            start, end = epoch.blocks[block : block + 2].tolist()
            rest = start + permute(rest - start, end - start, self._block_key(epoch, number, block))
        slot = _last_at_or_before(epoch.starts, rest)
        return Location(number, int(epoch.shards[slot]), rest - int(epoch.starts[slot]))

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` of each position: epochs, shards and samples, int64 arrays of the shape of `positions` (n,).

        Raises:
            ValueError: a negative position.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and (lowest := int(positions.min())) < 0:
            raise ValueError(f"position is {lowest}; allowed are integers from 0")
        epochs, rest = np.divmod(positions, self.samples)
        shards, samples = np.empty_like(rest), np.empty_like(rest)
        for number in sorted(set(epochs.tolist())):
            epoch = self._epoch(number)
            rows = epochs == number
            inside = rest[rows]
            if self.shuffle:
                inside = self._shuffled(inside, epoch, number)
            slots = epoch.starts.searchsorted(inside, side="right") - 1
            shards[rows], samples[rows] = epoch.shards[slots], inside - epoch.starts[slots]
        return epochs, shards, samples

    def upcoming(self, position: int, limit: int) -> list[int]:
        """At most `limit` shards in the order in which they are read from `position` on, each once.

        First all those of the position's block (without shuffle: those not read to their end), then the next blocks'.
        """
        found: dict[int, None] = {}
        total = min(limit, int(np.count_nonzero(self.counts)))
        for _, shards in self.blocks_from(position):
            found.update(dict.fromkeys(shards))
            if len(found) >= total:
                break
        return list(found)[:total]

    def blocks_from(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """Blocks from that of `position` on, without end: first position of each, and its shards that hold samples."""
        number, rest = divmod(position, self.samples)
        while True:
            epoch = self._epoch(number)
            for block in range(_last_at_or_before(epoch.blocks, rest), self.blocks):
                first, last = (edge * len(epoch.shards) // self.blocks for edge in (block, block + 1))
                if not self.shuffle:
                    first = max(first, _last_at_or_before(epoch.starts, rest))
                shards = epoch.shards[first:last]
                shards = shards[self.counts[shards] > 0]
                if len(shards):
                    yield number * self.samples + int(epoch.blocks[block]), shards.tolist()
            number, rest = number + 1, 0

    def _shuffled(self, rest: np.ndarray, epoch: _Epoch, number: int) -> np.ndarray:
        blocks = epoch.blocks.searchsorted(rest, side="right") - 1
        used, sets = np.unique(blocks, return_inverse=True)
        starts = epoch.blocks[used]
        keys = [self._block_key(epoch, number, block) for block in used.tolist()]
        sizes = (epoch.blocks[used + 1] - starts).tolist()
        return starts[sets] + _permute_in_sets(rest - starts[sets], sets, sizes, keys)

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            shards = np.arange(len(self.counts))
            if self.shuffle:
                shards = _shard_order(len(self.counts), self._key(number, 0, self.stream))
            starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
            blocks = starts[np.arange(self.blocks + 1) * len(shards) // self.blocks]
            if len(self._epochs) >= 2:  # two, since batches lie across the ends of epochs
                del self._epochs[min(self._epochs)]
            epoch = self._epochs[number] = _Epoch(shards, starts, blocks, {})
        return epoch

    def _block_key(self, epoch: _Epoch, number: int, block: int) -> int:
        key = epoch.keys.get(block)
        if key is None:
            if len(epoch.keys) >= 16:
                epoch.keys.clear()
            key = epoch.keys[block] = self._key(number, block + 1, self.stream | self.part << 32)
        return key

    def _key(self, *address: int) -> int:
        return int(generator(self.seed, Purpose.ORDER, *address).bit_generator.random_raw())


def _last_at_or_before(starts: np.ndarray, value: int) -> int:
    """Index of the last entry that is at most `value`; `starts` is sorted."""
    return int(starts.searchsorted(value, side="right")) - 1
