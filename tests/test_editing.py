"""The walk from a given picture to pictures, with a tiny model: addressed draws, kept latents, the measurement."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_pipeline
from torch import Tensor

from ldm.data.pictures import normalize
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import guided, unguided
from ldm.diffusion.ode_solvers import euler
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.schedule import ScheduleConfig
from ldm.diffusion.spacing import sigmas
from ldm.models.autoencoder import posterior_mean, sample_posterior
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.editing import NOTHING, prepare
from ldm.sampling.generation import decode_latents, encode_prompts, generate, initial_noise
from ldm.sampling.given_pictures import GivenPicture, Operator
from ldm.sampling.inversion import invert

SIDE, SHAPE = 16, (4, 8, 8)
SETTINGS: dict[str, Any] = {"seed": 0, "steps": 4, "sampler": "ddim", "guidance": 3.0}
PICTURE = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = np.zeros((SIDE, SIDE), bool)
MASK[5:12, 4:] = True  # begins and ends within latents, which are 2 pixels wide
GIVEN = {
    "image to image": GivenPicture(PICTURE, 0.5),
    "inpainting": GivenPicture(PICTURE, 1.0, MASK),
    "inpainting in part": GivenPicture(PICTURE, 0.75, MASK),
    "inpainting with repeats": GivenPicture(PICTURE, 1.0, MASK, repeats=3),
    "super-resolution": GivenPicture(PICTURE[:4, :4].copy(), 1.0, None, Operator("super_resolution", 4)),
    "deblurring": GivenPicture(PICTURE, 0.75, None, Operator("blur", 1.5)),
    "missing pixels": GivenPicture(PICTURE, 1.0, MASK, Operator("mask")),
}


def kept_latents(pipeline: Pipeline, prompts: list[str], **settings: Any) -> Tensor:
    kept: list[Tensor] = []
    generate(pipeline, prompts, keep=kept.append, **settings)
    return torch.cat(kept)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("image to image", "ddpm"),
        ("inpainting", "dpmpp_2m"),
        ("inpainting in part", "ddpm"),
        ("inpainting with repeats", "ddpm"),
        ("inpainting with repeats", "dpmpp_2m"),
        ("super-resolution", "ddpm"),
        ("deblurring", "dpmpp_2m"),
    ],
)
def test_a_picture_is_a_function_of_seed_and_index_whatever_its_batch(pipeline, name: str, sampler: str) -> None:
    settings = SETTINGS | {"sampler": sampler, "given": GIVEN[name], "steps": 2 if GIVEN[name].operator else 4}
    prompts = ["red heart", "a", "blue"]
    together = generate(pipeline, prompts, indices=[3, 4, 9], batch_size=3, **settings).astype(int)
    in_turn = generate(pipeline, prompts, indices=[3, 4, 9], batch_size=1, **settings)
    alone = generate(pipeline, ["blue"], indices=[9], **settings)[0]
    assert np.abs(together - in_turn).max() <= 1
    assert np.abs(together[2] - alone).max() <= 1
    other = generate(pipeline, ["blue"], indices=[10], **settings)[0]
    assert np.abs(together[2] - other).max() > 5, "the noise of two indices is one"


@pytest.mark.parametrize("name", ["none", "image to image", "inpainting", "inpainting with repeats"])
def test_with_adaptive_steps_too_batches_change_a_picture_by_rounding_only(clip, name: str) -> None:
    """Of a network that turns its input little: a random one's flow makes much of rounding."""
    pipeline = make_pipeline(clip)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.02)
    settings = SETTINGS | {"sampler": "ode_adaptive", "given": GIVEN.get(name), "indices": [3, 4, 9]}
    together, in_pairs, in_turn = (
        kept_latents(pipeline, ["red heart", "a", "blue"], batch_size=size, **settings) for size in (3, 2, 1)
    )
    torch.testing.assert_close(in_turn, together, rtol=0, atol=5e-6)
    torch.testing.assert_close(in_turn, in_pairs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["none", "inpainting", "super-resolution", "deblurring"])
