"""Draws pictures of prompts: `python ldm/sample.py --checkpoint runs/X --prompt "a red heart" --out heart.png`.

Enters: a checkpoint (a run's folder, its checkpoints/, or any pipeline folder of diffusers), prompts, perhaps noise or
a picture to start from.
Leaves: PNG files with their prompt and settings inside, or one labelled grid; latents, where they are asked for.
Walk: open_checkpoint -> generate -> write_pictures.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.pictures import normalize
from ldm.diffusion.reverse_variances import PosteriorVariances
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.separate_steps import ToleranceError
from ldm.diffusion.variance import VARIANCES
from ldm.grid import labelled_grid, save_png
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.durable import file_hash
from ldm.models.parity_gate import ParityError
from ldm.models.pretrained import weights_hash
from ldm.models.text_encoder import DTYPES
from ldm.models.unet_config import UNetConfig
from ldm.sampling.compiling import compile_pipeline
from ldm.sampling.generation import checked_shape, generate
from ldm.sampling.given_options import add_given_options, given_texts, read_given
from ldm.sampling.inversion import check_inverts, invert
from ldm.sampling.latent_files import LATENTS, NOISE, check_tensor_out, read_noise, write_tensor
from ldm.sampling.options import (
    add_sampling_options,
    check_folder,
    choose_device,
    open_checkpoint,
    progress_bar,
    whole,
    with_variances,
)
from ldm.training.autoencoder_loss import psnr
from ldm.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Picture:
    """What one picture is a function of, besides the settings that all pictures of a call share."""

    prompt: str
    index: int
    noise_row: int | None = None
    """Row of the file of noise that it starts from; None where its noise is drawn from seed and index."""

    def texts(self) -> dict[str, str]:
        """What its file says of it alone."""
        row = {} if self.noise_row is None else {"noise_row": str(self.noise_row)}
        return {"prompt": self.prompt, "index": str(self.index), **row}


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file, one a line; blank lines are none.

    Raises:
        ValueError: there is no prompt at all, or the file is not UTF-8 text.
    """
    found = list(prompts)
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {file} is not UTF-8 text: {error}") from error
    if not found:
        raise ValueError("prompt: found none, expected --prompt TEXT or --prompts FILE with a prompt a line")
    return found


