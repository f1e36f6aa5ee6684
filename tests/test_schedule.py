"""Noise schedule: published figures, diffusers' tables and timesteps, exact inversion, zero terminal SNR."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.schedule import BETA_SCHEDULES, Schedule, ScheduleConfig
from ldm.diffusion.spacing import sigmas

NAMES = [*BETA_SCHEDULES]
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def schedule(name: str = "scaled_linear", rescale: bool = False, **settings: float) -> Schedule:
    return Schedule(ScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=rescale, **settings))  # type: ignore[arg-type]


def every_t(length: int = 1000) -> torch.Tensor:
    return torch.arange(length)


def test_scaled_linear_has_the_published_alphas_cumprod() -> None:
    found = schedule().alphas_cumprod
    expected = {1: 0.9982960278, 250: 0.6737926252, 500: 0.2763326838, 999: 0.0046600985}
    for t, value in expected.items():
        assert found[t].item() == pytest.approx(value, abs=5e-11)
    assert found[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert found.dtype == torch.float64
    assert schedule().alpha(torch.tensor(999)).item() == pytest.approx(0.0682649, abs=5e-8)


def test_scaled_linear_has_the_published_snr_thresholds() -> None:
    snr = schedule().snr(every_t())
    assert torch.equal(torch.nonzero(snr > 5).flatten(), torch.arange(147))
    assert int(torch.nonzero(snr <= 1)[0]) == 354
    assert snr[999].item() == pytest.approx(0.00468192, abs=5e-9)


def test_linear_is_linear_in_beta_and_not_in_its_root() -> None:
    assert schedule("linear").alphas_cumprod[-1].item() == pytest.approx(0.00157896, abs=5e-9)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_diffusers(name: str, rescale: bool) -> None:
    ours = schedule(name, rescale)
    theirs = DDPMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale)
    # diffusers multiplies 1,000 factors in float32.
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tables_belong_together(name: str, rescale: bool) -> None:
    s, t = schedule(name, rescale), every_t()
    torch.testing.assert_close(torch.cumprod(1 - s.betas, 0), s.alphas_cumprod, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(s.alpha(t) ** 2 + s.sigma(t) ** 2, torch.ones(1000, dtype=torch.float64))
    inner = every_t(999)
    torch.testing.assert_close(s.sigma_hat(inner), s.sigma(inner) / s.alpha(inner))
    torch.testing.assert_close(s.snr(inner), s.sigma_hat(inner) ** -2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_keeps_the_first_and_ends_at_exactly_zero(name: str) -> None:
    plain, rescaled = schedule(name), schedule(name, rescale=True)
    last = torch.tensor(999)
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-14)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alpha(last) == 0
    assert rescaled.sigma(last) == 1
    assert rescaled.snr(last) == 0
    assert rescaled.sigma_hat(last) == TERMINAL_SIGMA
    assert rescaled.betas[-1] == 1
    assert rescaled.zero_terminal_snr
    assert not plain.zero_terminal_snr


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_timestep_is_exact_on_every_training_timestep(name: str, rescale: bool) -> None:
    s = schedule(name, rescale)
    levels = s.sigma_hat(every_t())
    assert torch.equal(s.timestep(levels), every_t().double())
    one_by_one = [s.timestep(level).item() for level in levels]
    assert one_by_one == list(range(1000))


def test_timestep_is_log_linear_between_training_timesteps() -> None:
    seed, count = 3, 500
    s = schedule()
    grid = s.sigma_hat(every_t()).numpy()
    levels = np.exp(np.random.default_rng(seed).uniform(np.log(grid[0]), np.log(grid[-1]), count))
    expected = np.interp(np.log(levels), np.log(grid), np.arange(1000))
    np.testing.assert_allclose(
        s.timestep(torch.from_numpy(levels)).numpy(), expected, atol=1e-9, err_msg=f"seed {seed}"
    )


def test_levels_rounded_to_float32_are_within_the_schedule() -> None:
    s = schedule()
    ends = s.sigma_hat(torch.tensor([0, 999]))
    rounded = torch.stack([ends[0] * (1 - 1e-7), ends[1] * (1 + 1e-7)])
    assert s.timestep(rounded).tolist() == [0, 999]
    assert s.timestep(ends.float()).tolist() == pytest.approx([0, 999], abs=1e-4)


def test_the_level_that_stands_for_infinity_is_the_terminal_timestep_of_a_zero_snr_schedule_only() -> None:
    terminal = torch.tensor(TERMINAL_SIGMA, dtype=torch.float64)
    assert schedule(rescale=True).timestep(terminal) == 999
    assert schedule(rescale=True).timestep(terminal / 2) < 999
    with pytest.raises(ValueError, match="expected noise levels from"):
        schedule().timestep(terminal)
    with pytest.raises(ValueError, match="expected noise levels from"):
        schedule(rescale=True).timestep(torch.tensor(math.inf))


@pytest.mark.parametrize("level", [14.7, 1e-3, 0.0, -1.0, math.nan])
def test_levels_outside_of_the_schedule_are_errors(level: float) -> None:
    with pytest.raises(ValueError, match=r"sigma: found .* expected noise levels from 0\.029.* to 14\.6"):
        schedule().timestep(torch.tensor([1.0, level]))


def test_timesteps_outside_of_the_schedule_or_fractional_are_errors() -> None:
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="expected 0 to 999"):
            schedule().alpha(torch.tensor([0, t]))
    with pytest.raises(TypeError, match="expected an integer"):
        schedule().alpha(torch.tensor([0.5]))


def test_gathering_never_waits_for_the_device() -> None:
    # The meta device has no values: whatever would be fetched to the host raises.
    s = schedule().to("meta")
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    for table in (s.alpha, s.sigma, s.snr, s.sigma_hat):
        assert table(t).device.type == "meta"


EVERY_STEP = ["trailing", "leading", "linspace", "karras"]
COUNTS = [1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 25, 30, 50, 64, 100, 250, 333, 999, 1000]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_of_a_spacing_are_those_of_diffusers(spacing: str) -> None:
    s = schedule()
    for steps in COUNTS:
        theirs = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if spacing == "linspace" and steps == 1:
            # diffusers starts a single step at t = 0, as if pure noise were nearly clean; ours starts at the last.
            assert expected == [0]
            expected = [999]
        assert s.timestep(sigmas(s, steps, spacing)[:-1]).tolist() == expected, f"{steps} steps"


def test_trailing_starts_at_the_last_timestep_and_leading_ends_at_the_first() -> None:
    s = schedule()
    assert s.timestep(sigmas(s, 5, "trailing")[:-1]).tolist() == [999, 799, 599, 399, 199]
    assert s.timestep(sigmas(s, 5, "leading")[:-1]).tolist() == [800, 600, 400, 200, 0]


def test_karras_levels_are_those_of_diffusers() -> None:
    s = schedule()
    for steps in (2, 5, 10, 50, 1500):
        theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True)
        # A ramp between the ends of the schedule: as many levels as are asked for, also more than timesteps.
        theirs.set_timesteps(steps)
        torch.testing.assert_close(sigmas(s, steps, "karras").float(), theirs.sigmas, rtol=3e-5, atol=0)
        torch.testing.assert_close(
            s.timestep(sigmas(s, steps, "karras")[:-1]).float(), theirs.timesteps, rtol=1e-5, atol=2e-3
        )


@pytest.mark.parametrize(
    ("spacing", "rescale"),
    [*((name, False) for name in EVERY_STEP), *((name, True) for name in EVERY_STEP if name != "karras")],
)
def test_levels_descend_to_zero_within_the_schedule(spacing: str, rescale: bool) -> None:
    s = schedule(rescale=rescale)
    low, high = s.sigma_hat(torch.tensor([0, 999])).tolist()
    for steps in [*range(1, 60), 999, 1000]:
        levels = sigmas(s, steps, spacing)
        assert levels.shape == (steps + 1,)
        assert levels.dtype == torch.float64
        assert levels[-1] == 0
        assert bool((levels.diff() < 0).all())
        assert low <= levels[-2] <= levels[0] <= high
        assert spacing == "leading" or levels[0] == high


def test_trailing_with_zero_terminal_snr_starts_at_the_terminal_level() -> None:
    assert sigmas(schedule(rescale=True), 10)[0] == TERMINAL_SIGMA


def test_wrong_requests_for_levels_are_errors() -> None:
    s = schedule()
    for steps in (0, -3):
        with pytest.raises(ValueError, match="expected 1 or more"):
            sigmas(s, steps)
    for spacing in ("trailing", "leading", "linspace"):
        with pytest.raises(ValueError, match="steps: found 1001, expected at most the schedule's 1000"):
            sigmas(s, 1001, spacing)
    with pytest.raises(ValueError, match="spacing: found 'cosine', expected one of"):
        sigmas(s, 10, "cosine")
    with pytest.raises(ValueError, match="karras needs a finite highest noise level"):
        sigmas(schedule(rescale=True), 10, "karras")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "cosine"}, "noise.beta_schedule: found 'cosine'"),
        ({"beta_start": 0.0}, "noise.beta_start"),
        ({"beta_start": 0.02}, "beta_start <= beta_end"),
        ({"beta_end": 1.0}, "noise.beta_end"),
        ({"num_train_timesteps": 1}, "noise.num_train_timesteps: found 1"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)


def test_a_schedule_whose_levels_float64_cannot_hold_is_an_error() -> None:
    for settings in ({"beta_end": 0.3}, {"beta_end": 0.9}, {"beta_start": 1e-18, "beta_end": 1e-18}):
        with pytest.raises(ValueError, match="noise: found noise levels from"):
            schedule("linear", **settings)


def test_the_settings_help_names_the_tables_entries() -> None:
    assert [*get_args(get_type_hints(ScheduleConfig)["beta_schedule"])] == NAMES
