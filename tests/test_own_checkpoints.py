"""Checkpoints of this program as sources of a run: a run's folder means its latest; altered bytes are never loaded."""

import shutil
from pathlib import Path

import pytest
import tiny_runs
from safetensors.torch import load_file
from training_runs import train, weights

from ldm.training.checkpoint import CheckpointError
from ldm.training.own_checkpoints import checked_source

FILE = "diffusion_pytorch_model.safetensors"
SHORT = (
    "--optimizer.warmup_steps=0",
    "--training.steps=2",
    "--training.checkpoint_every=1",
    "--validation.every=0",
    "--previews.every=0",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny run's parts and config, and the run `first` that is done."""
    folder = tmp_path_factory.mktemp("own") / "run"
    tiny_runs.make(folder)
    train(folder / "first", "", *SHORT, config=folder / "config.yaml")
    return folder


@pytest.fixture
def copied(place, tmp_path) -> Path:
    shutil.copytree(place / "first", tmp_path / "first", symlinks=True)
    return tmp_path / "first"


def begun(place: Path, run: Path, *options: str) -> None:
    train(run, "", *SHORT, "--training.steps=1", *options, config=place / "config.yaml")


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/latest", "checkpoints/latest/unet"])
def test_a_runs_folder_means_its_latest_checkpoint(place, tmp_path, name, capfd):
    begun(place, tmp_path / "run", f"--init_from={place / 'first' / name}", "--optimizer.lr=1e-12")
    found = weights(tmp_path / "run/checkpoints/latest")
    for tensor, value in load_file(place / "first/checkpoints/step-00000002/unet" / FILE).items():
        assert (found[f"weight {tensor}"] - value).abs().max() < 1e-10
    assert "warning" not in capfd.readouterr().err


def test_autoencoder_and_text_encoder_come_from_a_runs_folder_too(place, tmp_path):
    run = place / "first"
    begun(place, tmp_path / "run", f"--autoencoder={run}", f"--text_encoder.source={run}")
    for name in ("vae/" + FILE, "text_encoder/model.safetensors"):
        ours, theirs = (load_file(one / "checkpoints/latest" / name) for one in (tmp_path / "run", run))
        assert all((ours[key] == value).all() for key, value in theirs.items())


SOURCES = [
    ("init_from", "checkpoints/latest", f"unet/{FILE}"),
    ("init_from", "checkpoints/latest/unet", f"unet/{FILE}"),
    ("init_from", f"checkpoints/latest/unet/{FILE}", f"unet/{FILE}"),
    ("init_from", "", "unet/config.json"),
    ("init_from", "", "scheduler/scheduler_config.json"),
    ("autoencoder", "checkpoints/latest", f"vae/{FILE}"),
    ("autoencoder", "checkpoints/latest/vae", f"vae/{FILE}"),
    ("text_encoder.source", "checkpoints/latest", "text_encoder/model.safetensors"),
    ("text_encoder.source", "checkpoints/latest/text_encoder", "tokenizer/tokenizer.json"),
    ("text_encoder.tokenizer", "checkpoints/latest/tokenizer", "tokenizer/tokenizer.json"),
]


@pytest.mark.parametrize(("setting", "source", "altered"), SOURCES)
def test_a_checkpoint_whose_bytes_were_altered_is_refused_by_setting_and_file(
    place, copied, tmp_path, setting, source, altered
):
    flip_last_letter(copied / "checkpoints/latest" / altered)
    with pytest.raises(CheckpointError) as error:
        begun(place, tmp_path / "run", f"--{setting}={copied / source}")
    assert str(error.value).startswith(f"{setting}: ")
    assert f"{altered} was altered" in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert not (tmp_path / "run/checkpoints").exists()


def flip_last_letter(path: Path) -> None:
    """Alters a file so that it is still read: a bit of its last number, or the case of a letter that may be text."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        content[-4] ^= 1
    else:
        content[-1:] = b" "
    path.unlink()  # frozen parts are links to those of other checkpoints
    path.write_bytes(content)


def test_a_part_that_is_altered_is_no_matter_to_whoever_loads_another(place, copied):
    flip_last_letter(copied / "checkpoints/latest/vae" / FILE)
    assert checked_source(str(copied), "unet") == str(copied / "checkpoints/step-00000002")


def test_other_sources_stay_as_they_are(place, tmp_path, monkeypatch):
    others = [str(place / "autoencoder"), "owner/model", "package:a/b", "./nowhere", str(place / "autoencoder" / FILE)]
    (place / "hashes.json").write_text("another program's")
    assert [checked_source(one, "vae") for one in others] == others
    (place / "hashes.json").unlink()
    monkeypatch.chdir(place / "first/checkpoints/latest")
    assert checked_source("vae", "vae") == "vae"


def test_a_run_without_a_checkpoint_and_one_that_is_not_finished_are_told(place, copied, tmp_path):
    checkpoint = copied / "checkpoints/step-00000002"
    (checkpoint / "hashes.json").unlink()
    with pytest.raises(CheckpointError, match=r"init_from: .*step-00000002 .* hashes\.json is missing"):
        begun(place, tmp_path / "run", f"--init_from={copied}")
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"init_from: .*first holds no checkpoint: expected model_index\.json"):
        begun(place, tmp_path / "run", f"--init_from={copied}")
