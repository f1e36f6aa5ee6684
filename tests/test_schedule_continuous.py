"""Continuous schedules and inverses: closed forms, round trips in float64, diffusers' flow and EDM tables."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from ldm.diffusion.continuous import KINDS, ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.process import TERMINAL_SIGMA, ForwardProcess
from ldm.diffusion.schedule import BETA_SCHEDULES, Schedule, ScheduleConfig

NAMES = [*KINDS]


def schedule(kind: str, **settings: float) -> ContinuousSchedule:
    return ContinuousSchedule(ContinuousScheduleConfig(kind=kind, **settings))  # type: ignore[arg-type]


def times(process: ContinuousSchedule, count: int = 501) -> torch.Tensor:
    return process.at(torch.linspace(0, 1, count, dtype=torch.float64))


@pytest.mark.parametrize("kind", NAMES)
def test_alpha_and_sigma_are_the_published_formulas(kind: str) -> None:
    process = schedule(kind)
    t = times(process)
    x = t.numpy()
    beta_integral = 0.1 * x + (20 - 0.1) * x**2 / 2  # Song et al. 2021, Eq. 33
    alpha, sigma = {
        "vp": (np.exp(-beta_integral / 2), np.sqrt(-np.expm1(-beta_integral))),
        "cosine": (np.cos(np.pi * x / 2), np.sin(np.pi * x / 2)),
        "flow": (1 - x, x),
        "edm": (np.ones_like(x), x),
    }[kind]
    np.testing.assert_allclose(process.alpha(t).numpy(), alpha, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(process.sigma(t).numpy(), sigma, rtol=1e-13)
    inner = alpha > 1e-8
    found = process.sigma_hat(t).numpy()
    np.testing.assert_allclose(found[inner], (sigma / np.maximum(alpha, 1e-300))[inner], rtol=1e-12)
    np.testing.assert_allclose(process.log_snr(t).numpy()[inner], -2 * np.log(found[inner]), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(process.snr(t).numpy()[inner], found[inner] ** -2.0, rtol=1e-11)


def test_vp_is_the_sigma_of_edms_table_and_the_limit_of_ddpms_betas() -> None:
    process = schedule("vp")
    t = times(process)
    # Karras et al. 2022, table 1: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).
    expected = ((19.9 * t**2 / 2 + 0.1 * t).exp() - 1).sqrt()
    torch.testing.assert_close(process.sigma_hat(t), expected, rtol=1e-6, atol=0)
    for count in (1000, 4000):
        steps = Schedule(ScheduleConfig("linear", 0.1 / count, 20 / count, count))
        at = torch.arange(count // 10, count, count // 10)
        continuous = process.alpha((at.double() + 1) / count) ** 2
        assert float((steps.alphas_cumprod[at].log() / continuous.log() - 1).abs().max()) < 20 / count


@pytest.mark.parametrize("kind", NAMES)
def test_every_inverse_gives_the_time_back(kind: str) -> None:
    process = schedule(kind)
    t = times(process, 2001)
    torch.testing.assert_close(
        process.timestep(process.sigma_hat(t)), t, rtol=4e-15, atol=0 if kind != "flow" else 2e-8
    )
    inner = t[process.sigma_hat(t) < 1e3]
    torch.testing.assert_close(process.timestep(process.sigma_hat(inner)), inner, rtol=4e-15, atol=0)
    torch.testing.assert_close(process.timestep_of_log_snr(process.log_snr(inner)), inner, rtol=4e-14, atol=0)
    # alpha near 1 and sigma near 1 hold the level to their own rounding only.
    middle = inner[(process.sigma_hat(inner) > 0.1) & (process.sigma_hat(inner) < 10)]
    torch.testing.assert_close(process.timestep_of_sigma(process.sigma(middle)), middle, rtol=3e-14, atol=0)
    if kind == "edm":
        with pytest.raises(ValueError, match="alpha is 1 at every time"):
            process.timestep_of_alpha(torch.ones(1))
    else:
        torch.testing.assert_close(process.timestep_of_alpha(process.alpha(middle)), middle, rtol=3e-14, atol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_levels_and_coefficients_of_a_path_belong_together(kind: str) -> None:
    process = schedule(kind)
    level = torch.logspace(-2, 1.5, 200, dtype=torch.float64)
    alpha = process.path.alpha(level)
    t = process.timestep(level)
    torch.testing.assert_close(process.alpha(t), alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t), alpha * level, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_positions_are_the_inverse_of_times_and_the_ends_are_exact(kind: str) -> None:
    process = schedule(kind)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(process.position(process.at(u)), u, rtol=1e-12, atol=1e-14)
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64)
    assert process.timestep(ends).tolist() == pytest.approx([process.t_min, process.t_max], rel=1e-15)
    outside = torch.tensor([process.sigma_min / 3, process.sigma_max * 3], dtype=torch.float64)
    assert torch.equal(process.nearest(outside), process.timestep(ends))
    with pytest.raises(ValueError, match=r"sigma: found .* expected noise levels from"):
        process.timestep(outside[:1])


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_the_last_time_of_cosine_and_flow_is_pure_noise(kind: str) -> None:
    process = schedule(kind)
    last = torch.tensor([1.0], dtype=torch.float64)
    assert process.zero_terminal_snr
    assert (process.t_max, process.alpha(last).item(), process.sigma(last).item()) == (1, 0, 1)
    assert process.snr(last) == 0
    assert process.log_snr(last) == -math.inf
    assert process.sigma_hat(last) == TERMINAL_SIGMA
    assert process.timestep(process.sigma_hat(last)) == 1
    assert process.timestep_of_log_snr(process.log_snr(last)) == 1
    assert not schedule(kind, sigma_max=100.0).zero_terminal_snr


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", [*BETA_SCHEDULES])
def test_every_inverse_of_a_discrete_schedule_gives_the_timestep_back(name: str, rescale: bool) -> None:
    process = Schedule(ScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=rescale))  # type: ignore[arg-type]
    t = torch.arange(1000)
    exact = t.double()
    torch.testing.assert_close(process.timestep_of_log_snr(process.log_snr(t)), exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(process.timestep_of_alpha(process.alpha(t[:999])), exact[:999], rtol=0, atol=1e-7)
    middle = (process.sigma_hat(t) < 10).nonzero().flatten()
    torch.testing.assert_close(process.timestep_of_sigma(process.sigma(middle)), middle.double(), rtol=0, atol=1e-7)
    assert torch.equal(process.nearest(process.sigma_hat(t) * 1.00001), t)
    assert torch.equal(process.at(process.position(t)), t)
    torch.testing.assert_close(process.snr(t).log(), process.log_snr(t))


def test_flow_levels_and_times_are_those_of_diffusers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler()
    process = schedule("flow")
    sigma = theirs.sigmas.double()[1:]
    t = process.timestep_of_sigma(sigma)
    torch.testing.assert_close(process.sigma(t), sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.network_time(t).float(), theirs.timesteps[1:], rtol=1e-6, atol=0)
    x0, noise = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    for at in (1, 300, 998):
        noisy = theirs.scale_noise(x0, theirs.timesteps[at : at + 1], noise)
        ours = process.alpha(t[at - 1]) * x0 + process.sigma(t[at - 1]) * noise
        torch.testing.assert_close(ours.float(), noisy, rtol=1e-5, atol=0)


def test_edm_levels_and_times_are_those_of_diffusers() -> None:
    theirs, process = EDMEulerScheduler(), schedule("edm")
    levels = theirs.sigmas[:-1].double().clamp(0.002, 80)
    t = process.timestep(levels)
    torch.testing.assert_close(process.sigma_hat(t), levels, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.network_time(t).float(), theirs.timesteps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NAMES)
def test_times_of_the_wrong_kind_or_range_are_errors(kind: str) -> None:
    process: ForwardProcess = schedule(kind)
    with pytest.raises(TypeError, match="this schedule is continuous"):
        process.alpha(torch.tensor([1]))
    with pytest.raises(ValueError, match="time: found"):
        process.sigma(torch.tensor([100.0]))


@pytest.mark.parametrize("kind", NAMES)
def test_nothing_but_the_range_check_waits_for_the_device(kind: str) -> None:
    process = schedule(kind).to("meta")
    t = process.at(torch.zeros(3, dtype=torch.float64, device="meta"))
    for function in (process.alpha, process.sigma, process.snr, process.log_snr, process.sigma_hat, process.nearest):
        assert function(t).device.type == "meta"
    assert process.network_time(t).device.type == process.position(t).device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ve"}, "noise.kind: found 've'"),
        ({"sigma_min": 0.0}, "noise.sigma_min"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_max": math.inf}, "which stands for pure noise"),
        ({"beta_min": 0.0}, "noise.beta_min"),
        ({"kind": "vp", "sigma_max": 200.0}, "vp's at t = 1"),
        ({"kind": "edm", "sigma_min": 90.0}, "expected less than the highest"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousSchedule(ContinuousScheduleConfig(**settings))
