"""Pipelines with learned variance: diffusers' DDPM and ours on the same noise, in folders that either of them wrote."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_models import LENGTH, make_pipeline
from torch import Tensor

from ldm import sample
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.unet import UNet
from ldm.pipeline.pipeline import Pipeline, load_pipeline, save_pipeline
from ldm.sampling.generation import checked_variance, encode_prompts, generate, initial_noise, sample_latents

PROMPTS = ["red heart", "flag of France"]
NEGATIVE = "blurry"
SHAPE = (2, 4, 8, 8)
SEED = 5


def learned(clip: str, **settings: object) -> Pipeline:
    """Random, with a variance half about between -1 and 1, as a trained one's is."""
    pipeline = make_pipeline(clip, learned_variance=True, **settings)
    with torch.no_grad():
        pipeline.unet.conv_out.weight[4:] *= 0.3
        pipeline.unet.conv_out.bias[4:] *= 0.3
    return pipeline


@pytest.fixture(scope="module")
def pipeline(clip) -> Pipeline:
    return learned(clip)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(folder, pipeline)
    return folder


def start_noise() -> Tensor:
    return initial_noise(3, [0, 1], SHAPE[1:])


def drawn_by_diffusers() -> Callable[[int], Tensor]:
    """What diffusers draws from a generator with SEED, a tensor a step, in the order of the steps."""
    generator, found = torch.Generator().manual_seed(SEED), []

    def noise(step: int) -> Tensor:
        while len(found) <= step:
            found.append(torch.randn(SHAPE, generator=generator))
        return found[step]

    return noise


def ours(pipeline: Pipeline, *, steps: int, guidance: float, spacing: str = "linspace", **settings: object) -> Tensor:
    conditioning, unconditional = encode_prompts(pipeline, PROMPTS, NEGATIVE)
    return sample_latents(
        pipeline, conditioning, unconditional, start_noise(), sampler="ddpm", steps=steps, guidance=guidance,
        spacing=spacing, fresh_noise=drawn_by_diffusers(), **settings,
    )  # fmt: skip


def theirs(reference: StableDiffusionPipeline, *, steps: int, guidance: float) -> Tensor:
    reference.set_progress_bar_config(disable=True)
    return reference(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=start_noise(), num_inference_steps=steps,
        guidance_scale=guidance, generator=torch.Generator().manual_seed(SEED), output_type="latent",
    ).images  # fmt: skip


def stepped(pipeline: Pipeline, scheduler: DDPMScheduler, *, steps: int, guidance: float, last: int | None = None):
    """The loop of diffusers' pipeline over our network, so that the last step can be left out; mean half if told so."""
    scheduler.set_timesteps(steps)
    both = [part.text for part in encode_prompts(pipeline, PROMPTS, NEGATIVE)]
    network = diffusers_network(pipeline)
    x, generator = start_noise(), torch.Generator().manual_seed(SEED)
    for t in scheduler.timesteps[:last]:
        with torch.no_grad():
            with_text, without = (network(x, t, text).sample for text in both)
        output = without + guidance * (with_text - without)
        output = output if scheduler.config.variance_type == "learned_range" else output[:, :4]
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def diffusers_network(pipeline: Pipeline) -> UNet2DConditionModel:
    network = UNet2DConditionModel.from_config(pipeline.unet.config.to_dict()).eval()
    network.load_state_dict(pipeline.unet.state_dict())
    return network


def assert_same(a: Tensor, b: Tensor) -> None:
    assert b.isfinite().all()
    # The network's float32 rounding grows with the guided latents, which random weights drive far beyond 1.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1.0, float(b.abs().max())))


