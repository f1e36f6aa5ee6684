"""Training on corruptions through the program: losses against NumPy's own corruptions, resuming, two processes, replay.

What the network is given, and what its output is compared with, is computed here anew from shards, seed and positions.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_tool
from PIL import Image
from safetensors.torch import load_file
from training_runs import TORCHRUN_2, assert_same_state, launch, metrics, train

from ldm.config import RunConfig, load_config
from ldm.data.batch import Batch
from ldm.data.draws import Purpose, generator
from ldm.data.loader import make_loader, make_validation_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.grid import labelled_grid
from ldm.models.autoencoder import sample_posterior
from ldm.models.conditioning import Conditioning
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet import UNet
from ldm.pipeline.pipeline import load_pipeline
from ldm.sampling.generation import generate
from ldm.training.corruption_start import with_start

SIDE, BATCH = 16, 16
COMMON = (
    "--objective.parameterization=x0",
    "--objective.loss=x0",
    "--optimizer.warmup_steps=1",
    "--optimizer.lr=2e-2",  # so that what the network is told shows after two steps
    "--training.steps=4",
    "--training.checkpoint_every=2",
    "--training.keep_checkpoints=0",
)
KINDS = {
    "fill": ("--corruption.kind=masking", "--corruption.pixels_per_level=3", "--corruption.fill=0.5"),
    "noise": (
        "--corruption.kind=masking",
        "--corruption.pixels_per_level=7",
        "--corruption.fill=null",
        "--objective.stratified=true",
    ),
    "growing": ("--corruption.kind=growing_mask", "--corruption.levels=12", "--corruption.mask_growth=0.5"),
    "blur": (
        "--corruption.kind=blur",
        "--corruption.levels=9",
        "--corruption.start_samples=20",
        "--objective.distance=huber",
        "--objective.huber_c=0.3",
    ),
}
GENTLE = (*KINDS["blur"], "--optimizer.lr=1e-3")  # which leaves rounding as small as it is
LEVELS = {"fill": math.ceil(256 / 3), "noise": math.ceil(256 / 7), "growing": 12, "blur": 9}
PREVIEWS = ("--previews.prompts=[red heart, orange circle]", "--previews.every=4", "--previews.steps=3")
Corrupt = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


def masked(pixels: int, fill: float | None) -> Corrupt:
    def corrupt(x0: np.ndarray, level: int, noise: np.ndarray) -> np.ndarray:
        found = x0.copy()
        place = np.argsort(noise[0].ravel(), kind="stable")  # of each pixel in the order
        for pixel in np.flatnonzero(place < pixels * level):
            row, column = divmod(int(pixel), SIDE)
            found[:, row, column] = noise[1:, row, column] if fill is None else fill
        return found

    return corrupt


def grown(x0: np.ndarray, level: int, noise: np.ndarray) -> np.ndarray:
    row, column = divmod(int(noise[0].argmax()), SIDE)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    squared = (rows - row) ** 2 + (columns - column) ** 2
    factors = [1 - np.exp(-squared / (2 * (1 + 0.5 * i) ** 2)) for i in range(level)]
    return x0 * np.prod(factors, axis=0)


def blurred(x0: np.ndarray, level: int, noise: np.ndarray) -> np.ndarray:
    deviation = 0.25 * (16 / 0.25) ** ((level - 1) / 8)
    # A Gaussian's transform on a picture that goes on as its mirror image, so that it is periodic.
    twice = np.pad(x0, ((0, 0), (0, SIDE), (0, SIDE)), mode="symmetric")
    frequency = 2 * np.pi * np.fft.fftfreq(2 * SIDE)
    decay = np.exp(-(frequency[:, None] ** 2 + frequency**2) * deviation**2 / 2)
    return np.fft.ifft2(np.fft.fft2(twice) * decay).real[:, :SIDE, :SIDE]


CORRUPT: dict[str, Corrupt] = {"fill": masked(3, 0.5), "noise": masked(7, None), "growing": grown, "blur": blurred}


def validation(shards: Path) -> tuple[str, ...]:
    return f"--data.validation={shards}", "--validation.every=2", "--validation.samples=8"


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, encoded_shards) -> Callable[[str], Path]:
    """The undisturbed run of a kind, trained when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), set()

    def of(kind: str) -> Path:
        if kind not in done:
            extra = (*PREVIEWS, *validation(encoded_shards)) if kind in ("noise", "blur") else ()
            train(folder / kind, encoded_shards, *COMMON, *(GENTLE if kind == "gentle" else KINDS[kind]), *extra)
            done.add(kind)
        return folder / kind

    return of


def batch_of(config: RunConfig, step: int) -> Batch:
    positions = Positions(rank=0, world=1, micro_batch=BATCH, accumulation=1, start_step=step - 1, stop_step=step)
    manifest = Manifest.load(config.data.shards)
    return next(iter(make_loader(config.data, manifest, config.seed, positions, latent_shape=(4, SIDE, SIDE))))