def list_pictures(
    prompts: Sequence[str], images_per_prompt: int, first_index: int = 0, *, given_noise: bool = False
) -> list[Picture]:
    """The pictures of a call in order, prompt by prompt; their indices count on from `first_index`, rows from 0."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [Picture(prompt, first_index + i, i if given_noise else None) for i, prompt in enumerate(repeated)]


def check_out(out: Path, count: int, grid: bool) -> None:
    """Raises ValueError where `out` cannot hold `count` pictures: before, not after they are drawn."""
    if out.suffix.lower() == ".png":
        if count > 1 and not grid:
            raise ValueError(f"out: {out} is one picture, but {count} are asked for; give a folder, or --grid")
        if out.is_dir():
            raise ValueError(f"out: {out} is a folder, expected a file name")
        check_folder("out", out.parent)
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder, or a name that ends in .png")
    else:
        check_folder("out", out)


def write_pictures(
    images: np.ndarray, pictures: Sequence[Picture], out: Path, *, grid: bool, texts: dict[str, str]
) -> list[Path]:
    """Writes (N, H, W, 3) uint8 with their texts and returns the files.

    A name that ends in .png takes the one picture, or the grid of all; any other is a folder, which takes every picture
    as INDEX-PROMPT.png and the grid beside them.
    """
    written = []
    if out.suffix.lower() != ".png":
        for image, picture in zip(images, pictures, strict=True):
            path = out / f"{picture.index:05d}-{_slug(picture.prompt)}.png"
            save_png(image, path, {**picture.texts(), **texts})
            written.append(path)
    elif not grid:
        save_png(images[0], out, {**pictures[0].texts(), **texts})
        written.append(out)
    if grid:
        path = out if out.suffix.lower() == ".png" else out / "grid.png"
        labels = [picture.prompt for picture in pictures]
        save_png(labelled_grid(images, labels), path, {**texts_of_all(pictures), **texts})
        written.append(path)
    return written


def texts_of_all(pictures: Sequence[Picture]) -> dict[str, str]:
    """What a file of many pictures says of each: prompts and indices in order, as JSON; rows of noise are in order."""
    prompts, indices = [picture.prompt for picture in pictures], [picture.index for picture in pictures]
    return {"prompt": json.dumps(prompts), "index": json.dumps(indices)}


def settings_texts(
    options: argparse.Namespace, checkpoint: str, variances: PosteriorVariances | None
) -> dict[str, str]:
    """What goes into each file beside prompt and index: all that the picture depends on, and no path of this machine.

    A picture's height and width are its own; of a file of noise its hash is told, and of variances, from wherever they
    were taken, that of their numbers.
    """
    names = ("negative", "seed", "sampler", "steps", "spacing", "guidance", "guidance_rescale", "dtype")
    noise = {} if options.noise is None else {"noise": f"xxh3_64 {file_hash(options.noise)}"}
    variance = {} if options.variance is None else {"variance": options.variance}
    if options.sampler == "analytic_dpm" and variances is not None:
        numbers = weights_hash([("levels", variances.levels), ("variances", variances.variances)])
        variance["variances"] = f"xxh3_128 {numbers}"
    return {name: str(getattr(options, name)) for name in names} | variance | noise | {"checkpoint": checkpoint}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        pictures = list_pictures(
            read_prompts(options.prompt, options.prompts),
            options.images_per_prompt,
            options.index,
            given_noise=options.noise is not None,
        )
        check_out(options.out, len(pictures), options.grid)
        for option in ("latents_out", "invert"):
            if getattr(options, option) is not None:
                check_tensor_out(option, getattr(options, option))
                check_folder(option, getattr(options, option).parent)
        tensors = [file.resolve() for file in (options.invert, options.latents_out) if file is not None]
        if len({*tensors}) < len(tensors):
            raise ValueError(f"invert, latents_out: found {options.invert} for both, expected two files")
        given, prompts = read_given(options), [picture.prompt for picture in pictures]
        noise = None if options.noise is None else read_noise(options.noise, len(pictures))
        device = choose_device(options.device)
        shape = (0, 0, 0)

        def check(unet: UNetConfig, autoencoder: AutoencoderKL) -> None:
            nonlocal given, shape
            if options.invert is not None:
                check_inverts(options.sampler, unet, autoencoder.config)
            masked, size = given is not None and given.inpaints, (options.height, options.width)
            shape = checked_shape(unet, autoencoder, len(pictures), *size, noise, masked=masked)
            if given is not None:
                given = given.fitted(*(side * autoencoder.downsample_factor for side in shape[1:]))

        pipeline, name = open_checkpoint(options.checkpoint, device, DTYPES[options.dtype], check)
        options.sampler = chosen_sampler(options.sampler, pipeline.corruption)
        pipeline = with_variances(pipeline, options.variances, options.sampler)
        if options.compile:  # after all that may be refused
            batch = min(options.batch_size, len(pictures))
            deviation = compile_pipeline(pipeline, shape, batch, options.guidance)
            print(f"compiled; an evaluation deviates by {deviation:.1g} from the uncompiled network's")
        settings = {
            name: getattr(options, name)
            for name in ("steps", "spacing", "guidance", "guidance_rescale", "negative", "batch_size")
        }
        if options.invert is not None:
            assert given is not None
            with progress_bar("inverting") as report:
                noise = invert(pipeline, prompts, given, shape, progress=report, **settings)
        latents: list[Tensor] = []
        with progress_bar("sampling") as report:
            images = generate(
                pipeline,
                prompts,
                indices=[picture.index for picture in pictures],
                seed=options.seed,
                sampler=options.sampler,
                variance=options.variance,
                height=options.height,
                width=options.width,
                noise=noise,
                given=given if options.invert is None else None,
                keep=latents.append,
                progress=report,
                **settings,
            )
        texts = {**settings_texts(options, name, pipeline.variances), **given_texts(options, given)}
        written = write_pictures(images, pictures, options.out, grid=options.grid, texts=texts)
        if options.latents_out is not None:
            write_tensor(LATENTS, torch.cat(latents), options.latents_out, {**texts_of_all(pictures), **texts})
        if options.invert is not None:
            assert noise is not None
            write_tensor(NOISE, noise, options.invert, {**texts_of_all(pictures), **texts})
    except (OSError, ValueError, ToleranceError, CheckpointError, ParityError) as error:
        parser.error(str(error))
    print(f"{len(pictures)} pictures of {name} in {written[0] if len(written) == 1 else options.out}")
    if options.invert is not None and given is not None:
        decibels = psnr(normalize(given.pixels[None]), normalize(images))
        print(f"drawn again from {options.invert}: PSNR {decibels.min():.1f} dB or more")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="ldm/sample.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with a prompt a line")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="NAME.png, or a folder for many pictures"
    )
    parser.add_argument("--grid", action="store_true", help="draw a labelled grid: as NAME.png, or beside the pictures")
    parser.add_argument(
        "--negative",
        default="",
        metavar="TEXT",
        help="what guidance leads away from (default, and where it is empty: no caption, as the network was trained "
        "without one; zeros for SDXL)",
    )
    parser.add_argument(
        "--images_per_prompt", type=whole(1), default=1, metavar="N", help="pictures of each prompt (1)"
    )
    parser.add_argument("--index", type=whole(0), default=0, metavar="N", help="index of the first picture (0)")
    parser.add_argument(
        "--variance",
        choices=[*VARIANCES],
        help="of ddpm's steps: small is beta-tilde (default), large beta, learned the network's own (default where it "
        "has one)",
    )
    parser.add_argument(
        "--height", type=whole(1), metavar="N", help="of the pictures in pixels (that of the training, or of the noise)"
    )
    parser.add_argument("--width", type=whole(1), metavar="N", help="as --height")
    parser.add_argument(
        "--noise",
        type=Path,
        metavar="FILE",
        help="safetensors file with the tensor noise (N, C, h, w) of unit variance, a row for each picture, to start "
        "from instead of noise that is drawn",
    )
    parser.add_argument(
        "--latents_out",
        type=Path,
        metavar="FILE",
        help="safetensors file for the final latents (N, C, h, w), scaled as the network knows them",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the network, and compare it with itself: about a minute at first, for many pictures",
    )
    add_sampling_options(parser)
    add_given_options(parser)
    return parser


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


if __name__ == "__main__":
    sys.exit(main())
