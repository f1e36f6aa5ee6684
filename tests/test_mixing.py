"""Several sources and buckets: exactly once, one bucket a batch, shares, jumps, reserves; over random runs."""

import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from ldm.data.draws import Purpose, uniform
from ldm.data.interleaving import Mix
from ldm.data.mixing import Place, RunOrder
from ldm.data.order import Order

UNEVEN = [7, 0, 31, 1, 12, 12, 0, 5, 19, 3, 8, 40, 2]
SHARE_BOUND = 1.68


class World(NamedTuple):
    """Made-up sources: the bucket of each sample of each shard."""

    assigned: list[list[np.ndarray]]
    buckets: int

    def members(self, source: int, shard: int) -> np.ndarray:
        return self.assigned[source][shard]

    def counts(self) -> list[np.ndarray]:
        return [np.array([np.bincount(one, minlength=self.buckets) for one in source]) for source in self.assigned]

    def order(self, seed: int, **options: object) -> RunOrder:
        if self.buckets == 1:
            return RunOrder([one[:, 0] for one in self.counts()], seed, **options)
        return RunOrder(self.counts(), seed, members=self.members, **options)

    def every(self, source: int, bucket: int) -> set[tuple[int, int]]:
        shards = enumerate(self.assigned[source])
        return {(shard, int(one)) for shard, buckets in shards for one in np.flatnonzero(buckets == bucket)}


def world(rng: np.random.Generator, sources: int, buckets: int, largest: int = 40, shards: int = 9) -> World:
    """Uneven shards, some of them empty; each source has its own distribution of buckets, some never."""
    made = []
    for _ in range(sources):
        counts = rng.integers(1, largest, rng.integers(1, shards))
        counts *= rng.random(len(counts)) > 0.3
        counts[-1] += 1
        shares = rng.dirichlet(np.full(buckets, 0.7))
        made.append([rng.choice(buckets, count, p=shares) for count in counts])
    return World(made, buckets)


