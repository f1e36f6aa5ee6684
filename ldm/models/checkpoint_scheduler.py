"""The scheduler that goes with a single file: as a released model's, or as FILE.scheduler.json beside it says.

Enters: scheduler_config.json of a pipeline's folder, or what a file tells of its family. Leaves: the settings for the
other layout; those that a single file could not give back lie beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.models.pretrained import read_json

SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")
"""In a pipeline's folder."""
EPSILON = "epsilon"
"""What every scheduler of diffusers takes where its file names no prediction."""
PREDICTIONS = (EPSILON, "v_prediction", "sample", "flow_prediction")

# What training fixed: with another value the same weights give noise. The rest is a matter of sampling. Beside each:
# what every sampler of diffusers takes where its file has no such field; of betas they take different ones.
_ABSENT = {
    "num_train_timesteps": 1000,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "sigma_data": None,
}


def released(pair: bool, prediction: str | None, zero_snr: bool) -> dict[str, Any]:
    """Settings of a released model's scheduler.

    Args:
        pair: SDXL, with two text encoders.
        prediction: what the UNet predicts; None where a single file does not tell.
        zero_snr: betas are rescaled, so that the last level is noise alone.
    """
    return {
        "_class_name": "EulerDiscreteScheduler" if pair else "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def told(names: Mapping[str, Any], family: str | None) -> tuple[str | None, bool]:
    """What a file's UNet predicts (None: it does not tell) and whether the betas are rescaled to no signal at the end.

    v_pred and ztsnr are the marks that fine-tunings of SDXL carry.
    """
    prediction = None if family == "sd2" else "v_prediction" if "v_pred" in names else "epsilon"
    return prediction, "ztsnr" in names


def beside(file: Path) -> Path:
    """Where the scheduler of a single file is written, and looked for."""
    return file.with_suffix(".scheduler.json")


def differ(found: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether weights trained with one scheduler would be used wrongly with the other."""
    learned = [values.get("variance_type") == "learned_range" for values in (found, other)]
    return (
        learned[0] != learned[1]
        or predicted(found) != predicted(other)
        or any(found.get(name, absent) != other.get(name, absent) for name, absent in _ABSENT.items())
    )


def read(path: Path) -> dict[str, Any]:
    """Settings in a scheduler's file.

    Raises:
        ValueError: it is not JSON, or not that of a scheduler of diffusers; names the file.
    """
    values = read_json(path)
    if not isinstance(values.get("_class_name"), str):
        raise ValueError(f"{path}: expected a diffusers scheduler's settings, with its _class_name")
    prediction = values.get("prediction_type", EPSILON)
    if prediction not in PREDICTIONS:
        raise ValueError(f"{path}: prediction_type is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    return values


def predicted(values: Mapping[str, Any]) -> Any:
    """prediction_type of a scheduler's settings, or what stands for it in those of one kind of model alone.

    Schedulers of flow matching have no such field, and EDM's call their own preconditioned output epsilon.
    """
    kind = str(values.get("_class_name"))
    if kind.startswith("FlowMatch"):
        return "flow_prediction"
    prediction = values.get("prediction_type", EPSILON)
    return f"EDM's {prediction}" if kind.startswith("EDM") else prediction
