"""Latents are shifted and scaled once in training, from pictures and encoded shards, and back once in sampling."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from tiny_shards import png, positions_of
from torch import Tensor

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.draws import Purpose, generator
from ldm.data.encoding import EncodingConfig, encode_shards, encoder_identity
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.quarantine import Ledger
from ldm.data.shards import write_shards
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import decode_latents, generate
from ldm.train import batch_loss, latents_of

FACTOR, SHIFT = 0.7, 0.3
SEED, SIDE, COUNT = 5, 16, 24
TOLERANCE = {"online": 1e-5, "float32": 1e-5, "float16": 3e-3}
"""Of latents of size one, by where they come from: float16 rounds moments by 0.05 %"""


class Case(NamedTuple):
    reference: DiffusersAutoencoder
    pipeline: Pipeline
    pictures: np.ndarray
    """(COUNT, SIDE, SIDE, 3) uint8"""
    shards: dict[str, Manifest]
    """ "online": raw; "float32" and "float16": encoded from them"""

    @property
    def run(self) -> SimpleNamespace:
        """Of a run, what a batch's loss is computed with."""
        objective = ObjectiveConfig(parameterization="x0", loss="x0")
        config = SimpleNamespace(objective=objective, training=SimpleNamespace(global_batch=COUNT))
        return SimpleNamespace(config=config, pipeline=self.pipeline, corruption=None)