def walk(order: RunOrder, stop: int, start: int = 0) -> list[Place]:
    return [Place(*one) for one in np.stack(order.locate_many(np.arange(start, stop)), axis=1).tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights", [None, [None], [0.3]])
def test_one_source_without_buckets_is_read_in_the_order_of_order(weights: list | None, shuffle: bool) -> None:
    plain = Order(UNEVEN, 5, 3, shuffle)
    order = RunOrder([UNEVEN], 5, weights=weights, shards_per_block=3, global_batch=16, shuffle=shuffle)
    column = RunOrder([np.array(UNEVEN)[:, None]], 5, shards_per_block=3, shuffle=shuffle)
    assert len(order) == len(plain)
    positions = np.random.default_rng(0).integers(0, 10**6, 150)
    for place, again, position in zip(
        zip(*order.locate_many(positions), strict=True),
        zip(*column.locate_many(positions), strict=True),
        positions.tolist(),
        strict=True,
    ):
        assert place == again == (0, *plain.locate(position), 0)
    assert order.upcoming(700, 5) == [(0, shard) for shard in plain.upcoming(700, 5)]


def reference(made: World, seed: int, weights: list | None, block: int, batch: int, stop: int) -> list[Place]:
    """The definition, walked position by position with a counter for each bucket and each source in it."""
    counts = made.counts()
    sizes = [int(one.sum()) for one in counts]
    weights = sizes if weights is None else weights
    parts = [Fraction(weight, size) for weight, size in zip(weights, sizes, strict=True)]
    shares = [[part * int(n) for n in one.sum(axis=0)] for part, one in zip(parts, counts, strict=True)]
    by_bucket = list(zip(*shares, strict=True))
    buckets, mixes = Mix([sum(one) for one in by_bucket]), [Mix(one) if sum(one) else None for one in by_bucket]
    orders = {
        (source, bucket): Order(counts[source][:, bucket], seed, block, stream=source, part=bucket)
        for source, bucket in itertools.product(range(len(sizes)), range(made.buckets))
        if counts[source][:, bucket].any()
    }
    items, ordinals, places = Counter(), Counter(), []
    for position in range(stop):
        bucket = buckets.place(position // batch)[0]
        source = mixes[bucket].place(items[bucket])[0]
        epoch, shard, number = orders[source, bucket].locate(ordinals[source, bucket])
        sample = int(np.flatnonzero(made.assigned[source][shard] == bucket)[number])
        places.append(Place(source, epoch, shard, sample, bucket))
        items[bucket] += 1
        ordinals[source, bucket] += 1
    return places


def test_any_position_at_once_is_what_a_walk_with_counters_comes_to_over_120_random_runs() -> None:
    seed, trials, stop = 21, 120, 300
    print(f"seed {seed}, {trials} runs, 300 positions walked, and jumped to in any order")
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        made = world(rng, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
        weights = None if trial % 2 else rng.integers(1, 9, len(made.assigned)).tolist()
        block, batch, key = int(rng.integers(1, 5)), int(rng.integers(1, 14)), int(rng.integers(0, 2**63))
        expected = reference(made, key, weights, block, batch if made.buckets > 1 else 1, stop)
        options = {"weights": weights, "shards_per_block": block, "global_batch": batch}
        order = made.order(key, **options)
        assert walk(order, stop) == expected
        jumps = rng.permutation(stop)
        jumped = np.stack(made.order(key, **options).locate_many(jumps), axis=1)
        assert [Place(*one) for one in jumped.tolist()] == [expected[position] for position in jumps]
        for position in jumps[:5].tolist():
            assert order.locate(position) == expected[position]
            assert order.bucket_of(position) == expected[position].bucket


def test_each_sample_of_a_source_or_bucket_stands_once_in_each_of_its_epochs_over_100_random_runs() -> None:
    seed, trials = 22, 100
    print(f"seed {seed}, {trials} runs of 1 to 3 sources and 1 to 4 buckets")
    rng = np.random.default_rng(seed)
    epochs_seen = 0
    for trial in range(trials):
        made = world(rng, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
        weights = None if trial % 2 else rng.integers(1, 9, len(made.assigned)).tolist()
        order = made.order(trial, weights=weights, shards_per_block=2, global_batch=int(rng.integers(1, 14)))
        seen: dict[tuple[int, int], dict[int, list[tuple[int, int]]]] = {}
        for one in walk(order, 600):
            seen.setdefault((one.source, one.bucket), {}).setdefault(one.epoch, []).append((one.shard, one.sample))
        for (source, bucket), epochs in seen.items():
            every = made.every(source, bucket)
            assert sorted(epochs) == list(range(len(epochs)))
            for epoch, samples in epochs.items():
                assert len(set(samples)) == len(samples)
                assert set(samples) <= every
                if epoch < len(epochs) - 1:
                    assert set(samples) == every
                    epochs_seen += 1
    print(f"{epochs_seen:,} whole epochs compared")
    assert epochs_seen > 1000


def test_each_global_batch_is_of_one_bucket_and_buckets_have_their_shares_over_60_random_runs() -> None:
    seed, trials, batches = 23, 60, 80
    print(f"seed {seed}, {trials} runs of {batches} batches")
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        made = world(rng, int(rng.integers(1, 4)), 4)
        size = int(rng.integers(1, 14))
        places = walk(made.order(trial, global_batch=size), batches * size)
        by_batch = [{one.bucket for one in places[k * size : (k + 1) * size]} for k in range(batches)]
        assert all(len(one) == 1 for one in by_batch)
        share = sum(one.sum(axis=0) for one in made.counts()) / sum(one.sum() for one in made.counts())
        seen = np.cumsum(np.eye(4)[[min(one) for one in by_batch]], axis=0)
        assert np.abs(seen - share * np.arange(1, batches + 1)[:, None]).max() <= SHARE_BOUND
        # A sample comes with the bucket that it was assigned to.
        assert all(made.assigned[one.source][one.shard][one.sample] == one.bucket for one in places)


def test_sources_keep_their_weights_in_every_prefix_with_and_without_buckets() -> None:
    rng = np.random.default_rng(24)
    weights = [0.5, 0.2, 0.3]
    for buckets in (1, 4):
        made = world(rng, 3, buckets)
        places = walk(made.order(0, weights=weights, global_batch=8), 4000)
        totals = [one.sum(axis=0) for one in made.counts()]
        expected = np.array([w * n / n.sum() for w, n in zip(weights, totals, strict=True)])  # (sources, buckets)
        for bucket in range(buckets):
            sources = [one.source for one in places if one.bucket == bucket]
            share = expected[:, bucket] / max(expected[:, bucket].sum(), 1e-9)
            seen = np.cumsum(np.eye(3)[sources], axis=0)
            assert np.abs(seen - share * np.arange(1, len(sources) + 1)[:, None]).max(initial=0) <= SHARE_BOUND
        whole = np.bincount([one.source for one in places], minlength=3)
        assert np.abs(whole - np.array(weights) * len(places)).max() <= SHARE_BOUND * buckets * (1 + 8)


def test_without_weights_an_epoch_of_the_run_is_an_epoch_of_each_source() -> None:
    made = world(np.random.default_rng(25), 3, 1)
    order = made.order(3)
    for epoch in range(3):
        places = walk(order, (epoch + 1) * len(order), epoch * len(order))
        assert {one.epoch for one in places} == {epoch}
        for source in range(3):
            assert {one[2:4] for one in places if one.source == source} == made.every(source, 0)


def test_sources_of_the_same_shards_are_shuffled_each_in_its_own_way() -> None:
    places = walk(RunOrder([UNEVEN, UNEVEN], 1, shards_per_block=3), 2 * sum(UNEVEN))
    first, second = ([one[2:4] for one in places if one.source == source] for source in (0, 1))
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def open_shards(places: list[Place]) -> int:
    """Most shards that lie between their first and their last sample at one time."""
    spans: dict[tuple[int, int], list[int]] = {}
    for position, one in enumerate(places):
        spans.setdefault((one.shard, one.epoch), [position, position])[1] = position
    return max(sum(a <= position <= b for a, b in spans.values()) for position in range(0, len(places), 10))


def test_the_buckets_of_a_source_read_the_same_blocks_at_about_the_same_time() -> None:
    rng = np.random.default_rng(26)
    made = World([[rng.choice(4, 50, p=[0.1, 0.2, 0.6, 0.1]) for _ in range(60)]], 4)
    order = made.order(0, shards_per_block=6, global_batch=8)
    together = open_shards(walk(order, 3000))
    order = made.order(0, shards_per_block=6, global_batch=8)
    for (_, bucket), one in order._orders.items():
        one.stream = bucket  # another permutation of the shards for each bucket
    apart = open_shards(walk(order, 3000))
    print(f"shards in use at a time: {together}; with a permutation for each bucket {apart}; a block has 6")
    assert together <= 3 * 6
    assert apart > 1.2 * together


def test_upcoming_shards_come_in_the_order_in_which_a_walk_opens_their_blocks_over_30_random_runs() -> None:
    seed, trials, stop = 27, 30, 400
    print(f"seed {seed}, {trials} runs, {stop} positions walked")
    rng = np.random.default_rng(seed)
    compared = 0
    for trial in range(trials):
        made = world(rng, int(rng.integers(1, 4)), int(rng.integers(1, 4)), largest=6, shards=30)
        order = made.order(trial, shards_per_block=int(rng.integers(1, 4)), global_batch=int(rng.integers(1, 6)))
        filled = {(s, k) for s, shards in enumerate(made.assigned) for k, one in enumerate(shards) if len(one)}
        position = int(rng.integers(0, stop // 2))
        ahead = order.upcoming(position, 1000)
        assert len(ahead) == len(filled)
        assert set(ahead) == filled
        assert order.upcoming(position, 3) == ahead[:3]
        opened: dict[tuple[int, int], None] = {}
        ordinals: Counter[tuple[int, int]] = Counter()
        for now, one in enumerate(walk(order, stop)):
            part = order._orders[one.source, one.bucket]
            if now >= position:
                _, shards = next(part.blocks_from(ordinals[one.source, one.bucket]))
                assert one.shard in shards
                opened.update(dict.fromkeys((one.source, shard) for shard in shards))
            ordinals[one.source, one.bucket] += 1
        assert ahead[: len(opened)] == list(opened)
        compared += len(opened)
    print(f"{compared:,} shards compared")
    assert compared > 200
    plain = RunOrder([UNEVEN, UNEVEN], 0, shuffle=False)
    assert plain.upcoming(sum(UNEVEN[:11]), 3) == [(0, 11), (0, 12), (1, 0)]


def test_without_shuffle_sources_follow_each_other_in_file_order_and_buckets_are_told() -> None:
    made = world(np.random.default_rng(28), 2, 3)
    order = made.order(0, shuffle=False)
    expected = [
        Place(source, 0, shard, sample, int(bucket))
        for source, shards in enumerate(made.assigned)
        for shard, buckets in enumerate(shards)
        for sample, bucket in enumerate(buckets)
    ]
    assert walk(order, len(order)) == expected
    assert order.locate(len(order) + 1) == expected[1]._replace(epoch=1)
    assert [order.bucket_of(position) for position in range(len(order))] == [one.bucket for one in expected]


def test_a_reserve_of_one_source_is_the_sample_at_the_drawn_rank() -> None:
    order, starts = RunOrder([UNEVEN], 9), np.concatenate([[0], np.cumsum(UNEVEN)])
    for position, attempt in itertools.product(range(200), range(3)):
        rank = int(uniform(9, Purpose.RESERVE, position, attempt) * sum(UNEVEN))
        shard = next(k for k in range(len(UNEVEN)) if starts[k] <= rank < starts[k + 1])
        assert order.reserve(position, attempt) == Place(0, -1, shard, rank - starts[shard], 0)


def test_reserves_are_uniform_over_the_samples_of_the_bucket_in_all_sources() -> None:
    made = world(np.random.default_rng(29), 3, 3)
    order = made.order(4, global_batch=4)
    for bucket in range(3):
        every = {(source, *one) for source in range(3) for one in made.every(source, bucket)}
        draws = 100 * len(every)
        places = [order.reserve(position, 0, bucket) for position in range(draws)]
        found = Counter((one.source, one.shard, one.sample) for one in places)
        assert set(found) == every
        chi_square = sum((n - 100) ** 2 / 100 for n in found.values())
        assert chi_square < len(every) + 5 * np.sqrt(2 * len(every))


def test_a_hundred_million_samples_in_two_sources_and_seven_buckets_cost_less_than_thirty_megabytes() -> None:
    shard = np.random.default_rng(0).choice(7, 10_000)
    column = np.bincount(shard, minlength=7)
    counts = [np.tile(column, (8000, 1)), np.tile(column, (2000, 1))]
    tracemalloc.start()
    order = RunOrder(counts, 0, global_batch=1024, members=lambda source, number: shard)
    before = tracemalloc.get_traced_memory()[0]
    for start in (0, 5 * 10**7, 10**8 - 100, 10**9 + 17):
        order.locate_many(np.arange(start, start + 256))
    order.upcoming(10**9, 50)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{before / 1e6:.1f} MB made, {after / 1e6:.1f} MB used, {peak / 1e6:.1f} MB at most")
    assert peak < 30e6


def test_what_cannot_be_mixed_is_an_error() -> None:
    counts = [np.array([[3, 2], [1, 0]])]
    with pytest.raises(ValueError, match="2 buckets need a global batch"):
        RunOrder(counts, 0, members=lambda source, shard: np.zeros(5))
    with pytest.raises(ValueError, match="2 buckets need a global batch"):
        RunOrder(counts, 0, global_batch=4)
    with pytest.raises(ValueError, match="each source needs some of both"):
        RunOrder([[3], [0]], 0)
    with pytest.raises(ValueError, match="each source needs some of both"):
        RunOrder([[3]], 0, weights=[1, 2])
    for weights in ([1, None], [1, 0], [1, -2], [1, float("nan")]):
        with pytest.raises(ValueError, match=r"weights are .*allowed are positive numbers, or none"):
            RunOrder([[3], [4]], 0, weights=weights)
    with pytest.raises(ValueError, match="position is -1"):
        RunOrder([[3], [4]], 0).locate(-1)
    other = RunOrder(counts, 0, global_batch=4, members=lambda source, shard: np.array([0, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match=r"source 0, shard .* hold \[4, 1\] samples, but the order was made for"):
        walk(other, 8)
