"""Training starts from every shipped config with weights given by path: random ones of diffusers and transformers."""

import math
from pathlib import Path

import pytest
import tiny_sources
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from tiny_models import make_clip, make_sdxl_pair
from training_runs import metrics, train

from ldm.config import load_config
from ldm.models.unet import UNet

FACTS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "finetune_sd15": 859_520_964}
"""Parameters of the UNet (FACTS.md: public figures)."""
SHRUNK = ["--unet.norm_num_groups=8", "--unet.layers_per_block=1", "--data.workers=0", "--wrapping.compile=false"]
SHORT = ["--training.steps=1", "--training.global_batch=4", "--optimizer.warmup_steps=0", "--validation.every=0"]
PLAIN = ["--wrapping.mixed_precision=no", "--metrics.tensorboard=false", "--previews.every=0", "--data.validation=null"]


@pytest.mark.parametrize("name", sorted(FACTS))
def test_the_unet_of_a_config_has_the_released_networks_parameters(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        unet = UNet(config.unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == FACTS[name]


def options_for(name: str, folder: Path) -> list[str]:
    """Overrides that shrink a config and name its weights, after making them."""
    tiny_sources.make_pictures(folder / "raw", count=8)
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 64, "scaling_factor": 0.18215}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    tiny_sources.make_vae(folder / "vae", **vae, **kinds)
    unet = load_config(ROOT / "configs" / f"{name}.yaml").unet
    widths = [16 * 2**level for level in range(len(unet.block_out_channels))]
    options = [
        f"--autoencoder={folder / 'vae'}",
        f"--data.shards={folder / 'raw'}",
        "--data.resolution=64",
        "--unet.sample_size=8",
        f"--unet.block_out_channels={widths}",
        f"--unet.attention_head_dim={[2] * len(widths)}",
        f"--text_encoder.source={folder / 'text'}",
        "--text_encoder.max_length=16",
        *SHRUNK,
        *SHORT,
        *PLAIN,
    ]
    if name == "sdxl":
        make_sdxl_pair(folder / "text")
        options += [
            f"--text_encoder_2.source={folder / 'text'}",
            "--text_encoder_2.max_length=16",
            "--unet.cross_attention_dim=80",
            "--unet.addition_time_embed_dim=8",
            "--unet.projection_class_embeddings_input_dim=88",
            "--data.buckets.step=32",
        ]
    else:
        make_clip(folder / "text")
        options += ["--unet.cross_attention_dim=32"]
    return options


@pytest.mark.parametrize("name", sorted(FACTS))
def test_one_step_from_weights_by_path_leaves_a_pipeline_that_diffusers_opens(name, tmp_path, capfd):
    options = options_for(name, tmp_path)
    if name == "finetune_sd15":
        config = load_config(ROOT / "configs" / f"{name}.yaml").unet
        tiny_sources.make_unet(
            tmp_path / "released",
            block_out_channels=(16, 32, 64, 128),
            down_block_types=tuple(config.down_block_types),
            up_block_types=tuple(config.up_block_types),
        )
        options.append(f"--init_from={tmp_path / 'released'}")
    run = tmp_path / "run"
    train(run, "", *options, config=ROOT / "configs" / f"{name}.yaml")
    (line,) = metrics(run)
    if name == "finetune_sd15":
        assert "initial weights from" in capfd.readouterr().err
        assert math.isfinite(line["loss"])
        assert line["loss"] != pytest.approx(1.0, abs=0.05)
    else:
        assert line["loss"] == pytest.approx(1.0, abs=0.12)  # a zero output against unit noise, 1,024 numbers
    pipeline = DiffusionPipeline.from_pretrained(run / "checkpoints/latest")
    expected = "StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline"
    assert type(pipeline).__name__ == expected
    layers = pipeline.text_encoder.config.num_hidden_layers
    assert layers == (3 if name == "sd21" else 4)  # SD 2.x as shipped: without the last layer
