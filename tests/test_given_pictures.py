"""The sampling program with given pictures: what it draws and writes of them, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_files import pixels, run, texts
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.data.pictures import decode_picture
from ldm.diffusion.linear_operators import AveragePooling
from ldm.models.durable import file_hash
from ldm.models.unet import UNet
from ldm.pipeline.pipeline import Pipeline, save_pipeline
from ldm.sample import main
from ldm.sampling.generation import generate
from ldm.sampling.given_pictures import GivenPicture, Operator

FAST = ["--steps=4", "--sampler=ddim", "--guidance=3", "--device=cpu", "--prompt=red heart"]
SETTINGS: dict[str, Any] = {"seed": 0, "steps": 4, "sampler": "ddim", "guidance": 3.0}
SIDE = 16


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_pipeline(folder, pipeline)
    return folder


def random_picture(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write(tmp_path / "private-name.png", random_picture(SIDE, SIDE))


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Nearly white in the right half but for a corner, nearly black in the left one: not 0 and 255 alone."""
    pixels = np.full((SIDE, SIDE), 100, np.uint8)
    pixels[:, SIDE // 2 :] = 130
    pixels[:3, -3:] = 0
    return write(tmp_path / "private-mask.png", pixels)


def test_image_to_image_is_told_with_hash_and_strength_and_stays_nearer_the_lower_that_is(
    folder, picture, tmp_path
) -> None:
    words = ["--checkpoint", folder, *FAST, "--init_image", picture]
    run(*words, "--out", tmp_path / "default.png")
    run(*words, "--out", tmp_path / "same.png", "--strength", 0.8)
    assert np.array_equal(pixels(tmp_path / "default.png"), pixels(tmp_path / "same.png"))
    found = texts(tmp_path / "same.png")
    assert (found["init_image"], found["strength"]) == (f"xxh3_64 {file_hash(picture)}", "0.8")
    assert b"private" not in (tmp_path / "same.png").read_bytes()
    run(*words, "--out", tmp_path / "near.png", "--strength=0.25")
    run(*words, "--out", tmp_path / "far.png", "--strength=1")
    assert np.abs(pixels(tmp_path / "near.png") - pixels(tmp_path / "far.png")).max() > 20


def test_inpainting_keeps_every_black_pixel_of_the_mask_and_draws_every_white_one(
    folder, picture, mask, tmp_path
) -> None:
    run(
        "--checkpoint",
        folder,
        *FAST,
        "--init_image",
        picture,
        "--mask",
        mask,
        "--out",
        tmp_path / "a.png",
        "--repeats=2",
    )
    white = np.asarray(Image.open(mask)) >= 128
    original, drawn = pixels(picture), pixels(tmp_path / "a.png")
    assert np.array_equal(drawn[~white], original[~white])
    assert np.abs(drawn[white] - original[white]).max(axis=1).min() > 0
    found = texts(tmp_path / "a.png")
    assert (found["mask"], found["repeats"], found["strength"]) == (f"xxh3_64 {file_hash(mask)}", "2", "1.0")
    assert b"private" not in (tmp_path / "a.png").read_bytes()


def test_a_picture_of_another_size_is_resized_and_cropped_as_in_training_and_so_is_its_mask(
    folder, pipeline, tmp_path, caplog
) -> None:
    wide = write(tmp_path / "wide.png", np.asarray(Image.fromarray(random_picture(5, 9)).resize((36, 20))))
    white = np.zeros((20, 36), np.uint8)
    white[:, 18:] = 255
    write(tmp_path / "mask.png", white)
    with caplog.at_level("WARNING"):
        run(
            "--checkpoint", folder, *FAST, "--init_image", wide, "--mask", tmp_path / "mask.png", "--out",
            tmp_path / "a.png",
        )  # fmt: skip
    assert "init_image: 20 x 36 pixels (height x width) are resized and cropped to 16 x 16" in caplog.text
    trained = decode_picture({"png": wide.read_bytes()}, SIDE).pixels
    drawn = pixels(tmp_path / "a.png")
    assert np.array_equal(drawn[:, :7], trained[:, :7])
    assert (np.abs(drawn[:, 9:] - trained[:, 9:]).max(axis=2) > 0).mean() > 0.9
    # The size is that of --height and --width, where they say one: then nothing is resized.
    run("--checkpoint", folder, *FAST, "--init_image", wide, "--height=20", "--width=36", "--out", tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").shape == (20, 36, 3)
    expected = generate(
        pipeline,
        ["red heart"],
        given=GivenPicture(pixels(wide).astype(np.uint8), 0.8),
        **SETTINGS | {"height": 20, "width": 36},
    )
    assert np.abs(pixels(tmp_path / "b.png") - expected[0]).max() <= 1


def test_transparency_is_white_in_pictures_and_what_is_transparent_in_a_mask_is_drawn(
    folder, picture, tmp_path
) -> None:
    rgba = np.dstack([pixels(picture).astype(np.uint8), np.full((SIDE, SIDE), 255, np.uint8)])
    rgba[:, :8, 3] = 0
    write(tmp_path / "rgba.png", rgba)
    black = np.zeros((SIDE, SIDE, 4), np.uint8)
    black[..., 3] = 255
    black[8:, :, 3] = 0
    write(tmp_path / "mask.png", black)
    run(
        "--checkpoint", folder, *FAST, "--init_image", tmp_path / "rgba.png", "--mask", tmp_path / "mask.png", "--out",
        tmp_path / "a.png",
    )  # fmt: skip
    drawn = pixels(tmp_path / "a.png")
    assert (drawn[:8, :8] == 255).all()
    assert np.array_equal(drawn[:8, 8:], pixels(picture)[:8, 8:])


def test_what_is_drawn_at_a_higher_resolution_has_the_measured_picture_as_its_means(folder, tmp_path) -> None:
    small = write(tmp_path / "small.png", random_picture(4, 4))
    run(
        "--checkpoint",
        folder,
        *FAST,
        "--init_image",
        small,
        "--operator=super_resolution:4",
        "--out",
        tmp_path / "a.png",
    )
    means = AveragePooling(4)(torch.from_numpy(pixels(tmp_path / "a.png")).double().permute(2, 0, 1)[None])
    error = float((means - torch.from_numpy(pixels(small)).permute(2, 0, 1)[None]).abs().max())
    assert error <= 0.5, "8-bit rounding of the picture is all that may be left"
    assert texts(tmp_path / "a.png")["operator"] == "super_resolution:4"


def test_inverted_noise_is_a_file_of_noise_that_leads_to_the_same_picture(folder, picture, tmp_path, capsys) -> None:
    noise = tmp_path / "new" / "noise.safetensors"
    words = ["--checkpoint", folder, *FAST, "--guidance=1", "--prompt=blue"]
    run(*words, "--init_image", picture, "--invert", noise, "--out", tmp_path / "inverted")
    assert "drawn again from" in capsys.readouterr().out
    assert load_file(noise)["noise"].shape == (2, 4, 8, 8)
    with safe_open(noise, framework="pt") as file:
        assert json.loads(file.metadata()["prompt"]) == ["red heart", "blue"]
    assert b"private" not in noise.read_bytes()
    run(*words, "--noise", noise, "--out", tmp_path / "again")
    for name in ("00000-red-heart.png", "00001-blue.png"):
        assert np.array_equal(pixels(tmp_path / "inverted" / name), pixels(tmp_path / "again" / name))
        found = texts(tmp_path / "inverted" / name)
        assert found["init_image"] == f"xxh3_64 {file_hash(picture)}"
        assert "noise" not in found


def refusal(capsys, *words: object) -> str:
    """What the program says when it refuses: exit status 2, and the message without the usage."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error:") :]


def test_options_that_need_or_exclude_others_are_refused(folder, picture, mask, tmp_path, capsys) -> None:
    words = ["--checkpoint", folder, *FAST, "--out", tmp_path / "a.png"]
    for option in (
        ["--mask", mask],
        ["--strength=0.5"],
        ["--operator=blur:1"],
        ["--invert", tmp_path / "n.safetensors"],
    ):
        name = option[0].partition("=")[0].strip("-")
        assert f"{name}: needs a picture: --init_image FILE" in refusal(capsys, *words, *option)
    assert "repeats: needs a picture and a mask" in refusal(capsys, *words, "--repeats=2")
    words += ["--init_image", picture]
    for strength in ("0", "-0.1", "1.01"):
        message = refusal(capsys, *words, f"--strength={strength}")
        assert f"strength: found {float(strength)}, expected more than 0, at most 1" in message
    assert "--strength: found 'nan', expected a finite number" in refusal(capsys, *words, "--strength=nan")
    message = refusal(capsys, *words, "--strength=0.2")
    assert "strength: found 0.2, which of 4 steps leaves none, expected 0.25 or more, or more steps" in message
    message = refusal(capsys, *words, "--strength=0.3", "--steps=3")
    assert "strength: found 0.3, which of 3 steps leaves none, expected 0.334 or more" in message
    assert "--steps: found '0', expected a whole number, 1 or more" in refusal(capsys, *words, "--steps=0")
    assert "repeats: found 2, expected 1, or 2 and more with a mask" in refusal(capsys, *words, "--repeats=2")
    assert "operator: mask needs --mask FILE" in refusal(capsys, *words, "--operator=mask")
    message = refusal(capsys, *words, "--operator=blur:2", "--mask", mask)
    assert "mask: operator blur takes none" in message
    for option in (["--mask", mask], ["--strength=0.5"], ["--noise", "a.safetensors"], ["--operator=blur:1"]):
        message = refusal(capsys, *words, "--invert", tmp_path / "n.safetensors", *option)
        assert "invert: the noise is found for the whole picture; leave out --" in message
    assert "invert: found n.pt, expected a file name that ends in .safetensors" in refusal(
        capsys, *words, "--invert=n.pt"
    )
    same = tmp_path / "n.safetensors"
    message = refusal(capsys, *words, "--invert", same, "--latents_out", tmp_path / "x" / ".." / "n.safetensors")
    assert f"invert, latents_out: found {same} for both, expected two files" in message
    for sampler in ("ddpm", "dpmpp_2m_sde", "analytic_dpm"):
        message = refusal(capsys, *words, "--invert", same, f"--sampler={sampler}")
        assert f"invert: found sampler {sampler}, which adds noise in each step" in message
        assert "expected a deterministic one: ddim, dpmpp_2m, euler, heun" in message
    message = refusal(capsys, *words, "--variances", tmp_path / "variances.json")
    assert "variances.json with sampler ddim, expected --sampler analytic_dpm" in message
    assert not (tmp_path / "a.png").exists()
    assert not same.exists()


def test_inversion_of_an_inpainting_network_is_refused_by_its_channels(pipeline, picture, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(pipeline.unet.config, in_channels=9))
    save_pipeline(tmp_path / "nine", dataclasses.replace(pipeline, unet=unet))
    words = ["--checkpoint", tmp_path / "nine", *FAST, "--out", tmp_path / "a.png", "--init_image", picture]
    message = refusal(capsys, *words, "--invert", tmp_path / "n.safetensors")
    assert "invert: found an inpainting network (in_channels 9), which takes a mask" in message
    assert "expected a checkpoint with in_channels 4" in message
    assert "give both" not in message


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("super_resolution", "found 'super_resolution', expected one of super_resolution:FACTOR, blur:SIGMA, mask"),
        ("super_resolution:1", "super_resolution: found factor 1, expected 2 or more"),
        ("super_resolution:2.5", "found 'super_resolution:2.5', expected one of"),
        ("blur:0", "blur: found sigma 0.0, expected a number of pixels above 0"),
        ("blur:inf", "blur: found sigma inf"),
        ("blur:wide", "found 'blur:wide'"),
        ("mask:3", "found 'mask:3', expected one of"),
        ("sharpen:2", "found 'sharpen:2', expected one of"),
    ],
)
def test_operators_that_cannot_be_are_refused_by_the_option(
    folder, picture, tmp_path, capsys, operator, message
) -> None:
    words = ["--checkpoint", folder, *FAST, "--out", tmp_path / "a.png", "--init_image", picture]
    assert f"argument --operator: {message}" in refusal(capsys, *words, f"--operator={operator}").replace(
        "found 'blur:0': ", ""
    ).replace("found 'blur:inf': ", "").replace("found 'super_resolution:1': ", "")


def test_files_and_sizes_that_do_not_fit_are_refused_with_what_was_found_and_expected(
    folder, picture, mask, tmp_path, capsys
) -> None:
    words = ["--checkpoint", folder, *FAST, "--out", tmp_path / "a.png"]
    assert "init_image: there is no file no.png" in refusal(capsys, *words, "--init_image=no.png")
    (tmp_path / "text.png").write_text("no picture")
    message = refusal(capsys, *words, "--init_image", tmp_path / "text.png")
    assert f"init_image: {tmp_path / 'text.png'}: the picture does not decode: not a PNG, JPEG or WebP" in message
    words += ["--init_image", picture]
    assert "mask: there is no file no.png" in refusal(capsys, *words, "--mask=no.png")
    write(tmp_path / "other.png", np.full((16, 12), 255, np.uint8))
    message = refusal(capsys, *words, "--mask", tmp_path / "other.png")
    assert "mask: found 16 x 12 pixels (height x width), expected the picture's 16 x 16" in message
    write(tmp_path / "black.png", np.full((16, 16), 127, np.uint8))
    assert "mask: found no white pixel" in refusal(capsys, *words, "--mask", tmp_path / "black.png")
    message = refusal(capsys, *words, "--operator=super_resolution:4")
    assert (
        "init_image: found 16 x 16 pixels (height x width), expected 4 x 4, what operator super_resolution measures of "
        "a picture of 16 x 16; --height and --width say the size to draw"
    ) in message
    message = refusal(capsys, *words, "--operator=super_resolution:3")
    assert "operator: super_resolution:3 does not divide pictures of 16x16 pixels" in message
    assert "expected 20 x 16, what operator blur measures" in refusal(
        capsys, *words, "--operator=blur:1", "--height=20"
    )
    big, dot = np.zeros((160, 160, 3), np.uint8), np.zeros((160, 160), np.uint8)
    dot[5, 5] = 255
    message = refusal(capsys, *words[:-1], write(tmp_path / "big.png", big), "--mask", write(tmp_path / "dot.png", dot))
    assert "mask: resized and cropped to 16 x 16 with its picture, nothing of it is white" in message
    assert "height: found 15 pixels, expected a multiple" in refusal(capsys, *words, "--height=15")
    assert not (tmp_path / "a.png").exists()


def test_a_given_picture_of_another_size_than_is_drawn_is_refused_by_the_walk(pipeline) -> None:
    with pytest.raises(
        ValueError, match=r"init_image: found 8 x 16 pixels .* expected 16 x 16, the size that is drawn"
    ):
        generate(pipeline, ["a"], given=GivenPicture(random_picture(8, 16)), **SETTINGS)
    with pytest.raises(ValueError, match="mask: operator super_resolution takes none"):
        GivenPicture(random_picture(4, 4), 1.0, np.ones((4, 4), bool), Operator("super_resolution", 4))
