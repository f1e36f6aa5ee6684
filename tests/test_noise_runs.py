"""Runs of flow matching and of EDM: losses in closed form on real batches, resuming, processes, replay, previews."""

import json
import math
import shutil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import tiny_runs
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, run_tool
from forked_runs import ForkServer
from PIL import Image
from torch import Tensor
from training_runs import metrics

from ldm.config import parse_config
from ldm.data.batch import Batch
from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.grid import labelled_grid
from ldm.pipeline.pipeline import load_pipeline
from ldm.sampling.generation import generate
from ldm.train import batch_loss, main
from ldm.training.distributed import split_global_batch, start_accelerator
from ldm.training.metrics import QUARTERS, LossWindow
from ldm.training.run import Run, build_run

SIGMA_DATA, STEPS = 0.6, 12
RUNS = {
    "flow": ["--continuous_noise.kind=flow", "--objective.parameterization=flow", "--objective.loss=flow"],
    "edm": [
        "--continuous_noise.kind=edm", "--objective.parameterization=edm", "--objective.loss=edm",
        "--objective.weight=edm", "--objective.timestep_sampling=log_normal", f"--objective.sigma_data={SIGMA_DATA}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    steps = [f"--training.steps={STEPS}", "--training.checkpoint_every=4", "--training.keep_checkpoints=0"]
    return [*tiny_runs.make(tmp_path_factory.mktemp("tiny") / "data"), *steps]


def forget_processes() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("undisturbed")
    for name, options in RUNS.items():
        forget_processes()
        assert main([*words, f"--run_dir={root / name}", *options]) == 0
    return {name: root / name for name in RUNS}


@pytest.fixture(params=RUNS)
def batch_of_run(request: pytest.FixtureRequest, words: list[str], tmp_path: Path) -> tuple[str, Run, Batch]:
    """A run as the program builds it, and its first batch."""
    forget_processes()
    options = [*words, f"--run_dir={tmp_path}", *RUNS[request.param]]
    config = parse_config(options, prog="test", description="")
    accelerator = start_accelerator(config.distributed, "no")
    split = split_global_batch(config.training.global_batch, 1, None)
    run = build_run(config, accelerator, split, lambda line: None)
    return request.param, run, next(run.data.training_batches(run.share, 0, 1))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_loss_of_a_known_output_and_what_the_network_is_given_are_the_papers(
    batch_of_run: tuple[str, Run, Batch], share: float
) -> None:
    name, run, batch = batch_of_run
    given: list[np.ndarray] = []

    def network(x: Tensor, time: Tensor, conditioning: object) -> Tensor:
        given.extend([x.double().numpy(), time.double().numpy()])
        return share * x

    loss, _, latents = batch_loss(run, network, batch)
    x0, noise, u = latents.double().numpy(), batch.noise.double().numpy(), batch.u.double().numpy()
    if name == "flow":
        # Liu et al. 2023: t uniform, x_t = (1 - t) x0 + t noise, velocity noise - x0; 1000 t as in Stable Diffusion 3.
        low = 0.001 / 1.001
        t = (low + (1 - low) * u).reshape(-1, 1, 1, 1)
        seen, told, target = (1 - t) * x0 + t * noise, 1000 * t, noise - x0
    else:
        # Karras et al. 2022, Eq. 7 and 8, table 1: weight lambda c_out^2 = 1 on F.
        normal = np.array([NormalDist().inv_cdf(one) for one in u])
        sigma = np.exp(-0.5 + 1.2 * normal).clip(0.002, 80).reshape(-1, 1, 1, 1)
        y, total = x0 + sigma * noise, sigma**2 + SIGMA_DATA**2
        c_skip, c_out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / np.sqrt(total)
        seen, told, target = y / np.sqrt(total), np.log(sigma) / 4, (x0 - c_skip * y) / c_out
        assert 0.5 < target.std() < 2, "unit variance, but for latents of another deviation than sigma_data"
    np.testing.assert_allclose(given[0], seen, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(given[1], told.ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss.numpy(), ((share * seen - target) ** 2).mean(axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_byte_by_byte_as_the_undisturbed_one(
    undisturbed: dict[str, Path], words: list[str], tmp_path: Path, name: str
) -> None:
    run = tmp_path / name
    shutil.copytree(undisturbed[name], run, symlinks=True)
    for path in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    (run / "checkpoints" / "latest").unlink()
    forget_processes()
    again = [*words, f"--run_dir={run}", *RUNS[name]]
    assert main(again) == 0
    # The config holds the folder's name.
    ours, theirs = tiny_runs.left_by(run), tiny_runs.left_by(undisturbed[name])
    different = tiny_runs.differences(ours, theirs)
    assert [one for one in different if not one.endswith(("config.yaml", "hashes.json"))] == []
    forget_processes()
    with pytest.raises(ValueError, match=r"continuous_noise\.sigma_max: None -> 70"):
        main([*again, "--continuous_noise.kind=edm", *RUNS["edm"][1:], "--continuous_noise.sigma_max=70"])


def test_two_processes_give_the_losses_of_one(undisturbed: dict[str, Path], words: list[str], tmp_path: Path) -> None:
    with ForkServer() as server:
        for name, options in RUNS.items():
            (tmp_path / name).mkdir()
            two = [*words, "--distributed.processes=2", *options]
            server.start(tmp_path / name, two, 2).finish()
            for ours, theirs in zip(metrics(tmp_path / name / "run"), metrics(undisturbed[name]), strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
                for key in (f"loss_quarter_{quarter + 1}" for quarter in range(QUARTERS)):
                    assert ours[key] == (theirs[key] and pytest.approx(theirs[key], rel=1e-5))


def test_replay_prints_time_and_noise_level_and_the_loss_that_was_logged(undisturbed: dict[str, Path]) -> None:
    output = run_tool(ROOT / "tools/replay.py", "--run", undisturbed["flow"], "--step", "6")
    *samples, step = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert step["loss"] == step["logged_loss"] == metrics(undisturbed["flow"])[5]["loss"]
    for sample in samples:
        t = sample["timestep"]
        assert sample["sigma"] == pytest.approx(t / (1 - t), rel=1e-12)
    assert len({sample["timestep"] for sample in samples}) == len(samples), "times are fractions, none is like another"


@pytest.mark.parametrize("name", RUNS)
def test_previews_are_the_pictures_of_the_checkpoint_and_held_out_losses_are_finite(
    words: list[str], tmp_path: Path, name: str
) -> None:
    shards = Path(words[0].removeprefix("--config=")).parent / "shards"
    options = ["--previews.prompts=[red ape]", "--previews.every=3", "--previews.steps=4"]
    options += [f"--data.validation={shards}", "--validation.every=3", "--training.steps=3"]
    forget_processes()
    assert main([*words, f"--run_dir={tmp_path}", *options, *RUNS[name]]) == 0
    assert math.isfinite(metrics(tmp_path)[-1]["validation_loss"])
    pipeline = load_pipeline(tmp_path / "checkpoints" / "latest")
    assert pipeline.sigma_data == (SIGMA_DATA if name == "edm" else 1)
    drawn = generate(pipeline, ["red ape"], seed=0, sampler="dpmpp_2m", steps=4, guidance=5.0)
    shown = np.asarray(Image.open(tmp_path / "samples" / "step-00000003.png").convert("RGB"))
    expected = np.asarray(labelled_grid(drawn, ["red ape"]).convert("RGB"))
    assert np.abs(shown.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", RUNS)
def test_the_card_names_the_noise_of_the_run_and_not_the_one_in_whose_place_it_is(
    undisturbed: dict[str, Path], name: str
) -> None:
    card = (undisturbed[name] / "checkpoints" / "latest" / "README.md").read_text()
    assert f"continuous_noise:\n  kind: {name}\n" in card
    assert "beta_schedule" not in card


def test_quarters_of_the_loss_are_those_of_the_noise_range() -> None:
    discrete = Schedule(ScheduleConfig())
    t = torch.arange(1000)
    assert (counts(discrete.position(t)) == 250).all()
    assert counts(discrete.position(torch.tensor([0, 249, 250, 499, 500, 749, 750, 999]))).tolist() == [2, 2, 2, 2]
    flow = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    assert counts(flow.position(torch.tensor([0.001, 0.24, 0.26, 0.6, 0.9, 1.0]))).tolist() == [2, 1, 1, 2]
    edm = ContinuousSchedule(ContinuousScheduleConfig(kind="edm"))
    level = torch.tensor([0.002, 0.02, 0.1, 1.0, 80.0])  # even quarters in ln sigma end at 0.028, 0.4 and 5.7
    assert counts(edm.position(level)).tolist() == [2, 1, 1, 1]


def counts(position: Tensor) -> Tensor:
    window = LossWindow(torch.device("cpu"))
    window.add(torch.ones(len(position)), position, torch.zeros(len(position), dtype=torch.bool))
    return window.counts
