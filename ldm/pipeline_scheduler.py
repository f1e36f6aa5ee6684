"""The scheduler of a pipeline's folder: what the network was trained with, in the files of diffusers' schedulers.

Enters: schedule and parameterization. Leaves: scheduler_config.json, with which diffusers draws the same pictures, and
the same back out of it, or an error that names file and field.
"""

import dataclasses
from pathlib import Path

from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.pretrained import read_json
from ldm.pipeline_folder import SCHEDULER, write_json

PREDICTION_TYPES: dict[TargetName, str] = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


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
    write_json(folder / SCHEDULER, values)


def read_scheduler(path: Path) -> tuple[Schedule, TargetName]:
    """Schedule and parameterization of a scheduler's file, scheduler_config.json, whatever sampler it names.

    Settings of that sampler are not read: sampler, steps and spacing are the caller's. With timestep_spacing leading
    and steps_offset 1, as Stable Diffusion is shipped, DDIM's and Euler's levels are those of the spacing `leading_1`,
    DPMSolverMultistep's those of `leading_1_multistep`. What no spacing expresses: set_alpha_to_one false (DDIM then
    stops at the noise of the first timestep, here at none), and DDIM with linspace, which steps to t - T // S.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is missing or has a value that is not supported; names it.
    """
    values = read_json(path)
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
