"""Times what a checkpoint costs training: this program's background writer against accelerate's save_state.

In: a UNet with AdamW and average in memory, and a folder on the disk in question. Out: a table, and records as JSON
(`--json FILE`): the pause of each, in interleaved rounds on the same tensors, and how training goes while the write in
the background runs.
"""

import argparse
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bench_record import Record, about, device_name, write_records
from torch import Tensor

from ldm.models.conditioning import Conditioning
from ldm.models.durable import write_text
from ldm.models.pretrained import save_component
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.checkpoint import TrainingState, load_training_state
from ldm.training.checkpoint_writer import CheckpointWriter
from ldm.training.ema import EMA, EMAConfig
from ldm.training.optimizer import OptimizerConfig, make_optimizer, optimizer_tensors


class RegisteredAverage:
    """The average in the form in which accelerate takes it along: `register_for_checkpointing`, as its users do."""

    def __init__(self, average: EMA) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "updates": self.average.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"], state["updates"])


class Training:
    """A network of SD's shape with given channels, after some steps on noise."""

    def __init__(self, channels: int) -> None:
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        torch.manual_seed(0)
        sizes = [channels, 2 * channels, 4 * channels, 4 * channels]
        self.unet = UNet(UNetConfig(block_out_channels=sizes, cross_attention_dim=768)).to(self.device)
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network, optimizer = self.accelerator.prepare(
            self.unet, make_optimizer(self.unet.named_parameters(), OptimizerConfig())
        )
        self.network: Any = network
        self.optimizer: Any = optimizer
        self.average = EMA(self.unet, EMAConfig())
        self.accelerator.register_for_checkpointing(RegisteredAverage(self.average))
        self.steps = 0
        self.waited = 0.0

    def step(self, writer: CheckpointWriter | None = None) -> float:
        """One optimizer step on one latent of 32x32; returns its seconds.

        Args:
            writer: waited for, as training does, before weights change; what that took is in `waited`.
        """
        self.waited = 0.0
        start = time.perf_counter()
        noise = torch.randn(1, 4, 32, 32, device=self.device)
        text = Conditioning(text=torch.randn(1, 77, 768, device=self.device))
        t = torch.full((1,), 500, device=self.device)
        loss = (self.network(noise, t, text) - noise).square().mean()
        self.accelerator.backward(loss)
        if writer is not None:
            self.settle()
            began = time.perf_counter()
            writer.wait_copied()
            self.waited = time.perf_counter() - began
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.steps += 1
        self.settle()
        return time.perf_counter() - start

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> TrainingState:
        weights, optimizer = self.unet.state_dict(), optimizer_tensors(self.optimizer.optimizer)
        return TrainingState(self.steps, weights, optimizer, ema_updates=self.average.updates)

    def write_pipeline(self, folder: Path, averaged: Mapping[str, Tensor], earlier: Path | None) -> None:
        write_text("{}", folder / "model_index.json")
        save_component(averaged, self.unet.config.to_dict(), folder / "unet", class_name="UNet2DConditionModel")

    def save(self, writer: CheckpointWriter) -> float:
        """Begins a background save; returns the seconds until training goes on."""
        self.settle()
        start = time.perf_counter()
        writer.save(self.state(), self.average.state_dict(), self.write_pipeline, config_yaml="")
        return time.perf_counter() - start

    def save_state(self, folder: Path) -> float:
        """accelerate's save_state into an empty folder; returns its seconds, all of which training waits."""
        shutil.rmtree(folder, ignore_errors=True)
        self.settle()
        start = time.perf_counter()
        self.accelerator.save_state(str(folder))
        return time.perf_counter() - start


def check_same(training: Training, ours: Path, theirs: Path) -> int:
    """Compares what comes back from both, bit by bit; returns the number of bytes."""
    state, average = load_training_state(ours)
    for tensor in (*training.unet.state_dict().values(), *optimizer_tensors(training.optimizer.optimizer).values()):
        tensor.zero_()
    training.accelerator.load_state(str(theirs))
    live = training.state()
    size = 0
    for found, expected in (
        (state.weights, live.weights),
        (state.optimizer, live.optimizer),
        (average, training.average.state_dict()),
    ):
        assert found.keys() == expected.keys(), "the two hold other tensors"
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name].cpu()), f"{name} differs"
            size += tensor.nbytes
    return size


def longest_gap(work: Callable[[], object]) -> float:
    """The longest time in seconds for which a Python thread that wants to run every 0.5 ms did not, during `work`."""
    over, longest = threading.Event(), 0.0

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    work()
    over.set()
    thread.join()
    return longest


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(folder: Path, channels: int, rounds: int) -> dict[str, Any]:
    """All figures, times in seconds; leaves nothing in `folder`."""
    training = Training(channels)
    writer, theirs = CheckpointWriter(folder / "ours", keep=1), folder / "theirs"
    training.step()
    first = training.save(writer)
    writer.wait()
    training.save_state(theirs)
    assert writer.last is not None
    size = check_same(training, writer.last, theirs)
    result = {
        "parameters": sum(p.numel() for p in training.unet.parameters()),
        "bytes": size,
        "first_pause": first,
        "device": device_name(training.device),
        "threads": torch.get_num_threads(),
        **pauses(training, writer, theirs, rounds),
    }
    shutil.rmtree(theirs)
    result |= beside_training(training, writer, rounds)
    shutil.rmtree(folder)
    return result


