"""Every engine against one process: losses, norms and steps that are skipped; saved, resumed by any other, sampled.

DDP and FSDP2 with two processes run here; all engines and more processes (5 minutes on two cores):
    LDM_ENGINES=all LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_engines.py
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import trials
from forked_runs import ForkServer
from safetensors.torch import load_file

from ldm.pipeline.pipeline import load_pipeline
from ldm.sampling.generation import generate

ALL = os.environ.get("LDM_ENGINES") == "all"
GLOBAL_BATCH, STEPS = 24, 20
TABLE = [("ddp", 2), ("fsdp2", 2)]
CHAIN = [("ddp", 2), ("fsdp2", 2), ("single", 1), ("fsdp2", 2), ("ddp", 2)]
"""Changes of engine and of processes in one run, the same number of steps each."""
if ALL:
    TABLE += [("ddp", 4), ("fsdp2", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3", 4)]
    CHAIN = [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("single", 1), ("zero3", 2), ("zero1", 4), ("fsdp2", 4),
             ("zero2", 4), ("zero1", 2), ("ddp", 4)]  # fmt: skip
HARD = (
    "--training.max_micro_batch=6",  # accumulation: 2 with two processes
    "--optimizer.max_grad_norm=0.3",  # below all norms: each step is clipped
    "--optimizer.warmup_steps=2",
    "--optimizer.schedule=constant",  # so that a shorter run is the beginning of a longer one
    "--training.checkpoint_every=0",
    "--wrapping.gradient_checkpointing=all",
)
BAD = [{"position": 6 * GLOBAL_BATCH + 13, "kind": "nan times"}]
"""Step 7: a sample of the second process, where there are two."""
EXACT = ("step", "lr", "ema_decay", "captions_dropped", "quarantined", "skipped_steps")


@dataclass
class Lab:
    """The material of all runs here, and the server that starts them."""

    server: ForkServer
    words: list[str]
    folder: Path

    def run(self, name: str, engine: str, world: int, *options: str, bad: Any = None) -> list[dict[str, Any]]:
        """Runs or resumes a run by its name; the lines of its metrics."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        words = [*self.words, f"--distributed.engine={engine}", f"--distributed.processes={world}", *options]
        hook = {"hook": "injected_numbers:spoil", "told": bad} if bad else {}
        self.server.start(folder, words, world, **hook).finish(seconds=300)
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def latest(self, name: str) -> Path:
        return self.folder / name / "run" / "checkpoints" / "latest"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("engines")
    with ForkServer() as server:
        yield Lab(server, tiny_runs.make(folder / "material"), folder)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> list[dict[str, Any]]:
    return lab.run("undisturbed", "single", 1, *HARD, f"--training.steps={STEPS}", bad=BAD)


def deviation(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> float:
    """The largest relative one; a number that one of two has, and the other has not, is infinite."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
    return max(0.0 if a == b else float("inf") if a is None or b is None else abs(a / b - 1) for a, b in pairs)


def assert_same_run(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Losses and norms within 1e-5, all else equal; what the deviations are."""
    for name in EXACT:
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    found = {name: deviation(ours, theirs, name) for name in ("loss", "grad_norm")}
    assert max(found.values()) <= 1e-5, found
    return found


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = {
        "average": checkpoint / "unet" / "diffusion_pytorch_model.safetensors",
        "weights": checkpoint / "training_state" / "unet.safetensors",
        "optimizer": checkpoint / "training_state" / "optimizer.safetensors",
    }
    return {f"{kind} {name}": tensor for kind, path in files.items() for name, tensor in load_file(path).items()}


def assert_close_state(ours: Path, theirs: Path) -> float:
    """The same names, shapes and float32, and each tensor near the other's in norm; the largest distance."""
    a, b = state(ours), state(theirs)
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert {t.dtype for t in a.values()} == {torch.float32}
    far = {n: float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-6)) for n in a}
    worst = max(far, key=far.__getitem__)
    assert far[worst] < 1e-3, (worst, far[worst])
    return far[worst]


def picture(checkpoint: Path) -> np.ndarray:
    pipeline = load_pipeline(checkpoint)
    made = generate(pipeline, ["red 1"], seed=3, indices=[0], sampler="ddim", steps=4, guidance=2.0)
    return np.asarray(made[0]).astype(int)


