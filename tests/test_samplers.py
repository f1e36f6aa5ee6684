"""Samplers: exact flows and their orders, Bayes, noise where it belongs, the step from infinite noise, errors."""

import math
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from exact_networks import (
    NOTHING,
    SCHEDULE,
    SHAPE,
    ZERO_SNR,
    assert_same,
    denoise_with,
    step_noise,
    two_modes,
    unit_noise,
)
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, denoiser
from ldm.diffusion.guidance import unguided
from ldm.diffusion.samplers import SAMPLERS, Noise, ddim, ddpm, dpmpp_2m, euler, heun, start
from ldm.diffusion.schedule import TERMINAL_SIGMA
from ldm.diffusion.spacing import sigmas


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("name", [*SAMPLERS])
def test_the_step_from_infinite_noise_is_its_limit(name: str, parameterization: str) -> None:
    """From sigma = infinity samplers go to denoised + sigma_next * noise: fresh noise with ddpm, else the start's."""
    z, noise, denoise = unit_noise(), step_noise(), denoise_with(parameterization, ZERO_SNR)
    levels = sigmas(ZERO_SNR, 10)
    found = SAMPLERS[name](denoise, start(z, levels), levels, noise=noise)
    denoised = torch.zeros(SHAPE, dtype=torch.float64)  # the mean of both modes
    x = denoised + levels[1] * (noise(0) if name == "ddpm" else z)
    expected = SAMPLERS[name](denoise, x, levels[1:], noise=lambda step: noise(step + 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --- Exact solutions


def gaussian(mean: Tensor | float, std: Tensor | float) -> Denoise:
    """E[x0 | x] for data N(mean, std^2) in every dimension."""
    return lambda x, sigma: mean + std**2 / (std**2 + sigma.view(-1, 1) ** 2) * (x - mean)


def geometric(high: float, low: float, steps: int) -> Tensor:
    return torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp()


def fitted_order(error_of: Callable[[int], float], counts: list[int]) -> float:
    errors = [error_of(steps) for steps in counts]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


ORDERS = {"ddim": 1, "euler": 1, "dpmpp_2m": 2, "heun": 2}


@pytest.mark.parametrize("dims", [1, 16])
@pytest.mark.parametrize(("name", "order"), [*ORDERS.items()])
def test_deterministic_samplers_converge_to_the_exact_flow_of_gaussian_data_at_their_order(
    name: str, order: int, dims: int
) -> None:
    draws = np.random.default_rng(dims)
    mean, std = torch.from_numpy(draws.normal(size=dims)), torch.from_numpy(draws.uniform(0.3, 1.5, size=dims))
    high, low = 14.6, 0.05
    x = torch.from_numpy(draws.normal(size=(8, dims))) * math.sqrt(1 + high**2)
    exact = mean + (x - mean) * ((std**2 + low**2) / (std**2 + high**2)).sqrt()

    def error(steps: int) -> float:
        return (SAMPLERS[name](gaussian(mean, std), x, geometric(high, low, steps)) - exact).norm().item()

    found = fitted_order(error, [40, 80, 160, 320])
    assert 0.9 * order <= found <= 1.2 * order, f"fitted order {found:.3f}"


@pytest.mark.parametrize(("name", "order"), [*ORDERS.items()])
def test_deterministic_samplers_converge_on_data_with_two_modes_at_their_order(name: str, order: int) -> None:
    high, low = 14.6, 0.3
    x = unit_noise(4) * math.sqrt(1 + high**2)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return two_modes(x, 1.0, sigma.view(-1, 1, 1, 1))

    exact = x
    levels = geometric(high, low, 1000).tolist()
    for sigma, sigma_next in pairwise(levels):  # classical Runge-Kutta of order 4 in log sigma, error below 1e-10
        h = math.log(sigma_next / sigma)

        def slope(x: Tensor, part: float, sigma: float = sigma, h: float = h) -> Tensor:
            return x - denoise(x, torch.full((2,), sigma * math.exp(part * h), dtype=torch.float64))

        k1 = slope(exact, 0)
        k2 = slope(exact + h / 2 * k1, 0.5)
        k3 = slope(exact + h / 2 * k2, 0.5)
        k4 = slope(exact + h * k3, 1)
        exact = exact + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def error(steps: int) -> float:
        return (SAMPLERS[name](denoise, x, geometric(high, low, steps)) - exact).norm().item()

    found = fitted_order(error, [40, 80, 160, 320])
    assert 0.9 * order <= found <= 1.2 * order, f"fitted order {found:.3f}"


def test_second_order_samplers_need_far_fewer_steps_down_to_zero() -> None:
    """The order of a whole run to sigma = 0: its last step, of order 1, starts so low that it does not matter."""
    mean, std = 0.3, 0.7
    levels_of = {steps: sigmas(SCHEDULE, steps, "karras") for steps in (20, 200)}
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 4)))
    high = float(levels_of[20][0])
    x = z * math.sqrt(1 + high**2)
    exact = mean + (x - mean) * std / math.sqrt(std**2 + high**2)
    error = {
        (name, steps): (SAMPLERS[name](gaussian(mean, std), x, levels) - exact).abs().max().item()
        for name, (steps, levels) in product(ORDERS, levels_of.items())
    }
    for name in ("dpmpp_2m", "heun"):
        assert error[name, 20] < error["euler", 200] * 1.5
        assert error[name, 200] < 0.01 * error["euler", 20]


