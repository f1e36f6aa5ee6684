"""Pictures against diffusers' own pipelines: whole folders made and saved by diffusers, drawn by the sampling program.

The same latents, prompts, 20 steps, guidance 7.5; scheduler settings are named in SCHEDULERS. Weights are random, and
drawn so large that pictures are far from flat.
"""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import make_clip, make_sdxl_pair

from ldm.sample import main

PROMPTS = ["red heart", "a blue apple, far too long for the sixteen tokens that the encoder takes"]
NEGATIVE = "blurry, ugly"
STEPS, GUIDANCE = 20, 7.5
SIDE = 8
"""Height and width of the latents; pictures are 8 times as large."""

# The scheduler files of the released models, whatever sampler they name: the noise schedule is what is read of them.
SHIPPED: dict[str, dict[str, Any]] = {
    "sd1": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "clip_sample": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "sd2": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "clip_sample": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "prediction_type": "v_prediction",
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
        "use_karras_sigmas": False,
    },
}  # fmt: skip

MULTISTEP = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
    "euler_at_final": False, "final_sigmas_type": "zero", "use_karras_sigmas": False,
}  # fmt: skip

# Our --sampler and --spacing; diffusers' class, and what is changed of the scheduler file. As shipped, set_alpha_to_one
# is false: DDIM then ends at the first timestep's noise, where no sampler here ends.
SCHEDULERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "ddim": ("ddim", "trailing", "DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    "ddim-leading": ("ddim", "leading_1", "DDIMScheduler", {"timestep_spacing": "leading", "set_alpha_to_one": True}),
    "dpmpp_2m": (
        "dpmpp_2m", "trailing", "DPMSolverMultistepScheduler", {**MULTISTEP, "timestep_spacing": "trailing"}
    ),
    "dpmpp_2m-leading": (
        "dpmpp_2m", "leading_1_multistep", "DPMSolverMultistepScheduler", {**MULTISTEP, "timestep_spacing": "leading"}
    ),
    "dpmpp_2m-linspace": (
        "dpmpp_2m", "linspace_multistep", "DPMSolverMultistepScheduler", {**MULTISTEP, "timestep_spacing": "linspace"}
    ),
    "euler-leading": ("euler", "leading_1", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
}  # fmt: skip


def make_folder(folder: Path, kind: str, *, force_zeros: bool = True, latent_channels: int = 4) -> Path:
    """A whole pipeline folder of random parts in the shape of a released model, made and saved by diffusers alone."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    pair = kind == "sdxl"
    encoders = folder.parent / f"{folder.name}-encoders"
    if pair:
        make_sdxl_pair(encoders)
    else:
        make_clip(encoders / "text_encoder")
        (encoders / "tokenizer").symlink_to("text_encoder")
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModel.from_pretrained(encoders / "text_encoder"),
        "tokenizer": AutoTokenizer.from_pretrained(encoders / "tokenizer"),
    }
    levels, cross, plain = 3 if pair else 4, "CrossAttn", ""
    attending = [plain, cross, cross] if pair else [cross, cross, cross, plain]
    shape: dict[str, Any] = {
        "block_out_channels": (16, 32, 32, 32)[:levels],
        "down_block_types": [f"{attends}DownBlock2D" for attends in attending],
        "up_block_types": [f"{attends}UpBlock2D" for attends in reversed(attending)],
        "cross_attention_dim": 80 if pair else 32,
        "attention_head_dim": {"sd1": 4, "sd2": [2, 4, 4, 4], "sdxl": [2, 4, 4]}[kind],
        "use_linear_projection": kind != "sd1",
    }
    if pair:
        shape |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
            "transformer_layers_per_block": [1, 1, 2],
        }
    torch.manual_seed(5)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE, in_channels=latent_channels, out_channels=latent_channels, norm_num_groups=8, **shape
    )
    for name, parameter in unet.named_parameters():
        if "attn2.to_" in name or "add_embedding" in name:  # text, pooled text and sizes have to show
            torch.nn.init.normal_(parameter, std=0.5)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=8, latent_channels=latent_channels, sample_size=8 * SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if pair else 0.18215,
    )  # fmt: skip
    scheduler = getattr(diffusers, SHIPPED[kind]["_class_name"])()
    if pair:
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(encoders / "text_encoder_2")
        parts["tokenizer_2"] = AutoTokenizer.from_pretrained(encoders / "tokenizer_2")
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae, unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=force_zeros, **parts
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **parts,
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SHIPPED[kind]))
    return folder


def unit_noise(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(11))


def open_with_diffusers(folder: Path) -> Any:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Drawn(NamedTuple):
    pictures: np.ndarray  # (N, H, W, 3) uint8
    latents: torch.Tensor  # (N, C, h, w), those that were decoded, scaled as the network knows them


def theirs(pipeline: Any, scheduler: str, noise: torch.Tensor, negative: str | None, **settings: Any) -> Drawn:
    """What diffusers draws."""
    import diffusers

    _, _, name, changes = SCHEDULERS[scheduler]
    folder = Path(pipeline.config._name_or_path)
    shipped = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = getattr(diffusers, name).from_config({**shipped, **changes})
    latents = [noise]

    def keep(_: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(tensors["latents"])
        return tensors

    images = pipeline(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        latents=noise.clone(),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
        callback_on_step_end=keep,
        **settings,
    ).images
    return Drawn((images * 255).round().astype(np.uint8), latents[-1])


def ours(folder: Path, scheduler: str, noise: torch.Tensor, negative: str | None, out: Path) -> Drawn:
    """What is in the files that the sampling program writes."""
    sampler, spacing, *_ = SCHEDULERS[scheduler]
    out.mkdir(parents=True, exist_ok=True)
    save_file({"noise": noise}, out / "noise.safetensors")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = {
        "checkpoint": folder, "prompts": out / "prompts.txt", "noise": out / "noise.safetensors",
        "out": out / "pictures", "latents_out": out / "latents.safetensors", "sampler": sampler, "spacing": spacing,
        "steps": STEPS, "guidance": GUIDANCE, "device": "cpu",
    }  # fmt: skip
    if negative is not None:
        arguments["negative"] = negative
    assert main([f"--{name}={value}" for name, value in arguments.items()]) == 0
    files = sorted((out / "pictures").glob("*.png"))
    assert len(files) == len(PROMPTS)
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return Drawn(pictures, load_file(out / "latents.safetensors")["latents"])


def largest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def assert_same_pictures(claim: str, a: Drawn, b: Drawn) -> None:
    """Pictures equal within 2/255 at each pixel, latents within 2e-5 of the largest, which tells finer than 8 bits.

    Pictures that are flat, or alike, would say nothing.
    """
    assert (a.pictures.shape, a.latents.shape) == (b.pictures.shape, b.latents.shape)
    difference = largest(a.pictures, b.pictures)
    relative = float((a.latents - b.latents).abs().max() / b.latents.abs().max())
    spread = min(picture.std() for picture in b.pictures)
    print(f"\n{claim}: largest difference {difference}/255, of latents {relative:.1e}, deviation {spread:.1f}")
    assert spread > 10, "flat pictures match anything"
    assert largest(b.pictures[0], b.pictures[1]) > 20, "the two pictures are one"
    assert difference <= 2
    assert relative <= 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("theirs")
    made = {kind: make_folder(root / kind, kind) for kind in SHIPPED}
    return {**made, "sdxl-encoded": make_folder(root / "sdxl-encoded", "sdxl", force_zeros=False)}


@pytest.mark.parametrize(
    ("kind", "scheduler"), [*product(["sd1", "sd2", "sdxl"], ["ddim", "dpmpp_2m"]), ("sdxl-encoded", "dpmpp_2m")]
)
def test_pictures_of_a_folder_made_by_diffusers_are_those_of_diffusers(folders, tmp_path, kind, scheduler) -> None:
    folder, noise = folders[kind], unit_noise(2, 4, SIDE, SIDE)
    reference = open_with_diffusers(folder)
    with_negative, without = (theirs(reference, scheduler, noise, negative) for negative in (NEGATIVE, None))
    for expected, negative in ((with_negative, NEGATIVE), (without, None)):
        drawn = ours(folder, scheduler, noise, negative, tmp_path / str(negative))
        assert_same_pictures(f"{kind}, {scheduler}, negative prompt {negative!r}", drawn, expected)
    assert largest(with_negative.pictures, without.pictures) > 20, "the negative prompt does nothing"


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("sd1", "ddim-leading"), ("sd2", "dpmpp_2m-leading"), ("sd1", "dpmpp_2m-linspace"), ("sdxl", "euler-leading")],
)
def test_spacings_of_the_shipped_schedulers_give_the_pictures_of_diffusers(folders, tmp_path, kind, scheduler) -> None:
    noise = unit_noise(2, 4, SIDE, SIDE)
    expected = theirs(open_with_diffusers(folders[kind]), scheduler, noise, NEGATIVE)
    drawn = ours(folders[kind], scheduler, noise, NEGATIVE, tmp_path)
    assert_same_pictures(f"{kind}, {scheduler}", drawn, expected)


def test_without_a_negative_prompt_zeros_and_the_encoded_empty_caption_are_two_pictures(folders) -> None:
    # Otherwise the cases above would not tell them apart.
    noise = unit_noise(2, 4, SIDE, SIDE)
    a, b = (theirs(open_with_diffusers(folders[kind]), "dpmpp_2m", noise, None) for kind in ("sdxl", "sdxl-encoded"))
    assert largest(a.pictures, b.pictures) > 20


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_latents_and_pictures_of_another_size_than_the_training_s_are_those_of_diffusers(
    folders, tmp_path, kind
) -> None:
    # SDXL's network is told the size: 96 by 40 pixels, which its halvings do not divide.
    noise = unit_noise(2, 4, 12, 5)
    reference = open_with_diffusers(folders[kind])
    drawn = ours(folders[kind], "dpmpp_2m", noise, NEGATIVE, tmp_path)
    assert (drawn.pictures.shape, drawn.latents.shape) == ((2, 96, 40, 3), (2, 4, 12, 5))
    expected = theirs(reference, "dpmpp_2m", noise, NEGATIVE, height=96, width=40)
    assert_same_pictures(f"{kind}, 96 x 40 pixels", drawn, expected)


def test_a_folder_as_it_is_shipped_opens_with_what_else_lies_in_it(folders, tmp_path) -> None:
    import diffusers
    from transformers import CLIPConfig

    folder = tmp_path / "shipped"
    shutil.copytree(folders["sd1"], folder)
    edges = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**edges, "image_size": 8, "patch_size": 4}
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(
        CLIPConfig(text_config=edges, vision_config=vision, projection_dim=8)
    )
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 224}')
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        half = {key: tensor.half() * 3 for key, tensor in load_file(folder / part / f"{name}.safetensors").items()}
        save_file(half, folder / part / f"{name}.fp16.safetensors", metadata={"format": "pt"})
        (folder / part / f"{name}.bin").write_bytes(b"a pickle that must not be read")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a pickle that must not be read")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer" / "tokenizer.json").unlink()  # releases of 2022 have the two files above instead
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_diffusers_version": "0.6.0",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    noise = unit_noise(2, 4, SIDE, SIDE)
    expected = theirs(open_with_diffusers(folders["sd1"]), "ddim", noise, NEGATIVE)
    assert_same_pictures("sd1 as shipped", ours(folder, "ddim", noise, NEGATIVE, tmp_path / "out"), expected)