def network_of(checkpoint: Path, file: str) -> UNet:
    """The network of a checkpoint with the weights of a file in it."""
    unet = UNet.from_pretrained(checkpoint / "unet")
    unet.load_state_dict(load_file(checkpoint / file))
    return unet.eval()


@torch.no_grad()
def losses(kind: str, config: RunConfig, unet: UNet, batch: Batch, seed: int, us: list[float]) -> list[float]:
    """Each sample's loss: level and noise from its address, corrupted by NumPy, through the network."""
    empty = TextConditioner.load([config.text_encoder]).empty().text
    text = torch.where(batch.dropped[:, None, None], empty, batch.text_states.float())
    x0s = sample_posterior(batch.moments, batch.posterior_noise).numpy().astype(float)  # its factor is 1
    found = []
    for row, position in enumerate(batch.positions.tolist()):
        level = int(us[row] * LEVELS[kind]) + 1
        noise = generator(seed, Purpose.NOISE, position).standard_normal((5, SIDE, SIDE), dtype=np.float32)
        z = torch.from_numpy(CORRUPT[kind](x0s[row], level, noise)[None]).float()
        told = Conditioning(text[row : row + 1])
        error = unet(z, torch.tensor([level]), told)[0].numpy() - x0s[row]
        if kind == "blur":  # whose run asks for Huber's distance
            size = np.abs(error)
            found.append(np.where(size < 0.3, error**2, 0.3 * (2 * size - 0.3)).mean())
        else:
            found.append((error**2).mean())
    return found


def us_of(kind: str, seed: int, positions: np.ndarray) -> list[float]:
    """The uniform draws of positions; stratified in the run of one kind, one in each of 16 parts."""
    drawn = np.array([generator(seed, Purpose.TIMESTEP, position).random() for position in positions.tolist()])
    if kind != "noise":
        return drawn.tolist()
    step, place = divmod(positions, BATCH)
    # Multiples of 9 and of 7, which have no divisor in common with 16 and are next to 0.618 and 0.423 of it.
    return (((place * 9 + step * 7) % BATCH + drawn) / BATCH).tolist()


