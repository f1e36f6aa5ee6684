"""The scheduler of a pipeline's folder: what the network was trained with, in the files of diffusers' schedulers.

Enters: schedule and parameterization. Leaves: scheduler_config.json, with which diffusers draws the same pictures, and
the same back out of it, or an error that names file and field.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ldm.diffusion.continuous import NETWORK_TIME, ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.corruption_config import CorruptionConfig
from ldm.diffusion.objective_config import SIGMA_DATA, TargetName
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import BETA_SCHEDULES, Schedule, ScheduleConfig
from ldm.diffusion.spacing import KARRAS_RHO
from ldm.models.pretrained import read_json
from ldm.pipeline.corruption import CORRUPTION_CLASS, corruption_in, corruption_values
from ldm.pipeline.folder import SCHEDULER, write_json

logger = logging.getLogger(__name__)

PREDICTION_TYPES: dict[TargetName, str] = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""On schedules of timesteps."""
FLOW_PREDICTION_TYPES: dict[TargetName, str] = {"flow": "flow_prediction", "x0": "sample"}
"""On the straight path of flow matching."""
BY_NAME = ("scaled_linear", "linear", "squaredcos_cap_v2")
"""Beta schedules that every scheduler of diffusers knows; of others the betas themselves are written."""
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers of flow matching alone; others say use_flow_sigmas."""
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


class TrainedWith(NamedTuple):
    """What a network was trained with, as far as a scheduler's file tells."""

    schedule: ForwardProcess
    """The noise levels."""
    parameterization: TargetName
    """What the network puts out."""
    sigma_data: float = SIGMA_DATA
    """Deviation of the data in EDM's preconditioning; other parameterizations do not use it."""
    learned_variance: bool = False
    """Whether the network puts out the variance of a step, too: its place between the two bounds."""
    corruption: CorruptionConfig | None = None
    """What the network undoes in place of noise, whose schedule then has no meaning; None for noise."""


class Trained(Protocol):
    """What has been trained with it: a Pipeline, or TrainedWith itself."""

    @property
    def schedule(self) -> ForwardProcess: ...

    @property
    def parameterization(self) -> TargetName: ...

    @property
    def sigma_data(self) -> float: ...

    @property
    def learned_variance(self) -> bool: ...

    @property
    def corruption(self) -> CorruptionConfig | None: ...


def write_scheduler(folder: Path, pipeline: Trained) -> str:
    """Writes scheduler_config.json and returns the class of diffusers that it names; raises as `scheduler_values`."""
    values = scheduler_values(pipeline)
    write_json(folder / SCHEDULER, values)
    return str(values["_class_name"])


def scheduler_values(of: Trained) -> dict[str, Any]:
    """Settings of the scheduler with which diffusers' pipelines of Stable Diffusion draw as the network was trained.

    With timesteps DDIM, at the levels of `sigmas(..., "trailing")`; with learned variance DDPM, at those of "linspace",
    because diffusers adds noise in the last step unless it is timestep 0's; with flow matching DPM-Solver++(2M), at
    those of "linspace_multistep", where it tells the network 1000 t rounded down; with EDM Euler, at those of "karras".
    All go down to 0.

    Raises:
        ValueError: no scheduler of diffusers expresses it; names the setting of a run.
    """
    if of.corruption is not None:
        return corruption_values(of.corruption)  # of a class that diffusers does not have
    schedule = of.schedule
    if isinstance(schedule, Schedule):
        return _of_timesteps(schedule.config, of.parameterization, of.learned_variance)
    kind = schedule.config.kind if isinstance(schedule, ContinuousSchedule) else None
    if isinstance(schedule, ContinuousSchedule) and kind == "flow":
        return _of_flow(schedule, of.parameterization)
    if isinstance(schedule, ContinuousSchedule) and kind == "edm":
        return _of_edm(schedule, of.parameterization, of.sigma_data)
    raise ValueError(
        f"continuous_noise.kind: found {kind!r}, expected 'flow' or 'edm': no scheduler of diffusers, which a "
        "checkpoint names, has another kind of continuous time. noise.beta_schedule linear, beta_start 0.0001, "
        "beta_end 0.02 is vp in 1000 timesteps, squaredcos_cap_v2 cosine"
    )