def test_samples_at_levels_that_differ_are_denoised_as_each_alone(pipeline, name: str) -> None:
    """As adaptive steps ask for them, guided and with what is given of the picture."""
    edit = prepare(pipeline, GIVEN[name], SHAPE) if name in GIVEN else NOTHING
    sigma = torch.tensor([5.0, 0.3, 0.05], dtype=torch.float64)
    x = 0.5 + sigma.view(-1, 1, 1, 1) * initial_noise(0, range(3), SHAPE).double()

    def denoised(rows: list[int]) -> Tensor:
        both = encode_prompts(pipeline, [["red heart", "a", "blue"][row] for row in rows])
        clean = denoiser(pipeline.unet, pipeline.schedule, pipeline.parameterization)
        with torch.no_grad():
            return edit.denoise(guided(clean, *both, 3.0, 0.5))(x[rows], sigma[rows])

    alone = torch.cat([denoised([row]) for row in range(3)])
    torch.testing.assert_close(denoised([0, 1, 2]), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["inpainting", "inpainting in part", "inpainting with repeats"])
def test_latents_whose_pixels_are_all_kept_are_those_of_the_picture_and_pixels_are_too(pipeline, name: str) -> None:
    latents = kept_latents(pipeline, ["a", "b"], given=GIVEN[name], **SETTINGS)
    encoded = posterior_mean(pipeline.autoencoder.encode(normalize(PICTURE[None]))) * 0.7  # the scaling factor
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:6, 2:] = False  # of which some pixel is masked
    torch.testing.assert_close(latents[..., kept], encoded[..., kept].expand(2, -1, -1), rtol=0, atol=1e-6)
    assert float((latents - encoded).abs().amax(dim=1)[..., ~kept].min()) > 0.01, "a latent of masked pixels is kept"
    pictures = generate(pipeline, ["a", "b"], given=GIVEN[name], **SETTINGS)
    assert all(np.array_equal(one[~MASK], PICTURE[~MASK]) for one in pictures)
    assert (np.abs(pictures[:, MASK].astype(int) - PICTURE[MASK]).max(axis=-1) > 0).mean() > 0.9


def test_at_full_strength_the_kept_part_begins_as_the_original_with_noise_and_the_rest_as_noise_alone(pipeline) -> None:
    edit, levels = prepare(pipeline, GIVEN["inpainting"], SHAPE), sigmas(pipeline.schedule, 4)
    assert edit.latents is not None
    noise = initial_noise(0, [0], SHAPE).double()
    x = edit.start(noise, levels)
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:6, 2:] = False
    torch.testing.assert_close(x[..., kept], (edit.latents + levels[0] * noise)[..., kept], rtol=0, atol=1e-6)
    torch.testing.assert_close(x[..., ~kept], start(noise, levels)[..., ~kept], rtol=0, atol=1e-12)


def test_image_to_image_begins_at_the_posterior_mean_with_noise_of_the_level_of_its_strength(pipeline) -> None:
    """By hand: of 8 steps the last 3 at strength 0.4, Euler's."""
    seed, index, levels = 5, 2, sigmas(pipeline.schedule, 8)[5:]
    mean = posterior_mean(pipeline.autoencoder.encode(normalize(PICTURE[None]))) * 0.7
    x = mean + levels[0] * initial_noise(seed, [index], SHAPE)
    conditioning, _ = encode_prompts(pipeline, ["red heart"])
    with torch.no_grad():
        denoise = unguided(denoiser(pipeline.unet, pipeline.schedule, pipeline.parameterization), conditioning)
        expected = euler(denoise, x, levels)
    settings: dict[str, Any] = {"seed": seed, "steps": 8, "sampler": "euler", "guidance": 1.0}
    found = kept_latents(pipeline, ["red heart"], indices=[index], given=GivenPicture(PICTURE, 0.4), **settings)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_the_code_of_a_picture_is_the_one_that_decodes_to_it_best(clip) -> None:
    pipeline = make_pipeline(clip)
    edit = prepare(pipeline, GivenPicture(PICTURE), SHAPE)
    assert edit.latents is not None
    moments = pipeline.autoencoder.encode(normalize(PICTURE[None]))
    sample = sample_posterior(moments, initial_noise(0, [0], SHAPE))
    torch.testing.assert_close(edit.latents, posterior_mean(moments) * 0.7)
    assert float((edit.latents - sample * 0.7).abs().max()) > 0.1  # a sample is another one