# --- Stochastic sampling


def vp_levels(sigma: float, sigma_next: float) -> tuple[float, float]:
    return 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_a_ddpm_step_is_the_posterior_of_bayes(variance: str) -> None:
    x0, x_t = 0.6, -1.3
    grid = SCHEDULE.sigma_hat(torch.tensor([999, 998, 500, 499, 20, 1, 0])).tolist()
    for sigma, sigma_next in [*pairwise(grid), (grid[0], grid[2]), (grid[0], grid[-1])]:
        abar, abar_next = vp_levels(sigma, sigma_next)
        # q(x_s | x0) = N(sqrt(abar_s) x0, 1 - abar_s) times q(x_t | x_s) = N(sqrt(a) x_s, 1 - a), as precisions
        a = abar / abar_next
        precision = 1 / (1 - abar_next) + a / (1 - a)
        mean = (math.sqrt(abar_next) * x0 / (1 - abar_next) + math.sqrt(a) * x_t / (1 - a)) / precision
        expected_variance = 1 / precision if variance == "beta_tilde" else 1 - a
        steps_taken = []
        for unit in (0.0, 1.0):
            x = torch.full((1, 1), x_t * math.sqrt(1 + sigma**2), dtype=torch.float64)
            after = ddpm(
                lambda x, sigma: torch.full_like(x, x0), x, torch.tensor([sigma, sigma_next], dtype=torch.float64),
                noise=lambda step, unit=unit: torch.full((1, 1), unit), variance=variance,  # type: ignore[arg-type]
            )  # fmt: skip
            steps_taken.append(after.item() * math.sqrt(abar_next))
        assert steps_taken[0] == pytest.approx(mean, rel=1e-9)
        assert (steps_taken[1] - steps_taken[0]) ** 2 == pytest.approx(expected_variance, rel=1e-8)


def numpy_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    return lambda step: torch.from_numpy(np.random.default_rng([seed, step]).normal(size=shape))


def assert_moments(samples: Tensor, mean: float, variance: float) -> None:
    """Within 4.5 standard errors of Gaussian samples."""
    count = samples.numel()
    assert samples.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(variance / count))
    assert samples.var().item() == pytest.approx(variance, rel=4.5 * math.sqrt(2 / count))


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("steps", [10, 100])
def test_ddpm_samples_of_gaussian_data_have_the_mean_and_variance_of_the_chain(steps: int, variance: str) -> None:
    """40,000 samples, seed 17, against the chain's own moments in Ho's coordinates (Eq. 6 and 7)."""
    mean, std, shape = 0.4, 0.6, (40_000, 1)
    levels = sigmas(SCHEDULE, steps)
    x = start(numpy_noise(17, shape)(10_000), levels)
    found = ddpm(gaussian(mean, std), x, levels, noise=numpy_noise(17, shape), variance=variance)  # type: ignore[arg-type]
    chain_mean, chain_variance = 0.0, 1.0
    for sigma, sigma_next in pairwise(levels.tolist()):
        abar, abar_next = vp_levels(sigma, sigma_next)
        beta = 1 - abar / abar_next
        gain = math.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar)
        offset = mean - gain * math.sqrt(abar) * mean
        to_x0 = math.sqrt(abar_next) * beta / (1 - abar)
        to_x = math.sqrt(1 - beta) * (1 - abar_next) / (1 - abar)
        added = beta if variance == "beta" else (1 - abar_next) / (1 - abar) * beta
        chain_mean = (to_x0 * gain + to_x) * chain_mean + to_x0 * offset
        chain_variance = (to_x0 * gain + to_x) ** 2 * chain_variance + (added if sigma_next > 0 else 0.0)
    assert_moments(found, chain_mean, chain_variance)


