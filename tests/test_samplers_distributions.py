"""Stochastic samplers: their steps against Bayes' rule, their samples' distribution against the data's.

Moments are compared within 4.5 standard errors; distributions by the Kolmogorov-Smirnov test at the level 1e-4, whose
bound for n samples is sqrt(-ln(1e-4 / 2) / (2 n)). All seeds are fixed.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_networks import SCHEDULE, assert_same, gaussian, geometric, mixture, numpy_noise
from torch import Tensor

from ldm.diffusion.ancestral import analytic_dpm, ddim, ddpm, euler_ancestral
from ldm.diffusion.dpm_solver import dpmpp_2m_sde
from ldm.diffusion.langevin import annealed_langevin, predictor_corrector
from ldm.diffusion.ode_solvers import heun
from ldm.diffusion.sampler_contract import Sampler, start
from ldm.diffusion.spacing import sigmas

# --- Distributions

CENTRES, WIDTH = (-1.0, 0.2, 1.3), 0.25
"""The data: three modes in one dimension."""


def cdf(x: Tensor, variance: float) -> Tensor:
    return torch.stack([torch.special.ndtr((x - c) / math.sqrt(variance)) for c in CENTRES]).mean(0)


STOCHASTIC: dict[str, tuple[Sampler, Tensor]] = {
    "ddpm": (ddpm, geometric(30, 0.01, 150)),
    "ddpm beta": (partial(ddpm, variance="beta"), geometric(30, 0.01, 400)),
    "ddim eta 0.6": (partial(ddim, eta=0.6), geometric(30, 0.01, 150)),
    "euler_ancestral": (euler_ancestral, geometric(30, 0.01, 150)),
    "euler_ancestral eta 0.6": (partial(euler_ancestral, eta=0.6), geometric(30, 0.01, 150)),
    "dpmpp_2m_sde": (dpmpp_2m_sde, geometric(30, 0.01, 40)),
    "heun with churn": (partial(heun, s_churn=20.0), geometric(30, 0.01, 60)),
    "predictor_corrector": (partial(predictor_corrector, snr=0.1), geometric(30, 0.01, 60)),
    "annealed_langevin": (partial(annealed_langevin, langevin_steps=20), geometric(30, 0.05, 40)),
}


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "predictor_corrector"])
def test_samples_of_a_mixture_have_its_distribution(name: str) -> None:
    """Kolmogorov-Smirnov, 5,000 samples, seed 21, at the lowest level, where the distribution is known exactly."""
    sample, levels = STOCHASTIC[name]
    count = 5_000
    noise = numpy_noise(21, (count, 1))
    denoise = mixture(torch.tensor(CENTRES, dtype=torch.float64)[:, None], WIDTH)
    modes = torch.from_numpy(np.random.default_rng(22).choice(CENTRES, size=(count, 1)))
    high = math.sqrt(WIDTH**2 + float(levels[0]) ** 2)
    x = sample(denoise, modes + high * noise(10**6), levels, noise=noise)
    bound = math.sqrt(-math.log(1e-4 / 2) / (2 * count))
    ranks = torch.arange(1, count + 1) / count
    distance = (cdf(x.flatten().sort().values, WIDTH**2 + float(levels[-1]) ** 2) - ranks).abs().max()
    assert distance < bound + 1 / count, f"distance {distance:.4f}, bound {bound:.4f}"


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "heun with churn", "predictor_corrector"])
def test_samples_in_64_dimensions_have_the_modes_weights_and_width(name: str) -> None:
    """1,000 samples of three modes, seed 23: shares within 4.5 binomial deviations, squared width of chi-square.

    The corrector's own bias, 1 + snr^2 of the variance at snr 0.1, is allowed for.
    """
    count, dims, width = 1000, 64, 0.5
    sample, levels = STOCHASTIC[name]
    levels = torch.cat([levels, torch.zeros(1)])
    draws = np.random.default_rng(23)
    centres = torch.from_numpy(draws.normal(size=(3, dims)))
    modes = centres[torch.from_numpy(draws.integers(3, size=count))]
    noise = numpy_noise(24, (count, dims))
    x = sample(mixture(centres, width), modes + math.hypot(width, float(levels[0])) * noise(10**6), levels, noise=noise)
    squared, nearest = torch.cdist(x, centres).square().min(1)
    for mode in range(3):
        share = (nearest == mode).double().mean().item()
        assert share == pytest.approx(1 / 3, abs=4.5 * math.sqrt(2 / 9 / count))
    slack = 0.03  # of the discretization, seen to be below 0.02
    assert squared.mean().item() / dims == pytest.approx(width**2, rel=slack + 4.5 * math.sqrt(2 / count / dims))
    assert (x - centres[nearest]).mean().abs() < 4.5 * width / math.sqrt(count * dims)


# --- DDPM


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


# --- Analytic-DPM


def test_analytic_dpm_is_exact_for_gaussian_data_in_however_few_steps() -> None:
    """40,000 samples, seed 30; ddpm's variances are far off there, on either side."""
    mean, std, shape = 0.4, 0.6, (40_000, 1)
    noise = numpy_noise(30, shape)
    for levels in (geometric(14.6, 0.3, 1), geometric(14.6, 0.1, 3)):
        high, low = levels[[0, -1]].tolist()
        sigma = levels[:-1]
        exact = std**2 * sigma**2 / (std**2 + sigma**2)
        x = mean + math.hypot(std, high) * noise(100)
        found = analytic_dpm(gaussian(mean, std), x, levels, noise=noise, variances=exact)
        assert_moments(found, mean, std**2 + low**2)
        for variance, sign in (("beta_tilde", -1), ("beta", 1)):
            other = ddpm(gaussian(mean, std), x, levels, noise=noise, variance=variance)  # type: ignore[arg-type]
            assert sign * (other.var().item() - std**2 - low**2) > 0.1 * std**2


