"""tools/replay.py: the loss of a step and of a sample, computed again from the checkpoint before it."""

import json

import pytest
import torch
from conftest import ROOT, run_tool
from training_runs import metrics, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoded_shards):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(
        folder, encoded_shards, "--training.checkpoint_every=5", "--training.steps=12", "--training.keep_checkpoints=0"
    )
    return folder


def replay(run, *words):
    output = run_tool(ROOT / "tools/replay.py", "--run", run, *words)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("step", "checkpoint"), [(6, "step-00000005"), (9, "step-00000005"), (3, "initial weights")])
def test_a_steps_loss_is_the_one_that_the_run_logged(run, step, checkpoint):
    output = run_tool(ROOT / "tools/replay.py", "--run", run, "--step", str(step))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert checkpoint in output
    assert lines[-1]["loss"] == metrics(run)[step - 1]["loss"] == lines[-1]["logged_loss"]
    assert [line["position"] for line in lines[:-1]] == list(range(16 * (step - 1), 16 * step))
    mean = torch.tensor([line["loss"] for line in lines[:-1]], dtype=torch.float64).mean().item()
    assert mean == pytest.approx(lines[-1]["loss"], rel=1e-12)


def test_one_position_is_computed_with_its_step_and_the_run_stays_as_it_was(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    whole, one = replay(run, "--step", "7"), replay(run, "--step", "7", "--position", "100")
    assert one == [line for line in whole if line.get("position") in (100, None)]
    assert one[0]["caption"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--step", "13"), "the run has steps 1 to 12"),
        (("--step", "7", "--position", "5"), "--position 5 belongs to step 1; step 7 has positions 96 to 111"),
    ],
)
def test_what_the_run_does_not_have_is_said(run, words, message):
    with pytest.raises(AssertionError, match=message):
        replay(run, *words)
