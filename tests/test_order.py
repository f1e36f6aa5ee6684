"""The order of samples: bijections, their statistics, exactly once an epoch, and how well it mixes."""

import itertools
import tracemalloc

import numpy as np
import pytest
import xxhash

from ldm.data.order import Location, Order, permutation, permute

UNEVEN = [7, 0, 31, 1, 12, 12, 0, 5, 19, 3, 8, 40, 2]


def epoch_of(order: Order, epoch: int) -> list[Location]:
    return [order.locate(position) for position in range(epoch * len(order), (epoch + 1) * len(order))]


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_permute_is_a_bijection_on_every_size_from_1_to_300(key: int) -> None:
    for size in range(1, 301):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000, 4096])
def test_a_whole_permutation_is_permute_of_each_index(size: int) -> None:
    for key in (0, 5, 2**64 - 1):
        assert permutation(size, key).tolist() == [permute(index, size, key) for index in range(size)]


def test_permute_stays_inside_of_huge_sizes() -> None:
    for size in (10**8, 2**40 + 1):
        images = [permute(index, size, 3) for index in range(1000)]
        assert len(set(images)) == 1000
        assert all(0 <= image < size for image in images)


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0)])
def test_an_index_outside_of_the_set_is_an_error(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        permute(index, size, 0)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 9, 12, 17])
def test_positions_and_pairs_are_uniform_over_3000_random_keys(size: int) -> None:
    trials = 3000
    keys = np.random.default_rng(100 + size).integers(0, 2**63, trials).tolist()
    images = np.array([[permute(index, size, key) for index in range(size)] for key in keys])
    chi_square, freedom = 0.0, (size - 1) ** 2
    for index in range(size):
        observed = np.bincount(images[:, index], minlength=size)
        chi_square += (size - 1) / size * ((observed - trials / size) ** 2 / (trials / size)).sum()
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom), f"{chi_square} of {freedom}"
    if size == 2:
        return
    pairs, freedom = size * (size - 1), size * (size - 1) - 1
    for first, second in itertools.combinations(range(size), 2):
        observed = np.bincount(images[:, first] * size + images[:, second], minlength=size * size)
        observed = observed.reshape(size, size)[~np.eye(size, dtype=bool)]
        chi_square = ((observed - trials / pairs) ** 2 / (trials / pairs)).sum()
        assert chi_square - freedom < 6 * np.sqrt(2 * freedom), f"{first}, {second}: {chi_square} of {freedom}"


def test_all_24_permutations_of_4_come_equally_often_over_6000_random_keys() -> None:
    keys = np.random.default_rng(4).integers(0, 2**63, 6000).tolist()
    images = [tuple(permute(index, 4, key) for index in range(4)) for key in keys]
    observed = np.array([images.count(one) for one in itertools.permutations(range(4))])
    assert (((observed - 250) ** 2) / 250).sum() < 23 + 4.5 * np.sqrt(46)


def test_large_permutations_look_random() -> None:
    size = 5000
    for key in range(5):
        image = permutation(size, key).astype(float)
        assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / np.sqrt(size)
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / np.sqrt(size)
        # The mean distance of two random places is size / 3.
        assert abs(np.abs(np.diff(image)).mean() / (size / 3) - 1) < 0.05


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("block", [1, 2, 5, 16, 100])
def test_each_sample_exactly_once_an_epoch_with_uneven_and_empty_shards(block: int, shuffle: bool) -> None:
    every = {(shard, sample) for shard, count in enumerate(UNEVEN) for sample in range(count)}
    order = Order(UNEVEN, 5, block, shuffle)
    assert len(order) == sum(UNEVEN)
    for epoch in range(4):
        located = epoch_of(order, epoch)
        assert {one.epoch for one in located} == {epoch}
        assert len(located) == len(every)
        assert {(one.shard, one.sample) for one in located} == every


