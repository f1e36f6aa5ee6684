"""Learned variance in real runs: the loss in closed form, checkpoints that diffusers steps as we do, exact resuming."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_models import MINILM
from tiny_shards import positions_of
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from training_runs import assert_same_state, metrics, train

from ldm.data.data_config import DataConfig
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest
from ldm.diffusion.denoiser import predictor
from ldm.diffusion.likelihood import choose_timesteps, elbo
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.pipeline.pipeline import load_pipeline
from ldm.sampling.generation import encode_prompts, initial_noise, sample_latents
from tools.replay import replay

LATENT, CHECKPOINT, VLB = (4, 16, 16), 6, 0.01
OPTIONS = (
    "--objective.learned_variance=true", "--unet.out_channels=8", f"--objective.vlb_weight={VLB}",
    "--training.steps=9", f"--training.checkpoint_every={CHECKPOINT}", "--optimizer.warmup_steps=0",
    "--objective.parameterization=v", "--objective.loss=v",
)  # fmt: skip
PROMPTS = ["red heart", "grey elephant"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoded_shards) -> Path:
    folder = tmp_path_factory.mktemp("learned") / "run"
    train(folder, encoded_shards, *OPTIONS, "--previews.prompts=[red heart]", "--previews.every=9",
          "--previews.sampler=ddpm", "--previews.steps=3")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def checkpoint(run) -> Path:
    return run / f"checkpoints/step-{CHECKPOINT:08d}"


def test_the_variance_half_is_learned_and_previews_are_drawn_with_it(run, checkpoint):
    files = [one / "training_state/unet.safetensors" for one in (checkpoint, run / "checkpoints/latest")]
    rows = [load_file(one)["conv_out.weight"][4:] for one in files]
    assert rows[0].any()
    assert not torch.equal(*rows)
    assert (run / "samples/step-00000009.png").is_file()


@torch.no_grad()
def test_the_logged_loss_is_the_simple_one_and_the_bound_out_of_torchs_divergences(run, checkpoint, encoded_shards):
    config = DataConfig(shards=str(encoded_shards), resolution=64, workers=0)
    positions = positions_of(micro_batch=16, start_step=CHECKPOINT, stop_step=CHECKPOINT + 1)
    batch = next(iter(make_loader(config, Manifest.load(encoded_shards), 0, positions, latent_shape=LATENT)))
    scheduler = DDPMScheduler.from_pretrained(checkpoint / "scheduler")
    network = UNet2DConditionModel.from_config(json.loads((checkpoint / "unet/config.json").read_text())).eval()
    network.load_state_dict(load_file(checkpoint / "training_state/unet.safetensors"))
    encoder = TextConditioner.load([TextEncoderConfig(MINILM, max_length=16, attention_mask=True)])
    text = torch.where(batch.dropped.view(-1, 1, 1), encoder.empty().text, batch.text_states.float())
    scale = json.loads((checkpoint / "vae/config.json").read_text())["scaling_factor"]
    mean, log_variance = batch.moments.float().chunk(2, dim=1)
    x0, noise = scale * (mean + (log_variance / 2).exp() * batch.posterior_noise), batch.noise
    t = (batch.u * 1000).long()
    cumulative = scheduler.alphas_cumprod.double()
    kept = cumulative[t].view(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    x_t = (alpha * x0 + sigma * noise).float()
    output, raw = network(x_t, t, text).sample.double().chunk(2, dim=1)
    simple = (output - (alpha * noise - sigma * x0)).square().flatten(1).mean(1)
    predicted = alpha * x_t - sigma * output
    assert t.min() > 0, "the decoder's term is test_objective_variance's"
    before = cumulative[t - 1].view(-1, 1, 1, 1)
    beta = 1 - kept / before
    small = (1 - before) / (1 - kept) * beta
    share = (raw + 1) / 2
    deviation = (share * beta.log() + (1 - share) * small.log()).div(2).exp()  # Nichol & Dhariwal 2021, Eq. 15
    gain = before.sqrt() * beta / (1 - kept)  # Ho et al. 2020, Eq. 7: of x0 in the posterior's mean
    bound = kl_divergence(Normal(gain * x0, small.sqrt()), Normal(gain * predicted, deviation)).flatten(1).mean(1)
    expected = (simple + VLB * 1000 * bound / np.log(2)).mean().item()
    assert float((VLB * 1000 * bound / np.log(2)).mean()) > 0.01 * expected, "the bound must show"
    assert metrics(run)[CHECKPOINT]["loss"] == pytest.approx(expected, rel=1e-4)


def drawn(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn((2, *LATENT), generator=generator) for _ in range(steps)]


def test_diffusers_opens_the_checkpoint_and_steps_its_ddpm_to_our_latents(checkpoint):
    guidance = 3.0
    reference = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    assert type(reference) is StableDiffusionPipeline
    assert type(reference.scheduler) is DDPMScheduler
    assert reference.scheduler.config.variance_type == "learned_range"
    pipeline = load_pipeline(checkpoint)
    assert pipeline.learned_variance
    conditioning, unconditional = encode_prompts(pipeline, PROMPTS)
    noise = initial_noise(1, [0, 1], LATENT)
    fresh = drawn(12)
    ours = sample_latents(
        pipeline, conditioning, unconditional, noise, sampler="ddpm", steps=12, guidance=guidance, spacing="linspace",
        fresh_noise=fresh.__getitem__,
    )  # fmt: skip
    scheduler, x = reference.scheduler, noise
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(8)
    for t in scheduler.timesteps:
        with torch.no_grad():
            with_text, without = (reference.unet(x, t, part.text).sample for part in (conditioning, unconditional))
        assert with_text.shape[1] == 8
        x = scheduler.step(without + guidance * (with_text - without), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)
    small = sample_latents(
        pipeline, conditioning, unconditional, noise, sampler="ddpm", steps=12, guidance=guidance, spacing="linspace",
        fresh_noise=fresh.__getitem__, variance="small",
    )  # fmt: skip
    assert (small - ours).abs().max() > 1e-3, "the learned variance does nothing"


def test_the_bound_of_a_checkpoint_takes_its_learned_variance(checkpoint):
    pipeline = load_pipeline(checkpoint)
    conditioning, _ = encode_prompts(pipeline, PROMPTS)
    predict = predictor(pipeline.unet, pipeline.schedule, pipeline.parameterization)
    x0 = initial_noise(4, [0, 1], LATENT)
    chosen = choose_timesteps(pipeline.schedule, torch.full((3, 2), 0.5))
    bounds = {
        variance: elbo(
            lambda x, sigma: predict(x, sigma, conditioning), pipeline.schedule, x0,
            lambda number: initial_noise(number, [0, 1], LATENT), variance=variance, at=chosen,
        ).nats
        for variance in ("beta_tilde", "beta", "learned")
    }  # fmt: skip
    assert all(one.isfinite().all() for one in bounds.values())
    assert not torch.allclose(bounds["learned"], bounds["beta"], rtol=1e-6)
    assert not torch.allclose(bounds["learned"], bounds["beta_tilde"], rtol=1e-6)


def test_a_resumed_run_is_the_undisturbed_one_byte_by_byte(run, encoded_shards, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(again / "checkpoints/step-00000009")
    (again / "checkpoints/latest").unlink()
    train(again, encoded_shards, *OPTIONS, "--data.workers=1")
    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(run)]
    assert_same_state(again / "checkpoints/latest", run / "checkpoints/latest")
    names = [path.relative_to(run) for path in (run / "checkpoints/latest").resolve().rglob("scheduler/*")]
    assert all((again / name).read_bytes() == (run / name).read_bytes() for name in names)


def test_replay_computes_the_same_loss_again(run):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    *_, whole = replay(run, CHECKPOINT + 2, None, None)
    assert whole["loss"] == whole["logged_loss"] == metrics(run)[CHECKPOINT + 1]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--objective.learned_variance=true",),
            "unet.out_channels is 4, but the autoencoder's latents have 4 and objective.learned_variance is true: "
            "expected 8, the second half for the variance; or set objective.learned_variance to false",
        ),
        (
            ("--unet.out_channels=8",),
            "unet.out_channels is 8, but the autoencoder's latents have 4: the second half would be a variance, which "
            "this objective does not train; set objective.learned_variance to true, or unet.out_channels to 4",
        ),
        (("--unet.out_channels=6",), "unet.out_channels is 6, but the autoencoder's latents have 4"),
    ],
)
def test_channels_that_do_not_fit_the_objective_are_refused_with_what_to_do(options, message, encoded_shards, tmp_path):
    with pytest.raises(ValueError, match="the parts of this run do not fit") as error:
        train(tmp_path / "run", encoded_shards, *options)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [message]


def test_a_run_may_begin_with_a_network_without_variance_or_leave_anothers(run, encoded_shards, tmp_path):
    options = [*OPTIONS[5:], "--training.steps=1", f"--init_from={run}"]
    train(tmp_path / "plain", encoded_shards, *options)
    record = json.loads((tmp_path / "plain/checkpoints/latest/training_state/state.json").read_text())
    assert "the 4 rows of the source's learned variance are left out" in json.dumps(record)
    options[-1] = f"--init_from={tmp_path}/plain"
    train(tmp_path / "learned", encoded_shards, *options, *OPTIONS[:2])
    record = json.loads((tmp_path / "learned/checkpoints/latest/training_state/state.json").read_text())
    assert "4 rows of a variance are new and zero: it begins at the geometric mean of its bounds" in json.dumps(record)