@pytest.mark.parametrize(("name", "bound"), [("super-resolution", 0.5), ("deblurring", 1.0), ("missing pixels", 0.0)])
def test_the_picture_satisfies_its_measurement(pipeline, name: str, bound: float) -> None:
    """To `bound` levels of 8 bits, at each pixel of H^+ H picture, which is all of it that was measured."""
    given = GIVEN[name]
    operator = given.linear_operator()
    measured = torch.from_numpy(given.pixels.astype(np.float64)).permute(2, 0, 1)[None]
    if name == "deblurring":  # a measurement that some picture has: a random one asks for values out of range
        measured = operator(torch.from_numpy(PICTURE.astype(np.float64) / 2 + 60).permute(2, 0, 1)[None])
        given = GivenPicture(measured.round().byte()[0].permute(1, 2, 0).numpy(), 0.75, None, given.operator)
    if name == "missing pixels":
        measured = operator(measured)
    drawn = generate(pipeline, ["red heart"], given=given, **SETTINGS | {"steps": 2})
    found = operator(torch.from_numpy(drawn.astype(np.float64)).permute(0, 3, 1, 2))
    error = (operator(operator.pseudo_inverse(found - measured))).abs().max()
    assert float(error) <= bound


def test_what_is_measured_of_latents_is_measured_of_the_picture_that_they_decode_to(pipeline) -> None:
    measurement = prepare(pipeline, GIVEN["super-resolution"], SHAPE).measurement
    assert measurement is not None
    latents = initial_noise(0, [0, 1], SHAPE)
    decoded = pipeline.autoencoder.decode(latents / 0.7).reshape(2, 3, 4, 4, 4, 4).mean(dim=(3, 5))
    torch.testing.assert_close(measurement.of_latents(latents.double()), decoded, rtol=0, atol=1e-5)


def test_guidance_by_a_measurement_brings_the_latents_themselves_near_it(pipeline) -> None:
    """Before the last projection, by which the picture itself satisfies it; of a picture that the decoder knows."""
    settings = SETTINGS | {"guidance": 1.0}
    truth = generate(pipeline, ["a"], indices=[7], **settings)

    def means(pictures: np.ndarray) -> np.ndarray:
        return pictures.astype(float).reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4))

    given = GivenPicture(means(truth)[0].round().astype(np.uint8), 1.0, None, Operator("super_resolution", 4))
    steered, plain = (
        decode_latents(pipeline, kept_latents(pipeline, ["a", "b"], given=g, **settings)) for g in (given, None)
    )
    errors = [float(np.sqrt(((means(one) - means(truth)) ** 2).mean())) for one in (steered, plain)]
    assert errors[0] < 0.6 * errors[1], errors