def test_ddpm_is_exact_for_unit_normal_data_with_beta_and_for_a_point_with_beta_tilde() -> None:
    """Ho et al. 2020, section 3.2; 40,000 samples, seed 18. The last step gives D, of variance alphas_cumprod_0."""
    shape, levels = (40_000, 1), sigmas(SCHEDULE, 20, "leading")
    x = numpy_noise(18, shape)(10_000) * math.sqrt(1 + float(levels[0]) ** 2)
    noise = numpy_noise(18, shape)
    assert_moments(ddpm(gaussian(0.0, 1.0), x, levels, noise=noise, variance="beta"), 0.0, 0.99915)
    point = ddpm(lambda x, sigma: torch.full_like(x, 0.25), x, levels, noise=noise)
    torch.testing.assert_close(point, torch.full_like(point, 0.25), rtol=0, atol=1e-12)


def test_ddpm_samples_have_the_datas_mean_and_variance_after_many_steps() -> None:
    """10,000 samples, seed 19: in 1,000 steps the chain itself is within 1 % of the data."""
    mean, std, shape = 0.4, 0.6, (10_000, 1)
    levels = sigmas(SCHEDULE, 1000)
    x = start(numpy_noise(19, shape)(10_000), levels)
    for variance in ("beta_tilde", "beta"):
        found = ddpm(gaussian(mean, std), x, levels, noise=numpy_noise(19, shape), variance=variance)  # type: ignore[arg-type]
        # The start knows nothing of the mean, of which the last training level keeps 0.068: a bias of less than 0.02.
        assert found.mean().item() == pytest.approx(mean, abs=0.02 + 4.5 * std / 100)
        assert found.std().item() == pytest.approx(std, rel=0.01 + 4.5 / math.sqrt(2 * 10_000))


def test_ddim_with_eta_1_is_ddpm_and_with_eta_0_is_euler() -> None:
    z, denoise = unit_noise(), denoise_with("v")
    runs = [sigmas(SCHEDULE, 12, spacing) for spacing in ("trailing", "leading", "karras")]
    runs += [sigmas(ZERO_SNR, steps) for steps in (1, 2, 3, 5, 8, 10, 13, 20, 30)]
    for levels in runs:
        terminal = levels[0] == TERMINAL_SIGMA
        if terminal:
            denoise = denoise_with("v", ZERO_SNR)
        x = start(z, levels)
        ancestral = ddpm(denoise, x, levels, noise=step_noise())
        assert_same(ddim(denoise, x, levels, noise=step_noise(), eta=1.0), ancestral, 1e-12)
        # Euler takes a difference of 2^26 from x at the terminal level, which loses 1e-8 to rounding.
        assert_same(ddim(denoise, x, levels), euler(denoise, x, levels), 1e-7 if terminal else 1e-12)


@pytest.mark.parametrize("sample", [ddpm, ddim], ids=["ddpm", "ddim"])
def test_noise_is_drawn_once_a_step_and_not_in_the_last(sample: Callable[..., Tensor]) -> None:
    denoise, levels, drawn = denoise_with("v"), sigmas(SCHEDULE, 7), []
    seen: list[Tensor] = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return step_noise()(step)

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(denoise(x, sigma))
        return seen[-1]

    for settings in (
        [{"variance": "beta_tilde"}, {"variance": "beta"}] if sample is ddpm else [{"eta": 1.0}, {"eta": 0.3}]
    ):
        drawn.clear()
        found = sample(watched, start(unit_noise(), levels), levels, noise=noise, **settings)
        assert drawn == [0, 1, 2, 3, 4, 5]
        assert torch.equal(found, seen[-1]), "the last step is the denoised latents themselves"


# --- The contract