@pytest.fixture(scope="module", params=[4, 16], ids=["4 channels", "16 channels"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An autoencoder that diffusers made, a pipeline around it, and pictures as raw and as encoded shards."""
    folder, channels = tmp_path_factory.mktemp("scaling"), request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        reference = DiffusersAutoencoder(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=channels,
            norm_num_groups=8,
            scaling_factor=FACTOR,
            shift_factor=SHIFT,
            use_quant_conv=channels == 4,
            use_post_quant_conv=channels == 4,
        ).eval()
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1 and ("conv_in" in name or "conv_out" in name):
                torch.nn.init.normal_(parameter, std=0.2)
        reference.save_pretrained(folder / "vae")
        tiny_models.make_clip(folder / "text")
        pipeline = tiny_models.make_pipeline(str(folder / "text"), parameterization="x0")
        unet = UNet(dataclasses.replace(pipeline.unet.config, in_channels=channels, out_channels=channels)).eval()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    pipeline = dataclasses.replace(pipeline, unet=unet, autoencoder=autoencoder)
    pictures = np.random.default_rng(channels).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    samples = [
        {"__key__": f"{number:03d}", "png": png(one), "txt": f"red {number}"} for number, one in enumerate(pictures)
    ]
    shards = {"online": write_shards(samples, folder / "raw", prefix="s", samples_per_shard=7)}
    for dtype in ("float32", "float16"):
        encoding = EncodingConfig(dtype=dtype, flipped=True, workers=0, batch_size=5)
        shards[dtype] = encoded(shards["online"], folder / dtype, pipeline, encoding)
    return Case(reference, pipeline, pictures, shards)


def encoded(raw: Manifest, out: Path, pipeline: Pipeline, encoding: EncodingConfig) -> Manifest:
    """Encoded as the tool does it."""
    out.mkdir()
    autoencoder, shards = pipeline.autoencoder, range(len(raw.shards))
    device, ledger = torch.device("cpu"), Ledger(out / "quarantine.jsonl", 0.0)
    done = encode_shards(raw, shards, out, autoencoder, None, ledger, resolution=SIDE, config=encoding, device=device)
    assert sum(done) == COUNT
    identity = encoder_identity(autoencoder, pipeline.text_encoder, SIDE, encoding, text_states=False)
    return build_manifest(out, identity, progress=False)


def batches(case: Case, kind: str) -> list[Batch]:
    """Three batches of 8 out of the real loader, half of the pictures mirrored: each picture once."""
    manifest = case.shards[kind]
    config = DataConfig(shards=str(manifest.folder), resolution=SIDE, workers=0, flip=0.5)
    shape = (case.pipeline.autoencoder.config.latent_channels, SIDE // 2, SIDE // 2)
    found = list(make_loader(config, manifest, SEED, positions_of(stop_step=3), latent_shape=shape))
    assert all((batch.moments is None) == (kind == "online") for batch in found)
    assert len(set(itertools.chain(*(batch.keys for batch in found)))) == COUNT
    return found


@torch.no_grad()
def expected_latents(case: Case, batch: Batch) -> Tensor:
    """(B, C, h, w): diffusers' posterior of the pictures themselves, sampled with the batch's noise."""
    rows = []
    for key, position in zip(batch.keys, batch.positions.tolist(), strict=True):
        picture = case.pictures[int(key[-3:])]
        flip = generator(SEED, Purpose.FLIP, position).random() < 0.5
        rows.append(torch.from_numpy((picture[:, ::-1] if flip else picture).copy()))
    images = torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = case.reference.encode(images).latent_dist
    config = case.reference.config
    return (posterior.mean + posterior.std * batch.posterior_noise - config.shift_factor) * config.scaling_factor


@pytest.mark.parametrize("kind", ["online", "float32", "float16"])
def test_training_latents_of_pictures_and_encoded_shards_are_those_of_diffusers(case: Case, kind: str) -> None:
    for batch in batches(case, kind):
        expected = expected_latents(case, batch)
        assert 0.3 < expected.std() < 3
        torch.testing.assert_close(latents_of(case.run, batch), expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])


@torch.no_grad()
def predict_always(case: Case, values: Tensor) -> None:
    """Has the network predict the same latents, whatever it is given: value c in channel c."""
    last = case.pipeline.unet.conv_out
    last.weight.zero_()
    assert last.bias is not None
    last.bias.copy_(values)


@pytest.mark.parametrize("kind", ["online", "float32", "float16"])
def test_the_error_that_is_minimized_is_that_of_latents_scaled_once(case: Case, kind: str) -> None:
    values = torch.linspace(-1, 1.5, case.pipeline.autoencoder.config.latent_channels)
    predict_always(case, values)
    for batch in batches(case, kind):
        with torch.no_grad():
            loss, _, _ = batch_loss(case.run, case.pipeline.unet, batch)
        expected = (expected_latents(case, batch) - values[:, None, None]).square().flatten(1).mean(1)
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE[kind], atol=0)


def pictures_by_diffusers(case: Case, latents: Tensor) -> Tensor:
    """(B, H, W, 3) in 0 to 255, not rounded, of scaled latents."""
    config = case.reference.config
    with torch.no_grad():
        images = case.reference.decode(latents / config.scaling_factor + config.shift_factor).sample
    return ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)


def test_decoded_pictures_of_training_latents_are_those_of_diffusers(case: Case) -> None:
    for batch in batches(case, "online"):
        latents = expected_latents(case, batch)
        expected = pictures_by_diffusers(case, latents)
        assert expected.std() > 20
        found = torch.from_numpy(decode_latents(case.pipeline, latents)).float()
        assert (found - expected).abs().max() <= 0.51  # rounded to whole numbers


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_sampling_decodes_what_the_network_predicts_unscaled_once(case: Case, sampler: str) -> None:
    values = torch.linspace(-2, 2.5, case.pipeline.autoencoder.config.latent_channels)
    predict_always(case, values)
    found = generate(case.pipeline, ["a", "red"], seed=3, sampler=sampler, steps=4, guidance=2.0)
    size = case.pipeline.latent_shape
    expected = pictures_by_diffusers(case, values[None, :, None, None].expand(2, *size))
    assert (torch.from_numpy(found).float() - expected).abs().max() <= 0.51


def test_twice_or_never_would_be_seen_in_every_comparison_above(case: Case) -> None:
    (batch, *_) = batches(case, "online")
    once = expected_latents(case, batch)
    z = once / FACTOR + SHIFT
    wrong = [z - SHIFT, once * FACTOR, z * FACTOR, (z - 2 * SHIFT) * FACTOR, z * FACTOR - SHIFT, z]
    for latents in wrong:
        assert (latents - once).abs().mean() > 30 * TOLERANCE["float16"]
        assert (pictures_by_diffusers(case, latents) - pictures_by_diffusers(case, once)).abs().max() > 3
