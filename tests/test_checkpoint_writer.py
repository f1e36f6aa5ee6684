"""Background writing: the same checkpoint, of the save's moment, whatever training and storage do meanwhile."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.models.durable import write_tensors
from ldm.training.checkpoint import (
    AVERAGED,
    CheckpointError,
    TrainingState,
    load_training_state,
    newest_complete,
    save_checkpoint,
)
from ldm.training.checkpoint_writer import CheckpointWriter, HostCopy


def state(step: int) -> TrainingState:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "conv.bias": torch.tensor([float("nan"), -0.0, step]),
        "ids": torch.arange(5),
    }
    optimizer = {f"{name}/exp_avg": tensor.float() * 2 for name, tensor in weights.items()}
    optimizer["conv.weight/step"] = torch.tensor(float(step))
    return TrainingState(step, weights, optimizer, ema_updates=step, scalars={"loss_window": [1.5, step]})


def averaged(step: int) -> dict[str, Tensor]:
    return {name: tensor.float() + 1 for name, tensor in state(step).weights.items()}


def write_pipeline(folder: Path, average, earlier: Path | None) -> None:
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    write_tensors(average, folder / AVERAGED)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].contiguous().numpy().tobytes() == b[k].contiguous().numpy().tobytes()
        for k in a
    )


def assert_holds(checkpoint: Path, step: int) -> None:
    loaded, average = load_training_state(checkpoint)
    assert loaded.step == loaded.ema_updates == step
    assert loaded.scalars == state(step).scalars
    assert same(loaded.weights, state(step).weights)
    assert same(loaded.optimizer, state(step).optimizer)
    assert same(average, averaged(step))


def test_the_files_are_those_of_the_synchronous_save(tmp_path):
    writer = CheckpointWriter(tmp_path / "a", keep=0)
    for step in (1, 2, 3):
        writer.save(state(step), averaged(step), write_pipeline, config_yaml="seed: 0\n")
    writer.wait()
    for step in (1, 2, 3):
        there = save_checkpoint(
            tmp_path / "b",
            state(step),
            lambda folder, step=step: write_pipeline(folder, averaged(step), None),
            config_yaml="seed: 0\n",
            keep=0,
        )
        here = tmp_path / "a" / there.name
        assert json.loads((here / "hashes.json").read_text()) == json.loads((there / "hashes.json").read_text())
        assert_holds(here, step)
    assert writer.last == tmp_path / "a" / "step-00000003"
    assert writer.poll()


def test_what_is_written_is_the_state_at_the_save_though_training_goes_on(tmp_path):
    go = threading.Event()

    def held_up(folder, average, earlier):
        assert go.wait(20)
        write_pipeline(folder, average, earlier)

    writer = CheckpointWriter(tmp_path, keep=0)
    live, average = state(4), averaged(4)
    writer.save(live, average, held_up, config_yaml="")
    assert not writer.poll()  # it returned while the write is under way
    live.scalars["loss_window"].append("later")
    writer.wait_copied()
    assert not writer.poll()
    for tensors in (live.weights, live.optimizer, average):
        for tensor in tensors.values():
            tensor.zero_()
    assert list(tmp_path.glob("step-*")) == []
    go.set()
    writer.wait()
    assert_holds(tmp_path / "latest", 4)


def test_the_state_may_be_changed_as_soon_as_it_is_copied_200_of_200_times(tmp_path):
    # Large enough that a copy takes milliseconds: a wait that returned early would let zeros into it.
    shape, trials = (512, 2048), 200
    writer = CheckpointWriter(tmp_path, keep=1)
    held = {}

    def look(folder, average, earlier):
        held["average"] = average["w"].clone()
        raise OSError("not to be written: only what was copied counts here")

    said = []
    writer._report, writer._allowed = said.append, trials
    for trial in range(1, trials + 1):
        live = {"w": torch.full(shape, float(trial))}
        writer.save(TrainingState(trial, live, {}, ema_updates=0), live, look, config_yaml="")
        writer.wait_copied()
        live["w"].zero_()
        with pytest.raises((OSError, CheckpointError)):
            writer.wait()
        assert (held["average"] == trial).all()
    assert len(said) == trials


def test_a_copy_that_fails_is_a_failed_write_and_holds_nobody_up(tmp_path):
    said = []
    writer = CheckpointWriter(tmp_path, keep=0, report=said.append)
    writer.save(state(1), averaged(1), write_pipeline, config_yaml="")
    writer.wait()
    writer._host.take = lambda groups, ready: (_ for _ in ()).throw(MemoryError("no room for the copy"))
    writer.save(state(2), averaged(2), write_pipeline, config_yaml="")
    writer.wait_copied()
    with pytest.raises(CheckpointError, match="no room for the copy"):
        writer.wait()
    assert "step-00000001, is untouched" in said[0]


def test_the_next_save_waits_for_the_one_under_way_before_it_takes_its_buffers(tmp_path):
    go = threading.Event()

    def held_up(folder, average, earlier):
        assert go.wait(20)
        write_pipeline(folder, average, earlier)

    writer = CheckpointWriter(tmp_path, keep=0)
    writer.save(state(1), averaged(1), held_up, config_yaml="")
    second = threading.Thread(
        target=writer.save, args=(state(2), averaged(2), write_pipeline), kwargs={"config_yaml": ""}
    )
    second.start()
    second.join(0.3)
    assert second.is_alive()
    go.set()
    second.join(20)
    writer.wait()
    for step in (1, 2):
        assert_holds(tmp_path / f"step-{step:08d}", step)


def test_buffers_are_kept_from_save_to_save_and_made_anew_for_other_shapes():
    host = HostCopy()
    groups = [state(1).weights, state(1).optimizer]
    first = host.take(groups, {})
    places = [tensor.data_ptr() for group in first for tensor in group.values()]
    again = host.take([state(2).weights, state(2).optimizer], {})
    assert [tensor.data_ptr() for group in again for tensor in group.values()] == places
    assert same(again[0], state(2).weights)
    assert same(again[1], state(2).optimizer)
    assert again[0]["conv.weight"].stride() == groups[0]["conv.weight"].stride()
    spans = sorted((t.data_ptr(), t.numel() * t.element_size()) for group in again for t in group.values())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(spans))
    other = {
        "w": torch.ones(3, dtype=torch.bfloat16),
        "gaps": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        "0": torch.ones(0),
    }
    for values in (other, {"w": torch.ones(5), "gaps": torch.ones(2, 2, dtype=torch.int64), "0": torch.ones(1)}):
        copies = host.take([values], {})[0]
        for name, value in values.items():
            assert torch.equal(copies[name], value)
            assert copies[name].dtype == value.dtype


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("disk full (os error 28)")]
)
def test_a_failed_write_is_told_leaves_the_earlier_one_and_is_made_up_for_by_the_next_save(tmp_path, error):
    def fail(folder, average, earlier):
        write_pipeline(folder, average, earlier)
        raise error

    said = []
    writer = CheckpointWriter(tmp_path, keep=1, report=said.append)
    writer.save(state(1), averaged(1), write_pipeline, config_yaml="")
    writer.save(state(2), averaged(2), fail, config_yaml="")
    with pytest.raises((OSError, CheckpointError), match=r"os error 28|No space left"):
        writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert_holds(tmp_path / "latest", 1)
    assert writer.last == tmp_path / "step-00000001"
    assert writer.failures == len(said) == 1
    assert "checkpoint step-00000002 was not written, the earlier one, step-00000001, is untouched" in said[0]
    assert str(error) in said[0]
    writer.save(state(3), averaged(3), write_pipeline, config_yaml="")
    writer.wait()
    assert writer.failures == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_more_failures_in_a_row_than_allowed_stop_the_run_at_the_next_save(tmp_path):
    said = []
    writer = CheckpointWriter(tmp_path, keep=1, failures_allowed=1, report=said.append)
    writer.save(state(1), averaged(1), full, config_yaml="")
    writer.save(state(2), averaged(2), full, config_yaml="")  # one is allowed
    with pytest.raises(CheckpointError, match=r"2 writes of checkpoints in a row have failed, 1 are allowed.*No space"):
        writer.save(state(3), averaged(3), write_pipeline, config_yaml="")
    with pytest.raises(CheckpointError, match="2 writes"):
        writer.wait()
    assert "there is none before it" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_failures_that_are_not_in_a_row_are_not_added_up(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1, failures_allowed=1, report=lambda line: None)
    for step in range(1, 9):
        writer.save(state(step), averaged(step), full if step % 2 else write_pipeline, config_yaml="")
    writer.wait()
    assert writer.last == tmp_path / "step-00000008"


def test_a_fault_after_the_rename_counts_but_the_new_checkpoint_does_too(tmp_path, monkeypatch):
    said = []
    writer = CheckpointWriter(tmp_path, keep=1, report=said.append)
    writer.save(state(1), averaged(1), write_pipeline, config_yaml="")
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", full)
        writer.save(state(2), averaged(2), write_pipeline, config_yaml="")
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    assert "checkpoint step-00000002 is complete, but" in said[0]
    assert writer.last == newest_complete(tmp_path, said.append)
    assert_holds(tmp_path / "latest", 1)
    assert_holds(tmp_path / "step-00000002", 2)


def test_frozen_parts_lie_on_the_storage_twice_however_many_checkpoints_there_are(tmp_path):
    told = []

    def write(folder, average, earlier):
        told.append(earlier and earlier.name)
        write_pipeline(folder, average, None)
        (folder / "vae").mkdir()
        if earlier is None:
            (folder / "vae" / "config.json").write_text("{}")
        else:
            os.link(earlier / "vae" / "config.json", folder / "vae" / "config.json")

    save_checkpoint(tmp_path, state(1), lambda folder: write(folder, averaged(1), None), config_yaml="", keep=0)
    writer = CheckpointWriter(tmp_path, keep=2, report=lambda line: None)
    writer.last = tmp_path / "step-00000001"  # as a resumed run does
    for step in (2, 3, 4):
        writer.save(state(step), averaged(step), write, config_yaml="")
    writer.save(state(5), averaged(5), full, config_yaml="")
    for step in (6, 7):
        writer.save(state(step), averaged(step), write, config_yaml="")
    writer.wait()
    assert told == [None, None, "step-00000001", "step-00000002", "step-00000003", "step-00000004"]
    assert len({path.stat().st_ino for path in tmp_path.glob("step-*/vae/config.json")}) == 2


def test_a_program_that_ends_right_after_a_save_leaves_the_whole_checkpoint(tmp_path):
    program = """
