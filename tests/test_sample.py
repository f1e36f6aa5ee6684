"""The sampling program: what it draws, what its files say of themselves, and what it refuses."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_files import pixels, texts

from ldm.diffusion import samplers
from ldm.grid import labelled_grid
from ldm.pipeline.pipeline import Pipeline, save_pipeline
from ldm.sample import main
from ldm.sampling.generation import generate
from ldm.training.checkpoint import HASHES, TrainingState, save_checkpoint

ROOT = Path(__file__).parent.parent
FAST = ["--steps=3", "--sampler=ddim", "--guidance=3", "--device=cpu"]
SETTINGS = {"steps": 3, "sampler": "ddim", "guidance": 3.0}


def write_run(run: Path, pipeline: Pipeline) -> Path:
    """A run's folder with one checkpoint, as training leaves it; returns the run's folder."""
    state = TrainingState(step=10, weights={"a": torch.zeros(1)}, optimizer={}, ema_updates=0)
    save_checkpoint(
        run / "checkpoints", state, lambda folder: save_pipeline(folder, pipeline), config_yaml="seed: 0\n", keep=0
    )
    return run


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", pipeline)


def test_the_program_runs_as_a_script_and_writes_a_picture(run, pipeline, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "ldm" / "sample.py", "--checkpoint", run, "--prompt", "red heart", "--seed", "4",
         "--out", tmp_path / "heart.png", *FAST], capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr, "no progress bar"
    assert "1 pictures of tiny/step-00000010" in done.stdout
    expected = generate(pipeline, ["red heart"], seed=4, **SETTINGS)[0]
    assert np.abs(pixels(tmp_path / "heart.png") - expected).max() <= 1


def test_run_checkpoints_and_checkpoint_folder_mean_the_same(run, tmp_path) -> None:
    places = [run, run / "checkpoints", run / "checkpoints" / "latest", run / "checkpoints" / "step-00000010"]
    for i, place in enumerate(places):
        assert main(["--checkpoint", str(place), "--prompt", "a", "--out", str(tmp_path / f"{i}.png"), *FAST]) == 0
    contents = {(tmp_path / f"{i}.png").read_bytes() for i in range(len(places))}
    assert len(contents) == 1


def test_a_picture_says_what_it_is_a_function_of_and_no_path(run, pipeline, tmp_path) -> None:
    out = tmp_path / "a.png"
    main(["--checkpoint", str(run), "--prompt", "緑のリンゴ", "--negative", "blurry", "--seed", "9", "--index", "3",
          "--guidance_rescale", "0.5", "--out", str(out), *FAST])  # fmt: skip
    assert texts(out) == {
        "prompt": "緑のリンゴ",
        "index": "3",
        "negative": "blurry",
        "seed": "9",
        "sampler": "ddim",
        "steps": "3",
        "spacing": "trailing",
        "guidance": "3.0",
        "guidance_rescale": "0.5",
        "dtype": "float32",
        "checkpoint": "tiny/step-00000010",
    }
    assert str(run.parent).encode() not in out.read_bytes()
    settings = {"seed": 9, "indices": [3], "guidance_rescale": 0.5, **SETTINGS}
    expected, plain = (generate(pipeline, ["緑のリンゴ"], negative=text, **settings)[0] for text in ("blurry", ""))
    assert np.abs(pixels(out) - expected).max() <= 1
    assert np.abs(pixels(out) - plain).max() > 1, "the negative prompt is named, but does nothing"


def test_many_pictures_go_into_a_folder_and_each_can_be_drawn_again_alone(run, pipeline, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("Flag of France!\n\n  \nred heart\n", encoding="utf-8")
    main(["--checkpoint", str(run), "--prompt", "a", "--prompts", str(tmp_path / "prompts.txt"), "--seed", "2",
          "--images_per_prompt", "2", "--batch_size=4", "--grid", "--out", str(tmp_path / "out"), *FAST])  # fmt: skip
    names = [f"{i:05d}-{slug}" for i, slug in enumerate(["a"] * 2 + ["flag-of-france"] * 2 + ["red-heart"] * 2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{name}.png" for name in names),
        "grid.png",
    ]
    prompts = ["a", "a", "Flag of France!", "Flag of France!", "red heart", "red heart"]
    expected = generate(pipeline, prompts, seed=2, **SETTINGS)
    for i, name in enumerate(names):
        assert np.abs(pixels(tmp_path / "out" / f"{name}.png") - expected[i]).max() <= 1
        assert texts(tmp_path / "out" / f"{name}.png")["prompt"] == prompts[i]
    assert np.abs(expected[4].astype(int) - expected[5]).max() > 20, "two pictures of a prompt are one"
    main(["--checkpoint", str(run), "--prompt", "red heart", "--seed", "2", "--index", "5", "--out",
          str(tmp_path / "again.png"), *FAST])  # fmt: skip
    assert np.abs(pixels(tmp_path / "again.png") - pixels(tmp_path / "out" / f"{names[5]}.png")).max() <= 1


def test_a_grid_is_one_file_that_names_all_its_prompts(run, pipeline, tmp_path) -> None:
    prompts = ["red heart", "blue heart", "green apple"]
    out = tmp_path / "grid.png"
    main(["--checkpoint", str(run), *(f"--prompt={prompt}" for prompt in prompts), "--grid", "--out", str(out), *FAST])
    drawn = generate(pipeline, prompts, seed=0, **SETTINGS)
    assert np.abs(pixels(out) - np.asarray(labelled_grid(drawn, prompts)).astype(int)).max() <= 8  # enlarging rings
    assert json.loads(texts(out)["prompt"]) == prompts
    assert json.loads(texts(out)["index"]) == [0, 1, 2]


def refusal(capsys, *words: object) -> str:
    """What the program says when it refuses: exit status 2, and the message without the usage."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error:") :]


