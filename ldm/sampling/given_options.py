"""Options of drawing from a given picture, and the files that they name.

Enters: words of a command line, picture files. Leaves: a GivenPicture as large as its file, or an error that names the
option; and what the files of pictures say of it: settings and hashes, no path.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.pictures import open_picture
from ldm.diffusion.linear_operators import AveragePooling, GaussianBlur
from ldm.models.durable import file_hash
from ldm.sampling.given_pictures import GivenPicture, Operator, is_white
from ldm.sampling.options import finite, whole

STRENGTH = 0.8
"""Of image-to-image where none is told, as diffusers has it; with a mask or an operator it is 1."""
OPERATORS = "super_resolution:FACTOR, blur:SIGMA, mask"


def add_given_options(parser: argparse.ArgumentParser) -> None:
    """Options of drawing from a given picture."""
    group = parser.add_argument_group("drawing from a given picture")
    group.add_argument(
        "--init_image",
        type=Path,
        metavar="FILE",
        help="picture (PNG, JPEG, WebP) to start from, resized and cropped as training pictures are; with --operator, "
        "its measurement, of exactly the operator's size",
    )
    group.add_argument(
        "--strength",
        type=finite,
        metavar="F",
        help=f"above 0, to 1: how much of the picture becomes noise first, and is drawn anew in the last F * steps "
        f"({STRENGTH}; with --mask or --operator 1)",
    )
    group.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="picture of the size of --init_image: white (half grey or lighter) is drawn anew, the rest is kept",
    )
    group.add_argument(
        "--repeats",
        type=whole(1),
        default=1,
        metavar="N",
        help="with --mask, take each step N times with fresh noise between, so that the new fits the kept better (1)",
    )
    group.add_argument(
        "--operator",
        type=operator_of,
        metavar="NAME",
        help=f"of which --init_image is the measurement: {OPERATORS}; the picture drawn satisfies it",
    )
    group.add_argument(
        "--invert",
        type=Path,
        metavar="FILE",
        help="safetensors file for the noise that leads to --init_image by DDIM with these prompts, steps and guidance "
        "(1 returns best), for --noise; the pictures are drawn from it",
    )


def operator_of(text: str) -> Operator:
    """Parser of an operator: `super_resolution:4`, `blur:1.5` or `mask`."""
    name, _, value = text.partition(":")
    try:
        if name == "mask" and not value:
            return Operator(name)
        if name == "super_resolution" and re.fullmatch(r"\d+", value):
            AveragePooling(int(value))
            return Operator(name, int(value))
        if name == "blur" and value:
            GaussianBlur(1, 1, float(value))
            return Operator(name, float(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}: {error}") from error
    raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {OPERATORS}")


def read_given(options: argparse.Namespace) -> GivenPicture | None:
    """The picture that options and files give, as large as its file is; None where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option without the picture that it is for, a file that is no picture, or as GivenPicture.
    """
    if options.init_image is None:
        for name in ("strength", "mask", "operator", "invert"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: needs a picture: --init_image FILE")
        if options.repeats != 1:
            raise ValueError("repeats: needs a picture and a mask: --init_image FILE --mask FILE")
        return None
    if options.invert is not None:
        for name in ("strength", "mask", "operator", "noise"):
            if getattr(options, name) is not None:
                raise ValueError(f"invert: the noise is found for the whole picture; leave out --{name}")
    strength = options.strength
    if strength is None:
        strength = STRENGTH if options.mask is None and options.operator is None else 1.0
    picture = _read("init_image", options.init_image)
    mask = None if options.mask is None else is_white(_read("mask", options.mask).convert("L"))
    return GivenPicture(np.array(picture), strength, mask, options.operator, options.repeats)


def given_texts(options: argparse.Namespace, given: GivenPicture | None) -> dict[str, str]:
    """What the file of a picture says of the given ones: hashes of their files, and settings."""
    if given is None:
        return {}
    texts = {"init_image": f"xxh3_64 {file_hash(options.init_image)}"}
    if options.invert is not None:
        return {**texts, "inverted": "ddim_inversion"}
    texts["strength"] = str(given.strength)
    if options.mask is not None:
        texts |= {"mask": f"xxh3_64 {file_hash(options.mask)}", "repeats": str(given.repeats)}
    if given.operator is not None:
        value = f":{str(given.operator.value).removesuffix('.0')}" if given.operator.value else ""
        texts["operator"] = f"{given.operator.name}{value}"
    return texts


def _read(option: str, file: Path) -> Image.Image:
    """The picture in a file: RGB, upright, on white, as training pictures are read."""
    if not file.is_file():
        raise FileNotFoundError(f"{option}: there is no file {file}")
    try:
        return open_picture(file.read_bytes())[0]
    except ValueError as error:
        raise ValueError(f"{option}: {file}: {error}") from error