import sys
from pathlib import Path
from test_checkpoint_writer import averaged, state, write_pipeline
from ldm.training.checkpoint_writer import CheckpointWriter

CheckpointWriter(Path(sys.argv[1]), keep=0).save(state(1), averaged(1), write_pipeline, config_yaml="")
raise SystemExit("no more steps")
"""
    for trial in range(5):
        root = tmp_path / str(trial)
        words = [sys.executable, "-c", program, str(root)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
        assert "no more steps" in done.stderr
        assert_holds(root / "latest", 1)


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from test_checkpoint_writer import averaged, state, write_pipeline
from ldm.training.checkpoint_writer import CheckpointWriter

def slow(folder, average, earlier):
    write_pipeline(folder, average, earlier)
    Path(sys.argv[1], "under way").touch()
    time.sleep(1)

writer = CheckpointWriter(Path(sys.argv[1]), keep=0)
writer.save(state(1), averaged(1), write_pipeline, config_yaml="")
writer.save(state(2), averaged(2), slow, config_yaml="")
while not Path(sys.argv[1], "under way").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("end", "code", "steps"),
    [
        ("", 0, [1, 2]),
        ("raise FloatingPointError('loss nan')", 1, [1, 2]),
        ("sys.exit(75)", 75, [1, 2]),
        ("os._exit(3)", 3, [1]),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, [1]),
    ],
)
def test_a_program_that_ends_in_mid_write_finishes_it_and_one_that_is_killed_leaves_none(tmp_path, end, code, steps):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + end, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == code, process.stderr
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in steps]
    assert_holds(tmp_path / "latest", steps[-1])
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(state(9), averaged(9), write_pipeline, config_yaml="")
    writer.wait()
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000009"]
