"""Draws pictures of prompts: `python ldm/sample.py --checkpoint runs/X --prompt "a red heart" --out heart.png`.

Enters: a checkpoint (a run's folder, its checkpoints/, or any pipeline folder of diffusers) and prompts. Leaves: PNG
files that carry their prompt and settings, or one labelled grid. Walk: open_checkpoint -> generate -> write_pictures.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.diffusion.samplers import SAMPLERS, Progress
from ldm.diffusion.spacing import SPACINGS
from ldm.grid import labelled_grid, save_png
from ldm.models.text_encoder import DTYPES
from ldm.pipeline import Pipeline, generate, load_pipeline
from ldm.training.checkpoint import HASHES, STATE, CheckpointError, find_checkpoint, verify_checkpoint


@dataclass(frozen=True)
class Picture:
    """What one picture is a function of, besides the settings that all pictures of a call share."""

    prompt: str
    index: int


def open_checkpoint(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Pipeline, str]:
    """The pipeline that `path` means, and its name: `run/step-00001000`, or the folder's own name.

    Args:
        path: a pipeline folder, a run's folder, or a run's `checkpoints/` (the latest one then).

    Raises:
        CheckpointError: nothing there, or a run's checkpoint that is incomplete or altered; names the file.
        FileNotFoundError, ValueError: as `load_pipeline`.
    """
    folder = find_checkpoint(path).resolve()  # `latest` becomes the step that it points to
    if (folder / HASHES).is_file() or (folder / STATE).is_dir():
        verify_checkpoint(folder)
    name = f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    return load_pipeline(folder, device, dtype, channels_last=device.type == "cuda"), name


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch builds without CUDA raise the latter
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


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


def list_pictures(prompts: Sequence[str], images_per_prompt: int, first_index: int = 0) -> list[Picture]:
    """The pictures of a call in order, prompt by prompt; their indices count on from `first_index`."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [Picture(prompt, first_index + i) for i, prompt in enumerate(repeated)]


def check_out(out: Path, count: int, grid: bool) -> None:
    """Raises ValueError where `out` cannot hold `count` pictures: before, not after they are drawn."""
    if out.suffix.lower() == ".png":
        if count > 1 and not grid:
            raise ValueError(f"out: {out} is one picture, but {count} are asked for; give a folder, or --grid")
        if out.is_dir():
            raise ValueError(f"out: {out} is a folder, expected a file name")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder, or a name that ends in .png")


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
            save_png(image, path, {"prompt": picture.prompt, "index": str(picture.index), **texts})
            written.append(path)
    elif not grid:
        save_png(images[0], out, {"prompt": pictures[0].prompt, "index": str(pictures[0].index), **texts})
        written.append(out)
    if grid:
        path = out if out.suffix.lower() == ".png" else out / "grid.png"
        labels = [picture.prompt for picture in pictures]
        indices = json.dumps([picture.index for picture in pictures])
        save_png(labelled_grid(images, labels), path, {"prompt": json.dumps(labels), "index": indices, **texts})
        written.append(path)
    return written


def settings_texts(options: argparse.Namespace, checkpoint: str) -> dict[str, str]:
    """What goes into each PNG beside prompt and index: all that the picture depends on, and no path of this machine."""
    names = ("negative", "seed", "sampler", "steps", "spacing", "guidance", "guidance_rescale", "dtype")
    return {name: str(getattr(options, name)) for name in names} | {"checkpoint": checkpoint}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        pictures = list_pictures(
            read_prompts(options.prompt, options.prompts), options.images_per_prompt, options.index
        )
        check_out(options.out, len(pictures), options.grid)
        device = choose_device(options.device)
        pipeline, name = open_checkpoint(options.checkpoint, device, DTYPES[options.dtype])
        with progress_bar("sampling") as report:
            images = generate(
                pipeline,
                [picture.prompt for picture in pictures],
                indices=[picture.index for picture in pictures],
                seed=options.seed,
                sampler=options.sampler,
                steps=options.steps,
                spacing=options.spacing,
                guidance=options.guidance,
                guidance_rescale=options.guidance_rescale,
                negative=options.negative,
                batch_size=options.batch_size,
                progress=report,
            )
        texts = settings_texts(options, name)
        written = write_pictures(images, pictures, options.out, grid=options.grid, texts=texts)
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        parser.error(str(error))
    print(f"{len(pictures)} pictures of {name} in {written[0] if len(written) == 1 else options.out}")
    return 0


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar that follows `generate`: it is told the steps done and the steps of all batches."""
    with tqdm(desc=what, unit="step", dynamic_ncols=True) as bar:

        def report(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield report


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line; evaluation shares those of sampling."""
    parser = argparse.ArgumentParser(prog="ldm/sample.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with a prompt a line")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="NAME.png, or a folder for many pictures"
    )
    parser.add_argument("--grid", action="store_true", help="draw a labelled grid: as NAME.png, or beside the pictures")
    parser.add_argument(
        "--negative", default="", metavar="TEXT", help="what guidance leads away from (default: nothing)"
    )
    parser.add_argument(
        "--images_per_prompt", type=whole(1), default=1, metavar="N", help="pictures of each prompt (1)"
    )
    parser.add_argument("--index", type=whole(0), default=0, metavar="N", help="index of the first picture (0)")
    add_sampling_options(parser)
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which checkpoint samples, how, and on what device."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder, its checkpoints/, or a pipeline folder",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of all noise (0)")
    parser.add_argument("--sampler", choices=[*SAMPLERS], default="dpmpp_2m", help="default: dpmpp_2m")
    parser.add_argument("--steps", type=whole(1), default=25, metavar="N", help="sampling steps (25)")
    parser.add_argument("--spacing", choices=[*SPACINGS], default="trailing", help="of the noise levels: trailing")
    parser.add_argument("--guidance", type=finite, default=5.0, metavar="F", help="guidance scale; 1 is without (5.0)")
    parser.add_argument(
        "--guidance_rescale", type=finite, default=0.0, metavar="F", help="0 to 1, against overexposure (0.0)"
    )
    parser.add_argument("--batch_size", type=whole(1), default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="precision of the network (float32)")


def whole(least: int) -> Callable[[str], int]:
    """Parser of a whole number, `least` or more."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, {least} or more")
        return int(text)

    return parse


def finite(text: str) -> float:
    """Parser of a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a finite number")
    return value


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


if __name__ == "__main__":
    sys.exit(main())
