"""Our maps between CompVis' names and diffusers' against diffusers' conversion: tiny with numbers, full-size by name.

diffusers' functions are the reference: what they make of a file in CompVis' names has to be what our map makes of it.
"""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from published_configs import UNETS, VAES
from tiny_checkpoints import LENGTH, VAE, VOCABULARY, clip, openclip
from tiny_checkpoints import UNETS as TINY_UNETS
from torch import Tensor

from ldm.models import compvis
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.compvis_text import clip_entries, openclip_entries
from ldm.models.single_file import text_entries
from ldm.models.unet_config import UNetConfig

ODD_UNETS: dict[str, dict[str, Any]] = {
    "attention outside only": {
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
    },
    "attention on the way up only": {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 3,
    },
}
UNET_CASES = {**{f"tiny {name}": config for name, config in TINY_UNETS.items()}, **ODD_UNETS, **UNETS}
VAE_CASES: dict[str, dict[str, Any]] = {
    "tiny": VAE,
    "tiny, 16 channels": {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "tiny, 3 levels": {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [32, 64, 96],
        "layers_per_block": 2,
    },
    **VAES,
}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in found.items():
        assert tensor.device.type == "meta" or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", list(UNET_CASES))
def test_a_unet_in_our_compvis_names_is_the_same_unet_after_the_conversion_of_diffusers(name: str) -> None:
    config = {k: v for k, v in UNET_CASES[name].items() if k[0] != "_"}
    with torch.device("meta" if name in UNETS else "cpu"):
        state = UNet2DConditionModel.from_config(config).state_dict()
    names = compvis.unet_names(UNetConfig.from_dict(config))
    stored = {str(names.to_compvis(key)): tensor for key, tensor in state.items()}
    assert len(stored) == len(state)
    assert "None" not in stored
    with_prefix = {compvis.UNET_PREFIX + key: tensor for key, tensor in stored.items()}
    equal(convert_ldm_unet_checkpoint(with_prefix, {"layers_per_block": 2, **config}), state)
    equal({str(names.to_diffusers(key)): tensor for key, tensor in stored.items()}, state)


@pytest.mark.parametrize("name", list(VAE_CASES))
def test_an_autoencoder_in_our_compvis_names_is_the_same_one_after_the_conversion_of_diffusers(name: str) -> None:
    config = {k: v for k, v in VAE_CASES[name].items() if k[0] != "_"}
    with torch.device("meta" if name in VAES else "cpu"):
        state = DiffusersAutoencoderKL.from_config(config).state_dict()
    names = compvis.vae_names(AutoencoderConfig.from_dict(config))
    stored = {}
    for key, tensor in state.items():
        projection = compvis.is_vae_projection(key)
        assert projection == (".attentions." in key and tensor.ndim == 2)
        stored[str(names.to_compvis(key))] = tensor[:, :, None, None] if projection else tensor
    assert len(stored) == len(state)
    equal(convert_ldm_vae_checkpoint({compvis.VAE_PREFIX + k: t for k, t in stored.items()}, config), state)
    for key, tensor in stored.items():
        ours = str(names.to_diffusers(key))
        assert compvis.vae_shape(ours, tuple(tensor.shape)) == state[ours].shape


def test_full_size_names_are_those_that_published_files_have() -> None:
    # Names by which diffusers knows files of SD 1.x, 2.x and the x4 upscaler, and a few that every listing shows.
    names = compvis.unet_names(UNetConfig.from_dict({k: v for k, v in UNETS["sd1.5"].items() if k[0] != "_"}))
    assert names.to_compvis("up_blocks.3.resnets.2.conv_shortcut.weight") == "output_blocks.11.0.skip_connection.weight"
    attention = "transformer_blocks.0.attn2.to_k.weight"
    assert names.to_compvis(f"down_blocks.0.attentions.1.{attention}") == f"input_blocks.2.1.{attention}"
    assert names.to_compvis("down_blocks.3.resnets.0.conv1.bias") == "input_blocks.10.0.in_layers.2.bias"
    assert names.to_compvis("down_blocks.2.downsamplers.0.conv.bias") == "input_blocks.9.0.op.bias"
    assert names.to_compvis("up_blocks.0.upsamplers.0.conv.weight") == "output_blocks.2.1.conv.weight"
    assert names.to_compvis("up_blocks.1.upsamplers.0.conv.weight") == "output_blocks.5.2.conv.weight"


@pytest.mark.parametrize(
    "name",
    ["input_blocks.1.0.in_layers.1.weight", "input_blocks.99.0.op.weight", "betas", "out.1.weight", "input_blocks.1"],
)
def test_a_name_that_is_no_unets_is_not_translated(name: str) -> None:
    assert compvis.unet_names(UNetConfig()).to_diffusers(name) is None


def test_clip_keeps_its_names() -> None:
    tensors = clip(64)
    del tensors["text_model.embeddings.position_ids"]
    entries = clip_entries(layers=2)
    expected = convert_ldm_clip_checkpoint({f"cond_stage_model.transformer.{k}": t for k, t in tensors.items()})
    assert {entry.stored for entry in entries} == set(expected)
    assert all(entry.names == (entry.stored,) for entry in entries)


@pytest.mark.parametrize(("prefix", "projection"), [("cond_stage_model.model.", False), ("conditioner.x.", True)])
def test_openclip_splits_as_diffusers_does_and_joins_to_the_same_bytes(prefix: str, projection: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    stored = openclip(64, projected=48)
    if not projection:
        del stored["text_projection"]
    config = CLIPTextConfig(hidden_size=64, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_hidden_layers=1)
    expected = convert_open_clip_checkpoint(
        CLIPTextModel(config), {prefix + name: tensor for name, tensor in stored.items()}, prefix
    )
    entries = openclip_entries(layers=3, projection=projection)
    found: dict[str, Tensor] = {}
    for entry in entries:
        found |= dict(zip(entry.names, entry.split(stored[entry.stored]), strict=True))
    equal(found, expected)
    back = {entry.stored: entry.join(found) for entry in entries}
    equal(back, {name: tensor for name, tensor in stored.items() if name != "logit_scale"})
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert all(entry.shape(shapes) == tuple(stored[entry.stored].shape) for entry in entries)


@pytest.mark.parametrize(
    ("prefix", "parameters", "layers"),
    [("cond_stage_model.transformer.", 123_060_480, 12), ("cond_stage_model.model.", 340_387_840, 23)],
)
def test_full_size_text_encoders_have_the_published_number_of_parameters(
    prefix: str, parameters: int, layers: int
) -> None:
    with torch.device("meta"):
        clip_l, openclip_h = clip(768, 12, 49408, 77), openclip(1024, 24, 1024, 49408, 77)
    stored = clip_l if "transformer" in prefix else openclip_h
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in stored.items()}
    entries = text_entries(shapes, prefix)
    assert sum(torch.Size(shapes[prefix + entry.stored]).numel() for entry in entries) == parameters
    assert max(int(n.split(".")[3]) for entry in entries for n in entry.names if ".layers." in n) == layers - 1


def test_the_name_of_an_average_is_that_of_ldm_without_dots() -> None:
    # LitEma of latent-diffusion registers a buffer for each parameter of `model`, whose names cannot hold dots.
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert compvis.ema_name(name) == "model_ema.diffusion_modelinput_blocks00weight"
