"""The scheduler's file: it comes back as it was written, diffusers takes it word for word, foreign ones are read."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import BETA_SCHEDULES, Schedule, ScheduleConfig
from ldm.diffusion.spacing import sigmas
from ldm.pipeline.folder import SCHEDULER, write_json
from ldm.pipeline.scheduler import TrainedWith, read_scheduler, scheduler_values, write_scheduler


def continuous(kind: str, **settings: float) -> ContinuousSchedule:
    return ContinuousSchedule(ContinuousScheduleConfig(kind=kind, **settings))  # type: ignore[arg-type]


def discrete(**settings: Any) -> Schedule:
    return Schedule(ScheduleConfig(**settings))


TRAINED: dict[str, TrainedWith] = {
    **{name: TrainedWith(discrete(beta_schedule=name), "epsilon") for name in BETA_SCHEDULES},
    "sigmoid-zero": TrainedWith(discrete(beta_schedule="sigmoid", rescale_betas_zero_snr=True), "v"),
    "short": TrainedWith(discrete(beta_start=0.01, beta_end=0.3, num_train_timesteps=50), "x0"),
    "sigmoid-short": TrainedWith(discrete(beta_schedule="sigmoid", beta_end=0.3, num_train_timesteps=50), "x0"),
    "flow": TrainedWith(continuous("flow"), "flow"),
    "flow-x0": TrainedWith(continuous("flow"), "x0"),
    "edm": TrainedWith(continuous("edm"), "edm"),
    "edm-other": TrainedWith(continuous("edm", sigma_min=0.01, sigma_max=30.0), "edm", 0.7),
}


def told(trained: TrainedWith) -> dict[str, Any]:
    """All that a file tells, ends of continuous time as they are rather than as they were set."""
    schedule = trained.schedule
    if isinstance(schedule, Schedule):
        return {"config": schedule.config, "parameterization": trained.parameterization}
    assert isinstance(schedule, ContinuousSchedule)
    ends = (schedule.config.kind, schedule.sigma_min, schedule.sigma_max)
    return {"ends": ends, "parameterization": trained.parameterization, "sigma_data": trained.sigma_data}


def opened(folder: Path) -> Any:
    """The scheduler as diffusers opens it: the class that its file names."""
    values = json.loads((folder / SCHEDULER).read_text())
    return getattr(diffusers, values["_class_name"]).from_pretrained(folder, subfolder="scheduler")


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_read_is_what_was_trained_also_after_diffusers_has_saved_it(name: str, tmp_path: Path) -> None:
    trained = TRAINED[name]
    assert write_scheduler(tmp_path, trained) == scheduler_values(trained)["_class_name"]
    assert told(read_scheduler(tmp_path / SCHEDULER)) == told(trained)
    opened(tmp_path).save_pretrained(tmp_path / "again")
    assert told(read_scheduler(tmp_path / "again" / "scheduler_config.json")) == told(trained)


@pytest.mark.parametrize("name", TRAINED)
def test_diffusers_takes_every_setting_of_the_file(name: str, tmp_path: Path) -> None:
    write_scheduler(tmp_path, TRAINED[name])
    config = opened(tmp_path).config
    for setting, value in scheduler_values(TRAINED[name]).items():
        if setting != "_class_name":
            assert config[setting] == value, setting


@pytest.mark.parametrize("name", [name for name in TRAINED if isinstance(TRAINED[name].schedule, Schedule)])
def test_other_schedulers_made_from_the_file_have_the_betas_of_the_training(name: str, tmp_path: Path) -> None:
    # sigmoid is a name that DDPM alone knows: the betas have to lie in the file.
    schedule = TRAINED[name].schedule
    write_scheduler(tmp_path, TRAINED[name])
    theirs = opened(tmp_path)
    for kind in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"):
        found = getattr(diffusers, kind).from_config(theirs.config).alphas_cumprod
        expected = schedule.alpha(torch.arange(len(found))) ** 2
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-7)


def noise_and_time(schedule: ForwardProcess, levels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """sigma of x_t, and what the network is told, at each level above 0."""
    t = schedule.timestep(levels[:-1])
    sigma_hat = levels[:-1]
    return (schedule.path.alpha(sigma_hat) * sigma_hat).numpy(), schedule.network_time(t).double().numpy()


@pytest.mark.parametrize("steps", [1, 2, 9, 20, 37, 50, 333])
def test_levels_and_times_of_the_file_are_those_of_the_spacing_that_is_named_for_it(steps: int, tmp_path: Path) -> None:
    for name, spacing in (("sigmoid", "trailing"), ("flow", "linspace_multistep"), ("edm-other", "karras")):
        schedule = TRAINED[name].schedule
        write_scheduler(tmp_path, TRAINED[name])
        theirs = opened(tmp_path)
        theirs.set_timesteps(steps)
        sigma, time = noise_and_time(schedule, sigmas(schedule, steps, spacing))
        if name == "flow":
            np.testing.assert_allclose(theirs.sigmas[:-1], sigma, rtol=1e-6)
            # diffusers' multistep schedulers cut the fraction off, by rounding also where there is none.
            cut = time - theirs.timesteps.numpy()
            assert ((cut > -1e-9) & (cut < 1 + 1e-9)).all()
        else:
            np.testing.assert_allclose(theirs.timesteps.double().numpy(), time, rtol=1e-6, atol=1e-6)
        if name == "edm-other":
            np.testing.assert_allclose(theirs.sigmas[:-1], sigma, rtol=1e-6)
        if name != "sigmoid":
            assert float(theirs.sigmas[-1]) == 0


@pytest.mark.parametrize("steps", [2, 9, 20, 50])
def test_networks_of_flow_matching_are_told_what_diffusers_scheduler_of_flow_matching_tells(steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(steps)
    schedule = continuous("flow")
    sigma, time = noise_and_time(schedule, sigmas(schedule, steps, "linspace"))
    np.testing.assert_allclose(theirs.sigmas[:-1], sigma, rtol=0, atol=2e-6)
    np.testing.assert_allclose(theirs.timesteps, time, rtol=0, atol=2e-3)


FOREIGN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "FlowMatchEuler": (diffusers.FlowMatchEulerDiscreteScheduler(), "flow", {"parameterization": "flow"}),
    "FlowMatchHeun": (diffusers.FlowMatchHeunDiscreteScheduler(), "flow", {"parameterization": "flow"}),
    "UniPC": (
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "flow",
        {"parameterization": "flow"},
    ),
    "DPMSolver": (
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "flow",
        {"parameterization": "flow"},
    ),
    "x0": (
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="sample"),
        "flow",
        {"parameterization": "x0"},
    ),
    "EDMEuler": (diffusers.EDMEulerScheduler(), "edm", {"parameterization": "edm", "sigma_data": 0.5}),
    "EDMDPMSolver": (
        diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.6, sigma_max=120.0, sigma_min=0.003),
        "edm",
        {"parameterization": "edm", "sigma_data": 0.6},
    ),
    "sigmoid": (
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
        "sigmoid",
        {"parameterization": "epsilon"},
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_diffusers_wrote_are_read(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, kind, expected = FOREIGN[name]
    theirs.save_pretrained(tmp_path)
    found = read_scheduler(tmp_path / "scheduler_config.json")
    assert {setting: getattr(found, setting) for setting in expected} == expected
    assert found.schedule.config.kind == kind if kind != "sigmoid" else found.schedule.config.beta_schedule == kind
    assert caplog.records == []
    if kind == "edm":
        low, high = theirs.config.sigma_min, theirs.config.sigma_max
        assert (found.schedule.sigma_min, found.schedule.sigma_max) == (low, high)


def test_fields_that_an_edm_file_lacks_are_those_that_diffusers_takes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"_class_name": "EDMEulerScheduler"})
    found, theirs = read_scheduler(tmp_path / "a.json"), diffusers.EDMEulerScheduler().config
    assert (found.schedule.sigma_min, found.schedule.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    assert found.sigma_data == theirs.sigma_data


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "shift 3.0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting True"),
        (
            diffusers.UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, shift_terminal=0.1
            ),
            "flow_shift 5.0, shift_terminal 0.1",
        ),
    ],
)
def test_a_shift_of_the_sampling_levels_is_warned_of_and_changes_nothing_of_the_training(
    theirs: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = read_scheduler(tmp_path / "scheduler_config.json")
    assert told(found) == told(TRAINED["flow"])
    assert said in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is true"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "num_train_timesteps is 500"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "prediction_type is 'epsilon', expected one of flow_prediction, sample",
        ),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "puts out the negative"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, "expected 0 < sigma_min < sigma_max"),
        ({"_class_name": "FlowMapEulerDiscreteScheduler"}, "lacks num_train_timesteps, beta_start"),
        (
            {**scheduler_values(TRAINED["scaled_linear"]), "prediction_type": "flow_prediction"},
            "prediction_type is 'flow_prediction', expected one of epsilon, v_prediction, sample",
        ),
        ({**scheduler_values(TRAINED["sigmoid"]), "beta_end": 0.02}, "trained_betas that are not those of beta_sched"),
        ({**scheduler_values(TRAINED["sigmoid"]), "trained_betas": ["a"] * 1000}, "trained_betas that are not those"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_file_and_field(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "a.json", values)
    with pytest.raises(ValueError, match=r"a\.json: ") as error:
        read_scheduler(tmp_path / "a.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (TrainedWith(discrete(), "flow"), "found 'flow', expected epsilon, v or x0"),
        (TrainedWith(discrete(), "edm"), "set continuous_noise.kind edm"),
        (TrainedWith(continuous("flow"), "edm"), "with continuous_noise.kind flow, expected flow or x0"),
        (TrainedWith(continuous("edm"), "flow"), "with continuous_noise.kind edm, expected edm"),
        (TrainedWith(continuous("flow", sigma_min=1e-4), "flow"), "continuous_noise.sigma_min: found 0.0001 with"),
        (TrainedWith(continuous("vp"), "epsilon"), "continuous_noise.kind: found 'vp', expected 'flow' or 'edm'"),
        (TrainedWith(continuous("cosine"), "v"), "continuous_noise.kind: found 'cosine'"),
    ],
)
def test_what_no_scheduler_of_diffusers_expresses_is_refused_by_the_setting(trained: TrainedWith, message: str) -> None:
    with pytest.raises(ValueError, match=r"noise|objective") as error:
        scheduler_values(trained)
    assert message in str(error.value)


def test_the_discrete_schedules_that_the_refusal_of_vp_and_cosine_names_are_near_them() -> None:
    t = torch.arange(20, 980, 20)
    for kind, config in (("vp", ScheduleConfig("linear", 1e-4, 0.02)), ("cosine", ScheduleConfig("squaredcos_cap_v2"))):
        ratio = Schedule(config).sigma_hat(t) / continuous(kind).sigma_hat((t.double() + 1) / 1000)
        assert float(ratio.log().abs().max()) < (0.04 if kind == "vp" else math.log(1.5))
