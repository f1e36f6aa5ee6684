"""Sharded checkpoints: saved by some processes, loaded by others, with the values of a run that never was sharded."""

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm.models.durable import write_tensors
from ldm.training.checkpoint import AVERAGED, CheckpointError, load_training_state, newest_complete, verify_checkpoint
from ldm.training.optimizer import OptimizerConfig, make_optimizer, optimizer_tensors
from ldm.training.sharded_checkpoint import load_sharded, save_sharded

DECAY = 0.9


class Training:
    """A small network with its optimizer and average; sharded when there is a process group."""

    def __init__(self, width: int = 7) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            # First dimensions that neither 2 nor 3 divides, one smaller than either, and a buffer.
            self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5), nn.Linear(5, 1, bias=False))
        self.model.register_buffer("scale", torch.tensor([2.0, 3.0]))
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.model:
                if not isinstance(layer, nn.Tanh):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = make_optimizer(self.model.named_parameters(), OptimizerConfig(lr=1e-2))
        self.averaged = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def train(self, start: int, stop: int) -> "Training":
        """Steps on batches that are a function of the step; each process has the whole batch."""
        for step in range(start, stop):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            (self.model(x) * self.model.scale[0]).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, parameter in self.model.named_parameters():
                self.averaged[name].lerp_(parameter.detach(), 1 - DECAY)
        return self

    def whole(self) -> dict[str, Tensor]:
        """All tensors, put together; collective."""
        named = {f"weights {name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"optimizer {name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        named |= {f"averaged {name}": tensor for name, tensor in self.averaged.items()}
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in named.items()
        }

    def save(self, root: Path, step: int, keep: int = 0) -> Path:
        scalars = {"ema_updates": step, "ledger": [[1, "a"]]}
        return save_sharded(
            root, step, self.model, self.optimizer, self.averaged, scalars, write_pipeline, "seed: 0\n", keep
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        return load_sharded(checkpoint, self.model, self.optimizer, self.averaged)


def write_pipeline(folder: Path, averaged: Any, earlier: Path | None) -> None:
    assert not dist.is_initialized() or dist.get_rank() == 0
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    write_tensors(averaged, folder / AVERAGED)


def _process(rank: int, world: int, meeting: Path, work: Callable[[], Any], answer: Path) -> None:
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        result = {"value": work()}
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = {"error": traceback.format_exc()}
    answer.with_name(f"{answer.name}-{rank}").write_text(json.dumps(result))


def together(world: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """Runs `work` in `world` processes over gloo; what it returns on each, as JSON."""
    context = multiprocessing.get_context("fork")
    number = len(list(folder.glob("answer-*")))
    meeting, answer = folder / f"meeting-{number}", folder / f"answer-{number}"
    processes = [context.Process(target=_process, args=(rank, world, meeting, work, answer)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes}; None did not end"
    results = [json.loads(answer.with_name(f"{answer.name}-{rank}").read_text()) for rank in range(world)]
    for result in results:
        assert "error" not in result, result["error"]
    return [result["value"] for result in results]


def lists(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double().tolist() for name, tensor in tensors.items()}  # float32 in JSON, bit by bit


def assert_close(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of step 3 by two processes, and all that they held."""
    folder = tmp_path_factory.mktemp("sharded")

    def work() -> dict[str, Any]:
        training = Training().train(0, 3)
        training.save(folder / "checkpoints", 3)
        return lists(training.whole())

    values = together(2, folder, work)
    assert values[0] == values[1]
    return folder / "checkpoints" / "step-00000003", values[0]


def test_the_values_are_those_of_a_run_that_was_not_sharded(saved):
    assert_close(saved[1], Training().train(0, 3).whole())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_two_processes_saved_comes_back_bit_by_bit_on_any_number_and_goes_on(saved, tmp_path, world):
    checkpoint, values = saved

    def work() -> list[Any]:
        training = Training().train(0, 1)  # not what it was built with
        scalars = training.load(checkpoint)
        loaded = lists(training.whole())
        return [scalars, loaded, lists(training.train(3, 6).whole())]

    for scalars, loaded, later in together(world, tmp_path, work):
        assert scalars == {"step": 3, "ema_updates": 3, "ledger": [[1, "a"]]}
        assert loaded == values
        assert_close(later, Training().train(0, 6).whole())


def test_one_process_without_a_group_loads_and_saves_too(saved, tmp_path):
    training = Training()
    training.load(saved[0])
    assert lists(training.whole()) == saved[1]
    again = Training()
    again.load(training.save(tmp_path, 3))
    assert lists(again.whole()) == saved[1]


def test_three_processes_of_which_one_has_no_rows_save_and_one_loads(tmp_path):
    def work() -> dict[str, Any]:
        training = Training(width=2).train(0, 2)
        training.save(tmp_path / "checkpoints", 2)
        return lists(training.whole())

    values = together(3, tmp_path, work)
    training = Training(width=2)
    training.load(tmp_path / "checkpoints" / "latest")
    assert lists(training.whole()) == values[0]


def test_each_process_writes_its_shards_as_safetensors_and_the_average_is_whole(saved):
    checkpoint, values = saved
    names = json.loads((checkpoint / "hashes.json").read_text()).keys()
    shards = [f"training_state/shard-{i:05d}-model-00001-of-00001.safetensors" for i in (1, 2)]
    assert set(names) == {
        *shards,
        AVERAGED,
        "model_index.json",
        "training_state/state.json",
        "training_state/config.yaml",
    }
    held = [load_file(checkpoint / name) for name in shards]
    rows = [tensors["weights/0.weight"].shape[0] for tensors in held]
    assert rows == [4, 3]
    whole = torch.cat([tensors["optimizer/0.weight/exp_avg"] for tensors in held]).double().tolist()
    assert whole == values["optimizer 0.weight/exp_avg"]
    average = load_file(checkpoint / AVERAGED)
    assert {f"averaged {name}": tensor.double().tolist() for name, tensor in average.items()} == {
        name: value for name, value in values.items() if name.startswith("averaged")
    }


def strike(fault: str, ranks: tuple[int, ...]) -> None:
    """From here on this process's storage fails, if it is one of `ranks`."""
    if dist.get_rank() not in ranks:
        return
    fsync = os.fsync

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def cut(descriptor: int) -> None:  # the last byte is another when the file is on the storage
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".safetensors"):
            with open(name, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))
        fsync(descriptor)

    if fault == "flush":
        os.fsync = fail
    elif fault == "rename":
        os.replace = fail
    elif fault == "other bytes":
        os.fsync = cut


@pytest.mark.parametrize(
    ("fault", "rank", "told"),
    [
        ("flush", 1, "process 1.*No space left"),
        ("flush", 0, "process 0.*No space left"),
        ("other bytes", 1, "process 1.*other bytes than were written"),
        ("other bytes", 0, "process 0.*other bytes than were written"),
        ("rename", 0, "process 0.*No space left"),
    ],
)
def test_a_fault_on_one_process_is_an_error_on_all_and_leaves_the_earlier_checkpoint(tmp_path, fault, rank, told):
    root = tmp_path / "checkpoints"

    def work() -> str:
        training = Training().train(0, 2)
        training.save(root, 2, keep=1)
        training.train(2, 4)
        real = os.fsync, os.replace
        strike(fault, (rank,))
        try:
            with pytest.raises(CheckpointError, match=f"(?s)checkpoint step-00000004 was not written: .*{told}"):
                training.save(root, 4, keep=1)
        finally:
            os.fsync, os.replace = real
        dist.barrier()
        if dist.get_rank() == 0:
            verify_checkpoint(root / "step-00000002")
            assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]
        dist.barrier()
        training.save(root, 4, keep=1)
        return "agreed"

    assert together(2, tmp_path, work) == ["agreed"] * 2
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004"]
    training = Training()
    assert training.load(newest_complete(root, print))["step"] == 4
    assert_close(lists(training.whole()), Training().train(0, 4).whole())


def test_what_cannot_be_loaded_is_refused_on_every_process_with_the_reason(saved, tmp_path):
    checkpoint = tmp_path / "step-00000003"
    for path in saved[0].rglob("*"):
        if path.is_file():
            (checkpoint / path.relative_to(saved[0])).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / path.relative_to(saved[0])).write_bytes(path.read_bytes())
    shard = checkpoint / "training_state" / "shard-00002-model-00001-of-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))

    def work() -> list[str]:
        training, found = Training(width=3), []
        for folder in (checkpoint, saved[0]):
            before = lists(training.whole())
            with pytest.raises(CheckpointError) as caught:
                training.load(folder)
            assert lists(training.whole()) == before
            found.append(str(caught.value))
        return found

    for altered, other in together(2, tmp_path, work):
        assert "shard-00002-model-00001-of-00001.safetensors was altered" in altered
        assert "weights/0.weight has shape (7, 4), expected (3, 4)" in other
        assert "optimizer/2.weight/exp_avg_sq has shape (5, 7), expected (5, 3)" in other
    with pytest.raises(CheckpointError, match="holds the state of a sharded engine"):
        load_training_state(saved[0])


def test_saving_a_step_again_keeps_the_complete_one(saved, tmp_path):
    training = Training()
    training.load(saved[0])
    first = training.save(tmp_path, 3)
    before = first.stat().st_ino
    assert training.save(tmp_path, 3) == first
    assert first.stat().st_ino == before
