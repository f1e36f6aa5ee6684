"""Where a step's time goes: parts add up to the step, and looking changes nothing that is trained."""

import time
from types import SimpleNamespace

import pytest
import torch
from training_runs import assert_same_state, train

import ldm.train
import ldm.training.breakdown
from ldm.training.breakdown import NO_PARTS, PARTS, StepParts

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that goes on when it is told to."""
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(ldm.training.breakdown, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_seconds_are_told_by_part_and_step_and_begin_anew_after_a_reading(clock) -> None:
    parts = StepParts(CPU)
    for _ in range(4):
        for _ in range(2):  # micro-batches
            with parts("forward"):
                clock.now += 0.25
        clock.now += 10  # of no part
        with parts("optimizer"):
            clock.now += 1
        parts.step()
    read = parts.read()
    assert list(read) == list(PARTS)
    assert {part: seconds for part, seconds in read.items() if seconds} == {"forward": 0.5, "optimizer": 1.0}
    assert set(parts.read().values()) == {0}


def test_a_block_that_fails_is_counted_and_its_error_goes_on(clock) -> None:
    parts = StepParts(CPU)

    def fail_within():
        with parts("data"):
            clock.now += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    parts.step()
    assert parts.read()["data"] == 3


def test_parts_of_a_run_add_up_to_no_more_than_its_steps_and_change_nothing(encoded_shards, tmp_path, monkeypatch):
    options = ("--training.steps=8", "--training.max_micro_batch=8", "--metrics.log_every=4")
    train(tmp_path / "unread", encoded_shards, *options)
    found, seconds, step_of = [], [], ldm.train.train_step

    def timed(run, step, batches, clock):
        if not found:
            assert run.parts is NO_PARTS
            run.parts = StepParts(CPU)
            found.append(run.parts)
        began = time.perf_counter()
        latents = step_of(run, step, batches, clock)
        seconds.append(time.perf_counter() - began)
        return latents

    monkeypatch.setattr(ldm.train, "train_step", timed)
    train(tmp_path / "read", encoded_shards, *options)
    read = found[0].read()
    assert all(read[part] > 0 for part in PARTS)
    within = sum(value for part, value in read.items() if part not in ("log", "average"))  # these happen after it, too
    assert within <= sum(seconds) / 8
    assert_same_state(tmp_path / "unread/checkpoints/latest", tmp_path / "read/checkpoints/latest")


def test_what_nobody_reads_is_not_recorded(clock) -> None:
    for _ in range(3):
        with NO_PARTS("forward"):
            clock.now += 1
        NO_PARTS.step()
    assert set(NO_PARTS.read().values()) == {0}
