"""Analytic-DPM from the command line: variances estimated by the program, stored, found, and sampled with."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_pipelines import (
    DIMS,
    ExactNetwork,
    exact_pipeline,
    joint_mixture,
    narrow,
    two_modes,
    write_exact_shards,
)
from PIL import Image
from tiny_models import make_clip, make_pipeline

from ldm import evaluate, sample
from ldm.data.draws import Purpose
from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.reverse_variances import PosteriorVariances
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.evaluation.latent_samples import latent_batches
from ldm.evaluation.latent_variances import estimate_variances
from ldm.models.conditioning import Conditioning
from ldm.pipeline.pipeline import Pipeline, load_pipeline, save_pipeline
from ldm.pipeline.variances import VARIANCES, read_variances, write_variances
from ldm.sampling.generation import addressed_noise, sample_latents, step_noise
from ldm.training.checkpoint import TrainingState, save_checkpoint, verify_checkpoint

SD = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
FLOW = ContinuousSchedule(ContinuousScheduleConfig("flow"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    return make_pipeline(str(folder), size=2)


def refuse(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize(
    ("schedule", "name"), [(SD, "epsilon"), (ZERO_SNR, "v"), (FLOW, "flow")], ids=["epsilon", "v, pure noise", "flow"]
)
def test_estimated_variances_are_the_exact_ones(
    tiny: Pipeline, tmp_path: Path, schedule: ForwardProcess, name: TargetName
) -> None:
    """At each level within four standard errors of 512 samples; exact ones by the posterior of 8,192 others."""
    data = joint_mixture()
    write_exact_shards(tmp_path / "joint", data, 512)
    pipeline = exact_pipeline(tiny, data, schedule, name)
    batches = latent_batches(pipeline, tmp_path / "joint", samples=512, seed=0, batch_size=200, passed_over=refuse)
    found = estimate_variances(pipeline, batches, levels=24, seed=0)
    assert found.samples == 512
    levels = found.variances.levels
    assert (float(levels[0]), float(levels[-1])) == pytest.approx((schedule.sigma_min, schedule.sigma_max))
    x0 = data.sample(8192, seed=1)
    z = torch.from_numpy(np.random.default_rng(2).normal(size=x0.shape))
    for level, variance, by_score in zip(
        levels.tolist(), found.variances.variances.tolist(), found.from_score_norms, strict=True
    ):
        wanted = torch.full((len(x0),), level, dtype=torch.float64)
        x = x0 + level * z
        mean, posterior = data.posterior(x, wanted)
        exact, squared = float(posterior.mean()), (x0 - mean).square().flatten(1).mean(1)
        tolerated = 4 * float(squared.std()) / math.sqrt(512)
        assert tolerated < 0.2 * exact
        assert variance == pytest.approx(exact, abs=tolerated), f"seed 0, level {level}"
        assert (by_score is None) == (level == 2.0**26)
        if by_score is not None:
            score_norm = level**2 * (z**2 - ((x - mean) / level) ** 2).flatten(1).mean(1)
            error = float(score_norm.std()) / math.sqrt(512)
            assert by_score == pytest.approx(exact, abs=4 * error), f"seed 0, level {level}"


def test_variances_between_levels_are_interpolated_and_beyond_them_refused() -> None:
    levels = torch.linspace(math.log(0.02), math.log(20), 40, dtype=torch.float64).exp()
    exact = 0.25 * levels**2 / (0.25 + levels**2)
    found = PosteriorVariances(levels, exact)
    wanted = torch.tensor([20.0, 7.7, 1.0, 0.3, 0.02, 0.0], dtype=torch.float64)
    expected = 0.25 * wanted[:-1] ** 2 / (0.25 + wanted[:-1] ** 2)
    torch.testing.assert_close(found.at(wanted), expected, rtol=2e-3, atol=0)
    assert torch.allclose(found.at(torch.cat([levels.flip(0), torch.zeros(1)])), exact.flip(0))
    for outside in ([21.0, 1.0, 0.0], [1.0, 0.01, 0.0]):
        with pytest.raises(ValueError, match=r"found estimates from sigma 0\.02 to 20, .* of another noise schedule"):
            found.at(torch.tensor(outside))
    for bad in ([0.1, 0.0], [0.1, math.nan], [0.1], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="variances: found"):
            PosteriorVariances(torch.tensor([1.0, 2.0]), torch.tensor(bad))
    for bad in ([2.0, 1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="ascending levels"):
            PosteriorVariances(torch.tensor(bad), torch.ones(2))


@pytest.mark.parametrize(("schedule", "name"), [(SD, "epsilon"), (ZERO_SNR, "v")], ids=["epsilon", "v, pure noise"])
def test_five_steps_of_analytic_dpm_have_the_datas_variance_and_ddpm_has_not(
    tiny: Pipeline, tmp_path: Path, schedule: ForwardProcess, name: TargetName
) -> None:
    """With variances that the program estimated and stored; 1,024 samples of 16 elements, four standard errors."""
    data = narrow()
    write_exact_shards(tmp_path / "narrow", data, 128)
    pipeline = exact_pipeline(tiny, data, schedule, name)
    batches = latent_batches(pipeline, tmp_path / "narrow", samples=128, seed=0, batch_size=64, passed_over=refuse)
    found = estimate_variances(pipeline, batches, levels=64, seed=0)
    write_variances(tmp_path / VARIANCES, found.variances, pipeline.unet, found.about())
    pipeline = dataclasses.replace(pipeline, variances=read_variances(tmp_path / VARIANCES, pipeline.unet))
    drawn = {sampler: variance_of_samples(pipeline, sampler) for sampler in ("analytic_dpm", "ddpm")}
    tolerated = 0.25 * 4 * math.sqrt(2 / 1024 / DIMS)
    # The last step puts out the mean of x0, without the 0.0008 that is left of its variance.
    assert drawn["analytic_dpm"] == pytest.approx(0.25, abs=tolerated + 0.001), "seed 3"
    assert abs(drawn["ddpm"] - 0.25) > 3 * tolerated


def variance_of_samples(pipeline: Pipeline, sampler: str) -> float:
    noise = addressed_noise(3, Purpose.SAMPLE_NOISE, range(1024), (4, 2, 2)).double()
    text = Conditioning(torch.zeros(1024, 1, 1))
    latents = sample_latents(
        pipeline,
        text,
        text,
        noise,
        sampler=sampler,
        steps=5,
        guidance=1.0,
        spacing="linspace",
        fresh_noise=step_noise(3, range(1024), (4, 2, 2), pipeline.device),
    )
    return float(latents.double().square().mean())


def test_from_the_command_line(tiny: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluate writes variances; sample takes them as a file, or out of the checkpoint, which stays complete."""
    state = TrainingState(step=3, weights={}, optimizer={}, ema_updates=3)
    checkpoint = save_checkpoint(
        tmp_path / "run" / "checkpoints", state, lambda folder: save_pipeline(folder, tiny), config_yaml="", keep=1
    )
    write_exact_shards(tmp_path / "shards", two_modes(), 8)
    shared = ["--checkpoint", str(tmp_path / "run"), "--device=cpu"]
    drawing = [*shared, "--prompt=red heart", "--sampler=analytic_dpm", "--steps=4", "--guidance=2"]
    with pytest.raises(SystemExit):
        sample.main([*drawing, "--out", str(tmp_path / "none.png")])
    said = " ".join(capsys.readouterr().err.split())
    assert "sampler: analytic_dpm needs variances estimated for this network" in said
    assert "ldm/evaluate.py --scores variances --checkpoint CHECKPOINT" in said
    estimating = ["--scores", "variances", "--samples=8", "--timesteps=16", "--shards", str(tmp_path / "shards")]
    # The network's own text states are 32 wide, those of the shards 5: without them captions are encoded.
    write_plain_shards(tmp_path / "plain")
    estimating[-1] = str(tmp_path / "plain")
    assert evaluate.main([*shared, *estimating, "--out", str(tmp_path / "out")]) == 0
    many = [word.replace("=16", "=1001") for word in estimating]
    with pytest.raises(SystemExit):
        evaluate.main([*shared, *many, "--out", str(tmp_path / "many")])
    assert "timesteps: found 1001, expected 2 to 1000, which the" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        evaluate.main([*shared, *estimating, "--variances=x.json", "--out", str(tmp_path / "many")])
    assert "variances: found x.json with sampler dpmpp_2m, expected --sampler analytic_dpm" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / VARIANCES).read_text())
    assert len(report["levels"]) == len(report["variances"]) == len(report["variances_from_score_norms"]) == 16
    assert report["settings"]["checkpoint"] == "run/step-00000003"
    given = [*drawing, "--variances", str(tmp_path / "out" / VARIANCES)]
    assert sample.main([*given, "--out", str(tmp_path / "given.png")]) == 0
    assert evaluate.main([*shared, *estimating, "--out", str(checkpoint)]) == 0
    verify_checkpoint(checkpoint)
    assert sample.main([*drawing, "--out", str(tmp_path / "beside.png")]) == 0
    pictures = [Image.open(tmp_path / f"{name}.png") for name in ("given", "beside")]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    hashes = [picture.text["variances"] for picture in pictures]  # type: ignore[attr-defined]
    assert hashes[0].startswith("xxh3_128 ")
    assert hashes[0] == hashes[1], "variances in the checkpoint's folder are not told of"
    # Of a denoiser that knows a part of the picture they are not the variances.
    Image.open(tmp_path / "given.png").convert("L").point(lambda level: 255).save(tmp_path / "mask.png")
    edited = [*given, "--init_image", str(tmp_path / "given.png"), "--mask", str(tmp_path / "mask.png")]
    with pytest.raises(SystemExit):
        sample.main([*edited, "--out", str(tmp_path / "edited.png")])
    assert "sampler: found 'analytic_dpm' with a mask" in capsys.readouterr().err
    ddpm = [word.replace("analytic_dpm", "ddpm") for word in drawing]
    assert sample.main([*ddpm, "--out", str(tmp_path / "ddpm.png")]) == 0
    other = Image.open(tmp_path / "ddpm.png")
    assert other.tobytes() != pictures[0].tobytes()
    assert "variances" not in other.text  # type: ignore[attr-defined]