def test_start_noise_has_the_deviation_of_noisy_unit_data() -> None:
    """1,000,000 samples, seed 20."""
    z = torch.from_numpy(np.random.default_rng(20).normal(size=(2, 1_000_000)))
    levels = sigmas(SCHEDULE, 10)
    x = start(z[0].float(), levels)
    assert x.dtype == torch.float64
    forward = z[1] + float(levels[0]) * z[0]  # unit data with noise
    assert x.std().item() == pytest.approx(forward.std().item(), rel=4.5e-3)
    assert x.std().item() == pytest.approx(math.sqrt(1 / 0.0046600985), rel=4.5e-3)


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_a_sampler_keeps_dtype_and_input_and_reports_each_step(name: str) -> None:
    levels, done = sigmas(SCHEDULE, 6), []
    x = start(unit_noise(), levels)
    before, asked = x.clone(), []
    denoise = denoise_with("v")

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        assert sigma.shape == (2,)
        assert sigma.device.type == "cpu"
        asked.append(sigma[0].item())
        return denoise(x, sigma)

    found = SAMPLERS[name](watched, x, levels, noise=step_noise(), progress=lambda *counts: done.append(counts))
    assert done == [(i, 6) for i in range(1, 7)]
    assert torch.equal(x, before)
    assert found.dtype == torch.float64
    twice = [level for level in levels[1:-1].tolist() for _ in range(2)]
    assert asked == ([levels[0].item(), *twice] if name == "heun" else levels[:-1].tolist())
    single = SAMPLERS[name](denoise, x.float(), levels, noise=step_noise())
    assert single.dtype == torch.float32
    assert_same(found, single, 1e-5)
    assert not SAMPLERS[name](lambda x, s: x.requires_grad_(), x, levels, noise=step_noise()).requires_grad


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_a_sampler_and_its_denoiser_never_wait_for_the_device(name: str) -> None:
    # The meta device has no values: whatever would be fetched to the host raises.
    x = torch.zeros(SHAPE, device="meta")
    denoise = unguided(denoiser(lambda x_t, t, text: x_t * t.view(-1, 1, 1, 1), SCHEDULE, "v"), NOTHING)
    found = SAMPLERS[name](denoise, x, sigmas(SCHEDULE, 5), noise=lambda step: torch.zeros_like(x))
    assert found.device.type == "meta"


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_one_step_gives_the_denoised_start(name: str) -> None:
    levels, denoise = sigmas(SCHEDULE, 1), denoise_with("epsilon")
    x = start(unit_noise(), levels)
    assert_same(SAMPLERS[name](denoise, x, levels, noise=step_noise()), denoise(x, levels[:1].expand(2)), 1e-12)


@pytest.mark.parametrize("name", [*SAMPLERS])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "expected .steps . 1,. with 1 step or more"),
        ([1.0], "expected .steps . 1,. with 1 step or more"),
        (1.0, "expected .steps . 1,. with 1 step or more"),
        ([1.0, 1.0, 0.0], "finite levels that descend"),
        ([0.5, 1.0, 0.0], "finite levels that descend"),
        ([1.0, -0.1], "finite levels that descend"),
        ([math.inf, 1.0, 0.0], "finite levels that descend"),
        ([1.0, math.nan, 0.0], "finite levels that descend"),
    ],
)
def test_wrong_levels_are_errors(name: str, levels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](
            gaussian(0.0, 1.0), torch.zeros(1, 1), torch.tensor(levels), noise=lambda step: torch.zeros(1, 1)
        )


def test_a_level_outside_of_the_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sigma: found 80 to 80, expected noise levels from"):
        heun(denoise_with("v"), unit_noise(), torch.tensor([80.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="expected noise levels from"):
        dpmpp_2m(denoise_with("v"), unit_noise(), torch.tensor([TERMINAL_SIGMA, 1.0, 0.0]))


def test_stochastic_samplers_want_their_noise_and_known_settings() -> None:
    x, levels = torch.zeros(1, 1), torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="ddpm adds noise: give noise="):
        ddpm(gaussian(0.0, 1.0), x, levels)
    with pytest.raises(ValueError, match="ddim with eta > 0 adds noise"):
        ddim(gaussian(0.0, 1.0), x, levels, eta=0.5)
    with pytest.raises(ValueError, match=r"eta: found 1\.5, expected 0 to 1"):
        ddim(gaussian(0.0, 1.0), x, levels, eta=1.5)
    with pytest.raises(ValueError, match="variance: found 'learned'"):
        ddpm(gaussian(0.0, 1.0), x, levels, noise=step_noise(), variance="learned")  # type: ignore[arg-type]
