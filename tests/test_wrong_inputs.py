"""What users give by mistake, through the training program itself: an error that says which input and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import tiny_sources
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import make_clip, make_sdxl_pair
from training_runs import train

from ldm.config import load_config
from ldm.train import main

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny run on encoded shards with text states, and a released network that it could begin with."""
    folder = tmp_path_factory.mktemp("wrong") / "run"
    tiny_runs.make(folder)
    unet = tiny_runs.settings(folder)["unet"]
    lists = {name: tuple(value) for name, value in unet.items() if isinstance(value, list)}
    tiny_sources.make_unet(folder / "released", **(unet | lists))
    return folder


def refused(place: Path, tmp_path: Path, *options: str) -> str:
    """The reason that status.json has for a launch that must fail, which the error says too."""
    with pytest.raises((ValueError, OSError)) as error:
        train(tmp_path / "run", "", *options, config=place / "config.yaml")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["outcome"] == "failed"
    assert str(error.value) in status["reason"]
    return str(error.value)


def test_shards_of_another_resolution(place, tmp_path):
    text = refused(place, tmp_path, "--data.resolution=16", "--unet.sample_size=8")
    assert f"{place / 'shards'}: the shards were encoded with resolution 8, but this run has 16" in text
    assert "encode raw shards with these (tools/encode_latents.py)" in text


def test_shards_of_another_text_encoder(place, tmp_path):
    make_clip(tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    text = refused(place, tmp_path, f"--text_encoder.source={tmp_path / 'other'}")
    assert "the shards were encoded with text_encoder.weights" in text
    assert "Put back the settings with which the shards were encoded" in text


def test_shards_of_one_text_encoder_for_a_pair(place, tmp_path):
    make_sdxl_pair(tmp_path / "text")
    settings = yaml.safe_load((place / "config.yaml").read_text())
    encoder = {"source": str(tmp_path / "text"), "layer": "penultimate_without_norm", "max_length": 8}
    settings |= {"text_encoder": encoder, "text_encoder_2": encoder}
    settings["unet"] |= {
        "cross_attention_dim": 80,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 88,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    text = refused(tmp_path, tmp_path)
    assert "the shards were encoded with text_encoder_2" in text


def test_a_vae_given_as_the_network_to_begin_with(place, tmp_path):
    text = refused(place, tmp_path, f"--init_from={place / 'autoencoder'}")
    assert text.startswith("init_from: ")
    assert str(place / "autoencoder") in text
    assert "'AutoencoderKL', expected 'UNet2DConditionModel'" in text


def test_a_network_given_as_the_vae(place, tmp_path):
    text = refused(place, tmp_path, f"--autoencoder={place / 'released'}")
    assert text.startswith("autoencoder: ")
    assert "'UNet2DConditionModel', expected 'AutoencoderKL'" in text


@pytest.mark.parametrize(
    ("setting", "folder", "file"),
    [
        ("init_from", "released", FILE),
        ("autoencoder", "autoencoder", FILE),
        ("text_encoder.source", "text_encoder", "model.safetensors"),
    ],
)
def test_weights_cut_short(place, tmp_path, setting, folder, file):
    shutil.copytree(place / folder, tmp_path / folder)
    path = tmp_path / folder / file
    path.write_bytes(path.read_bytes()[:-100])
    text = refused(place, tmp_path, f"--{setting}={tmp_path / folder}")
    assert str(path) in text
    assert setting.split(".")[0] in text
    assert "fetch or copy it again" in text


def test_a_network_of_another_kind_is_told_with_what_to_set(place, tmp_path):
    tiny_sources.make_unet(tmp_path / "other")
    text = refused(place, tmp_path, f"--init_from={tmp_path / 'other'}")
    assert "unet.block_out_channels: the source has [16, 32], this run [16, 40]" in text
    assert "Set them as the source has them, or choose another source" in text


@pytest.mark.parametrize("name", ["autoencoder", "text_encoder.source", "data.resolution", "run_dir"])
def test_a_config_that_lacks_a_field(place, tmp_path, capsys, name):
    settings = yaml.safe_load((place / "config.yaml").read_text())
    section, _, field = name.partition(".")
    del (settings[section] if field else settings)[field or section]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stop:
        main([f"--config={tmp_path / 'config.yaml'}"])
    assert stop.value.code == 2
    assert name in capsys.readouterr().err.rsplit("error:", 1)[1]


def test_a_network_without_its_config(place, tmp_path):
    shutil.copytree(place / "released", tmp_path / "released")
    (tmp_path / "released/config.json").unlink()
    text = refused(place, tmp_path, f"--init_from={tmp_path / 'released'}")
    assert "init_from: " in text
    assert "config.json" in text
    assert str(tmp_path / "released") in text


def test_a_name_that_is_nowhere(place, tmp_path):
    text = refused(place, tmp_path, "--init_from=./nowhere")
    assert "init_from: model source './nowhere': there is no such file or folder" in text
    assert load_config(place / "config.yaml").init_from is None
