"""A small UNet of ours beside diffusers' with the same weights, inputs for both, and how far their outputs are apart.

Enters: settings, seeds and sizes. Leaves: networks, inputs, and a relative deviation.
"""

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

PARITY_LIMIT = 1e-5
SMALL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}


def random_inputs(config: UNetConfig, seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pooled = draw(2, config.pooled_channels) if config.pooled_channels else None
    sizes = torch.randint(0, 1025, (2, 6), generator=generator).float() if config.pooled_channels else None
    t = torch.randint(0, 1000, (2,), generator=generator)
    if seed % 2:
        t = t + 0.25
    return draw(2, config.in_channels, *size), t, Conditioning(draw(2, 7, config.cross_attention_dim), pooled, sizes)


def call_diffusers(model: UNet2DConditionModel, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
    return model(x, t, conditioning.text, added_cond_kwargs=added).sample


def deviation(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference relative to the largest value; infinite when something is missing or not a number."""
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    difference = float((found - expected).detach().abs().max())
    if difference == 0:
        return 0.0
    relative = difference / max(float(expected.detach().abs().max()), 1e-30)
    return math.inf if math.isnan(relative) else relative


def small_pair(**change: Any) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config({**SMALL, **change})
    ours = UNet(UNetConfig(**{**SMALL, **change}))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