ZERO_SNR = ScheduleConfig(rescale_betas_zero_snr=True)
SIGMOID = ScheduleConfig(beta_schedule="sigmoid", beta_start=0.0001, beta_end=0.02)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    ("parameterization", "noise"),
    [
        ("epsilon", ScheduleConfig()),
        ("v", ScheduleConfig()),
        ("x0", ScheduleConfig(beta_schedule="squaredcos_cap_v2")),
        ("v", ZERO_SNR),
        ("v", SIGMOID),
    ],
)
def test_diffusers_draws_from_what_is_saved_the_latents_of_our_ddpm(clip, tmp_path, parameterization, noise, guidance):
    pipeline = learned(clip, parameterization=parameterization, noise=noise)
    save_pipeline(tmp_path / "p", pipeline)
    reference = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(reference) is StableDiffusionPipeline
    assert type(reference.scheduler) is DDPMScheduler
    settings = json.loads((tmp_path / "p/scheduler/scheduler_config.json").read_text())
    assert settings["variance_type"] == reference.scheduler.variance_type == "learned_range"
    changed = [name for name in settings if name[0] != "_" and reference.scheduler.config[name] != settings[name]]
    assert not changed, f"diffusers corrects {changed} of the scheduler, with a warning"
    found = ours(pipeline, steps=10, guidance=guidance)
    assert_same(found, theirs(reference, steps=10, guidance=guidance))
    # And it comes back as it was.
    again = load_pipeline(tmp_path / "p")
    assert again.learned_variance
    assert_same(ours(again, steps=10, guidance=guidance), found)


def test_small_large_and_learned_variances_are_those_of_diffusers_and_differ(pipeline, saved):
    settings = json.loads((saved / "scheduler/scheduler_config.json").read_text())
    found = {}
    for variance, name in (("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")):
        for spacing in ("linspace", "leading"):
            scheduler = DDPMScheduler.from_config(
                settings | {"variance_type": name, "timestep_spacing": spacing, "steps_offset": 0}
            )
            found[variance] = ours(pipeline, steps=10, guidance=2.0, spacing=spacing, variance=variance)
            assert_same(found[variance], stepped(pipeline, scheduler, steps=10, guidance=2.0))
    assert torch.equal(ours(pipeline, steps=10, guidance=2.0, spacing="leading"), found["learned"]), "the default"
    for a, b in (("small", "large"), ("small", "learned"), ("large", "learned")):
        assert (found[a] - found[b]).abs().mean() > 0.01


def test_at_trailing_levels_diffusers_differs_by_the_noise_of_its_last_step_alone(pipeline, saved):
    scheduler = DDPMScheduler.from_pretrained(saved / "scheduler", timestep_spacing="trailing")
    whole = stepped(pipeline, scheduler, steps=10, guidance=2.0)
    mean = ours(pipeline, steps=10, guidance=2.0, spacing="trailing")
    # There diffusers' smaller bound is 1e-20, and where the network's share is 1 it adds all of the larger one.
    assert (whole - mean).abs().max() > 0.1
    before = stepped(pipeline, scheduler, steps=10, guidance=2.0, last=-1)
    conditioning, unconditional = encode_prompts(pipeline, PROMPTS, NEGATIVE)
    t = torch.tensor(99)
    text = torch.cat([unconditional.text, conditioning.text])
    with torch.no_grad():
        without, with_text = diffusers_network(pipeline)(torch.cat([before] * 2), t, text).sample[:, :4].chunk(2)
    kept = scheduler.alphas_cumprod[t]
    expected = kept.sqrt() * before - (1 - kept).sqrt() * (without + 2.0 * (with_text - without))  # x0 of v
    assert_same(mean, expected)


def released(clip: str, folder: Path, **scheduler: object) -> StableDiffusionPipeline:
    """A folder that diffusers wrote, of random weights, with a scheduler of learned range."""
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=32, norm_num_groups=8,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(clip, model_max_length=LENGTH)
    settings = {"variance_type": "learned_range", "clip_sample": False, "steps_offset": 1} | scheduler
    made = StableDiffusionPipeline(
        vae, CLIPTextModel.from_pretrained(clip), tokenizer, unet, DDPMScheduler(**settings), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_folder_of_diffusers_with_a_learned_range_is_sampled_as_diffusers_does(clip, tmp_path, prediction):
    reference = released(clip, tmp_path / "theirs", prediction_type=prediction, timestep_spacing="linspace")
    pipeline = load_pipeline(tmp_path / "theirs")
    assert pipeline.learned_variance
    for guidance in (1.0, 4.0):
        found = ours(pipeline, steps=12, guidance=guidance)
        assert_same(found, theirs(reference, steps=12, guidance=guidance))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "unipc", "euler_ancestral"])
