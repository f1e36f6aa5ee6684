"""Whole checkpoints in CompVis' names, tiny and random, one of each family, and the parts of which they are made.

Enters: a family's name. Leaves: models of diffusers and transformers, or tensors under the names of a single file.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ldm.models import compvis
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet_config import UNetConfig

FAMILIES = ("sd1", "sd2", "inpainting", "sdxl")
WIDTHS = {"sd1": (64,), "inpainting": (64,), "sd2": (64,), "sdxl": (64, 128)}
"""Of the text encoders."""
VOCABULARY = 600
LENGTH = 16

# Multiples of 32 (groups), and of 64 where heads have 64 channels: what shapes do not tell is as published.
_SD1 = {
    "sample_size": 64,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": _SD1,
    "inpainting": {**_SD1, "in_channels": 9},
    "sd2": {
        **_SD1,
        "sample_size": None,
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [64, 128],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 192,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "sample_size": 128,
}
SCALING = {"sd1": 0.18215, "inpainting": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
OPENCLIP_LAYERS = 3


def vae_config(family: str, **change: Any) -> dict[str, Any]:
    size = 256 if family == "sdxl" else 128
    return {**VAE, "scaling_factor": SCALING[family], "sample_size": size, **change}


def make_unet(family: str) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel.from_config(UNETS[family]).eval()


def make_vae(family: str, **change: Any) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL.from_config(vae_config(family, **change)).eval()


def unet_in_compvis(model: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    """A UNet's tensors under CompVis' names, bare; that the names are right is test_compvis' claim."""
    names = compvis.unet_names(UNetConfig.from_dict(config))
    return {str(names.to_compvis(name)): tensor for name, tensor in model.state_dict().items()}


def vae_in_compvis(model: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    """An autoencoder's tensors under CompVis' names, bare, its attention as 1x1 convolutions."""
    names = compvis.vae_names(AutoencoderConfig.from_dict(config))
    tensors = {}
    for name, tensor in model.state_dict().items():
        attends = "mid_block.attentions" in name and tensor.ndim == 2
        tensors[str(names.to_compvis(name))] = tensor[:, :, None, None] if attends else tensor
    return tensors


def clip(width: int, layers: int = 2, vocabulary: int = VOCABULARY, length: int = LENGTH) -> dict[str, Tensor]:
    """CLIP's text model as transformers names it in files, with the position_ids of older ones."""
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(layers):
        block = f"encoder.layers.{layer}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{block}self_attn.{name}.weight": (width, width), f"{block}self_attn.{name}.bias": (width,)}
        shapes |= {f"{block}mlp.fc1.weight": (4 * width, width), f"{block}mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{block}mlp.fc2.weight": (width, 4 * width), f"{block}mlp.fc2.bias": (width,)}
    tensors = {f"text_model.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    return {**tensors, "text_model.embeddings.position_ids": torch.arange(length).unsqueeze(0)}


def openclip(
    width: int,
    layers: int = OPENCLIP_LAYERS,
    projected: int = 1280,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> dict[str, Tensor]:
    """OpenCLIP's text model under the names of its own program."""
    shapes = {
        "positional_embedding": (length, width),
        "text_projection": (width, projected),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * width, width), f"{block}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}mlp.c_proj.weight": (width, 4 * width), f"{block}mlp.c_proj.bias": (width,)}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def checkpoint(family: str, *, averages: bool = False) -> dict[str, Tensor]:
    """A whole checkpoint of CompVis, with what a training program leaves in it."""
    unet = unet_in_compvis(make_unet(family), UNETS[family])
    tensors = {compvis.UNET_PREFIX + name: tensor for name, tensor in unet.items()}
    vae = vae_in_compvis(make_vae(family), vae_config(family))
    tensors |= {compvis.VAE_PREFIX + name: tensor for name, tensor in vae.items()}
    torch.manual_seed(3)
    if family == "sdxl":
        texts = {"conditioner.embedders.0.transformer.": clip(64), "conditioner.embedders.1.model.": openclip(128)}
    elif family == "sd2":
        texts = {"cond_stage_model.model.": openclip(64, projected=64)}
    else:
        texts = {"cond_stage_model.transformer.": clip(64)}
    for prefix, parts in texts.items():
        tensors |= {prefix + name: tensor for name, tensor in parts.items()}
    if averages:
        for name in unet:
            flat = "model_ema.diffusion_model" + name.replace(".", "")
            tensors[flat] = tensors[compvis.UNET_PREFIX + name] + 1
        tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tensors |= {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0).float(), "logvar": torch.zeros(1000)}
    return tensors
