"""Spacings: diffusers' multistep timesteps, even log-SNR, rho of Karras, continuous time, given levels, errors."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.spacing import given_levels, sigmas

SCHEDULE = Schedule(ScheduleConfig())
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = [1, 2, 3, 5, 7, 10, 20, 33, 50, 100, 250, 500]


@pytest.mark.parametrize("steps", STEPS)
def test_leading_with_an_offset_of_1_has_the_timesteps_of_diffusers(steps: int) -> None:
    theirs = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(steps)
    assert SCHEDULE.timestep(sigmas(SCHEDULE, steps, "leading_1")[:-1]).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("steps", STEPS)
def test_multistep_spacings_have_the_timesteps_of_diffusers_multistep_schedulers(steps: int, scheduler: type) -> None:
    for ours, name in (("leading_1_multistep", "leading"), ("linspace_multistep", "linspace")):
        theirs = scheduler(**STABLE_DIFFUSION, timestep_spacing=name, steps_offset=1)
        theirs.set_timesteps(steps)
        assert SCHEDULE.timestep(sigmas(SCHEDULE, steps, ours)[:-1]).tolist() == theirs.timesteps.tolist()


def test_log_snr_is_even_in_log_snr_and_gives_the_exponential_levels_of_diffusers() -> None:
    for steps in (2, 5, 20, 300, 2000):
        levels = sigmas(SCHEDULE, steps, "log_snr")
        snr = -2 * levels[:-1].log()
        torch.testing.assert_close(snr.diff(), snr.diff().mean().expand(steps - 1), rtol=1e-6, atol=1e-9)
        assert levels[0] == SCHEDULE.sigma_hat(torch.tensor(999))
        assert levels[-2] == SCHEDULE.sigma_hat(torch.tensor(0))
        theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION, use_exponential_sigmas=True)
        theirs.set_timesteps(steps)
        torch.testing.assert_close(levels.float(), theirs.sigmas, rtol=3e-5, atol=0)


def test_rho_goes_from_even_levels_to_even_log_levels() -> None:
    even = sigmas(SCHEDULE, 12, "karras", rho=1)[:-1]
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(11), rtol=1e-9, atol=0)
    nearly = sigmas(SCHEDULE, 12, "karras", rho=1e6)
    torch.testing.assert_close(nearly, sigmas(SCHEDULE, 12, "log_snr"), rtol=1e-4, atol=0)
    assert torch.equal(sigmas(SCHEDULE, 12, "karras", rho=7), sigmas(SCHEDULE, 12, "karras"))


def test_in_continuous_time_uniform_spacings_are_even_in_time() -> None:
    flow = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    levels = sigmas(flow, 10)
    assert levels[0] == TERMINAL_SIGMA
    assert levels[-1] == 0
    # On the straight path sigma_hat = t / (1 - t), but for the least noisy time, 0.001 and not 0.
    time = levels[1:-1] / (1 + levels[1:-1])
    torch.testing.assert_close(time, torch.linspace(0.9, 0.1, 9, dtype=torch.float64), rtol=0, atol=1e-3)
    bounded = ContinuousSchedule(ContinuousScheduleConfig(kind="edm"))
    for spacing in ("linspace", "karras", "log_snr"):
        found = sigmas(bounded, 10, spacing)
        assert found[0].item() == pytest.approx(80, rel=1e-9)
        assert found[-2].item() == pytest.approx(0.002, rel=1e-9)
        assert bool((found.diff() < 0).all())
    # Karras et al. 2022, Eq. 5, third of ten
    expected = (80 ** (1 / 7) + 2 / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas(bounded, 10, "karras")[2].item() == pytest.approx(expected, rel=1e-9)


def test_given_levels_are_taken_as_they_are_with_a_last_0() -> None:
    for given in ([14.0, 1.0, 0.1], [14.0, 1.0, 0.1, 0.0], torch.tensor([14.0, 1.0, 0.1], dtype=torch.float64)):
        found = given_levels(SCHEDULE, given)
        assert found.tolist() == [14.0, 1.0, 0.1, 0.0]
        assert found.dtype == torch.float64
    whole = sigmas(SCHEDULE, 20)
    assert torch.equal(given_levels(SCHEDULE, whole), whole)
    assert torch.equal(given_levels(SCHEDULE, whole.float())[:-1].float(), whole[:-1].float())


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "found .., expected levels that descend"),
        ([0.0], "expected levels that descend"),
        ([1.0, 2.0], "expected levels that descend"),
        ([1.0, 1.0, 0.0], "expected levels that descend"),
        ([1.0, -1.0], "expected levels that descend"),
        ([math.nan, 1.0], "expected levels that descend"),
        ([80.0, 1.0], "found 80 to 1, expected levels from 0.0291"),
        ([14.0, 0.001], "found 14 to 0.001, expected levels from 0.0291"),
        ([math.inf, 1.0], "found inf to 1"),
    ],
)
def test_wrong_levels_are_errors(levels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_levels(SCHEDULE, levels)


def test_wrong_requests_are_errors() -> None:
    for spacing in ("leading_1", "leading_1_multistep", "linspace_multistep"):
        with pytest.raises(ValueError, match="steps: found 1001, expected at most the schedule's 1000"):
            sigmas(SCHEDULE, 1001, spacing)
    with pytest.raises(ValueError, match="steps: found 1000, expected at most"):
        sigmas(SCHEDULE, 1000, "leading_1")
    with pytest.raises(ValueError, match="steps: found 0, expected 1 or more"):
        sigmas(SCHEDULE, 0, "log_snr")
    with pytest.raises(ValueError, match=r"found settings \['rho'\] for trailing, expected none"):
        sigmas(SCHEDULE, 10, rho=3)
    with pytest.raises(ValueError, match=r"found settings \['order'\] for karras, expected \['rho'\]"):
        sigmas(SCHEDULE, 10, "karras", order=3)
    with pytest.raises(ValueError, match="karras found rho 0, expected more than 0"):
        sigmas(SCHEDULE, 10, "karras", rho=0)
    zero_snr = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
    for schedule in (zero_snr, ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))):
        with pytest.raises(ValueError, match="log_snr needs a finite highest noise level"):
            sigmas(schedule, 10, "log_snr")
    with pytest.raises(ValueError, match="leading needs a schedule of timesteps, found continuous time"):
        sigmas(ContinuousSchedule(ContinuousScheduleConfig(kind="edm")), 10, "leading")
