"""Bad numbers: steps that are skipped leave no trace but their log; too many in a row end the run."""

import json
import math
import threading

import pytest
import torch
from training_runs import assert_same_state, metrics, train

import ldm.train
from ldm.training.bad_numbers import LOG, BadNumbersError, poisoned
from ldm.training.optimizer import OptimizerConfig, make_optimizer, step_unless

ALL = ("--metrics.log_every=1", "--optimizer.schedule=constant")


def losses_made_bad(monkeypatch, steps, value=math.nan, row=3):
    """From here on the loss of sample `row` at the given steps (from 1) is `value`, with a gradient that is finite."""
    loss_of = ldm.train.batch_loss

    def bad(run, network, batch):
        loss, t, latents = loss_of(run, network, batch)
        if int(batch.positions[0]) // 16 + 1 in steps:
            hit = torch.arange(len(loss)) == row
            loss = torch.where(hit, torch.full_like(loss, value), loss)  # gradient 0 there, as of an overflow
        return loss, t, latents

    monkeypatch.setattr(ldm.train, "batch_loss", bad)


def test_a_finite_loss_passes_bit_by_bit_with_its_gradient():
    loss = torch.rand(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    poisoned(loss).backward()
    assert torch.equal(loss.grad, torch.full((7,), 1 / 7))
    assert poisoned(loss).item() == loss.mean().item()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_poisons_gradients_that_are(value):
    weight = torch.ones((), requires_grad=True)
    loss = torch.where(torch.tensor([True, False, False]), torch.tensor(value), weight * torch.arange(3))
    poisoned(loss).backward()
    assert weight.grad.isnan()


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_optimizer_step_changes_neither_weights_nor_moments_nor_counts(fused):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7)
    inner = make_optimizer(layer.named_parameters(), OptimizerConfig(lr=0.1), scaled=not fused)
    assert bool(inner.defaults["fused"]) == fused
    optimizer = accelerator.prepare_optimizer(inner)
    states = []
    for skip in (False, True, False):
        layer(torch.ones(2, 5)).square().sum().backward()
        if skip:
            for p in layer.parameters():
                p.grad.fill_(math.nan)
        assert step_unless(optimizer, torch.tensor(skip)).item() == skip
        optimizer.zero_grad()
        moments = [value.clone() for p in layer.parameters() for value in inner.state[p].values()]
        states.append([p.detach().clone() for p in layer.parameters()] + moments)
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_steps_are_skipped_logged_and_leave_the_run_that_never_took_them(
    encoded_shards, tmp_path, monkeypatch, value
):
    with monkeypatch.context() as patch:
        losses_made_bad(patch, {4, 9, 10}, value)
        lines = train(tmp_path / "run", encoded_shards, "--training.steps=12", *ALL)
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [(line["step"], line["positions"], line["reason"]) for line in log] == [
        (4, [3 * 16 + 3], "loss"),
        (9, [8 * 16 + 3], "loss"),
        (10, [9 * 16 + 3], "loss"),
    ]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3]
    assert all(line["loss"] is not None for line in lines)  # of the fifteen good samples

    step_of = ldm.train.train_step

    def never_taken(run, step, batches, clock):
        if step + 1 not in (4, 9, 10):
            return step_of(run, step, batches, clock)
        batch = next(batches)
        ldm.train.settle(run)
        return batch.noise

    monkeypatch.setattr(ldm.train, "train_step", never_taken)
    train(tmp_path / "without", encoded_shards, "--training.steps=12", "--metrics.log_every=100", *ALL[1:])
    assert_same_state(tmp_path / "run/checkpoints/latest", tmp_path / "without/checkpoints/latest")


def test_too_many_in_a_row_end_the_run_with_the_weights_of_before(encoded_shards, tmp_path, monkeypatch):
    options = ("--training.checkpoint_every=1", "--training.keep_checkpoints=0", *ALL, "--training.bad_steps_allowed=2")
    train(tmp_path / "run", encoded_shards, "--training.steps=5", *options)
    losses_made_bad(monkeypatch, {6, 8, 9, 10})
    with pytest.raises(BadNumbersError, match=r"3 steps in a row up to step 10.*bad_steps_allowed is 2"):
        train(tmp_path / "run", encoded_shards, "--training.steps=12", *options)
    assert json.loads((tmp_path / "run/status.json").read_text())["outcome"] == "failed"
    for thread in threading.enumerate():  # as the interpreter does at its end
        if thread.name == "checkpoint writer":
            thread.join()
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-00000009"
    a, b = tmp_path / "run/checkpoints/step-00000007", tmp_path / "run/checkpoints/step-00000009"
    assert_same_state(a, b)


def test_a_resumed_run_counts_on_and_drops_log_lines_of_steps_done_again(encoded_shards, tmp_path, monkeypatch):
    options = ("--training.checkpoint_every=5", *ALL)
    losses_made_bad(monkeypatch, {4, 7})
    train(tmp_path / "run", encoded_shards, "--training.steps=8", *options)
    for name in ("latest", "step-00000008"):
        path = tmp_path / "run/checkpoints" / name
        path.unlink() if path.is_symlink() else (path / "hashes.json").unlink()
    train(tmp_path / "run", encoded_shards, "--training.steps=9", *options)
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert log == [4, 7]
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 2