@pytest.mark.parametrize("kind", ["fill", "noise", "growing"])
def test_the_first_loss_is_the_mean_square_of_the_latents(run_of, kind) -> None:
    """The network puts out 0 before it has learned anything."""
    run = run_of(kind)
    batch = batch_of(load_config(run / "config.yaml"), 1)
    expected = sample_posterior(batch.moments, batch.posterior_noise).double().square().mean().item()
    assert metrics(run)[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_loss_is_that_of_an_independent_computation_from_addresses(run_of, kind) -> None:
    run = run_of(kind)
    config, line = load_config(run / "config.yaml"), metrics(run)[2]
    unet = network_of(run / "checkpoints/step-00000002", "training_state/unet.safetensors")
    batch = batch_of(config, 3)
    us = us_of(kind, config.seed, batch.positions.numpy())
    expected = losses(kind, config, unet, batch, config.seed, us)
    assert line["loss"] == pytest.approx(np.mean(expected), rel=2e-5)
    levels = np.array([int(u * LEVELS[kind]) + 1 for u in us])
    quarters = 1 + 4 * (levels - 0.5) // LEVELS[kind]  # of levels 1 to T
    for quarter in range(1, 5):
        own = [loss for loss, q in zip(expected, quarters, strict=True) if q == quarter]
        assert line[f"loss_quarter_{quarter}"] == (pytest.approx(np.mean(own), rel=2e-5) if own else None)


def test_the_validation_loss_is_that_of_the_average_on_corrupted_held_out_samples(run_of) -> None:
    kind, run = "noise", run_of("noise")
    config, line = load_config(run / "config.yaml"), metrics(run)[3]
    unet = network_of(run / "checkpoints/step-00000004", "unet/diffusion_pytorch_model.safetensors")
    manifest, shape = Manifest.load(config.data.validation), (4, SIDE, SIDE)
    loader = make_validation_loader(
        config.data, manifest, config.seed, latent_shape=shape, rank=0, world=1, micro_batch=8, samples=8
    )
    (batch,) = loader
    seed = int(generator(config.seed, Purpose.VALIDATION).bit_generator.random_raw())
    expected = losses(kind, config, unet, batch, seed, us_of(kind, seed, batch.positions.numpy()))
    assert line["validation_loss"] == pytest.approx(np.mean(expected), rel=2e-5)


def test_the_start_of_sampling_is_estimated_from_the_first_positions_of_the_run(run_of) -> None:
    run = run_of("blur")
    stored = json.loads((run / "checkpoints/step-00000002/scheduler/scheduler_config.json").read_text())
    batches = [batch_of(load_config(run / "config.yaml"), step) for step in (1, 2)]
    means = np.concatenate(
        [sample_posterior(one.moments, one.posterior_noise).double().mean((2, 3)).numpy() for one in batches]
    )[:20]
    np.testing.assert_allclose(stored["start_mean"], means.mean(0), rtol=0, atol=1e-7)
    np.testing.assert_allclose(stored["start_covariance"], np.cov(means.T), rtol=0, atol=1e-7)


def test_estimating_stops_at_so_many_latents_and_needs_two(run_of) -> None:
    config = load_config(run_of("blur") / "config.yaml").corruption
    assert config is not None
    taken: list[int] = []

    def latents() -> Iterator[torch.Tensor]:
        for size in (15, 15, 15):
            taken.append(size)
            yield torch.randn(size, 3, 4, 5, generator=torch.Generator().manual_seed(len(taken)))

    found = with_start(config, latents())
    assert taken == [15, 15]
    every = torch.cat([torch.randn(15, 3, 4, 5, generator=torch.Generator().manual_seed(n)) for n in (1, 2)])[:20]
    np.testing.assert_allclose(found.start_covariance, np.cov(every.double().mean((2, 3)).numpy().T), atol=1e-12)
    with pytest.raises(ValueError, match="found 1 latents to estimate it from, expected 2 or more"):
        with_start(config, [torch.zeros(1, 3, 4, 5)])


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_resuming_gives_the_undisturbed_run_byte_by_byte(run_of, encoded_shards, tmp_path, kind) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of(kind), run, symlinks=True)
    whole = metrics(run)
    (run / "checkpoints/step-00000004").rename(tmp_path / "whole")
    (run / "checkpoints/latest").unlink()
    again = train(run, encoded_shards, *COMMON, *KINDS[kind], *PREVIEWS, *validation(encoded_shards))
    for name in ("loss", "validation_loss", "loss_quarter_1", "loss_quarter_4"):
        assert [line.get(name) for line in again] == [line.get(name) for line in whole]
    assert_same_state(run / "checkpoints/latest", tmp_path / "whole")
    for name in ("scheduler/scheduler_config.json", "README.md", "model_index.json"):
        assert (run / "checkpoints/latest" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_a_preview_is_what_the_checkpoint_of_its_step_draws(run_of, kind) -> None:
    run = run_of(kind)
    pipeline, prompts = load_pipeline(run / "checkpoints/latest"), ["red heart", "orange circle"]
    sampler = {"noise": "denoise_renoise", "blur": "cold_diffusion"}[kind]
    pictures = generate(pipeline, prompts, seed=0, sampler=sampler, steps=3, guidance=5.0)
    with Image.open(run / "samples/step-00000004.png") as grid:
        drawn = np.asarray(grid.convert("RGB"))
    expected = np.asarray(labelled_grid(pictures, prompts).convert("RGB"))
    assert np.abs(drawn.astype(int) - expected).max() <= 4  # rounding, which a network of two steps makes larger


def test_two_processes_give_the_losses_of_one_and_the_same_start(run_of, encoded_shards, tmp_path) -> None:
    run, alone = tmp_path / "run", run_of("gentle")
    process = launch(TORCHRUN_2, run, encoded_shards, *COMMON, *GENTLE, ACCELERATE_USE_CPU="true")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    for ours, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["loss_quarter_4"] == pytest.approx(theirs["loss_quarter_4"], rel=1e-5)
    name = "checkpoints/latest/scheduler/scheduler_config.json"
    assert (run / name).read_bytes() == (alone / name).read_bytes()


def test_accumulation_gives_the_losses_of_the_whole_batch(run_of, encoded_shards, tmp_path) -> None:
    lines = train(tmp_path / "run", encoded_shards, *COMMON, *GENTLE, "--training.max_micro_batch=4")
    for ours, theirs in zip(lines, metrics(run_of("gentle")), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_steps_loss_is_computed_again_with_its_levels(run_of) -> None:
    run = run_of("noise")
    output = run_tool(ROOT / "tools/replay.py", "--run", run, "--step", "4")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert lines[-1]["loss"] == metrics(run)[3]["loss"] == lines[-1]["logged_loss"]
    config = load_config(run / "config.yaml")
    us = us_of("noise", config.seed, np.arange(3 * BATCH, 4 * BATCH))
    assert [line["level"] for line in lines[:-1]] == [int(u * LEVELS["noise"]) + 1 for u in us]
    assert not {"timestep", "sigma"} & lines[0].keys()


def test_the_card_shows_the_corruption_and_not_the_noise_in_whose_place_it_is(run_of) -> None:
    card = (run_of("blur") / "checkpoints/latest/README.md").read_text()
    assert "corruption:\n  kind: blur\n" in card
    assert "beta_schedule" not in card


def test_weights_of_a_diffusion_model_may_begin_it_and_that_is_said(run_of, encoded_shards, tmp_path, capfd) -> None:
    options = (*COMMON, *KINDS["growing"], "--training.steps=1", f"--init_from={run_of('blur')}")
    train(tmp_path / "run", encoded_shards, *options)
    said = capfd.readouterr().err
    assert "corruption.kind: blur became growing_mask" in said
    assert "corruption.start_mean" not in said
