"""The sampling program with given noise, another size, kept latents, and checkpoints that are no folder of a run."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_files import pixels, run, texts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.models.durable import file_hash
from ldm.pipeline.pipeline import Pipeline, save_pipeline
from ldm.sample import main
from ldm.sampling.generation import decode_latents, generate, initial_noise

FAST = ["--steps=3", "--sampler=ddim", "--guidance=3", "--device=cpu"]
SETTINGS: dict[str, Any] = {"seed": 0, "steps": 3, "sampler": "ddim", "guidance": 3.0}


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_pipeline(folder, pipeline)
    return folder


def write_noise(path: Path, *shape: int, name: str = "noise", scale: float = 1.0) -> torch.Tensor:
    noise = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    save_file({name: noise}, path)
    return noise


def test_the_noise_that_is_drawn_given_as_a_file_gives_the_same_pictures(folder, tmp_path) -> None:
    save_file({"noise": initial_noise(7, [4, 5], (4, 8, 8))}, tmp_path / "noise.safetensors")
    words = ["--checkpoint", folder, "--prompt=a", "--prompt=red heart", "--seed=7", "--index=4", *FAST]
    run(*words, "--out", tmp_path / "drawn")
    run(*words, "--out", tmp_path / "given", "--noise", tmp_path / "noise.safetensors", "--batch_size=1")
    for name in ("00004-a.png", "00005-red-heart.png"):
        assert np.abs(pixels(tmp_path / "drawn" / name) - pixels(tmp_path / "given" / name)).max() <= 1


def test_rows_of_noise_are_those_of_the_pictures_and_each_is_told_with_the_file_s_hash(
    folder, pipeline, tmp_path
) -> None:
    noise = write_noise(tmp_path / "private-name.safetensors", 3, 4, 8, 8)
    prompts = ["a", "a", "a"]
    run(
        "--checkpoint", folder, "--prompt=a", "--images_per_prompt=3", "--batch_size=2", "--out", tmp_path / "out",
        "--noise", tmp_path / "private-name.safetensors", "--grid", *FAST,
    )  # fmt: skip
    expected = generate(pipeline, prompts, noise=noise, **SETTINGS).astype(int)
    assert np.abs(expected[0] - expected[1]).max() > 20
    assert np.abs(generate(pipeline, prompts, **SETTINGS) - expected).max() > 20
    digest = f"xxh3_64 {file_hash(tmp_path / 'private-name.safetensors')}"
    for row in range(3):
        file = tmp_path / "out" / f"{row:05d}-a.png"
        assert np.abs(pixels(file) - expected[row]).max() <= 1
        assert (texts(file)["noise"], texts(file)["noise_row"]) == (digest, str(row))
        assert b"private" not in file.read_bytes()
    assert texts(tmp_path / "out" / "grid.png")["noise"] == digest


def test_pictures_are_as_large_as_the_noise_or_the_options_say_and_may_be_no_squares(folder, tmp_path) -> None:
    noise = write_noise(tmp_path / "noise.safetensors", 1, 4, 5, 12)
    words = ["--checkpoint", folder, "--prompt=a", *FAST]
    run(*words, "--noise", tmp_path / "noise.safetensors", "--out", tmp_path / "noise.png")
    assert pixels(tmp_path / "noise.png").shape == (10, 24, 3)
    assert noise.shape[1:] == (4, 5, 12)
    for size, shape in (
        (["--height=10", "--width=24"], (10, 24, 3)),
        (["--height=10"], (10, 16, 3)),
        (["--width=24"], (16, 24, 3)),
    ):
        run(*words, *size, "--out", tmp_path / "size.png", "--sampler=ddpm")  # whose steps draw noise of that size, too
        assert pixels(tmp_path / "size.png").shape == shape
    run(*words, "--height=16", "--width=16", "--out", tmp_path / "same.png")
    run(*words, "--out", tmp_path / "trained.png")
    assert np.array_equal(pixels(tmp_path / "same.png"), pixels(tmp_path / "trained.png"))


def test_the_latents_decode_to_the_pictures_and_say_what_they_are_of(folder, pipeline, tmp_path) -> None:
    out = tmp_path / "new" / "latents.safetensors"
    run(
        "--checkpoint", folder, "--prompt=red heart", "--prompt=緑", "--index=3", "--batch_size=1", "--grid",
        "--out", tmp_path / "grid.png", "--latents_out", out, *FAST,
    )  # fmt: skip
    latents = load_file(out)["latents"]
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), torch.float32)
    expected = generate(pipeline, ["red heart", "緑"], indices=[3, 4], **SETTINGS)
    assert np.abs(decode_latents(pipeline, latents).astype(int) - expected).max() <= 1
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prompt"]) == ["red heart", "緑"]
    assert json.loads(metadata["index"]) == [3, 4]
    assert (metadata["steps"], metadata["sampler"], metadata["checkpoint"]) == ("3", "ddim", "tiny")
    assert [path.name for path in out.parent.iterdir()] == ["latents.safetensors"]
    assert str(tmp_path).encode() not in out.read_bytes()


def refusal(capsys, *words: object) -> str:
    """What the program says when it refuses: exit status 2, and the message without the usage."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error:") :]