@pytest.mark.parametrize("rescale", [False, True])
def test_a_schedule_that_begins_with_pure_noise_serves_all_of_them(clip, rescale: bool) -> None:
    pipeline = make_pipeline(clip, noise=ScheduleConfig(rescale_betas_zero_snr=rescale))
    for name in ("inpainting", "image to image", "super-resolution"):
        given = GivenPicture(GIVEN[name].pixels, 1.0, GIVEN[name].mask, GIVEN[name].operator)
        latents = kept_latents(pipeline, ["a"], given=given, **SETTINGS | {"steps": 2})
        assert bool(latents.isfinite().all())
        assert float(latents.abs().max()) < 100


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_inversion_and_back_gives_the_latents_of_the_picture(clip, kind: str, tmp_path) -> None:
    """For a network that turns its input little, as trained ones do; a random one is no flow that could be inverted."""
    if kind == "sdxl":
        from tiny_models import make_sdxl_pair

        make_sdxl_pair(tmp_path)
    pipeline = make_pipeline(str(tmp_path), pair=True) if kind == "sdxl" else make_pipeline(clip)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.02)
    prompts, settings = ["red heart", "a", "b"], {"steps": 40, "spacing": "trailing", "guidance": 1.0}
    noise = invert(pipeline, prompts, GivenPicture(PICTURE), SHAPE, batch_size=2, **settings)
    alone = invert(pipeline, prompts[2:], GivenPicture(PICTURE), SHAPE, **settings)
    torch.testing.assert_close(noise[2:], alone, rtol=0, atol=1e-4)
    back = kept_latents(pipeline, prompts, noise=noise, sampler="ddim", seed=0, **settings)
    expected = prepare(pipeline, GivenPicture(PICTURE), SHAPE).latents
    assert expected is not None
    torch.testing.assert_close(back, expected.expand_as(back), rtol=0, atol=1e-3)
    assert float((noise[0] - noise[1]).abs().max()) > 1e-4, "the prompt does nothing"


def test_an_inpainting_network_needs_picture_and_mask_and_takes_no_operator(clip) -> None:
    pipeline = make_pipeline(clip, inpainting=True)
    for given in (None, GIVEN["image to image"], GIVEN["super-resolution"], GIVEN["missing pixels"]):
        with pytest.raises(ValueError, match=r"in_channels is 9: an inpainting network, .*give both"):
            generate(pipeline, ["a"], given=given, **SETTINGS)
    drawn = generate(pipeline, ["a"], given=GIVEN["inpainting"], **SETTINGS)
    assert np.array_equal(drawn[0][~MASK], PICTURE[~MASK])
    # The network sees mask and masked picture: with a pixel of either changed it draws another picture.
    other_mask, other_picture = MASK.copy(), PICTURE.copy()
    other_mask[0:2, 0:2] = True
    other_picture[0, :] = 255 - other_picture[0, :]
    for given in (GivenPicture(PICTURE, 1.0, other_mask), GivenPicture(other_picture, 1.0, MASK)):
        assert (
            np.abs(generate(pipeline, ["a"], given=given, **SETTINGS)[0][MASK].astype(int) - drawn[0][MASK]).max() > 3
        )
    # What is masked it does not see.
    hidden = np.where(MASK[..., None], 0, PICTURE).astype(np.uint8)
    blind = generate(pipeline, ["a"], given=GivenPicture(hidden, 1.0, MASK), **SETTINGS)
    assert np.array_equal(blind, drawn)


def test_repeats_cost_that_many_steps_and_the_bar_counts_them(pipeline) -> None:
    told: list[tuple[int, int]] = []
    generate(
        pipeline, ["a", "b"], given=GIVEN["inpainting with repeats"], batch_size=1,
        progress=lambda *n: told.append(n), **SETTINGS,
    )  # fmt: skip
    assert told == [(i, 20) for i in range(1, 21)]  # for each picture three steps three times, the last one once


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_measurements_guide_networks_of_any_prediction_whose_maps_are_channels_last(clip, parameterization) -> None:
    drawn = []
    for order in (torch.contiguous_format, torch.channels_last):
        pipeline = make_pipeline(clip, parameterization=parameterization)
        pipeline.unet.to(memory_format=order)
        pipeline.autoencoder.to(memory_format=order)
        drawn.append(generate(pipeline, ["a heart"], given=GIVEN["super-resolution"].fitted(SIDE, SIDE), **SETTINGS))
    assert int(np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max()) <= 2
