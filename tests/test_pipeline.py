"""Pipelines: diffusers opens what is saved and gives the same picture, which is a function of its seed and index."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MINILM, make_pipeline, make_sdxl_pair, tiny_autoencoder

from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.autoencoder import posterior_mean, scale_latents
from ldm.pipeline.pipeline import Pipeline, load_pipeline, save_pipeline
from ldm.sampling import generation
from ldm.sampling.generation import (
    decode_latents,
    encode_prompts,
    generate,
    initial_noise,
    sample_latents,
    step_noise,
    to_uint8,
)

PROMPTS = ["red heart", "", "Flag of France", "a caption that is longer than the sixteen tokens of the encoder"]
NEGATIVE = "blurry, ugly"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoders") / "pair"
    make_sdxl_pair(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(pipeline: Pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(folder, pipeline)
    return folder


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def diffusers_pictures(folder: Path, noise: torch.Tensor, negative: str, *, steps: int = 5, guidance: float = 3.0):
    """(N, H, W, 3) uint8 that diffusers' own pipeline gives for PROMPTS, its scheduler and settings as saved."""
    import diffusers

    reference = diffusers.DiffusionPipeline.from_pretrained(folder)
    pair = (folder / "text_encoder_2").is_dir()
    assert type(reference).__name__ == ("StableDiffusionXLPipeline" if pair else "StableDiffusionPipeline")
    assert type(reference.scheduler).__name__ == "DDIMScheduler"
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    changed = [name for name in settings if name[0] != "_" and reference.scheduler.config[name] != settings[name]]
    assert not changed, f"diffusers corrects {changed} of the scheduler, with a warning"
    reference.set_progress_bar_config(disable=True)
    images = reference(
        PROMPTS,
        negative_prompt=[negative] * len(PROMPTS) if negative else None,
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


ZERO_SNR = ScheduleConfig(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("encoder", "parameterization", "noise"),
    [
        ("clip", "epsilon", ScheduleConfig()),
        ("clip", "v", ScheduleConfig()),
        ("clip", "x0", ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)),
        ("clip", "v", ZERO_SNR),
        ("minilm", "v", ScheduleConfig()),
        ("pair", "v", ScheduleConfig()),
        ("pair-zeros", "epsilon", ScheduleConfig()),
    ],
)
def test_diffusers_opens_what_is_saved_and_gives_our_picture(
    clip, pair, tmp_path, encoder, parameterization, noise
) -> None:
    pipeline = make_pipeline(
        {"clip": clip, "minilm": MINILM}.get(encoder, pair),
        parameterization=parameterization,
        noise=noise,
        attention_mask=encoder == "minilm",
        pair=encoder.startswith("pair"),
        empty_caption="zeros" if encoder == "pair-zeros" else "encoded",
    )
    save_pipeline(tmp_path / "p", pipeline)
    settings = {"seed": 3, "indices": [5, 2, 9, 0], "sampler": "ddim", "steps": 5, "guidance": 3.0}
    ours = generate(pipeline, PROMPTS, negative=NEGATIVE, **settings)
    assert ours.shape == (4, 16, 16, 3)
    assert ours.std() > 10, "a flat picture would match anything"
    latents = initial_noise(3, [5, 2, 9, 0], pipeline.latent_shape)
    assert difference(ours, diffusers_pictures(tmp_path / "p", latents, NEGATIVE)) <= 2
    # Without a negative prompt diffusers guides away from "", or from zeros: the encoder's empty caption here, too.
    plain = generate(pipeline, PROMPTS, **settings)
    assert difference(plain, diffusers_pictures(tmp_path / "p", latents, "")) <= 2
    assert difference(plain, ours) > 2, "the negative prompt does nothing"
    # And it comes back as it was.
    assert difference(generate(load_pipeline(tmp_path / "p"), PROMPTS, **settings), plain) <= 1


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_shift_of_16_channel_latents_is_applied_by_diffusers_too_once_saved(clip, tmp_path, convolutions) -> None:
    import diffusers

    shift = 0.6
    autoencoder = tiny_autoencoder(
        latent_channels=16, shift_factor=shift, scaling_factor=0.36, use_quant_conv=convolutions,
        use_post_quant_conv=convolutions, sample_size=16,
    )  # fmt: skip
    pipeline = make_pipeline(clip, autoencoder=autoencoder)
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    save_pipeline(tmp_path / "p", pipeline)
    assert all(torch.equal(tensor, before[name]) for name, tensor in autoencoder.state_dict().items())
    saved = json.loads((tmp_path / "p" / "vae" / "config.json").read_text())
    assert (saved["shift_factor"], saved["use_quant_conv"], saved["use_post_quant_conv"]) == (None, True, True)

    settings = {"seed": 3, "sampler": "ddim", "steps": 5, "guidance": 3.0}
    ours = generate(pipeline, PROMPTS, negative=NEGATIVE, **settings)
    noise = initial_noise(3, range(4), pipeline.latent_shape)
    assert difference(ours, diffusers_pictures(tmp_path / "p", noise, NEGATIVE)) <= 2
    again = load_pipeline(tmp_path / "p")
    assert difference(generate(again, PROMPTS, negative=NEGATIVE, **settings), ours) <= 1

    # The same latents and pictures as before, here and in diffusers' autoencoder; log-variances untouched.
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "p" / "vae")
    with torch.no_grad():
        moments = autoencoder.encode(images)
        expected = torch.cat([moments[:, :16] - shift, moments[:, 16:]], dim=1)
        for found in (again.autoencoder.encode(images), theirs._encode(images)):
            assert (found - expected).abs().max() < 2e-6
        latents = scale_latents(posterior_mean(moments), autoencoder.config)
        assert (
            scale_latents(posterior_mean(theirs._encode(images)), again.autoencoder.config) - latents
        ).abs().max() < 2e-6
    assert difference(decode_latents(again, latents), decode_latents(pipeline, latents)) <= 1
    # Without it pictures would show it.
    unshifted = dataclasses.replace(autoencoder.config, shift_factor=None)
    pipeline.autoencoder.config = unshifted
    assert difference(decode_latents(pipeline, latents), decode_latents(again, latents)) > 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "euler"])
