"""Drawing from given pictures against diffusers' own pipelines: image-to-image, inpainting with any network or its own.

The same random folder, picture, noise, steps and strength. Pictures enter diffusers as the posterior's mean, its own
autoencoder's, where it would take a sample of the posterior.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_picture_parity import GUIDANCE, PROMPTS, SCHEDULERS, SIDE, Drawn, largest, make_folder, open_with_diffusers

from ldm.sample import main

STEPS = 10
NEGATIVE = "blurry, ugly"
SEED = 3
PIXELS = 8 * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("theirs") / "sd1", "sd1")


@pytest.fixture(scope="module")
def inpainting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same parts around a network of nine channels."""
    import diffusers

    parts = open_with_diffusers(folder).components
    torch.manual_seed(6)
    unet = diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    for name, parameter in unet.named_parameters():
        if "attn2.to_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    made = tmp_path_factory.mktemp("theirs") / "inpainting"
    diffusers.StableDiffusionInpaintPipeline(**{**parts, "unet": unet}, requires_safety_checker=False).save_pretrained(
        made
    )
    return made


def picture() -> Image.Image:
    """Waves of all colours, and a disc."""
    rows, columns = np.mgrid[:PIXELS, :PIXELS] / PIXELS
    waves = [np.sin(9 * rows + 4 * columns), np.cos(7 * columns), np.sin(5 * rows * columns + 1)]
    pixels = np.stack(waves, axis=2) * 110 + 128
    pixels[(rows - 0.4) ** 2 + (columns - 0.6) ** 2 < 0.06] = (240, 30, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def mask() -> Image.Image:
    """Grey of all levels in the left half, where half and lighter is masked; a masked square on the right."""
    levels = np.tile(np.linspace(0, 255, PIXELS).astype(np.uint8)[:, None], (1, PIXELS))
    levels[:, PIXELS // 2 :] = 0
    levels[21:43, 45:58] = 255
    return Image.fromarray(levels)


def encoded(pipeline: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor


def theirs(pipeline: Any, scheduler: str, **settings: Any) -> Drawn:
    import diffusers

    _, _, name, changes = SCHEDULERS[scheduler]
    folder = Path(pipeline.config._name_or_path)
    shipped = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = getattr(diffusers, name).from_config({**shipped, **changes})
    pipeline.set_progress_bar_config(disable=True)
    latents: list[torch.Tensor] = []

    def keep(_: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(tensors["latents"])
        return tensors

    images = pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
        callback_on_step_end=keep, **settings,
    ).images  # fmt: skip
    return Drawn((images * 255).round().astype(np.uint8), latents[-1])


def ours(folder: Path, scheduler: str, noise: torch.Tensor, out: Path, **options: Any) -> Drawn:
    """What is in the files that the sampling program writes."""
    sampler, spacing, *_ = SCHEDULERS[scheduler]
    out.mkdir(parents=True, exist_ok=True)
    save_file({"noise": noise.contiguous()}, out / "noise.safetensors")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    picture().save(out / "picture.png")
    mask().save(out / "mask.png")
    arguments = {
        "checkpoint": folder, "prompts": out / "prompts.txt", "noise": out / "noise.safetensors", "negative": NEGATIVE,
        "out": out / "pictures", "latents_out": out / "latents.safetensors", "sampler": sampler, "spacing": spacing,
        "steps": STEPS, "guidance": GUIDANCE, "device": "cpu", "init_image": out / "picture.png", **options,
    }  # fmt: skip
    assert main([f"--{name}={value}" for name, value in arguments.items()]) == 0
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in sorted((out / "pictures").glob("*.png"))]
    return Drawn(np.stack(pictures), load_file(out / "latents.safetensors")["latents"])


def assert_same(claim: str, found: Drawn, expected: Drawn) -> None:
    difference = largest(found.pictures, expected.pictures)
    of_latents = float((found.latents - expected.latents).abs().max())
    print(f"\n{claim}: largest difference {difference}/255, of latents {of_latents:.1e}")
    assert found.latents.shape == expected.latents.shape
    assert difference <= 2
    assert of_latents <= 1e-4


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [("ddim", 0.3), ("ddim", 1.0), ("ddim-leading", 0.6), ("dpmpp_2m", 0.45), ("euler-leading", 0.58)],
)
def test_image_to_image_is_that_of_diffusers_at_every_strength(folder, tmp_path, scheduler, strength) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    latents = encoded(pipeline, pipeline.image_processor.preprocess(picture()))
    noise = torch.randn(2, 4, SIDE, SIDE, generator=generator())  # what the pipeline draws of this generator
    expected = theirs(pipeline, scheduler, image=latents.repeat(2, 1, 1, 1), strength=strength, generator=generator())
    found = ours(folder, scheduler, noise, tmp_path / "same", strength=strength)
    assert_same(f"{scheduler}, strength {strength}", found, expected)
    steps = int(STEPS * strength)
    if strength == 0.3:  # a step more is another picture: the comparison would tell
        more = ours(folder, scheduler, noise, tmp_path / "more", strength=(steps + 1) / STEPS + 1e-9)
        assert largest(more.pictures, expected.pictures) > 10


@pytest.mark.parametrize(("scheduler", "strength"), [("ddim", 1.0), ("dpmpp_2m", 1.0), ("ddim", 0.6)])
def test_a_network_for_inpainting_draws_what_diffusers_draws_with_it(inpainting, tmp_path, scheduler, strength) -> None:
    pipeline = open_with_diffusers(inpainting)
    assert type(pipeline).__name__ == "StableDiffusionInpaintPipeline"
    image = pipeline.image_processor.preprocess(picture())
    masked = np.asarray(mask()) >= 128
    masked_latents = encoded(pipeline, image * torch.from_numpy(~masked))
    noise = torch.randn(2, 4, SIDE, SIDE, generator=generator())
    expected = theirs(
        pipeline, scheduler, strength=strength, generator=generator(), mask_image=mask(),
        image=encoded(pipeline, image).repeat(2, 1, 1, 1), masked_image_latents=masked_latents.repeat(2, 1, 1, 1),
        height=PIXELS, width=PIXELS,
    )  # fmt: skip
    drawn = ours(inpainting, scheduler, noise, tmp_path, strength=strength, mask=tmp_path / "mask.png")
    original = np.asarray(picture())
    assert all(np.array_equal(one[~masked], original[~masked]) for one in drawn.pictures)
    assert largest(expected.pictures[:, ~masked], original[~masked]) > 20  # theirs is not pasted
    pasted = np.where(masked[..., None], expected.pictures, original)
    assert largest(pasted[0], pasted[1]) > 20, "the two pictures are one"
    assert_same(f"nine channels, {scheduler}, strength {strength}", drawn, Drawn(pasted, expected.latents))


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
def test_any_network_inpaints_as_diffusers_does_with_it(folder, tmp_path, scheduler) -> None:
    # Below strength 1, where both start from the noised picture, and with a mask that ends where latents do: where a
    # latent is part masked, diffusers keeps it or not by its first pixel, and it is drawn anew here.
    import diffusers

    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
    whole = np.zeros((PIXELS, PIXELS), np.uint8)
    whole[16:48, 24:] = 255
    Image.fromarray(whole).save(tmp_path / "whole.png")
    latents = encoded(pipeline, pipeline.image_processor.preprocess(picture()))
    noise = torch.randn(2, 4, SIDE, SIDE, generator=generator())
    expected = theirs(
        pipeline, scheduler, strength=0.9, generator=generator(), mask_image=Image.fromarray(whole),
        image=latents.repeat(2, 1, 1, 1), masked_image_latents=latents.repeat(2, 1, 1, 1),
        height=PIXELS, width=PIXELS,
    )  # fmt: skip
    drawn = ours(folder, scheduler, noise, tmp_path, strength=0.9, mask=tmp_path / "whole.png")
    pasted = np.where(whole[..., None] > 0, expected.pictures, np.asarray(picture()))
    assert_same(f"four channels, {scheduler}", drawn, Drawn(pasted, expected.latents))
    kept = torch.from_numpy(whole[::8, ::8] == 0).expand(2, 4, SIDE, SIDE)
    assert float((drawn.latents - latents)[kept].abs().max()) < 1e-5
