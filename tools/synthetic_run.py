"""A run of any size on made-up data: encoded shards of noise, and the small autoencoder and text encoder they name.

Enters: a run's config and the side of its latents. Leaves: a folder with everything that the run reads, and a RunConfig
of the same network, objective and optimizer that trains on it. Nothing is downloaded; what it learns is noise.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.config import RunConfig, parse_config
from ldm.data.encoding import encoder_identity
from ldm.data.members import MOMENTS, TEXT
from ldm.data.shards import write_shards
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.training.run import checked_text_configs

SAMPLES_PER_SHARD = 256
FACTOR = 8


def synthetic_run(folder: Path, config: Path, side: int, samples: int, overrides: Sequence[str] = ()) -> RunConfig:
    """Writes what a run of `config` reads at latents of `side` x `side`; returns the config of that run.

    Args:
        samples: encoded samples with text states; a run that needs more sees them again.
        overrides: dotted options, as ldm/train.py takes them.

    Raises:
        ValueError: the config has a second text encoder.
    """
    read = _parse([f"--config={config}"])
    if read.text_encoder_2 is not None:
        raise ValueError(f"{config}: found text_encoder_2, expected a network with one text encoder")
    length = read.text_encoder.max_length or 77
    make_autoencoder(folder / "vae", read.unet.in_channels, FACTOR * side)
    make_text_encoder(folder / "text", read.unet.cross_attention_dim, length)
    made = _parse(
        [
            f"--config={config}",
            f"--run_dir={folder / 'run'}",
            f"--autoencoder={folder / 'vae'}",
            f"--text_encoder.source={folder / 'text'}",
            f"--text_encoder.max_length={length}",
            "--text_encoder.layer=last",
            "--text_encoder.attention_mask=false",
            f"--data.shards={folder / 'shards'}",
            "--data.validation=null",
            f"--data.resolution={FACTOR * side}",
            f"--unet.sample_size={side}",
            f"--encoding.shards={folder / 'raw'}",
            "--encoding.validation=null",
            "--encoding.text_states=true",
            "--validation.every=0",
            "--previews.every=0",
            "--metrics.tensorboard=false",
            "--optimizer.warmup_steps=0",
            *overrides,
        ]
    )
    make_encoded_shards(folder / "shards", made, samples)
    return made


def _parse(arguments: list[str]) -> RunConfig:
    return parse_config(arguments, prog="synthetic run", description="")


def make_autoencoder(folder: Path, channels: int, pixels: int) -> None:
    """A random autoencoder of factor 8, as small as the blocks allow: the run never decodes."""
    config = AutoencoderConfig(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=pixels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(config).save_pretrained(folder)


def make_text_encoder(folder: Path, width: int, length: int) -> None:
    """A random CLIP text model of one layer with a tokenizer of single bytes: the run asks it for the empty caption."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(one + "</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=length,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder)


def make_encoded_shards(folder: Path, config: RunConfig, samples: int) -> None:
    """Encoded shards of noise as tools/encode_latents.py makes them: float16 moments and text states, caption, note."""
    autoencoder = AutoencoderKL.from_pretrained(config.autoencoder)
    text_encoder = TextConditioner.load(list(checked_text_configs(config)))
    identity = encoder_identity(
        autoencoder, text_encoder, config.data.resolution, config.encoding, text_states=True, buckets=None
    )
    rng = np.random.default_rng(7)
    side = config.data.resolution // FACTOR
    moments = (2 * autoencoder.config.latent_channels, side, side)
    text = (text_encoder.max_length, text_encoder.hidden_size)

    def each() -> Iterator[dict[str, Any]]:
        for number in range(samples):
            pixels = [config.data.resolution] * 2
            yield {
                "__key__": f"{number:09d}",
                MOMENTS: rng.standard_normal(moments, dtype=np.float32).astype(np.float16),
                "txt": f"a picture of object {number}",
                TEXT: rng.standard_normal(text, dtype=np.float32).astype(np.float16),
                "json": {"size": pixels, "crop": [0, 0]},
            }

    write_shards(each(), folder, prefix="shard", samples_per_shard=SAMPLES_PER_SHARD, encoder=identity)