def test_the_picture_of_a_seed_and_index_does_not_depend_on_batch_size_or_company(pipeline, sampler) -> None:
    def draw(rows: list[int], batch_size: int, seed: int = 7) -> np.ndarray:
        return generate(
            pipeline, [PROMPTS[row] for row in rows], indices=[10 + row for row in rows], seed=seed, sampler=sampler,
            steps=4, guidance=3.0, batch_size=batch_size,
        )  # fmt: skip

    together = draw([0, 1, 2, 3], 4)
    assert difference(draw([0, 1, 2, 3], 1), together) <= 1
    assert difference(draw([0, 1, 2, 3], 3), together) <= 1
    assert difference(draw([3, 1], 2), together[[3, 1]]) <= 1
    assert difference(draw([0, 1, 2, 3], 4, seed=8), together) > 20


def test_initial_noise_is_philox_at_seed_purpose_and_index(pipeline) -> None:
    noise = initial_noise(11, [4, 2**40], pipeline.latent_shape)
    for row, index in enumerate([4, 2**40]):
        philox = np.random.Philox(
            key=np.array([11, 10], dtype=np.uint64), counter=np.array([0, index, 0, 0], dtype=np.uint64)
        )
        expected = np.random.Generator(philox).standard_normal((4, 8, 8), dtype=np.float32)
        assert np.array_equal(noise[row].numpy(), expected)


def test_noise_of_stochastic_steps_differs_by_step_and_picture_and_from_the_initial_noise(pipeline) -> None:
    shape = pipeline.latent_shape
    draw = step_noise(11, [0, 1], shape, pipeline.device)
    rows = torch.cat([draw(0), draw(1), initial_noise(11, [0, 1], shape)]).flatten(1)  # (6, D)
    assert torch.equal(draw(1), rows[2:4].reshape(2, 4, 8, 8))
    correlation = torch.corrcoef(rows) - torch.eye(6)
    assert correlation.abs().max() < 0.3  # 256 draws: 5 standard deviations


def test_prompts_show_and_guidance_of_one_ignores_the_negative(pipeline) -> None:
    def draw(prompt: str, guidance: float, negative: str = "") -> np.ndarray:
        return generate(pipeline, [prompt], seed=0, sampler="ddim", steps=4, guidance=guidance, negative=negative)

    assert difference(draw("red heart", 3.0), draw("green apple", 3.0)) > 5
    assert difference(draw("red heart", 1.0), draw("red heart", 1.0, NEGATIVE)) == 0
    # Scale 0 is the unconditional network: any prompt, and a negative prompt in its place.
    assert difference(draw("red heart", 0.0), draw("green apple", 0.0)) == 0
    assert difference(draw("red heart", 0.0, NEGATIVE), draw(NEGATIVE, 1.0)) <= 1


def test_unconditional_states_are_those_that_dropped_captions_are_trained_with(pipeline) -> None:
    conditioning, unconditional = encode_prompts(pipeline, PROMPTS)
    assert torch.equal(unconditional.text, pipeline.text_encoder.empty().text.expand(4, -1, -1))
    assert torch.equal(conditioning.text[1], unconditional.text[0])  # PROMPTS[1] is ""