def write_plain_shards(folder: Path) -> None:
    from ldm.data.shards import write_shards

    rng = np.random.default_rng(0)
    samples = [
        {"__key__": f"{i}", "moments.npy": rng.normal(size=(8, 2, 2)).astype("float32"), "txt": f"number {i}"}
        for i in range(8)
    ]
    write_shards(samples, folder, prefix="x", samples_per_shard=8, encoder={})


def test_variances_of_another_network_or_no_variances_at_all_are_refused(
    tiny: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    estimated = PosteriorVariances(torch.tensor([0.01, 20.0]).double(), torch.tensor([0.0001, 1.0]).double())
    save_pipeline(tmp_path / "model", tiny)
    path = tmp_path / "model" / VARIANCES
    write_variances(path, estimated, tiny.unet, {"samples": 3})
    loaded = load_pipeline(tmp_path / "model")
    assert loaded.variances is not None
    assert torch.equal(loaded.variances.variances, estimated.variances)
    other = ExactNetwork(two_modes(), SD, "v")
    with pytest.raises(ValueError, match=r"was estimated with the network .* estimate them again"):
        read_variances(path, other)
    write_variances(path, estimated, other, {})
    assert load_pipeline(tmp_path / "model").variances is None
    assert "estimate them again" in caplog.text
    for content in ("{}", '{"unet": "a", "levels": [1, 2], "variances": [1]}', '{"unet": "a", "levels": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is not a file of `ldm/evaluate\.py --scores variances`"):
            read_variances(path, other)
    with pytest.raises(FileNotFoundError, match="variances: there is no file"):
        read_variances(tmp_path / "nothing.json", other)