def test_noise_that_does_not_fit_is_refused_with_what_was_found_and_expected(folder, tmp_path, capsys) -> None:
    file = tmp_path / "noise.safetensors"
    words = ["--checkpoint", folder, "--prompt=a", "--prompt=b", "--out", tmp_path / "out", *FAST, "--noise", file]
    assert f"noise: there is no file {file}" in refusal(capsys, *words)
    write_noise(file, 3, 4, 8, 8)
    assert "holds (3, 4, 8, 8) torch.float32, expected (2, C, h, w) floating-point numbers" in refusal(capsys, *words)
    write_noise(file, 2, 4, 64)
    assert "holds (2, 4, 64) torch.float32, expected (2, C, h, w)" in refusal(capsys, *words)
    save_file({"noise": torch.ones(2, 4, 8, 8, dtype=torch.int64)}, file)
    assert "torch.int64, expected (2, C, h, w) floating-point" in refusal(capsys, *words)
    write_noise(file, 2, 4, 8, 8, name="latents")
    assert "holds latents, expected the tensor 'noise'" in refusal(capsys, *words)
    write_noise(file, 2, 4, 8, 8, scale=torch.inf)
    assert "not finite" in refusal(capsys, *words)
    write_noise(file, 2, 16, 8, 8)
    message = refusal(capsys, *words)
    assert "noise: found shape (2, 16, 8, 8), expected (2, 4, 8, 8): 2 pictures of 16x16 pixels" in message
    write_noise(file, 2, 4, 8, 8)
    message = refusal(capsys, *words, "--width=24")
    assert "noise: found shape (2, 4, 8, 8), expected (2, 4, 8, 12): 2 pictures of 16x24 pixels" in message
    file.write_bytes(file.read_bytes()[:-100])
    assert "noise.safetensors is damaged or no safetensors file" in refusal(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_sizes_and_names_that_cannot_be_are_refused_before_a_picture_is_drawn(folder, tmp_path, capsys) -> None:
    words = ["--checkpoint", folder, "--prompt=a", "--out", tmp_path / "a.png", *FAST]
    message = refusal(capsys, *words, "--height=15")
    assert "height: found 15 pixels, expected a multiple of the autoencoder's factor 2" in message
    assert "--width: found '0'" in refusal(capsys, *words, "--width=0")
    assert "expected a file name that ends in .safetensors" in refusal(capsys, *words, "--latents_out", "latents.pt")
    (tmp_path / "folder.safetensors").mkdir()
    assert "expected a file name" in refusal(capsys, *words, "--latents_out", tmp_path / "folder.safetensors")
    assert not (tmp_path / "a.png").exists()


def test_a_size_or_noise_that_cannot_be_is_refused_before_the_network_s_weights_are_read(
    folder, tmp_path, capsys
) -> None:
    # A folder whose large weights are none: reading these is another error.
    shutil.copytree(folder, tmp_path / "p")
    save_file({"other": torch.zeros(1)}, tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "p" / "text_encoder" / "model.safetensors").write_bytes(b"")
    words = ["--checkpoint", tmp_path / "p", "--prompt=a", "--out", tmp_path / "a.png", *FAST]
    assert "text_encoder" in refusal(capsys, *words)
    for option, message in (("--height=15", "height: found 15 pixels"), ("--width=3", "width: found 3 pixels")):
        assert message in refusal(capsys, *words, option)
    write_noise(tmp_path / "noise.safetensors", 1, 16, 8, 8)
    message = refusal(capsys, *words, "--noise", tmp_path / "noise.safetensors")
    assert "noise: found shape (1, 16, 8, 8), expected (1, 4, 8, 8)" in message


def test_no_bar_stands_above_the_refusal_of_a_size(folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(folder), "--prompt=a", "--out", str(tmp_path / "a.png"), "--height=15", *FAST])
    assert "step/s" not in capsys.readouterr().err