def test_an_empty_negative_prompt_is_zeros_for_sdxl_as_diffusers_makes_of_none(pair, tmp_path) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "xl"
    save_pipeline(folder, make_pipeline(pair, pair=True, empty_caption="zeros"))
    theirs = StableDiffusionXLPipeline.from_pretrained(folder)
    _, negative, _, pooled = theirs.encode_prompt("a", device="cpu", negative_prompt=None)
    _, without = encode_prompts(load_pipeline(folder), ["a"], "")
    assert torch.equal(without.text, negative)
    assert without.pooled is not None
    assert torch.equal(without.pooled, pooled)
    assert not without.text.any()
    assert theirs.encode_prompt("a", device="cpu", negative_prompt="")[1].any(), "the two differ in diffusers"


def test_latents_are_unscaled_exactly_once_before_decoding(pipeline) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = posterior_mean(pipeline.autoencoder.encode(images))
        expected = to_uint8(pipeline.autoencoder.decode(z))
    assert difference(decode_latents(pipeline, scale_latents(z, pipeline.autoencoder.config)), expected) <= 1
    assert difference(decode_latents(pipeline, z), expected) > 1  # the factor of this autoencoder matters


def test_pixels_are_rounded_and_clamped_as_closed_form_says() -> None:
    values = torch.tensor([-7.0, -1.0, -1 + 2 / 255, 0.0, 1 - 1.1 / 255, 1.0, 3.0])
    pictures = to_uint8(values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pictures.shape == (1, 1, 7, 3)
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_generating_moves_no_global_generator_and_leaves_the_encoder_usable_in_training(clip) -> None:
    pipeline = make_pipeline(clip)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generate(pipeline, ["red"], seed=0, sampler="ddpm", steps=2, guidance=2.0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    layer = torch.nn.Linear(pipeline.text_encoder.hidden_size, 1)
    layer(pipeline.text_encoder.empty().text).sum().backward()  # cached while sampling: no inference tensor may stay


def test_lower_precision_is_used_and_stays_close(pipeline, saved) -> None:
    low = load_pipeline(saved, dtype=torch.bfloat16, channels_last=True)
    seen: list[torch.dtype] = []
    low.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    settings = {"seed": 1, "sampler": "ddim", "steps": 4, "guidance": 2.0}
    a, b = generate(low, PROMPTS, **settings), generate(pipeline, PROMPTS, **settings)
    assert set(seen) == {torch.bfloat16}
    assert low.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert 0 < np.abs(a.astype(int) - b).mean() < 3
    assert difference(generate(load_pipeline(saved, channels_last=True), PROMPTS, **settings), b) <= 1


def test_progress_counts_the_steps_of_all_batches(pipeline) -> None:
    calls: list[tuple[int, int]] = []
    generate(
        pipeline, PROMPTS, seed=0, sampler="ddim", steps=3, guidance=1.0, batch_size=3,
        progress=lambda done, of: calls.append((done, of)),
    )  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "magic"}, r"sampler: found 'magic', expected one of ddpm, ddim, dpmpp_2m"),
        ({"spacing": "odd"}, r"spacing: found 'odd'"),
        ({"steps": 0}, r"steps: found 0, expected 1 or more"),
        ({"steps": 1001}, r"steps: found 1001, expected at most the schedule's 1000"),
        ({"prompts": []}, r"found 0 prompts and 0 indices"),
        ({"indices": [1, 2]}, r"found 1 prompts and 2 indices"),
        ({"batch_size": 0}, r"batch_size: found 0"),
        ({"guidance": float("nan")}, r"guidance: found scale nan"),
        ({"guidance_rescale": 1.5}, r"rescale 1\.5, expected 0 to 1"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(pipeline, changes, message) -> None:
    settings = {"prompts": ["a"], "seed": 0, "sampler": "ddim", "steps": 2, "guidance": 2.0} | changes
    with pytest.raises(ValueError, match=message):
        generate(pipeline, settings.pop("prompts"), **settings)


def test_the_stages_can_be_called_one_by_one(pipeline) -> None:
    whole = generate(pipeline, PROMPTS[:2], seed=5, sampler="dpmpp_2m", steps=4, guidance=15.0, guidance_rescale=1.0)
    latents = sample_latents(
        pipeline, *encode_prompts(pipeline, PROMPTS[:2]), initial_noise(5, [0, 1], pipeline.latent_shape),
        sampler="dpmpp_2m", steps=4, guidance=15.0, guidance_rescale=1.0,
    )  # fmt: skip
    assert latents.dtype == torch.float32
    assert np.array_equal(generation.decode_latents(pipeline, latents), whole)
    plain = generate(pipeline, PROMPTS[:2], seed=5, sampler="dpmpp_2m", steps=4, guidance=15.0)
    assert difference(plain, whole) > 1, "guidance_rescale does nothing"
