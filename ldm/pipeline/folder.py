"""The folder of a pipeline on disk, in the layout of diffusers: which files it has, and what its own JSON files say.

Enters: a folder, or the schedule and parameterization to be written. Leaves: the same back, checked, or an error that
names file and field. Weights and configs of the parts are written by the parts themselves.
"""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from ldm.models.pretrained import INDEX_NAME, read_json
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_loading import FOLDERS

# Number of text encoders of each class of pipeline that is opened here: with and without inpainting.
PIPELINE_CLASSES = {
    "StableDiffusionPipeline": 1,
    "StableDiffusionInpaintPipeline": 1,
    "StableDiffusionXLPipeline": 2,
    "StableDiffusionXLInpaintPipeline": 2,
}
SCHEDULER = "scheduler/scheduler_config.json"

CARD = "README.md"
LAYOUT = "0.24.0"
"""Release of diffusers whose layout is written: its inpainting pipelines do not open a folder that names none."""

# Files of a pipeline folder; any one of the names in a row will do. The first is the one that is written here.
FILES: tuple[tuple[str, ...], ...] = (
    (INDEX_NAME,),
    ("unet/config.json",),
    ("unet/diffusion_pytorch_model.safetensors", "unet/*.safetensors"),
    ("vae/config.json",),
    ("vae/diffusion_pytorch_model.safetensors", "vae/*.safetensors"),
    ("text_encoder/config.json",),
    ("text_encoder/model.safetensors", "text_encoder/*.safetensors"),
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.*", "tokenizer/spiece.model"),
    (SCHEDULER,),
)
FILES_OF_PAIR: tuple[tuple[str, ...], ...] = tuple(
    tuple(f"{name.split('/')[0]}_2/{name.split('/')[1]}" for name in names)
    for names in FILES
    if names[0].startswith(("text_encoder/", "tokenizer/"))
)
"""Files that a pipeline with two text encoders has besides."""
FROZEN = ("vae", *(name for pair in FOLDERS for name in pair))
"""Folders that do not change in training; those of a second text encoder are there in pipelines that have one."""


def check_files(folder: Path) -> None:
    """Raises FileNotFoundError that names every file which the folder lacks, and ValueError as `read_index`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; expected a pipeline folder with {INDEX_NAME}")
    files = FILES
    if (folder / INDEX_NAME).is_file() and count_text_encoders(folder) == 2:
        files += FILES_OF_PAIR
    missing = [names[0] for names in files if not any(any(folder.glob(name)) for name in names)]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a whole pipeline folder{_pickles_instead(folder, missing)}; it lacks:\n  "
            + "\n  ".join(missing)
        )


def _pickles_instead(folder: Path, missing: list[str]) -> str:
    weights = [name for name in missing if name.endswith(".safetensors")]
    found = [(pickle, name) for name in weights for pickle in sorted((folder / name).parent.glob("*.bin"))]
    if not found:
        return ""
    pickle, name = found[0]
    return (
        f" (pickles are not read: {', '.join(str(path.relative_to(folder)) for path, _ in found)}; "
        f"`python tools/convert_checkpoint.py {shlex.quote(str(pickle))} {shlex.quote(str(folder / name))}` makes "
        "safetensors of one)"
    )


def write_index(folder: Path, text_encoder: TextConditioner, *, scheduler: str, inpainting: bool) -> None:
    """Writes model_index.json: which class of diffusers opens the folder, and which class of which library each part.

    Two text encoders make a StableDiffusionXLPipeline, whose empty negative prompt is zeros where that is what the
    network was trained with; one makes a StableDiffusionPipeline. `scheduler` is a class of diffusers.
    """
    pair = len(text_encoder.encoders) == 2
    kind = f"StableDiffusion{'XL' if pair else ''}{'Inpaint' if inpainting else ''}Pipeline"
    values: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": LAYOUT,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if pair:
        values["force_zeros_for_empty_prompt"] = text_encoder.empty_caption == "zeros"
    else:
        values |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    values["scheduler"] = ["diffusers", scheduler]
    for encoder, (model, tokenizer) in zip(text_encoder.encoders, FOLDERS, strict=False):
        values[model] = ["transformers", type(encoder.model).__name__]
        values[tokenizer] = ["transformers", type(encoder.tokenizer).__name__]
    values |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write_json(folder / INDEX_NAME, values)


def read_index(folder: Path) -> dict[str, Any]:
    """Values of model_index.json.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is not that of a pipeline that is opened here.
    """
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: expected {INDEX_NAME} in it, beside the folders of its parts"
        )
    values = read_json(folder / INDEX_NAME)
    kind = values.get("_class_name")
    if kind not in PIPELINE_CLASSES:
        raise ValueError(
            f"{folder / INDEX_NAME}: _class_name is {kind!r}, expected one of {', '.join(map(repr, PIPELINE_CLASSES))}"
        )
    return values


def count_text_encoders(folder: Path) -> int:
    """Text encoders that the pipeline of model_index.json has: 1 or 2; raises as `read_index`."""
    return PIPELINE_CLASSES[read_index(folder)["_class_name"]]


def link_folder(source: Path, target: Path) -> None:
    """Makes `target` a folder with the files of `source`: hard links, or copies where links cannot be made."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another file system, or one without links; a storage that is full fails again in the copy
            shutil.copyfile(path, copy)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an indented JSON file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
