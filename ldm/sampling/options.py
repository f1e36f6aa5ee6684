"""Options that every program which samples has, and what they mean: checkpoint, device, numbers, progress.

Enters: words of a command line. Leaves: a Pipeline with its name, a device, checked numbers, a bar; or an error that
names the option.
"""

import argparse
import math
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.diffusion.sampler_choice import SAMPLER_NAMES
from ldm.diffusion.sampler_contract import Progress
from ldm.diffusion.spacing import SPACINGS
from ldm.models.pretrained import resolve_source
from ldm.models.text_encoder import DTYPES
from ldm.pipeline.folder import count_text_encoders
from ldm.pipeline.pipeline import ConfigCheck, Pipeline, load_pipeline
from ldm.pipeline.variances import read_variances
from ldm.training.checkpoint import HASHES, STATE, find_checkpoint, verify_checkpoint


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which checkpoint samples, how, and on what device."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="run folder, its checkpoints/, a pipeline folder of diffusers, or OWNER/NAME on the hub",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of all noise (0)")
    parser.add_argument(
        "--sampler",
        choices=[*SAMPLER_NAMES],
        help="default: dpmpp_2m; with a checkpoint of a corruption one of the last two, by its kind",
    )
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=25,
        metavar="N",
        help="sampling steps (25); with a corruption of T levels each goes down by T / N of them, rounded up",
    )
    parser.add_argument("--spacing", choices=[*SPACINGS], default="trailing", help="of the noise levels (trailing)")
    parser.add_argument("--guidance", type=finite, default=5.0, metavar="F", help="guidance scale; 1 is without (5.0)")
    parser.add_argument(
        "--guidance_rescale", type=finite, default=0.0, metavar="F", help="0 to 1, against overexposure (0.0)"
    )
    parser.add_argument(
        "--variances",
        type=Path,
        metavar="FILE",
        help="of the steps of sampler analytic_dpm, estimated by evaluate.py --scores variances (variances.json of the "
        "checkpoint's folder, where there is one)",
    )
    parser.add_argument("--batch_size", type=whole(1), default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="precision of the network (float32)")


def open_checkpoint(
    source: str | Path, device: torch.device, dtype: torch.dtype, check: ConfigCheck | None = None
) -> tuple[Pipeline, str]:
    """The pipeline that `source` means, and its name: `run/step-00001000`, or the folder's own name.

    Args:
        source: a pipeline folder, a run's folder, or a run's `checkpoints/` (the latest one then); `package:NAME/
            folder`; or `owner/name` on the hub, with folders behind it or not, where there is no folder `owner` here.
        check: as `load_pipeline` takes it.

    Raises:
        CheckpointError: a folder with nothing in it, or a run's checkpoint that is incomplete or altered; names the
            file.
        FileNotFoundError, ValueError: no such folder, a single file, or as `resolve_source` and `load_pipeline`.
    """
    name = str(source)
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(
            f"checkpoint: {path} is a single file, which has no tokenizer, expected a folder; make a pipeline's folder "
            f"of it: `python tools/convert_checkpoint.py {shlex.quote(str(path))} FOLDER --tokenizer TOKENIZER_FOLDER`"
        )
    elsewhere = not path.exists()
    if elsewhere and not name.startswith("package:") and not _may_be_on_hub(name):
        raise FileNotFoundError(
            f"checkpoint: there is no folder {name} (looked at {path.absolute()}), expected a run's folder, its "
            "checkpoints/, a pipeline's folder, or OWNER/NAME on the hub"
        )
    folder = _fetch(name) if elsewhere else find_checkpoint(path).resolve()  # `latest` becomes the step it points to
    if (folder / HASHES).is_file() or (folder / STATE).is_dir():
        verify_checkpoint(folder)
    if not elsewhere:
        name = f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    return load_pipeline(folder, device, dtype, channels_last=True, check=check), name


def with_variances(pipeline: Pipeline, file: Path | None, sampler: str) -> Pipeline:
    """The pipeline with Analytic-DPM's variances of a file, where one is given.

    Raises:
        FileNotFoundError, ValueError: another sampler, which takes none, or as `read_variances`.
    """
    if file is None:
        return pipeline
    if sampler != "analytic_dpm":
        raise ValueError(
            f"variances: found {file} with sampler {sampler}, expected --sampler analytic_dpm: no other takes them"
        )
    return replace(pipeline, variances=read_variances(file, pipeline.unet))


def _may_be_on_hub(name: str) -> bool:
    """Whether it is `owner/name`, or deeper, and no path: of none that begins in a folder here the hub is asked."""
    owner, _, rest = name.partition("/")
    return bool(rest) and not name.startswith((".", "/", "~")) and not Path(owner).is_dir()


def _fetch(name: str) -> Path:
    """Folder of a pipeline on the hub, or in a package; of the hub's files only those of its parts are taken."""
    found = resolve_source(name, "scheduler")
    folder = found.parent if found.name == "scheduler" else found  # itself where it is no pipeline's
    encoders = ("text_encoder", "text_encoder_2")[: count_text_encoders(folder)]
    for part in ("unet", "vae", *encoders):
        resolve_source(name, part)
    return folder


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


def check_folder(option: str, folder: Path) -> None:
    """Raises ValueError where `folder` cannot be made because a file stands in its way: before anything is computed."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option}: {path} is a file, expected a folder")


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar that follows `generate`: it is told the steps done and the steps of all batches."""
    with tqdm(desc=what, unit="step", dynamic_ncols=True) as bar:

        def report(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield report


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


def positive(text: str) -> float:
    """Parser of a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value