def test_noise_that_is_scaled_already_is_used_and_reported(folder, tmp_path, caplog) -> None:
    write_noise(tmp_path / "noise.safetensors", 1, 4, 8, 8, scale=14.6)
    with caplog.at_level(logging.WARNING):
        run(
            "--checkpoint", folder, "--prompt=a", "--out", tmp_path / "a.png", "--noise",
            tmp_path / "noise.safetensors", *FAST,
        )  # fmt: skip
    assert "has a standard deviation of 15" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "a model.ckpt"])
def test_a_single_file_is_refused_with_the_command_that_makes_a_folder_of_it(tmp_path, capsys, name) -> None:
    (tmp_path / name).write_bytes(b"")
    message = refusal(capsys, "--checkpoint", tmp_path / name, "--prompt=a", "--out", tmp_path / "a.png")
    quoted = f"'{tmp_path / name}'" if " " in name else str(tmp_path / name)
    assert f"`python tools/convert_checkpoint.py {quoted} FOLDER --tokenizer" in message


def write_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder as owner/tiny in the cache that the hub's own client keeps, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)


def test_a_name_on_the_hub_is_a_checkpoint(folder, tmp_path, monkeypatch, capsys) -> None:
    write_hub(folder, tmp_path, monkeypatch)
    run("--checkpoint", "owner/tiny", "--prompt=a", "--out", tmp_path / "hub.png", *FAST)
    run("--checkpoint", folder, "--prompt=a", "--out", tmp_path / "folder.png", *FAST)
    assert np.array_equal(pixels(tmp_path / "hub.png"), pixels(tmp_path / "folder.png"))
    assert texts(tmp_path / "hub.png")["checkpoint"] == "owner/tiny"
    message = refusal(capsys, "--checkpoint", "owner/other", "--prompt=a", "--out", tmp_path / "a.png")
    assert "'owner/other': no such local path" in message
    assert "the hub gave no such model" in message


def test_a_path_that_is_not_there_is_no_name_on_the_hub(folder, tmp_path, monkeypatch, capsys) -> None:
    write_hub(folder, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name in ("./owner/tiny", "../owner/tiny", "~/owner/tiny", "/owner/tiny", "tiny"):
        message = refusal(capsys, "--checkpoint", name, "--prompt=a", "--out", "a.png")
        assert f"checkpoint: there is no folder {name} (looked at /" in message
    (tmp_path / "owner").mkdir()
    assert "there is no folder owner/tiny" in refusal(capsys, "--checkpoint=owner/tiny", "--prompt=a", "--out=a.png")


def test_what_is_no_pipeline_elsewhere_is_refused_by_the_file_it_lacks(folder, tmp_path, monkeypatch, capsys) -> None:
    words = ["--prompt=a", "--out", tmp_path / "a.png"]
    message = refusal(capsys, "--checkpoint=package:ldm/pretrained/emoji-f4", *words)
    assert "ldm/pretrained/emoji-f4 holds no pipeline: expected model_index.json in it" in message
    write_hub(folder / "vae", tmp_path, monkeypatch)
    message = refusal(capsys, "--checkpoint=owner/tiny", *words)
    assert f"{'0' * 40} holds no pipeline: expected model_index.json in it" in message