@pytest.mark.parametrize("block", [1, 2, 5])
def test_each_shard_is_read_inside_one_block_of_the_epoch(block: int) -> None:
    order = Order(UNEVEN, 9, block)
    for epoch in range(3):
        shards = [one.shard for one in epoch_of(order, epoch)]
        spans = {shard: (shards.index(shard), len(shards) - shards[::-1].index(shard)) for shard in set(shards)}
        for position in range(len(shards)):
            assert sum(first <= position < last for first, last in spans.values()) <= block


GOLDEN_LOCATIONS = [
    ("d96e6be0664948d8", UNEVEN, 5, 3, True, range(1000)),
    ("1b07396164bb63f0", [100] * 50, 2**64 - 1, 16, True, range(12000)),
    ("9eb9434b6d21b70d", [9], 0, 16, True, range(100)),
    ("7c1d3bd5b7cc78ff", UNEVEN, 5, 16, False, range(300)),
    ("f704934fe607ca76", [10_000] * 10_000, 7, 16, True, range(0, 100 * 999_999_937, 999_999_937)),
]


@pytest.mark.parametrize(("digest", "counts", "seed", "block", "shuffle", "positions"), GOLDEN_LOCATIONS)
def test_the_order_of_a_seed_never_changes(
    digest: str, counts: list[int], seed: int, block: int, shuffle: bool, positions: range
) -> None:
    order = Order(counts, seed, block, shuffle)
    one_by_one = np.array([order.locate(position) for position in positions], dtype="<i8")
    assert xxhash.xxh3_64_hexdigest(one_by_one.tobytes()) == digest
    at_once = np.stack(Order(counts, seed, block, shuffle).locate_many(np.array(positions)), axis=1)
    np.testing.assert_array_equal(at_once, one_by_one)


def test_many_positions_at_once_are_each_of_them_over_300_random_orders() -> None:
    seed, trials = 11, 300
    print(f"seed {seed}, {trials} orders of 64 positions")
    rng = np.random.default_rng(seed)
    for _ in range(trials):
        counts = rng.integers(0, rng.choice([2, 30, 3000]), rng.integers(1, 40))
        if not counts.sum():
            continue
        address = {"stream": int(rng.integers(0, 3)), "part": int(rng.integers(0, 3))}
        order = Order(
            counts, int(rng.integers(0, 2**63)), int(rng.integers(1, 20)), bool(rng.integers(0, 5)), **address
        )
        first = int(rng.integers(0, 4 * counts.sum()))
        scattered = rng.integers(0, 5 * counts.sum(), 32)
        positions = np.concatenate([np.arange(first, first + 32), scattered])
        located = np.stack(order.locate_many(positions), axis=1)
        assert located.tolist() == [list(order.locate(position)) for position in positions.tolist()]
    assert [len(one) for one in order.locate_many(np.array([], dtype=np.int64))] == [0, 0, 0]


