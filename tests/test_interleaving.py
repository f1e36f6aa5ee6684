"""Interleaving: exact shares in every prefix, inverse functions, and arrays equal to integers, over random weights."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice, product

import numpy as np
import pytest

from ldm.data.interleaving import LARGEST_TOTAL, Mix

# Half the sum of the reciprocal Fibonacci numbers, 3.35988... (OEIS A079586).
BOUND = 3.3598856662 / 2


def random_weights(rng: np.random.Generator, trial: int) -> list[int | float]:
    """1 to 12 weights: small integers with zeros, huge integers, decimals, or powers of 2 (the deepest trees)."""
    number = int(rng.integers(1, 13))
    weights = (
        rng.integers(0, 40, number),
        rng.integers(1, 2**50, number),
        np.round(rng.random(number), 3) + 0.001,
        2 ** rng.integers(0, 12, number),
    )[trial % 4]
    return weights.tolist() if weights.any() else [1]


def test_every_prefix_holds_each_share_within_the_bound_and_ordinals_count_up_over_200_random_mixes() -> None:
    seed, trials, items = 3, 200, 400
    print(f"seed {seed}, {trials} mixes, {items} items each")
    rng = np.random.default_rng(seed)
    worst = 0.0
    for trial in range(trials):
        weights = random_weights(rng, trial)
        mix = Mix(weights)
        exact = [round(one * 1000) for one in weights]
        placed = [mix.place(item) for item in range(items)]
        seen = [0] * len(weights)
        for item, (source, ordinal) in enumerate(placed):
            assert ordinal == seen[source]
            assert mix.item(source, ordinal) == item
            seen[source] += 1
            errors = [abs(n * sum(exact) - (item + 1) * one) for n, one in zip(seen, exact, strict=True)]
            worst = max(worst, max(errors) / sum(exact))
            assert seen == [mix.count(one, item + 1) for one in range(len(weights))]
        sources, ordinals = mix.places(np.arange(items))
        assert list(zip(sources.tolist(), ordinals.tolist(), strict=True)) == placed
    print(f"largest distance from a share: {worst:.3f} items; the bound is {BOUND:.3f}")
    assert worst <= BOUND


def test_the_deepest_trees_which_fibonacci_weights_give_keep_the_bound() -> None:
    weights = [1, 1]
    while len(weights) < 16:
        weights.append(sum(weights[-2:]))
    mix = Mix(weights)
    sources, _ = mix.places(np.arange(sum(weights)))
    worst = 0.0
    for source, weight in enumerate(weights):
        seen = np.cumsum(sources == source)
        assert seen[-1] == weight
        worst = max(worst, np.abs(seen - np.arange(1, len(seen) + 1) * (weight / sum(weights))).max())
    assert 0.9 < worst <= BOUND


@pytest.mark.parametrize("weights", [[1], [3, 1], [1, 1, 1], [5, 7, 11, 13], [2, 0, 3], [100, 1, 1, 1, 1]])
def test_shares_are_exact_after_each_period_of_whole_weights(weights: list[int]) -> None:
    period = sum(weights)
    mix = Mix([10 * one for one in weights])
    for start in range(0, 3 * period, period):
        sources, _ = mix.places(np.arange(start, start + period))
        assert np.bincount(sources, minlength=len(weights)).tolist() == weights


def test_two_sources_are_bresenhams_line() -> None:
    for left, right in product(range(1, 12), repeat=2):
        mix = Mix([left, right])
        sources, _ = mix.places(np.arange(200))
        for source, weight in ((0, left), (1, right)):
            seen = np.cumsum(sources == source)
            assert np.abs(seen - np.arange(1, 201) * weight / (left + right)).max() <= 0.5 + 1e-9


def naive(weights: Sequence[int], items: int) -> list[int]:
    """Greedy: the source that is furthest behind its share; independent of trees."""
    seen = [0] * len(weights)
    order = []
    for item in range(items):
        behind = [(item + 1) * w - n * sum(weights) for w, n in zip(weights, seen, strict=True)]
        order.append(behind.index(max(behind)))
        seen[order[-1]] += 1
    return order


def test_no_source_waits_longer_than_twice_a_greedy_interleaving_makes_it_wait() -> None:
    rng = np.random.default_rng(0)
    for trial in islice((t for t in range(200) if t % 4 != 1), 60):
        weights = Mix(random_weights(rng, trial)).weights
        items = 2000
        ours, greedy = (np.asarray(one) for one in (Mix(weights).places(np.arange(items))[0], naive(weights, items)))
        for source in range(len(weights)):
            gaps = [np.diff(np.flatnonzero(one == source)) for one in (ours, greedy)]
            if min(map(len, gaps)) > 3:
                assert gaps[0].max() <= 2 * gaps[1].max() + 2


def test_far_items_are_placed_exactly_by_arrays_and_by_integers_over_200_random_mixes() -> None:
    seed, trials = 5, 200
    print(f"seed {seed}, {trials} mixes, 50 items each up to 2^62")
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        mix = Mix(random_weights(rng, trial))
        items = rng.integers(0, 2 ** rng.integers(20, 62), 50)
        sources, ordinals = mix.places(items)
        for item, source, ordinal in zip(items.tolist(), sources.tolist(), ordinals.tolist(), strict=True):
            assert mix.place(item) == (source, ordinal)
            assert mix.item(source, ordinal) == item
            assert mix.count(source, item) == ordinal


def test_weights_are_taken_as_they_are_written() -> None:
    assert Mix([0.1, 0.7, 0.2]).weights == [1, 7, 2]
    assert Mix([2.5, 1]).weights == [5, 2]
    assert Mix([Fraction(1, 3), Fraction(1, 6)]).weights == [2, 1]
    assert Mix([30_000_000, 10_000_000]).weights == [3, 1]
    assert Mix([1e-3, 1000.0]).weights == [1, 10**6]


def test_ratios_beyond_48_bits_are_rounded_and_no_source_is_lost() -> None:
    mix = Mix([1, 10**30, 0.3333333333333333e30, 0])
    assert sum(mix.weights) <= LARGEST_TOTAL
    assert mix.weights[0] == 1
    assert mix.weights[3] == 0
    assert abs(mix.weights[1] / mix.weights[2] - 3) < 1e-12
    items = np.random.default_rng(0).integers(0, 2**62, 100)
    sources, ordinals = mix.places(items)
    assert [mix.place(one) for one in items.tolist()] == list(zip(sources.tolist(), ordinals.tolist(), strict=True))


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, float("nan")], [float("inf")]])
def test_weights_that_are_none_are_an_error(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"allowed are finite numbers|has to be positive"):
        Mix(weights)


def test_a_negative_item_and_the_items_of_a_source_without_weight_are_errors() -> None:
    mix = Mix([1, 0])
    with pytest.raises(ValueError, match="item is -1"):
        mix.place(-1)
    with pytest.raises(ValueError, match="item is -2"):
        mix.places(np.array([0, -2]))
    with pytest.raises(ValueError, match="weight is 0"):
        mix.item(1, 0)
    assert mix.count(1, 100) == 0
