"""The folder of a pipeline on disk, in the layout of diffusers: which files it has, and what its own JSON files say.

Enters: a folder, or the schedule and parameterization to be written. Leaves: the same back, checked, or an error that
names file and field. Weights and configs of the parts are written by the parts themselves.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ldm.diffusion.objective import TargetName
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.text_conditioner import TextConditioner

PIPELINE_CLASS = "StableDiffusionPipeline"
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
PREDICTION_TYPES: dict[TargetName, str] = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}

# Files of a pipeline folder; any one of the names in a row will do. The first is the one that is written here.
FILES = (
    (INDEX,),
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
FROZEN = ("vae", "text_encoder", "tokenizer")
"""Folders that do not change in training."""


def check_files(folder: Path) -> None:
    """Raises FileNotFoundError that names every file which the pipeline folder lacks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; expected a pipeline folder with model_index.json")
    missing = [names[0] for names in FILES if not any(any(folder.glob(name)) for name in names)]
    if missing:
        raise FileNotFoundError(f"{folder} is not a whole pipeline folder; it lacks:\n  " + "\n  ".join(missing))


def write_scheduler(folder: Path, schedule: Schedule, parameterization: TargetName) -> None:
    """Writes scheduler_config.json: diffusers' DDIMScheduler at the levels of `sigmas(..., "trailing")`, down to 0."""
    values = {
        "_class_name": "DDIMScheduler",
        **dataclasses.asdict(schedule.config),
        "prediction_type": PREDICTION_TYPES[parameterization],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        # Trailing spacing does not use it; StableDiffusionPipeline warns of any other value.
        "steps_offset": 1,
    }
    _write_json(folder / SCHEDULER, values)


def read_scheduler(folder: Path) -> tuple[Schedule, TargetName]:
    """Schedule and parameterization of the folder's scheduler_config.json, whatever sampler it names.

    Raises:
        ValueError: a field is missing or has a value that is not supported; names it.
    """
    path = folder / SCHEDULER
    values = _read_json(path)
    needed = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}: not the scheduler of a discrete diffusion model")
    if values.get("trained_betas") is not None:
        raise ValueError(f"{path}: found trained_betas, expected none: betas by formula only")
    # Files from before the field was there are of epsilon models.
    prediction = values.get("prediction_type", "epsilon")
    names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if prediction not in names:
        raise ValueError(f"{path}: prediction_type is {prediction!r}, expected one of {', '.join(names)}")
    try:
        config = ScheduleConfig(
            **{name: values[name] for name in needed},
            rescale_betas_zero_snr=values.get("rescale_betas_zero_snr", False),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Schedule(config), names[prediction]


def write_index(folder: Path, text_encoder: TextConditioner) -> None:
    """Writes model_index.json: which class of which library opens each folder."""
    values = {
        "_class_name": PIPELINE_CLASS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", type(text_encoder.encoders[0].model).__name__],
        "tokenizer": ["transformers", type(text_encoder.encoders[0].tokenizer).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / INDEX, values)


def check_index(folder: Path) -> None:
    """Raises ValueError unless model_index.json is that of a StableDiffusionPipeline."""
    kind = _read_json(folder / INDEX).get("_class_name")
    if kind != PIPELINE_CLASS:
        raise ValueError(f"{folder / INDEX}: _class_name is {kind!r}, expected {PIPELINE_CLASS!r}")


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a JSON {type(values).__name__}, expected an object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
