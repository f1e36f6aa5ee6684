"""The UNet's outputs and gradients against diffusers' on random configs, and full-size ones by name, shape and cost."""

import os
import random
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from published_configs import INPAINTING, SD15, SD21, SDXL, UNETS
from torch.utils.flop_counter import FlopCounterMode
from unet_pairs import PARITY_LIMIT, call_diffusers, deviation, random_inputs, small_pair

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

PARITY_CONFIGS = int(os.environ.get("LDM_PARITY_CONFIGS", "12"))
PARITY_SEED = int(os.environ.get("LDM_PARITY_SEED", "0"))


@pytest.mark.parametrize(
    ("config", "parameters", "keys"),
    [(SD15, 859_520_964, 686), (INPAINTING, 859_535_364, 686), (SD21, 865_910_724, 686), (SDXL, 2_567_463_684, 1_680)],
    ids=["sd1.5", "inpainting 1.5", "sd2.1", "sdxl"],
)
def test_published_shapes_have_the_published_parameter_and_key_counts(
    config: dict[str, Any], parameters: int, keys: int
) -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(config))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == keys


@pytest.mark.parametrize(
    ("config", "size", "billions"), [(SD15, 32, 90.1), (SD15, 64, 401.6), (SD21, 32, 90.5), (SD21, 64, 402.1)]
)
def test_forward_costs_the_published_multiply_accumulates(config: dict[str, Any], size: int, billions: float) -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(config))
        x, t, text = torch.empty(1, 4, size, size), torch.empty(1), torch.empty(1, 77, config["cross_attention_dim"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, t, Conditioning(text))
    assert round(counter.get_total_flops() / 2e9, 1) == billions


@pytest.mark.parametrize("name", list(UNETS))
def test_state_dict_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(UNETS[name])).state_dict()
        theirs = UNet2DConditionModel.from_config(UNETS[name]).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def random_config(rng: random.Random, family: str) -> dict[str, Any]:
    """SD 1.x, inpainting, 2.x or XL in small, otherwise of any shape."""
    levels = 3 if family == "sdxl" else rng.choice([2, 3, 4])
    groups = rng.choice([2, 4])
    heads = [rng.choice([1, 2, 4]) for _ in range(levels)]
    # Two channels or more a group: with one, GroupNorm takes away the bias before it, whose gradient is rounding alone.
    channels = [groups * 4 * rng.randint(1, 3) for _ in range(levels)]
    attends = [rng.random() < 0.7 for _ in range(levels)]
    if family == "sdxl":
        attends = [False, True, True]
    config: dict[str, Any] = {
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": channels,
        "layers_per_block": rng.choice([1, 2, [rng.randint(1, 2) for _ in range(levels)]]),
        "norm_num_groups": groups,
        "cross_attention_dim": rng.choice([8, 20]),
        "attention_head_dim": heads if family in ("sd2", "sdxl") else min(heads),
        "use_linear_projection": family in ("sd2", "sdxl"),
        "in_channels": 9 if family == "inpainting" else 4,
    }
    if family == "sdxl":
        config |= {
            "transformer_layers_per_block": [1, 2, 3],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 6 * 6 + 10,
        }
    return config


def test_outputs_and_all_gradients_equal_diffusers_within_1e5_on_random_configs() -> None:
    """12 configs (LDM_PARITY_CONFIGS), seed 0 (LDM_PARITY_SEED), latents of even and odd sizes, float32."""
    rng = random.Random(PARITY_SEED)
    worst_output, worst_gradient = (0.0, ""), (0.0, "")
    for trial in range(PARITY_CONFIGS):
        family = ("sd1", "sd2", "inpainting", "sdxl")[trial % 4]
        values = random_config(rng, family)
        # Two pixels or more at the innermost level: over one alone the gradients of q and k are zero, or rounding.
        smallest = 2 ** (len(values["block_out_channels"]) - 1) + 1
        size = (rng.randint(smallest, smallest + 7), rng.randint(smallest, smallest + 7))
        torch.manual_seed(trial)
        theirs = UNet2DConditionModel.from_config(values)
        ours = UNet(UNetConfig.from_dict(values))
        ours.load_state_dict(theirs.state_dict())
        x, t, conditioning = random_inputs(ours.config, trial, size)
        upstream = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(trial))
        out, expected = ours(x, t, conditioning), call_diffusers(theirs, x, t, conditioning)
        out.backward(upstream)
        expected.backward(upstream)
        what = f"{family}, config {trial} of seed {PARITY_SEED}, latents {size}"
        worst_output = max(worst_output, (deviation(out, expected), what))
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            difference = deviation(parameter.grad, gradients.pop(name))
            worst_gradient = max(worst_gradient, (difference, f"{name} of {what}"))
        assert not gradients
    print(f"\n{PARITY_CONFIGS} configs, seed {PARITY_SEED}: output {worst_output}, gradient {worst_gradient}")
    assert worst_output[0] <= PARITY_LIMIT, worst_output
    assert worst_gradient[0] <= PARITY_LIMIT, worst_gradient


def test_settings_that_random_configs_leave_alone_equal_diffusers_too() -> None:
    ours, theirs = small_pair(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-2, out_channels=3, sample_size=8)
    x, t, conditioning = random_inputs(ours.config, 3, (8, 8))
    assert deviation(ours(x, t, conditioning), call_diffusers(theirs, x, t, conditioning)) < PARITY_LIMIT
