"""What a run begins with, tiny and random: UNets and VAEs made by diffusers, raw shards of pictures of many shapes.

Enters: a folder. Leaves: component folders as diffusers saves them; a manifest's folder; words of a command line.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.manifest import build_manifest
from ldm.data.shards import write_shards

SD = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
"""Settings of a UNet that two levels make like SD 1.x's; pictures of 16 pixels have latents of 8."""


def make_unet(folder: Path, seed: int = 11, **settings: Any) -> Any:
    """Saves diffusers' UNet2DConditionModel with random weights under `folder`, and returns it."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**(SD | settings)).eval()
    unet.save_pretrained(folder)
    return unet


def make_vae(folder: Path, **settings: Any) -> Any:
    """Saves diffusers' AutoencoderKL with random weights and factor 2 under `folder`, and returns it."""
    from diffusers import AutoencoderKL

    defaults = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 16,
        "scaling_factor": 0.7,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        vae = AutoencoderKL(**(defaults | settings)).eval()
    vae.save_pretrained(folder)
    return vae


def make_pictures(folder: Path, count: int = 40) -> list[tuple[np.ndarray, str]]:
    """Raw shards of noise of many shapes with captions, and a manifest; returns pictures (H, W, 3) and captions."""
    rng = np.random.default_rng(3)
    samples, made = [], []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(16, 40, 2))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        caption = f"{('red', 'ape', 'blue')[number % 3]} {number}"
        stored = io.BytesIO()
        Image.fromarray(pixels).save(stored, "PNG")
        samples.append({"__key__": f"{number:03}", "png": stored.getvalue(), "txt": caption})
        made.append((pixels, caption))
    write_shards(samples, folder, prefix="s", samples_per_shard=16)
    build_manifest(folder, progress=False)
    return made


def settings_of(unet: Any) -> dict[str, Any]:
    """The section `unet` of a run's config for a UNet of diffusers: the fields that both have."""
    from ldm.models.unet_config import UNetConfig

    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dict(unet.config).items()
        if name in UNetConfig.__dataclass_fields__
    }
