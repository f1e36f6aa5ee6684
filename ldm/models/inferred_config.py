"""What the names and shapes of weights tell of a network: the settings of its config.json, as far as they can be told.

Enters: shape of each tensor, by its name. Leaves: settings of diffusers' UNet2DConditionModel, AutoencoderKL or of
transformers' CLIPTextModel; or an error that says what the shapes do not tell.
"""

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

GROUPS = 32
"""Of every GroupNorm in every published model of this kind; no shape tells it."""
HEADS = 8
"""Of SD 1.x, at each level."""
HEAD_SIZE = 64
"""Of SD 2.x and XL, and of CLIP's text models."""
CONVENTIONS = {"unet": ("attention_head_dim", "norm_num_groups"), "vae": ("norm_num_groups",)}
"""Settings below that are taken as published models have them: any other value would fit the same shapes."""
SIZES_FEATURES = 256
POOLED = 1280
"""SDXL: features of each of its six sizes, and of its pooled text; a shape tells no more than their sum."""


def count(shapes: Shapes, pattern: str) -> int:
    """How many numbers stand in the group of `pattern` at the beginning of names: 0 to one less."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"found the numbers {sorted(numbers)} in {pattern}, expected 0 to {len(numbers) - 1}")
    return len(numbers)


def unet_values(shapes: Shapes) -> dict[str, Any]:
    """Settings of a UNet from its shapes in diffusers' names; sample_size is not among them.

    Raises:
        ValueError: the shapes are those of a network of this kind, but do not tell its number of heads, or how its
            added conditioning is made up.
    """
    levels = count(shapes, r"down_blocks\.(\d+)\.")
    channels = [_of(shapes, f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)]
    layers = [count(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in range(levels)]
    down = [f"down_blocks.{level}.attentions.0." for level in range(levels)]
    up = [f"up_blocks.{step}.attentions.0." for step in range(levels)]
    attends_down, attends_up = ([any(n.startswith(block) for n in shapes) for block in blocks] for blocks in (down, up))
    # A level's transformers are as deep on the way down as on the way up; the innermost level's as the middle's.
    depths = []
    for level in range(levels):
        blocks = [down[level]] * attends_down[level] + [up[levels - 1 - level]] * attends_up[levels - 1 - level]
        if level == levels - 1:
            blocks.append("mid_block.attentions.0.")
        found = {count(shapes, rf"{re.escape(block)}transformer_blocks\.(\d+)\.") for block in blocks}
        if len(found) > 1:
            raise ValueError(
                f"transformers of level {level} are {sorted(found)} blocks deep, expected one depth a level"
            )
        depths.append(found.pop() if found else 1)
    projection = _of(shapes, "mid_block.attentions.0.proj_in.weight")
    linear = len(projection) == 2
    return {
        "in_channels": _of(shapes, "conv_in.weight")[1],
        "out_channels": _of(shapes, "conv_out.weight")[0],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attends_down],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in attends_up],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": _heads(channels, linear),
        "cross_attention_dim": _of(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": linear,
        "norm_num_groups": GROUPS,
        **_addition(shapes),
    }


def _heads(channels: list[int], linear: bool) -> int | list[int]:
    if not linear:
        return HEADS
    if any(width % HEAD_SIZE for width in channels):
        raise ValueError(
            f"attention_head_dim, the number of heads: linear projections have heads of {HEAD_SIZE} channels in "
            f"published models, but {channels} are not multiples of it"
        )
    return [width // HEAD_SIZE for width in channels]


def _addition(shapes: Shapes) -> dict[str, Any]:
    if "add_embedding.linear_1.weight" not in shapes:
        return {}
    width = shapes["add_embedding.linear_1.weight"][1]
    if width != POOLED + 6 * SIZES_FEATURES:
        raise ValueError(
            f"addition_time_embed_dim: the added conditioning has {width} features, of which the shape does not tell "
            f"how many are pooled text and how many sizes; SDXL has {POOLED} + 6 * {SIZES_FEATURES}"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZES_FEATURES,
        "projection_class_embeddings_input_dim": width,
    }


def compvis_unet_blocks(shapes: Shapes) -> tuple[list[int], list[bool], list[bool]]:
    """Residual blocks of each level, and where transformers follow them, from CompVis' numbering through all levels.

    Returns:
        What `compvis.unet_names_of` takes.
    """
    layers, down_attends = [0], [False]
    for place in range(1, count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{place}.0.op.weight" in shapes:
            layers.append(0)
            down_attends.append(False)
            continue
        layers[-1] += 1
        down_attends[-1] |= f"input_blocks.{place}.1.proj_in.weight" in shapes
    up_attends, place = [], 0
    for layer_count in reversed(layers):
        up_attends.append(f"output_blocks.{place}.1.proj_in.weight" in shapes)
        place += layer_count + 1
    return layers, down_attends, up_attends


def vae_values(shapes: Shapes) -> dict[str, Any]:
    """Settings of an autoencoder from its shapes in diffusers' names; its scaling factor is not among them."""
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": _of(shapes, "encoder.conv_in.weight")[1],
        "out_channels": _of(shapes, "decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [
            _of(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)
        ],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": _of(shapes, "decoder.conv_in.weight")[1],
        "norm_num_groups": GROUPS,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in shapes),
    }


def clip_values(shapes: Shapes, *, activation: str) -> dict[str, Any]:
    """Settings of a CLIP text model from its shapes in transformers' names.

    Args:
        activation: quick_gelu of OpenAI's CLIP, or gelu of OpenCLIP, which no shape tells.

    Raises:
        ValueError: a width that is not a multiple of the size of CLIP's heads.
    """
    vocabulary, width = _of(shapes, "text_model.embeddings.token_embedding.weight")
    if width % HEAD_SIZE:
        raise ValueError(f"num_attention_heads: CLIP's heads have {HEAD_SIZE} channels, but {width} is no multiple")
    projection = shapes.get("text_projection.weight")
    return {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": _of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": _of(shapes, "text_model.embeddings.position_embedding.weight")[0],
        "num_attention_heads": width // HEAD_SIZE,
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "projection_dim": projection[0] if projection else width,
        "vocab_size": vocabulary,
        # As every published config has them: transformers then pools at a caption's highest id, which is its end.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{name} is missing")
    return shapes[name]