def test_analytic_dpm_variance_is_the_formula_of_the_paper() -> None:
    """Bao et al. 2022, Theorem 1, in its own variance-preserving symbols, from Gamma = E|score|^2 / d."""
    std = 0.6
    for sigma, sigma_next in ((14.6, 3.0), (2.0, 1.5), (0.3, 0.05)):
        abar, abar_next = vp_levels(sigma, sigma_next)
        alpha = abar / abar_next
        beta_bar, beta_bar_next = 1 - abar, 1 - abar_next
        lambda_2 = beta_bar_next / beta_bar * (1 - alpha)
        gamma = 1 / (abar * std**2 + beta_bar)  # the score of N(0, v) is -x / v
        expected = (
            lambda_2
            + (math.sqrt(beta_bar / alpha) - math.sqrt(beta_bar_next - lambda_2)) ** 2 * (1 - beta_bar * gamma)
        )  # fmt: skip
        variances = torch.tensor([std**2 * sigma**2 / (std**2 + sigma**2)], dtype=torch.float64)
        found = analytic_dpm(
            gaussian(0.0, std), torch.zeros(1, 1).double(), torch.tensor([sigma, sigma_next], dtype=torch.float64),
            noise=lambda step: torch.ones(1, 1), variances=variances,
        ).item()  # fmt: skip
        assert found**2 * abar_next == pytest.approx(expected, rel=1e-6)


def test_analytic_variances_are_clipped_to_their_bounds() -> None:
    x, levels = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([2.0, 1.0])
    one = numpy_noise(1, (1, 1))
    for outside, bound in ((-1.0, 0.0), (9.0, 4.0)):
        found, expected = (
            analytic_dpm(gaussian(0.0, 1.0), x, levels, noise=one, variances=torch.tensor([v]))
            for v in (outside, bound)
        )
        assert_same(found, expected, 0)


# --- EDM's churn and the corrector


def test_churn_is_algorithm_2_of_edm() -> None:
    """Against the algorithm written out, in its symbols, for one number."""
    std, levels, noise = 0.6, geometric(14.6, 0.05, 12), numpy_noise(31, (1, 1))
    s_churn, s_tmin, s_tmax, s_noise = 4.0, 0.1, 5.0, 1.007
    t = [*levels.tolist(), 0.0]
    x = 3.0
    for i in range(12 + 1):
        gamma = min(s_churn / 13, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise(i).item()
        d = (x_hat - std**2 / (std**2 + t_hat**2) * x_hat) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_2 = (x - std**2 / (std**2 + t[i + 1] ** 2) * x) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_2) / 2
    found = heun(
        gaussian(0.0, std), torch.full((1, 1), 3.0, dtype=torch.float64), torch.tensor(t, dtype=torch.float64),
        noise=noise, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip
    assert found.item() == pytest.approx(x, rel=1e-9)


def test_churn_never_asks_the_network_above_the_first_level() -> None:
    levels, asked = geometric(14.6, 5.0, 4), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma.item())
        return gaussian(0.0, 1.0)(x, sigma)

    heun(denoise, torch.ones(1, 1).double(), levels, noise=numpy_noise(1, (1, 1)), s_churn=100.0)
    assert max(asked) == asked[0] == asked[2] == levels[0]


def test_the_correctors_stationary_variance_is_what_its_docstring_says() -> None:
    """Of N(0, 1) at one level after 40 corrections, 200 x 1000 numbers, seed 32: v (1 + snr^2) within 1.5 %."""
    snr, sigma = 0.4, 0.5
    x = predictor_corrector(
        gaussian(0.0, 1.0), numpy_noise(33, (200, 1000))(0), torch.tensor([sigma * 1.0001, sigma], dtype=torch.float64),
        noise=numpy_noise(32, (200, 1000)), corrector_steps=40, snr=snr,
    )  # fmt: skip
    assert x.var().item() == pytest.approx((1 + sigma**2) * (1 + snr**2), rel=0.015)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    draws = numpy_noise(34, (3, 8))
    x, levels, denoise = 14.6 * draws(1000), geometric(14.6, 0.1, 10), mixture(draws(1001), 0.3)
    for sample in (predictor_corrector, partial(annealed_langevin, langevin_steps=2), dpmpp_2m_sde, euler_ancestral):
        together = sample(denoise, x, levels, noise=draws)
        alone = torch.cat(
            [sample(denoise, x[i : i + 1], levels, noise=lambda draw, i=i: draws(draw)[i : i + 1]) for i in range(3)]
        )
        assert_same(together, alone, 1e-9)
