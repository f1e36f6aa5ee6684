"""Encoded shards that do not fit a run are refused with the field, what was found and what was expected."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import DEBUG
from tiny_models import LENGTH, make_clip, make_sdxl_pair
from tiny_shards import encoded_sample, write
from torch import nn

from ldm.config import RunConfig, load_config
from ldm.data.encoding import EncodingConfig, encoder_identity
from ldm.data.manifest import Manifest
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.training.fit import shard_problems

RESOLUTION = 8
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


def make_autoencoder(**changes: float) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(AutoencoderConfig(**BLOCKS, block_out_channels=[8, 8], norm_num_groups=8, **changes))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a single text encoder and of a pair."""
    root = tmp_path_factory.mktemp("text")
    make_clip(root / "one")
    make_sdxl_pair(root / "pair")
    return root


def one_encoder(sources: Path, **changes: int) -> TextConditioner:
    return TextConditioner.load([TextEncoderConfig(str(sources / "one"), **{"max_length": LENGTH} | changes)])


def pair(sources: Path, empty_caption: str = "encoded") -> TextConditioner:
    config = TextEncoderConfig(str(sources / "pair"), layer="penultimate_without_norm", max_length=LENGTH)
    return TextConditioner.load([config, config], empty_caption=empty_caption)


class Parts(NamedTuple):
    """What shards are encoded with, or a run has."""

    autoencoder: AutoencoderKL
    text_encoder: TextConditioner
    resolution: int = RESOLUTION

    @property
    def config(self) -> RunConfig:
        config = load_config(DEBUG)
        return replace(config, data=replace(config.data, resolution=self.resolution))


def shards_of(folder: Path, parts: Parts, *, text_states: bool = True, **storage: object) -> Manifest:
    """Shards on disk whose manifest says that these parts encoded them; read back."""
    encoding = EncodingConfig(text_states=text_states, **storage)
    identity = encoder_identity(
        parts.autoencoder, parts.text_encoder, parts.resolution, encoding, text_states=text_states
    )
    write(folder, lambda shard, number: encoded_sample(shard, number, text=False), [3], identity)
    return Manifest.load(folder)


def problems(manifest: Manifest, run: Parts) -> list[str]:
    return list(shard_problems(run.config, run.autoencoder, run.text_encoder, [manifest]))


def alter(module: nn.Module) -> None:
    """Changes one weight a little."""
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 1e-3


def altered(autoencoder: AutoencoderKL) -> AutoencoderKL:
    alter(autoencoder)
    return autoencoder


def altered_text(text_encoder: TextConditioner, number: int) -> TextConditioner:
    alter(text_encoder.encoders[number].model)
    return text_encoder


# By name: what the shards were encoded with, what the run has, and the fields of the errors.
Made = Callable[[Path], Parts]
WRONG: dict[str, tuple[Made, Made, list[str]]] = {
    "another autoencoder": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(altered(make_autoencoder()), pair(s)),
        ["autoencoder.weights"],
    ),
    "an autoencoder of another config": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(make_autoencoder(scaling_factor=0.5), pair(s)),
        ["autoencoder.config"],
    ),
    "an autoencoder of other channels": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(make_autoencoder(latent_channels=16), pair(s)),
        ["autoencoder.config", "autoencoder.weights", "latent_channels"],
    ),
    "another resolution": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(make_autoencoder(), pair(s), 16),
        ["resolution"],
    ),
    "another text encoder": (
        lambda s: Parts(make_autoencoder(), one_encoder(s)),
        lambda s: Parts(make_autoencoder(), altered_text(one_encoder(s), 0)),
        ["text_encoder.weights"],
    ),
    "captions of another length": (
        lambda s: Parts(make_autoencoder(), one_encoder(s)),
        lambda s: Parts(make_autoencoder(), one_encoder(s, max_length=LENGTH - 1)),
        ["text_encoder.max_length"],
    ),
    "another first of a pair": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(make_autoencoder(), altered_text(pair(s), 0)),
        ["text_encoder.weights"],
    ),
    "another second of a pair": (
        lambda s: Parts(make_autoencoder(), pair(s)),
        lambda s: Parts(make_autoencoder(), altered_text(pair(s), 1)),
        ["text_encoder_2.weights"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_shards_of_other_parts_are_refused_with_field_found_and_expected(
    sources: Path, tmp_path: Path, name: str
) -> None:
    encoded_with, run_with, fields = WRONG[name]
    shards, run = encoded_with(sources), run_with(sources)
    manifest = shards_of(tmp_path / "shards", shards)
    assert problems(manifest, shards) == []
    stored, expected = (
        encoder_identity(one.autoencoder, one.text_encoder, one.resolution, EncodingConfig(), text_states=True)
        for one in (shards, run)
    )
    lines = []
    for field in fields:
        whole, _, part = field.partition(".")
        a, b = (one[whole][part] if part else one[whole] for one in (stored, expected))
        assert a != b
        lines.append(f"{tmp_path}/shards: the shards were encoded with {field} {a}, but this run has {b}")
    assert problems(manifest, run) == lines


def test_shards_of_one_encoder_do_not_fit_a_pair_nor_the_reverse(sources: Path, tmp_path: Path) -> None:
    one, two = (Parts(make_autoencoder(), text) for text in (one_encoder(sources), pair(sources)))
    found = problems(shards_of(tmp_path / "one", one), two)
    assert any("text_encoder.weights" in line for line in found)
    assert found[-1].endswith("encoded with text_encoder_2 None, but this run has CLIPTextModelWithProjection")
    found = problems(shards_of(tmp_path / "two", two), one)
    assert found[-1].endswith("encoded with text_encoder_2 CLIPTextModelWithProjection, but this run has None")


def test_what_stands_for_no_caption_and_how_values_are_stored_do_not_matter(sources: Path, tmp_path: Path) -> None:
    # Captions are dropped in training: the shards hold the states of captions only.
    run = Parts(make_autoencoder(), pair(sources, "zeros"))
    shards = Parts(make_autoencoder(), pair(sources, "encoded"))
    manifest = shards_of(tmp_path / "shards", shards, dtype="float32", flipped=True)
    assert problems(manifest, run) == []


def test_shards_without_text_fit_any_text_encoder(sources: Path, tmp_path: Path) -> None:
    manifest = shards_of(tmp_path / "shards", Parts(make_autoencoder(), one_encoder(sources)), text_states=False)
    assert problems(manifest, Parts(make_autoencoder(), pair(sources))) == []


def test_an_identity_from_before_pairs_were_known_fits_one_encoder_and_no_pair(sources: Path, tmp_path: Path) -> None:
    one = Parts(make_autoencoder(), one_encoder(sources))
    manifest = shards_of(tmp_path / "shards", one)
    assert manifest.encoder is not None
    del manifest.encoder["text_encoder_2"]
    assert problems(manifest, one) == []
    pair_run = Parts(make_autoencoder(), pair(sources))
    assert any("text_encoder_2 None" in line for line in problems(manifest, pair_run))