def _of_timesteps(config: ScheduleConfig, parameterization: TargetName, learned_variance: bool) -> dict[str, Any]:
    if parameterization not in PREDICTION_TYPES:
        raise ValueError(
            f"objective.parameterization: found {parameterization!r}, expected epsilon, v or x0: no scheduler of "
            "diffusers, which a checkpoint names, has another on timesteps; set continuous_noise.kind "
            f"{parameterization}"
        )
    betas = BETA_SCHEDULES[config.beta_schedule](config).tolist()
    sampler: dict[str, Any]
    if learned_variance:
        sampler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "timestep_spacing": "linspace"}
    else:
        sampler = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    return {
        **sampler,
        **dataclasses.asdict(config),
        **({} if config.beta_schedule in BY_NAME else {"trained_betas": betas}),
        "prediction_type": PREDICTION_TYPES[parameterization],
        "clip_sample": False,
        # Neither spacing uses it; StableDiffusionPipeline warns of any other value.
        "steps_offset": 1,
    }


def _of_flow(schedule: ContinuousSchedule, parameterization: TargetName) -> dict[str, Any]:
    if parameterization not in FLOW_PREDICTION_TYPES:
        raise ValueError(
            f"objective.parameterization: found {parameterization!r} with continuous_noise.kind flow, expected flow or "
            "x0: diffusers' scheduler of flow matching, which a checkpoint names, has no other"
        )
    usual = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    for name in ("sigma_min", "sigma_max"):
        if getattr(schedule, name) != getattr(usual, name):
            raise ValueError(
                f"continuous_noise.{name}: found {getattr(schedule, name):.6g} with kind flow, expected it unset: "
                "diffusers' scheduler of flow matching, which a checkpoint names, has no field for it"
            )
    return {
        # FlowMatchEulerDiscreteScheduler lacks what pipelines of Stable Diffusion call.
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": int(NETWORK_TIME),
        "prediction_type": FLOW_PREDICTION_TYPES[parameterization],
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "steps_offset": 1,  # as above
    }


def _of_edm(schedule: ContinuousSchedule, parameterization: TargetName, sigma_data: float) -> dict[str, Any]:
    if parameterization != "edm":
        raise ValueError(
            f"objective.parameterization: found {parameterization!r} with continuous_noise.kind edm, expected edm"
        )
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "sigma_min": schedule.sigma_min,
        "sigma_max": schedule.sigma_max,
        "sigma_data": sigma_data,
        "sigma_schedule": "karras",
        "rho": KARRAS_RHO,
        "prediction_type": "epsilon",  # diffusers' name of (x0 - c_skip x) / c_out
        "final_sigmas_type": "zero",
    }


