"""The finished autoencoder on disk: weights, config and a card that says how it was made and what it reaches.

In: an AutoencoderKL, what was measured on it, and the words of the run's config.
Out: a folder in diffusers' layout that appears when complete, with README.md; a grid of reconstructions.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.grid import labelled_grid
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pretrained import WEIGHTS_NAME
from ldm.models.whitening import LatentStatistics
from ldm.training.autoencoder_loss import psnr, to_8_bit


@dataclass
class CardConfig:
    """What the README.md beside the weights says besides what was measured."""

    title: str = "Autoencoder"
    """Heading of the card."""
    data: str = ""
    """The pictures and where they come from."""
    licence: str = ""
    """Licence of the pictures and of the weights, with the attribution it asks for."""


@dataclass
class Measured:
    """What a training ends with; decibels are the mean over the held-out pictures."""

    held_out_psnr: float
    """Of the weights as they are stored."""
    held_out_psnr_before: float
    """Of the averaged weights before whitening and rounding."""
    held_out_latents: LatentStatistics
    """Of the weights as they are stored."""
    held_out_pictures: int
    training_pictures: int
    steps: int
    global_batch: int
    minutes: float
    device: str
    """The hardware in words."""
    command: str
    """The command line that trained it."""


def write_folder(autoencoder: AutoencoderKL, out: Path, card: CardConfig, measured: Measured) -> None:
    """Writes fp16 weights, config and card under a temporary name, then renames; FileExistsError where `out` exists."""
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or choose another folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        autoencoder.save_pretrained(temporary, torch.float16)
        size = (temporary / WEIGHTS_NAME).stat().st_size
        (temporary / "README.md").write_text(model_card(autoencoder, size, card, measured), "utf-8")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def model_card(autoencoder: AutoencoderKL, size: int, card: CardConfig, measured: Measured) -> str:
    """Text of README.md; `size` is that of the weights' file in bytes."""
    config, latents = autoencoder.config, measured.held_out_latents
    side = config.sample_size // autoencoder.downsample_factor
    rows = {
        "parameters": f"{sum(p.numel() for p in autoencoder.parameters()):,}",
        "weights": f"fp16 safetensors, {size / 1e6:.2f} MB",
        "latents": f"{config.latent_channels}x{side}x{side} of {config.sample_size}x{config.sample_size} pictures",
        "held-out PSNR": f"{measured.held_out_psnr:.2f} dB, mean over {measured.held_out_pictures} pictures "
        f"({measured.held_out_psnr_before:.2f} dB before whitening and rounding to fp16)",
        "held-out latents, mean of each channel": rounded(latents.mean),
        "held-out latents, standard deviation of each channel": rounded(latents.std),
        "training": f"{measured.steps:,} steps of {measured.global_batch} on {measured.training_pictures:,} pictures, "
        f"{measured.minutes:.0f} minutes on {measured.device}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {card.title}

A KL autoencoder (`AutoencoderKL`) in diffusers' layout. Pictures are in [-1, 1]. Its latents have mean 0 and standard
deviation 1 in each channel: whitening is folded into `quant_conv` and `post_quant_conv`, and the scaling factor is 1.

| | |
|---|---|
{table}

## Data

{card.data}

## Command

    {measured.command}

## Licence

{card.licence}
"""


def rounded(values: Tensor) -> str:
    """Numbers with three decimals."""
    return " ".join(f"{value:.3f}" for value in values.tolist())


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Image.Image:
    """Pictures (B, 3, H, W) in [-1, 1], each beside its reconstruction, labelled with its PSNR."""
    pairs = torch.stack([to_8_bit(images), to_8_bit(reconstructions)], dim=1).flatten(0, 1)  # (2B, 3, H, W)
    pixels = pairs.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
    decibels = psnr(images, reconstructions).tolist()
    return labelled_grid(pixels, [text for value in decibels for text in ("held out", f"{value:.1f} dB")], columns=8)