def test_streams_are_different_orders_and_parts_different_orders_of_the_same_blocks() -> None:
    counts, block = [10] * 40, 4
    plain, stream, part = (epoch_of(Order(counts, 1, block, **a), 0) for a in ({}, {"stream": 1}, {"part": 1}))
    for one, other in itertools.combinations((plain, stream, part), 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 60  # of 400; a block has 40
    blocks = [
        [{one.shard for one in located[k : k + 40]} for k in range(0, 400, 40)] for located in (plain, part, stream)
    ]
    assert blocks[0] == blocks[1] != blocks[2]
    single = [epoch_of(Order([50], 1, **a), 0) for a in ({}, {"stream": 1}, {"part": 1}, {"stream": 1, "part": 1})]
    assert len({tuple(one) for one in single}) == 4


@pytest.mark.parametrize("shuffle", [True, False])
def test_upcoming_shards_are_those_that_are_read_next(shuffle: bool) -> None:
    for block, epoch_blocks in ((3, 5), (16, 1), (1, 13)):
        order = Order(UNEVEN, 2, block, shuffle)
        for position in range(0, 3 * len(order), 7):
            read = list(dict.fromkeys(order.locate(p).shard for p in range(position, position + 2 * len(order))))
            ahead = order.upcoming(position, 100)
            assert sorted(ahead) == sorted(read) == [shard for shard, count in enumerate(UNEVEN) if count]
            assert order.upcoming(position, 4) == ahead[:4]
            if not shuffle:
                assert ahead == read
                continue
            # The position's block first, though some of its shards may be read to their end already.
            own = {one for start, shards in itertools.islice(order.blocks_from(position), 1) for one in shards}
            assert read[0] in own
            assert set(ahead[: len(own)]) == own
            assert len(own) <= -(-len(UNEVEN) // epoch_blocks)
            later = [shard for shard in read if shard not in own]
            if block == 1:
                assert ahead[1:] == later
    assert order.upcoming(5, 0) == []


def test_without_shuffle_the_order_is_that_of_the_files() -> None:
    located = epoch_of(Order(UNEVEN, 5, shuffle=False), 2)
    assert [(one.shard, one.sample) for one in located] == [
        (shard, sample) for shard, count in enumerate(UNEVEN) for sample in range(count)
    ]


def test_the_order_is_a_function_of_seed_and_position_alone() -> None:
    walked = [Order(UNEVEN, 5, 3).locate(position) for position in range(300)]  # a new object each time
    order = Order(UNEVEN, 5, 3)
    jumps = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    assert all(order.locate(position) == walked[position] for position in jumps)
    assert [Order(UNEVEN, 6, 3).locate(position) for position in range(300)] != walked


def test_each_epoch_has_another_order_of_shards_and_of_samples() -> None:
    order = Order([10] * 40, 1, 4)
    epochs = [epoch_of(order, epoch) for epoch in range(6)]
    for first, second in itertools.combinations(epochs, 2):
        same = sum(one[1:] == other[1:] for one, other in zip(first, second, strict=True))
        assert same < 12  # 1 expected of 400
    inside = [[one.sample for one in epoch if one.shard == 7] for epoch in epochs]
    assert len({tuple(samples) for samples in inside}) == 6


def test_the_last_block_is_no_shorter_than_half_the_others() -> None:
    # 17 shards in blocks of 16: one lonely shard at the end would come in a run.
    shards = [one.shard for one in epoch_of(Order([50] * 17, 3, 16), 0)]
    assert len(set(shards[-50:])) >= 7


def test_batches_mix_shards_as_a_full_permutation_inside_the_block_would() -> None:
    shards, per_shard, block, batch = 64, 100, 16, 32
    order = Order([per_shard] * shards, 2, block)
    distinct, neighbours = [], []
    for epoch in range(4):
        located = [one.shard for one in epoch_of(order, epoch)]
        distinct += [len(set(located[start : start + batch])) for start in range(0, len(located), batch)]
        neighbours += [one == other for one, other in itertools.pairwise(located)]
    # Drawing 32 of 1,600 without replacement from 16 shards of 100: 16 (1 - C(1500, 32) / C(1600, 32)) = 14.0.
    expected = block * (1 - np.prod([(1500 - k) / (1600 - k) for k in range(batch)]))
    assert abs(np.mean(distinct) - expected) < 0.15
    assert abs(np.mean(neighbours) - (per_shard - 1) / (block * per_shard - 1)) < 0.006


def test_samples_of_one_shard_are_spread_evenly_over_their_block() -> None:
    shards, per_shard, block = 32, 200, 8
    order = Order([per_shard] * shards, 4, block)
    located = [one.shard for one in epoch_of(order, 0)]
    length = block * per_shard
    places = [np.array([place for place, shard in enumerate(located) if shard == wanted]) for wanted in range(shards)]
    # Uniform places in a block have standard deviation length / sqrt(12).
    spread = np.mean([one.std() for one in places]) / (length / np.sqrt(12))
    assert abs(spread - 1) < 0.03
    assert {int(one.min()) // length for one in places} == set(range(4))


def shuffle_quality(shards: np.ndarray, batch: int) -> tuple[float, float, float]:
    """Of an epoch's shards by position: shards in a batch, the gap between samples of one shard, neighbours alike."""
    batches = np.sort(shards[: len(shards) // batch * batch].reshape(-1, batch), axis=1)
    distinct = 1 + (np.diff(batches, axis=1) > 0).sum(axis=1).mean()
    by_shard = np.argsort(shards, kind="stable")
    gaps = np.diff(by_shard)[np.diff(shards[by_shard]) == 0]
    return float(distinct), float(gaps.mean()), float((np.diff(shards) == 0).mean())


def test_the_shuffle_of_1000_shards_of_1000_is_a_full_permutation_inside_of_blocks_of_16_shards() -> None:
    """With 16 shards a block a batch of 256 holds 16.1 shards (full permutation: 226), and the next sample of a shard
    comes after 15.9 positions (full permutation: 999). Both are what numpy's permutations of the blocks give."""
    shards, per_shard, block, batch = 1000, 1000, 16, 256
    samples = shards * per_shard
    order = Order([per_shard] * shards, 0, block)
    located = np.concatenate([order.locate_many(np.arange(k, k + 50_000))[1] for k in range(0, samples, 50_000)])
    ours = shuffle_quality(located, batch)
    rng = np.random.default_rng(0)
    blocks = -(-shards // block)
    edges = [number * shards // blocks for number in range(blocks + 1)]
    names = np.repeat(rng.permutation(shards), per_shard)
    cuts = [slice(a * per_shard, b * per_shard) for a, b in itertools.pairwise(edges)]
    blockwise = shuffle_quality(np.concatenate([rng.permutation(names[cut]) for cut in cuts]), batch)
    full = shuffle_quality(rng.permutation(names), batch)
    for name, found in (("ours", ours), ("numpy in blocks", blockwise), ("numpy, full", full)):
        print(f"{name}: {found[0]:.2f} shards in a batch of {batch}, gap {found[1]:.2f}, alike {found[2]:.5f}")
    # n of N places without replacement: mean gap (N + 1) / (n + 1); none of n in B: C(N - n, B) / C(N, B).
    in_block = samples / blocks
    missing = np.prod([(in_block - per_shard - k) / (in_block - k) for k in range(batch)])
    absent = np.prod([(samples - per_shard - k) / (samples - k) for k in range(batch)])
    np.testing.assert_allclose(ours[1], (in_block + 1) / (per_shard + 1), rtol=0.002)
    np.testing.assert_allclose(full[1], (samples + 1) / (per_shard + 1), rtol=0.002)
    np.testing.assert_allclose(full[0], shards * (1 - absent), rtol=0.002)
    # A few batches lie across two blocks.
    across = (blocks - 1) / (samples / batch) * (shards / blocks)
    assert 0 < ours[0] - shards / blocks * (1 - missing) < across
    np.testing.assert_allclose(ours, blockwise, rtol=0.02)


def test_a_hundred_million_samples_cost_less_than_five_megabytes() -> None:
    counts = [10_000] * 10_000
    tracemalloc.start()
    order = Order(counts, 0)
    for position in (0, 5 * 10**7, 10**8 - 1, 10**9 + 17):
        order.locate(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(("counts", "block"), [([], 1), ([0, 0], 1), ([3, -1], 1), ([3], 0)])
def test_what_cannot_be_ordered_is_an_error(counts: list[int], block: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1|allowed are"):
        Order(counts, 0, block)


def test_a_negative_position_is_an_error() -> None:
    with pytest.raises(ValueError, match="position is -1"):
        Order([3], 0).locate(-1)
    with pytest.raises(ValueError, match="position is -1"):
        Order([3], 0).locate_many(np.array([4, -1]))