def read_scheduler(path: Path) -> TrainedWith:
    """What a scheduler's file, scheduler_config.json, says of the training, whatever sampler it names.

    Settings of that sampler are not read: sampler, steps and spacing are the caller's. With timestep_spacing leading
    and steps_offset 1, as Stable Diffusion is shipped, DDIM's and Euler's levels are those of the spacing `leading_1`,
    DPMSolverMultistep's those of `leading_1_multistep`. What no spacing expresses: set_alpha_to_one false (DDIM then
    stops at the noise of the first timestep, here at none), DDIM with linspace, which steps to t - T // S, and the
    shift of flow matching's levels, which is warned of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is missing or has a value that is not supported; names it.
    """
    values = read_json(path)
    try:
        if values.get("_class_name") == CORRUPTION_CLASS:
            return TrainedWith(Schedule(ScheduleConfig()), "x0", corruption=corruption_in(values))
        if values.get("_class_name") in EDM_CLASSES:
            return _edm_in(values)
        if values.get("_class_name") in FLOW_CLASSES or values.get("use_flow_sigmas"):
            found = _flow_in(values)
            if shifts := _shifts(values):
                logger.warning(
                    "%s: %s: a choice of sampling levels that no spacing here makes; levels are those of the spacing",
                    path,
                    ", ".join(f"{name} {values[name]}" for name in shifts),
                )
            return found
        return _timesteps_in(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _timesteps_in(values: dict[str, Any]) -> TrainedWith:
    needed = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(
            f"lacks {', '.join(missing)}: not the scheduler of a discrete diffusion model; those of continuous time "
            f"that are read say use_flow_sigmas, or are {', '.join([*FLOW_CLASSES, *EDM_CLASSES])}"
        )
    config = ScheduleConfig(
        **{name: values[name] for name in needed},
        rescale_betas_zero_snr=values.get("rescale_betas_zero_snr", False),
    )
    betas = values.get("trained_betas")
    if betas is not None and not _by_formula(betas, config):
        raise ValueError(
            f"found trained_betas that are not those of beta_schedule {config.beta_schedule}, expected none"
        )
    variance = values.get("variance_type")
    if variance == "learned":
        raise ValueError(
            "variance_type is 'learned', expected 'learned_range', or a fixed one: that network puts out the variance "
            "itself, not its place between the two bounds"
        )
    predicted = _predicted(values, PREDICTION_TYPES)
    return TrainedWith(Schedule(config), predicted, learned_variance=variance == "learned_range")


def _by_formula(betas: Any, config: ScheduleConfig) -> bool:
    expected = BETA_SCHEDULES[config.beta_schedule](config).tolist()
    return (
        isinstance(betas, list)
        and len(betas) == len(expected)
        and all(isinstance(a, float) and math.isclose(a, b, rel_tol=1e-6) for a, b in zip(betas, expected, strict=True))
    )


def _predicted(values: dict[str, Any], names: dict[TargetName, str]) -> TargetName:
    # Files from before the field was there are of epsilon models.
    prediction = values.get("prediction_type", "epsilon")
    for ours, theirs in names.items():
        if prediction == theirs:
            return ours
    raise ValueError(f"prediction_type is {prediction!r}, expected one of {', '.join(names.values())}")


def _flow_in(values: dict[str, Any]) -> TrainedWith:
    timesteps = values.get("num_train_timesteps", 1000)
    if timesteps != NETWORK_TIME:
        raise ValueError(
            f"num_train_timesteps is {timesteps!r}, expected {NETWORK_TIME:.0f}: networks of flow matching are told "
            f"{NETWORK_TIME:.0f} t here"
        )
    if values.get("invert_sigmas"):
        raise ValueError("invert_sigmas is true, expected false: time runs from noise to data there")
    of_flow_alone = values.get("_class_name") in FLOW_CLASSES
    predicted = "flow" if of_flow_alone else _predicted(values, FLOW_PREDICTION_TYPES)
    return TrainedWith(ContinuousSchedule(ContinuousScheduleConfig(kind="flow")), predicted)


def _shifts(values: dict[str, Any]) -> list[str]:
    usual = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    return [name for name, off in usual.items() if values.get(name, off) != off]


def _edm_in(values: dict[str, Any]) -> TrainedWith:
    prediction = values.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"prediction_type is {prediction!r}, expected 'epsilon': with the other a network of EDM puts out the "
            "negative, and no parameterization here is that"
        )
    # Fields that the file lacks are what diffusers takes then.
    config = ContinuousScheduleConfig(
        kind="edm", sigma_min=values.get("sigma_min", 0.002), sigma_max=values.get("sigma_max", 80.0)
    )
    return TrainedWith(ContinuousSchedule(config), "edm", float(values.get("sigma_data", 0.5)))
