"""Positions of micro-batches: any split gives the same global batches, from any step, and bad values are named."""

import itertools
import random
from typing import Any

import pytest
from tiny_shards import positions_of

from ldm.data.positions import Positions

SPLITS = [(1, 24, 1), (2, 4, 3), (4, 3, 2), (3, 2, 4), (8, 1, 3)]


def test_positions_of_ranks_and_micro_batches_are_the_global_batch_in_order() -> None:
    for world, micro_batch, accumulation in [(1, 24, 1), (2, 4, 3), (4, 3, 2), (3, 2, 4), (8, 1, 3)]:
        for step in (0, 1, 1000):
            parts = [
                part
                for rank in range(world)
                for part in Positions(
                    rank=rank,
                    world=world,
                    micro_batch=micro_batch,
                    accumulation=accumulation,
                    start_step=step,
                    stop_step=step + 1,
                )
            ]
            assert all(len(part) == micro_batch for part in parts)
            assert list(itertools.chain(*parts)) == list(range(24 * step, 24 * (step + 1)))


def test_positions_of_300_random_splits_and_steps_are_the_runs_in_order() -> None:
    print("seed 8, 300 trials")
    rng = random.Random(8)
    for _ in range(300):
        world, micro_batch, accumulation = rng.choice(SPLITS)
        start = rng.choice((0, 1, rng.randrange(10**9)))
        split = {"world": world, "micro_batch": micro_batch, "accumulation": accumulation}
        steps = {"start_step": start, "stop_step": start + rng.randrange(5)}
        ranks = [Positions(rank=rank, **split, **steps) for rank in range(world)]
        count = steps["stop_step"] - start
        assert all(len(one) == len(list(one)) == count * accumulation for one in ranks)
        assert all(one.global_batch == 24 for one in ranks)
        for step in range(count):
            own = slice(step * accumulation, (step + 1) * accumulation)
            parts = [part for one in ranks for part in list(one)[own]]
            assert all(len(part) == micro_batch for part in parts)
            assert list(itertools.chain(*parts)) == list(range(24 * (start + step), 24 * (start + step + 1)))


def test_a_resume_goes_on_where_the_first_part_ended_and_each_iteration_is_the_same() -> None:
    whole = positions_of(rank=1, world=2, accumulation=3, stop_step=10)
    parts = [positions_of(rank=1, world=2, accumulation=3, start_step=a, stop_step=b) for a, b in ((0, 4), (4, 10))]
    assert [*parts[0], *parts[1]] == list(whole) == list(whole)
    assert [whole.of(number) for number in range(len(whole))] == list(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 0}, "world is 0; allowed are integers from 1"),
        ({"micro_batch": 0}, "micro_batch is 0; allowed are integers from 1"),
        ({"accumulation": -1}, "accumulation is -1; allowed are integers from 1"),
        ({"start_step": -1}, "start_step is -1; allowed are integers from 0"),
        ({"start_step": 7}, "stop_step is 6; allowed are integers from 7"),
        ({"rank": 1}, "rank is 1; allowed are 0 to world - 1, which is 0"),
        ({"rank": -1}, "rank is -1; allowed are"),
    ],
)
def test_values_that_cannot_be_are_errors_that_name_them(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"positions: {message}"):
        positions_of(**change)
