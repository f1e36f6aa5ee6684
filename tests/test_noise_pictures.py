"""Runs with other noise than Stable Diffusion's: diffusers opens their checkpoints and draws the same pictures.

Real runs of configs/debug.yaml; the same noise, prompts, steps and guidance; the scheduler is that of the folder.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_picture_parity import Drawn, assert_same_pictures, largest, open_with_diffusers, unit_noise
from training_runs import metrics, train

from ldm.pipeline.folder import SCHEDULER
from ldm.pipeline.pipeline import load_pipeline
from ldm.sample import main

PROMPTS = ["red heart", "blue circle"]
GUIDANCE = 5.0

# Settings that differ from all defaults, so that one that is forgotten shows.
RUNS: dict[str, list[str]] = {
    "sigmoid": ["--noise.beta_schedule=sigmoid", "--noise.beta_start=0.0002", "--noise.beta_end=0.025"],
    "flow": [
        "--continuous_noise.kind=flow", "--objective.parameterization=flow", "--objective.loss=flow",
        "--objective.timestep_sampling=logit_normal",
    ],
    "edm": [
        "--continuous_noise.kind=edm", "--continuous_noise.sigma_min=0.01", "--continuous_noise.sigma_max=50",
        "--objective.parameterization=edm", "--objective.loss=edm", "--objective.weight=edm",
        "--objective.timestep_sampling=log_normal", "--objective.sigma_data=0.6",
    ],
}  # fmt: skip
AS_THE_FOLDER = {  # class of diffusers; our sampler and spacing
    "sigmoid": ("DDIMScheduler", "ddim", "trailing"),
    "flow": ("DPMSolverMultistepScheduler", "dpmpp_2m", "linspace_multistep"),
    "edm": ("EDMEulerScheduler", "euler", "karras"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, encoded_shards: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("noises")
    for name, options in RUNS.items():
        steps = ["--training.steps=6", "--optimizer.warmup_steps=1", "--optimizer.schedule=constant"]
        losses = [line["loss"] for line in train(root / name, encoded_shards, *steps, *options)]
        assert np.isfinite(losses).all()
    return {name: root / name / "checkpoints" / "latest" for name in RUNS}


class Uncut(diffusers.DPMSolverMultistepScheduler):
    """diffusers' own, which tells a network of flow matching 1000 t without cutting off the fraction."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = 1000 * self.sigmas[:-1]


def theirs(pipeline: Any, noise: torch.Tensor, steps: int) -> Drawn:
    """What diffusers' pipeline draws with the scheduler that it has."""
    latents = [noise]

    def keep(_: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(tensors["latents"])
        return tensors

    images = pipeline(
        PROMPTS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np",
        callback_on_step_end=keep,
    ).images  # fmt: skip
    return Drawn((images * 255).round().astype(np.uint8), latents[-1])


def ours(folder: Path, noise: torch.Tensor, steps: int, sampler: str, spacing: str, out: Path) -> Drawn:
    """What is in the files that the sampling program writes."""
    out.mkdir()
    save_file({"noise": noise}, out / "noise.safetensors")
    arguments = {
        "checkpoint": folder, "noise": out / "noise.safetensors", "out": out / "pictures", "sampler": sampler,
        "latents_out": out / "latents.safetensors", "spacing": spacing, "steps": steps, "guidance": GUIDANCE,
        "device": "cpu",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in arguments.items()]
    assert main([*words, *(f"--prompt={prompt}" for prompt in PROMPTS)]) == 0
    files = sorted((out / "pictures").glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return Drawn(pictures, load_file(out / "latents.safetensors")["latents"])


@pytest.mark.parametrize("name", RUNS)
def test_diffusers_draws_our_pictures_with_the_scheduler_of_the_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, sampler, spacing = AS_THE_FOLDER[name]
    pipeline, noise = open_with_diffusers(checkpoints[name]), unit_noise(2, 4, 16, 16)
    assert type(pipeline.scheduler).__name__ == kind
    at_start = 1.0
    if name == "flow":
        # It starts from unit noise at t = 0.999; here from the deviation there of data of deviation 1.
        pipeline.scheduler, at_start = Uncut.from_config(pipeline.scheduler.config), math.hypot(0.999, 0.001)
    drawn = ours(checkpoints[name], noise, 10, sampler, spacing, tmp_path / "exact")
    assert_same_pictures(f"{name}, 10 steps", drawn, theirs(pipeline, noise * at_start, 10))


def test_diffusers_default_call_of_a_flow_checkpoint_is_within_2_of_255(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pipeline, noise = open_with_diffusers(checkpoints["flow"]), unit_noise(2, 4, 16, 16)
    expected = theirs(pipeline, noise, 20)
    drawn = ours(checkpoints["flow"], noise, 20, "dpmpp_2m", "linspace_multistep", tmp_path / "default")
    difference = largest(drawn.pictures, expected.pictures)
    relative = float((drawn.latents - expected.latents).abs().max() / expected.latents.abs().max())
    print(f"\nflow, 20 steps of diffusers' default: largest difference {difference}/255, of latents {relative:.1e}")
    assert difference <= 2
    assert relative <= 2e-3


def test_diffusers_scheduler_of_flow_matching_draws_our_pictures_and_its_file_is_read(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    # At fractional times, which it does not cut. Pipelines of Stable Diffusion lack one attribute in it.
    folder = tmp_path / "as_sd3"
    shutil.copytree(checkpoints["flow"].resolve(), folder, ignore=shutil.ignore_patterns("training_state", "hashes*"))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    pipeline, noise = open_with_diffusers(checkpoints["flow"]), unit_noise(2, 4, 16, 16)
    pipeline.scheduler = scheduler
    scheduler.init_noise_sigma = 1.0
    drawn = ours(folder, noise, 10, "euler", "linspace", tmp_path / "out")
    assert_same_pictures("flow, FlowMatchEuler, 10 steps", drawn, theirs(pipeline, noise, 10))


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_read_as_the_run_was_configured(checkpoints: dict[str, Path], name: str) -> None:
    pipeline = load_pipeline(checkpoints[name])
    schedule: Any = pipeline.schedule
    if name == "sigmoid":
        found = schedule.config
        assert (found.beta_schedule, found.beta_start, found.beta_end) == ("sigmoid", 0.0002, 0.025)
    elif name == "edm":
        assert (schedule.sigma_min, schedule.sigma_max, pipeline.sigma_data) == (0.01, 50.0, 0.6)
    else:
        assert schedule.config.kind == "flow"
    assert pipeline.parameterization == {"sigmoid": "epsilon"}.get(name, name)


def test_the_losses_of_the_first_step_are_those_of_a_zero_output(checkpoints: dict[str, Path]) -> None:
    # The last layer starts at zero. Latents have unit deviation: E |noise - x0|^2 = 2.
    first = {name: metrics(checkpoints[name].parent.parent)[0]["loss"] for name in ("sigmoid", "flow")}
    assert first["sigmoid"] == pytest.approx(1, abs=0.1)
    assert first["flow"] == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_scheduler_of_another_noise_goes_along_with_a_single_file(checkpoints: dict[str, Path], name: str) -> None:
    from ldm.models import checkpoint_scheduler

    found = checkpoint_scheduler.read(checkpoints[name] / SCHEDULER)
    assert found == json.loads((checkpoints[name] / SCHEDULER).read_text())
    for pair in (False, True):
        assert checkpoint_scheduler.differ(found, checkpoint_scheduler.released(pair, "epsilon", False))
