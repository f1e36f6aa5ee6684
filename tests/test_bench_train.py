"""The benchmark of a training step measures equal work, refuses other work, and writes what it shows.

How fast is not tested.
"""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import bench_train
import pytest
import torch
import train_ways
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import DEBUG
from torch import Tensor
from train_ways import Inputs, Ours, Script, Tuned, check_same, check_updates, fresh_accelerator, initial_weights

from ldm.config import load_config

CPU = torch.device("cpu")
SIDE = 8


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """What a benchmark made of accelerate's state is none of other tests'."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def config():
    return load_config(DEBUG).unet


@pytest.fixture(scope="module")
def weights(config) -> dict[str, Tensor]:
    return initial_weights(config, CPU)


@pytest.fixture(scope="module")
def inputs(config) -> Inputs:
    return Inputs.random(config, 2, SIDE, 5, CPU)


def test_the_benchmark_writes_a_record_for_each_peer_and_the_run(tmp_path: Path, capsys) -> None:
    sizes = ["--size", "8", "--batch", "2", "--rounds", "2", "--precisions", "no", "--steps", "2", "--device", "cpu"]
    assert bench_train.main(["--config", str(DEBUG), *sizes, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())
    run, steps = rows[:2], rows[2:]
    assert [row["name"].split(": ")[1] for row in run] == ["waiting for data", "average"]
    assert run[0]["parts_seconds"].keys() == {
        "data", "copy", "forward", "backward", "optimizer", "average", "log", "loop",
    }  # fmt: skip
    assert sum(run[0]["parts_seconds"].values()) == pytest.approx(run[0]["seconds_a_step"])
    assert [row["peer_name"] for row in steps] == [Script.name, Tuned.name]
    for row in steps:
        assert row["ratio"] == row["peer"] / row["ours"]
        assert (row["unit"], row["rounds"], row["batch"], row["side"]) == ("s", 2, 2, 8)
        assert row["difference"] < 1e-5
        assert row["ours_pictures_per_second"] == pytest.approx(2 / row["ours"])
        assert row["ours_tflops"] / row["ours_pictures_per_second"] == pytest.approx(
            row["peer_tflops"] / row["peer_pictures_per_second"]
        )
        assert f"ours {row['ours']:.4g} (" in shown
    assert "forward" in shown


def test_a_compiled_step_is_compared_and_measured_too(tmp_path: Path, capsys) -> None:
    """On a CPU without its memory: what watches each operator sees nothing of a compiled program."""
    torch._dynamo.reset()
    sizes = ["--size", "8", "--batch", "2", "--rounds", "1", "--precisions", "no", "--device", "cpu"]
    ways = ["--compile", "--peers", "script", "--json", str(tmp_path / "r.json")]
    assert bench_train.main(["--config", str(DEBUG), *sizes, *ways]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert row["compiled"]
    assert row["difference"] < 1e-5
    assert "peer_step_gib" in row
    assert "ours_step_gib" not in row
    assert capsys.readouterr().out.count(" GiB") == 1


def test_only_one_peers_network_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of SD's size would not fit."""
    there = weakref.WeakSet[Script]()

    class Watched(Script):
        def __init__(self, *given) -> None:
            assert not there, "the peer before is still there"
            super().__init__(*given)
            there.add(self)

    monkeypatch.setattr(bench_train, "PEERS", {"script": Watched, "tuned": Watched})
    sizes = ["--size", "8", "--batch", "1", "--rounds", "1", "--precisions", "no", "--device", "cpu"]
    assert bench_train.main(["--config", str(DEBUG), *sizes]) == 0


def test_operations_of_a_picture_are_those_of_the_published_count() -> None:
    (_, config), *_ = bench_train.networks([320], None, 32)
    # FLOP counts of SD 1.5 by others: 90.1 G multiply-accumulates forward at 32x32.
    assert bench_train.picture_tflop(config, 32) == pytest.approx(6 * 90.1e9 / 1e12, rel=2e-3)


class OtherWeight(Script):
    """A peer of which one weight is another."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            self.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] += 0.1


class OtherLoss(Script):
    """A peer whose gradients are those of another loss; its output is the same."""

    def _loss(self):
        out, loss = super()._loss()
        return out, 1.01 * loss


class Idle(Script):
    """A peer that skips the optimizer."""

    def step(self) -> None:
        self.ema.step(self.unet.parameters())


class OtherRate(Script):
    """A peer whose learning rate is another."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1.1


class NoAverage(Script):
    """A peer that leaves its average as it was."""

    def step(self) -> None:
        shadows = [one.clone() for one in self.ema.shadow_params]
        super().step()
        for one, before in zip(self.ema.shadow_params, shadows, strict=True):
            one.copy_(before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equal_work_passes(config, weights, inputs, precision) -> None:
    accelerator = fresh_accelerator(precision)
    exact = train_ways.reference(config, weights, inputs)
    ours, peer = (way(config, weights, inputs, accelerator) for way in (Ours, Script))
    found = check_same(ours, peer, precision, exact)
    assert max(found.values()) < (1e-5 if precision == "no" else 0.1)
    check_updates(ours, peer, precision)


@pytest.mark.parametrize(
    ("peer", "message"),
    [(OtherWeight, "^output of ldm and of diffusers"), (OtherLoss, "^gradients of ldm and of diffusers")],
)
def test_a_peer_that_computes_something_else_is_refused(config, weights, inputs, peer, message) -> None:
    accelerator = fresh_accelerator("no")
    with pytest.raises(ValueError, match=f"{message}.* times would compare different things"):
        check_same(Ours(config, weights, inputs, accelerator), peer(config, weights, inputs, accelerator), "no")


def test_ours_with_another_weight_is_refused_in_bfloat16_too(config, weights, inputs) -> None:
    accelerator = fresh_accelerator("bf16")
    exact = train_ways.reference(config, weights, inputs)
    name = "mid_block.resnets.0.conv1.weight"
    ours = Ours(config, weights | {name: 1.5 * weights[name]}, inputs, accelerator)
    with pytest.raises(ValueError, match=r"of ldm in bf16 are .* from float32's"):
        check_same(ours, Script(config, weights, inputs, accelerator), "bf16", exact)


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (Idle, "changes weights otherwise"),
        (OtherRate, "changes weights otherwise"),
        (NoAverage, "left the average as it was"),
    ],
)
def test_a_peer_that_takes_another_step_is_refused(config, weights, inputs, peer, message) -> None:
    accelerator = fresh_accelerator("no")
    ours, other = (way(config, weights, inputs, accelerator) for way in (Ours, peer))
    if peer is Idle:
        # Its average may stay as it was: what counts is the weights.
        other.ema.shadow_params[0].add_(1.0)
    with pytest.raises(ValueError, match=message):
        check_updates(ours, other, "no")


def test_a_run_with_a_second_text_encoder_is_refused(tmp_path: Path) -> None:
    from synthetic_run import synthetic_run

    with pytest.raises(ValueError, match="found text_encoder_2, expected a network with one text encoder"):
        synthetic_run(tmp_path, DEBUG.parent / "sdxl.yaml", 8, 4)