def test_all_other_samplers_use_the_mean_half(pipeline, sampler):
    config = dataclasses.replace(pipeline.unet.config, out_channels=4)
    state = pipeline.unet.state_dict()
    state |= {name: state[name][:4] for name in ("conv_out.weight", "conv_out.bias")}
    half = UNet(config).eval()
    half.load_state_dict(state)
    plain = dataclasses.replace(pipeline, unet=half)
    assert not plain.learned_variance
    settings = {"seed": 2, "sampler": sampler, "steps": 4, "guidance": 3.0, "guidance_rescale": 0.5}
    assert (generate(pipeline, PROMPTS, **settings) == generate(plain, PROMPTS, **settings)).all()


def test_the_command_line_chooses_the_variance_and_the_picture_tells_it(pipeline, saved, tmp_path):
    from PIL import Image

    save_file({"noise": start_noise()}, tmp_path / "noise.safetensors")
    found = {}
    for variance in (None, "small", "large", "learned"):
        words = [f"--checkpoint={saved}", *(f"--prompt={one}" for one in PROMPTS), "--sampler=ddpm", "--steps=6"]
        words += [] if variance is None else [f"--variance={variance}"]
        out, latents = tmp_path / f"{variance}", tmp_path / f"{variance}.safetensors"
        noise = f"--noise={tmp_path / 'noise.safetensors'}"
        assert sample.main([*words, f"--out={out}", f"--latents_out={latents}", noise]) == 0
        found[variance] = load_file(latents)["latents"]
        told = Image.open(next(out.glob("*.png"))).text
        assert told.get("variance") == variance
    assert torch.equal(found[None], found["learned"])
    kept = []
    for variance in ("small", "large"):
        generate(
            pipeline, PROMPTS, seed=0, sampler="ddpm", steps=6, guidance=5.0, variance=variance, noise=start_noise(),
            keep=kept.append,
        )  # fmt: skip
    for variance, latents in zip(("small", "large"), kept, strict=True):
        assert_same(found[variance], latents)
        assert (found[variance] - found["learned"]).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddim", "variance": "large"}, "variance: found 'large' with sampler 'ddim', expected none"),
        ({"variance": "huge"}, "variance: found 'huge', expected one of small, large, learned"),
        ({"variance": "learned"}, "variance: found 'learned', expected 'small' or 'large': the network puts out no"),
    ],
)
def test_a_variance_that_there_is_not_is_an_error(clip, settings, message):
    plain = make_pipeline(clip)
    with pytest.raises(ValueError, match=message):
        generate(plain, PROMPTS, **{"seed": 0, "sampler": "ddpm", "steps": 2, "guidance": 1.0} | settings)


def test_where_a_mask_or_a_measurement_steers_the_default_is_small_and_learned_is_refused():
    assert checked_variance("ddpm", True, None) == "learned"
    assert checked_variance("ddpm", True, None, edited=True) == "beta_tilde"
    assert checked_variance("ddpm", True, "large", edited=True) == "beta"
    with pytest.raises(ValueError, match="found 'learned' with a mask, a measurement or repeated steps"):
        checked_variance("ddpm", True, "learned", edited=True)


@pytest.mark.parametrize(
    ("learned", "changes", "message"),
    [
        (False, {"variance_type": "learned_range"}, "out_channels is 4, expected 8, the second half for the variance"),
        (True, {"variance_type": "learned"}, "variance_type is 'learned', expected 'learned_range', or a fixed one"),
    ],
)
def test_a_folder_whose_scheduler_and_network_disagree_is_refused(clip, tmp_path, learned, changes, message):
    save_pipeline(tmp_path / "p", make_pipeline(clip, learned_variance=learned))
    path = tmp_path / "p/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / "p")


def test_a_network_of_another_number_of_channels_is_refused(clip, tmp_path):
    folder = tmp_path / "p"
    save_pipeline(folder, make_pipeline(clip))
    config = json.loads((folder / "unet/config.json").read_text()) | {"out_channels": 6}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"out_channels is 6, .* \(expected 4, or 8 with learned variance\)"):
        load_pipeline(folder)
