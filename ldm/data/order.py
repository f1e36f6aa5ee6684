"""The order of samples as a pure function: which sample stands at a position of the run.

In: the number of samples in each shard, the run's seed, and a position (0, 1, 2, ... over the whole run).
Out: (epoch, shard, sample in the shard); memory is O(shards) and never O(samples), and any position costs the same.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
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


def _feistel(value: Any, rows: int, columns: int, keys: tuple[int, ...]) -> Any:
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
    network = _network(size, key)
    images = _feistel(np.arange(size, dtype=np.uint64), *network)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], *network)
    return images.astype(np.int64)


class Location(NamedTuple):
    """Where a sample lies: the epoch that asks for it, the shard's number, the sample's number in the shard."""

    epoch: int
    shard: int
    sample: int


class _Epoch(NamedTuple):
    shards: list[int]  # shard numbers in this epoch's order
    sample_starts: list[int]  # samples before each of them, and the total
    block_starts: list[int]  # samples before each block, and the total
    block_keys: dict[int, int]


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

    Raises:
        ValueError: no samples at all, a negative count, or fewer than one shard a block.
    """

    def __init__(self, counts: Sequence[int], seed: int, shards_per_block: int = 16, shuffle: bool = True) -> None:
        self.counts = [int(count) for count in counts]
        if any(count < 0 for count in self.counts) or sum(self.counts) == 0:
            raise ValueError(f"the {len(self.counts)} shards hold {sum(self.counts)} samples; at least 1 is needed")
        if shards_per_block < 1:
            raise ValueError(f"shards_per_block is {shards_per_block}; allowed are integers from 1")
        self.seed = seed
        self.shuffle = shuffle
        self.samples = sum(self.counts)
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
        epoch = self._epochs.get(number) or self._open_epoch(number)
        if self.shuffle:
            block = bisect_right(epoch.block_starts, rest) - 1
            start, end = epoch.block_starts[block], epoch.block_starts[block + 1]
            rest = start + permute(rest - start, end - start, self._block_key(epoch, number, block))
        slot = bisect_right(epoch.sample_starts, rest) - 1
        return Location(number, epoch.shards[slot], rest - epoch.sample_starts[slot])

    def _open_epoch(self, number: int) -> _Epoch:
        shards = list(range(len(self.counts)))
        if self.shuffle:
            shards = permutation(len(self.counts), self._key(number, 0)).tolist()
        starts = list(accumulate((self.counts[shard] for shard in shards), initial=0))
        blocks = [starts[block * len(shards) // self.blocks] for block in range(self.blocks + 1)]
        if len(self._epochs) >= 2:  # two, since batches lie across the ends of epochs
            del self._epochs[min(self._epochs)]
        self._epochs[number] = _Epoch(shards, starts, blocks, {})
        return self._epochs[number]

    def _block_key(self, epoch: _Epoch, number: int, block: int) -> int:
        key = epoch.block_keys.get(block)
        if key is None:
            if len(epoch.block_keys) >= 16:
                epoch.block_keys.clear()
            key = epoch.block_keys[block] = self._key(number, block + 1)
        return key

    def _key(self, *address: int) -> int:
        return int(generator(self.seed, Purpose.ORDER, *address).bit_generator.random_raw())