@pytest.mark.parametrize(("engine", "world"), TABLE)
def test_an_engine_trains_saves_resumes_and_samples_as_one_process_does(lab, undisturbed, engine, world):
    """With accumulation, clipping, activation checkpointing, and a step that is skipped by all."""
    name = f"{engine}-{world}"
    lab.run(name, engine, world, *HARD, "--training.steps=10", bad=BAD)
    ours = lab.run(name, engine, world, *HARD, f"--training.steps={STEPS}")
    assert [line["skipped_steps"] for line in ours] == [0] * 6 + [1] * 14
    found = assert_same_run(ours, undisturbed)
    far = assert_close_state(lab.latest(name), lab.latest("undisturbed"))
    pixels = int(np.abs(picture(lab.latest(name)) - picture(lab.latest("undisturbed"))).max())
    assert pixels <= 1
    told = {f"{key}_deviates": value for key, value in found.items()}
    trials.report("engine against one process", engine=engine, processes=world, **told, farthest_tensor=far)


def test_a_run_goes_on_under_any_other_engine(lab, undisturbed):
    each = STEPS // len(CHAIN)
    for number, (engine, world) in enumerate(CHAIN, start=1):
        steps = STEPS if number == len(CHAIN) else number * each
        ours = lab.run("chain", engine, world, *HARD, f"--training.steps={steps}", bad=BAD)
    found = assert_same_run(ours, undisturbed)
    far = assert_close_state(lab.latest("chain"), lab.latest("undisturbed"))
    trials.report("engines in one run", changes=CHAIN, loss=found["loss"], farthest_tensor=far)


@pytest.mark.parametrize(("engine", "world"), [row for row in TABLE if row[0] != "ddp"])
def test_bf16_computes_in_bf16_and_keeps_float32(lab, engine, world):
    options = ("--wrapping.mixed_precision=bf16", "--training.steps=3", "--training.checkpoint_every=0")
    alone = lab.run("bf16", "single", 1, *options)
    full = lab.run("float32", "single", 1, options[1], options[2])
    ours = lab.run(f"bf16-{engine}-{world}", engine, world, *options)
    assert deviation(ours, alone, "loss") < 3e-4
    assert 1e-6 < deviation(ours, full, "loss") < 3e-2
    assert {t.dtype for t in state(lab.latest(f"bf16-{engine}-{world}")).values()} == {torch.float32}


@pytest.mark.parametrize(("engine", "world"), [row for row in TABLE if row[0] != "ddp"][: 6 if ALL else 1])
def test_grids_held_out_losses_and_given_weights_are_those_of_one_process(lab, undisturbed, engine, world):
    shards = lab.folder / "material" / "shards"
    options = (
        f"--init_from={lab.latest('undisturbed').resolve()}",
        "--previews.every=2",
        "--previews.prompts=[red 1]",
        "--previews.steps=2",
        "--validation.every=2",
        f"--data.validation={shards}",
        "--validation.samples=23",
        "--training.steps=4",
        "--training.checkpoint_every=0",
    )
    ours, theirs = lab.run(f"grids-{engine}-{world}", engine, world, *options), lab.run("grids", "single", 1, *options)
    assert [line["step"] for line in ours if "validation_loss" in line] == [2, 4]
    held_out = [[line["validation_loss"] for line in lines[1::2]] for lines in (ours, theirs)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert_same_run(ours, theirs)
    assert (lab.folder / f"grids-{engine}-{world}" / "run" / "samples" / "step-00000004.png").is_file()


@pytest.mark.skipif(not ALL, reason="LDM_ENGINES=all runs it")
@pytest.mark.parametrize(
    ("engine", "world", "what"),
    [
        ("fsdp2", 2, "parameters"),
        ("fsdp2", 1, "parameters"),
        ("zero1", 2, "optimizer"),
        ("zero2", 2, "optimizer"),
        ("zero3", 2, "optimizer"),
        ("zero3", 2, "parameters"),
        ("zero3", 1, "parameters"),
    ],
)
def test_what_stays_on_the_host_changes_nothing(lab, undisturbed, engine, world, what):
    name = f"{engine}-{world}-{what}"
    options = (*HARD, f"--distributed.offload={what}")
    lab.run(name, engine, world, *options, "--training.steps=4", bad=BAD)
    ours = lab.run(name, engine, world, *options, "--training.steps=10", bad=BAD)
    assert_same_run(ours, undisturbed[:10])