def pauses(training: Training, writer: CheckpointWriter, theirs: Path, rounds: int) -> dict[str, Any]:
    """How long training waits for each, one after the other in turns.

    Ours in two parts: the call, and before the next optimizer step what is left of the copy. Beside it, how much longer
    that step takes with the copy beside it, and how long the copy takes when training waits for it.
    """
    ours, states, writes, slower, copies = [], [], [], [], []
    for number in range(rounds):
        for which in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            training.step()
            alone = training.step()
            os.sync()  # neither pays for what the other has left in memory
            if which == "theirs":
                states.append(training.save_state(theirs))
            else:
                start = time.perf_counter()
                called = training.save(writer)
                step = training.step(writer)
                ours.append(called + training.waited)
                slower.append(called + step - alone)
                writer.wait()
                writes.append(time.perf_counter() - start)
                start = time.perf_counter()
                training.save(writer)
                writer.wait_copied()
                copies.append(time.perf_counter() - start)
                writer.wait()
    return {
        "pause": spread(ours),
        "save_state": spread(states),
        "share": spread([pause / state for pause, state in zip(ours, states, strict=True)]),
        "slower": spread(slower),
        "copy": spread(copies),
        "background": spread(writes),
    }


def beside_training(training: Training, writer: CheckpointWriter, rounds: int) -> dict[str, Any]:
    """What a write in the background does to Python threads and to training steps."""
    alone, during, gaps, quiet = [], [], [], []
    for _ in range(rounds):
        quiet.append(longest_gap(lambda: time.sleep(1.0)))
        training.step()  # the first after a rest is slow: it asks the system for the memory of its gradients
        alone += [training.step(), training.step()]
        training.save(writer)
        gaps.append(longest_gap(writer.wait))
        training.step()
        training.save(writer)
        while not writer.poll():
            during.append(training.step(writer))
        writer.wait()
    return {
        "gap_idle": spread(quiet),
        "gap_writing": spread(gaps),
        "step_alone": spread(alone),
        "step_writing": spread(during),
    }


def record(result: Mapping[str, Any]) -> Record:
    """The pause of each as a record, which also has everything else that was measured."""
    ours, theirs = result["pause"], result["save_state"]
    return Record(
        f"training's pause for a checkpoint, {result['parameters'] / 1e6:.0f} M parameters",
        ours["median"],
        theirs["median"],
        "accelerate's save_state",
        "s",
        (ours["min"], ours["max"]),
        (theirs["min"], theirs["max"]),
        (1 / result["share"]["max"], 1 / result["share"]["min"]),
        0.0,
        {"measured": dict(result)},
    )


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""

    def row(name: str, key: str, scale: float = 1.0, unit: str = "s") -> str:
        values = result[key]
        low, high = values["min"] * scale, values["max"] * scale
        return f"{name:46s} {values['median'] * scale:9.3f} {unit:2s} ({low:.3f} to {high:.3f})"

    return "\n".join(
        [
            f"{result['parameters'] / 1e6:.0f} M parameters, {result['bytes'] / 1e9:.2f} GB of tensors; "
            f"{result['device']}, {result['threads']} threads; torch {result['torch']}, "
            f"accelerate {result['accelerate']}, safetensors {result['safetensors']}; {result['rounds']} rounds, "
            "median (range)",
            row("training's pause, background writer", "pause"),
            row("training's pause, accelerate save_state", "save_state"),
            row("share of the pause", "share", 100, "%"),
            f"{'first pause':46s} {result['first_pause']:9.3f} s",
            row("call and next step, beyond a step alone", "slower"),
            row("the copy, where training waits for it", "copy"),
            row("save to complete checkpoint", "background"),
            row("longest wait of a thread, nothing written", "gap_idle", 1000, "ms"),
            row("longest wait of a thread, during a write", "gap_writing", 1000, "ms"),
            row("training step, nothing written", "step_alone"),
            row("training step, during a write", "step_writing"),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to be measured; removed")
    parser.add_argument("--channels", type=int, default=160, help="channels of the UNet's first level (SD has 320)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--json", type=Path, help="file for the records")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    result = {
        "rounds": options.rounds,
        **{name: version(name) for name in ("torch", "accelerate", "safetensors")},
        **measure(options.folder, options.channels, options.rounds),
    }
    print(table(result))
    if options.json is not None:
        write_records(options.json, [record(result)], about("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