def test_what_cannot_be_done_is_said_before_a_picture_is_drawn(run, tmp_path, capsys) -> None:
    base = ["--checkpoint", run, "--out", tmp_path / "a.png"]
    prompt = ["--prompt", "a"]
    message = refusal(capsys, *base, *prompt, "--sampler", "magic")
    assert all(name in message for name in ("magic", "ddpm", "ddim", "dpmpp_2m"))
    assert "--steps: found '0', expected a whole number, 1 or more" in refusal(capsys, *base, *prompt, "--steps", 0)
    assert "--seed: found '-1'" in refusal(capsys, *base, *prompt, "--seed=-1")
    assert "--seed: found '1.5'" in refusal(capsys, *base, *prompt, "--seed", "1.5")
    assert "--guidance: found 'nan'" in refusal(capsys, *base, *prompt, "--guidance", "nan")
    assert "prompt: found none" in refusal(capsys, *base)
    assert "2 are asked for; give a folder, or --grid" in refusal(capsys, *base, *prompt, *prompt)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(capsys, "--checkpoint", run, "--out", tmp_path / "file", *prompt)
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn\n")
    assert "latin.txt is not UTF-8" in refusal(capsys, *base, "--prompts", tmp_path / "latin.txt")
    assert "no.txt" in refusal(capsys, *base, "--prompts", tmp_path / "no.txt")
    assert "Is a directory" in refusal(capsys, *base, "--prompts", tmp_path)
    for place in ("file/a.png", "file/b/folder"):
        message = refusal(capsys, "--checkpoint", run, "--out", tmp_path / place, *prompt)
        assert f"out: {tmp_path / 'file'} is a file, expected a folder" in message
    message = refusal(capsys, *base, *prompt, "--latents_out", tmp_path / "file" / "a.safetensors")
    assert f"latents_out: {tmp_path / 'file'} is a file, expected a folder" in message
    nowhere = tmp_path / "nowhere"
    message = refusal(capsys, "--checkpoint", nowhere, "--out", tmp_path / "a.png", *prompt)
    assert f"checkpoint: there is no folder {nowhere}" in message
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, "--checkpoint", tmp_path / "empty", "--out", tmp_path / "a.png", *prompt)
    assert f"{tmp_path / 'empty'} holds no checkpoint" in message
    message = refusal(capsys, *base, *prompt, "--device", "cuda:99")
    assert "device: 'cuda:99' cannot be used here" in message
    assert "device: 'tpux'" in refusal(capsys, *base, *prompt, "--device", "tpux")
    assert not (tmp_path / "a.png").exists()


def test_a_tolerance_that_is_not_reached_is_said_without_a_traceback(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(samplers.SAMPLERS, "ode_adaptive", partial(samplers.ode_adaptive, max_steps=1))
    words = ["--checkpoint", run, "--out", tmp_path / "a.png", "--prompt=a", "--sampler=ode_adaptive", "--device=cpu"]
    assert "ODE: 1 steps reached" in refusal(capsys, *words)


def test_incomplete_and_altered_checkpoints_are_refused_by_file_name(pipeline, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "broken", pipeline)
    checkpoint = run / "checkpoints" / "step-00000010"
    words = ["--checkpoint", run, "--prompt", "a", "--out", tmp_path / "a.png"]
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "unet/diffusion_pytorch_model.safetensors was altered" in refusal(capsys, *words)
    (checkpoint / HASHES).unlink()
    assert "the checkpoint was not finished" in refusal(capsys, *words)
    assert not (tmp_path / "a.png").exists()


def test_a_prompt_longer_than_the_encoder_takes_is_drawn_and_reported_with_its_text(run, tmp_path, caplog) -> None:
    prompt = "one heart " * 20
    with caplog.at_level("WARNING"):
        main(["--checkpoint", str(run), "--prompt", prompt, "--out", str(tmp_path / "a.png"), *FAST])
    assert (tmp_path / "a.png").is_file()
    assert f"cut to the 16 that text_encoder takes (further ones are counted, not reported): {prompt!r}" in caplog.text


def test_an_unconditional_model_is_refused_by_its_class(tmp_path, capsys) -> None:
    # Guidance would have nothing to lead away from, and the prompt nowhere to go.
    import diffusers

    edges = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    network = diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **edges)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "uncond")
    message = refusal(capsys, "--checkpoint", tmp_path / "uncond", "--prompt=a", "--out", tmp_path / "a.png")
    assert "_class_name is 'DDPMPipeline', expected one of 'StableDiffusionPipeline'" in message
