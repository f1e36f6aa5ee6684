"""Guidance by a measurement against Bayes' rule for Gaussian data: posterior means, and conditional distributions.

Moments of samples are compared within 4.5 standard errors; seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from exact_networks import ZERO_SNR, denoise_with, geometric, numpy_noise
from torch import Tensor

from ldm.diffusion.ancestral import ddpm
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.inverse_problems import Covariance, conjugate_gradients, guided_by_measurement
from ldm.diffusion.linear_operators import AveragePooling, GaussianBlur, LinearOperator, Masking
from ldm.diffusion.ode_solvers import heun
from ldm.diffusion.process import TERMINAL_SIGMA

SIDE = 4
COUNT = SIDE * SIDE
MEAN, STD = 0.4, 1.3
MEASURED = torch.arange(COUNT).view(SIDE, SIDE) % 3 > 0
OPERATORS: dict[str, LinearOperator] = {
    "super_resolution": AveragePooling(2),
    "blur": GaussianBlur(SIDE, SIDE, 0.7),
    "mask": Masking(MEASURED),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def matrix(operator: LinearOperator) -> Tensor:
    return operator(torch.eye(COUNT, dtype=torch.float64).view(-1, 1, SIDE, SIDE)).flatten(1).T


def correlated() -> Tensor:
    """A covariance of pictures: neighbours resemble each other; deviations differ from pixel to pixel."""
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    near = (-torch.cdist(places, places) / 1.5).exp()
    deviations = torch.linspace(0.5, 1.5, COUNT, dtype=torch.float64)
    return deviations[:, None] * near * deviations


def gaussian(covariance: Tensor) -> Denoise:
    """E[x0 | x] for data N(MEAN, covariance) in pictures (B, 1, SIDE, SIDE)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        noisy = covariance + float(sigma[0]) ** 2 * torch.eye(COUNT, dtype=torch.float64)
        return (MEAN + (x.flatten(1) - MEAN) @ torch.linalg.solve(noisy, covariance)).view(x.shape)

    return denoise


def bayes(covariance: Tensor, H: Tensor, y: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Mean (B, COUNT) and covariance of x0 ~ N(MEAN, covariance) given y (B, M) = H x0 + deviation noise."""
    gain = covariance @ H.T @ torch.linalg.pinv(H @ covariance @ H.T + deviation**2 * torch.eye(len(H)), rtol=1e-12)
    return MEAN + (y - MEAN * H.sum(1)) @ gain.T, covariance - gain @ H @ covariance


def given_both(covariance: Tensor, H: Tensor, x: Tensor, sigma: float, y: Tensor, deviation: float) -> Tensor:
    """E[x0 | x0 + sigma noise = x, y]: both measurements stacked, in one application of Bayes' rule."""
    stacked = torch.cat([torch.eye(COUNT, dtype=torch.float64), H])
    noise = torch.cat([torch.full((COUNT,), sigma), torch.full((len(H),), max(deviation, 1e-7))]).double()
    total = stacked @ covariance @ stacked.T + torch.diag(noise**2)
    both = torch.cat([x.flatten(1), y], 1)
    return MEAN + (both - MEAN * stacked.sum(1)) @ torch.linalg.solve(total, stacked @ covariance)


@pytest.mark.parametrize("deviation", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("covariance", ["isotropic", "pigdm", "jacobian"])
def test_the_guided_denoiser_is_the_posterior_mean_of_independent_gaussian_data(
    covariance: Covariance, name: str, deviation: float
) -> None:
    operator, prior = OPERATORS[name], STD**2 * torch.eye(COUNT, dtype=torch.float64)
    x0, x = MEAN + STD * random(3, 1, SIDE, SIDE, seed=1), 3 * random(3, 1, SIDE, SIDE, seed=2)
    y = operator(x0 + deviation * random(3, 1, SIDE, SIDE, seed=3))
    guided = guided_by_measurement(
        gaussian(prior), operator, y, deviation=deviation, prior_deviation=STD, covariance=covariance, iterations=16
    )
    for sigma in (0.05, 1.0, 20.0):
        found = guided(x, torch.full((3,), sigma, dtype=torch.float64))
        expected = given_both(prior, matrix(operator), x, sigma, y.flatten(1), deviation)
        torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_with_the_denoisers_jacobian_it_is_the_posterior_mean_of_any_gaussian_data(name: str) -> None:
    operator, prior = OPERATORS[name], correlated()
    x, y = 2 * random(3, 1, SIDE, SIDE, seed=2), operator(random(3, 1, SIDE, SIDE, seed=4))
    settings = {"deviation": 0.2, "iterations": 40}
    exact = guided_by_measurement(gaussian(prior), operator, y, covariance="jacobian", **settings)
    others = [
        guided_by_measurement(gaussian(prior), operator, y, covariance=c, **settings) for c in ("isotropic", "pigdm")
    ]
    for sigma in (0.1, 1.0, 10.0):
        level = torch.full((3,), sigma, dtype=torch.float64)
        expected = given_both(prior, matrix(operator), x, sigma, y.flatten(1), 0.2)
        torch.testing.assert_close(exact(x, level).flatten(1), expected, rtol=0, atol=1e-7)
        if sigma == 10:  # the others assume independent data, which this is not
            assert all(float((other(x, level).flatten(1) - expected).abs().max()) > 0.05 for other in others)


@pytest.mark.parametrize("name", OPERATORS)
def test_for_other_data_it_is_the_formula_of_pigdm(name: str) -> None:
    """D + sigma^2 J^T H^T (r^2 H H^T + deviation^2)^-1 (y - H D) with matrices; J = C (C + sigma^2)^-1."""
    operator, prior, deviation = OPERATORS[name], correlated(), 0.2
    x, y, H = 2 * random(3, 1, SIDE, SIDE, seed=2), operator(random(3, 1, SIDE, SIDE, seed=4)), matrix(OPERATORS[name])
    guided = guided_by_measurement(gaussian(prior), operator, y, deviation=deviation, covariance="pigdm", iterations=16)
    for sigma in (0.3, 3.0):
        level = torch.full((3,), sigma, dtype=torch.float64)
        clean, r2 = gaussian(prior)(x, level).flatten(1), sigma**2 / (sigma**2 + 1)
        J = prior @ torch.linalg.inv(prior + sigma**2 * torch.eye(COUNT))
        inverse = torch.linalg.inv(r2 * H @ H.T + deviation**2 * torch.eye(len(H)))
        expected = clean + sigma**2 * (y.flatten(1) - clean @ H.T) @ inverse @ H @ J
        torch.testing.assert_close(guided(x, level).flatten(1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["super_resolution", "mask"])
@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_samples_have_the_exact_conditional_distribution_of_correlated_gaussian_data(sampler: str, name: str) -> None:
    """2,000 samples of 16 correlated pixels given a quarter, or two thirds, of them, as mean and covariance of all."""
    operator, prior, count, deviation = OPERATORS[name], correlated(), 2_000, 0.2
    H = matrix(operator)
    y = operator(MEAN + (torch.linalg.cholesky(prior) @ random(COUNT, seed=6)).view(1, 1, SIDE, SIDE))
    guided = guided_by_measurement(
        gaussian(prior),
        operator,
        y,
        deviation=deviation,
        covariance="jacobian",
        iterations=4 if name == "super_resolution" else 10,
    )
    levels = torch.cat([geometric(60, 0.02, 120 if sampler == "ddpm" else 25), torch.zeros(1, dtype=torch.float64)])
    noise = numpy_noise(7, (count, 1, SIDE, SIDE))
    x = MEAN + torch.from_numpy(np.random.default_rng(8).normal(size=(count, 1, SIDE, SIDE))) * 60
    sample = ddpm(guided, x, levels, noise=noise) if sampler == "ddpm" else heun(guided, x, levels)
    assert_moments(sample.flatten(1), *bayes(prior, H, y.flatten(1), deviation))


def assert_moments(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """All means, and all elements of the covariance, within 4.5 standard errors and a hundredth of the deviations."""
    deviations, count = covariance.diagonal().clamp(min=1e-6).sqrt(), len(samples)
    of_means = ((samples.mean(0) - mean[0]).abs() - 0.01 * deviations) / (deviations / math.sqrt(count))
    scale = deviations[:, None] * deviations
    errors = ((scale**2 + covariance**2) / count).sqrt()
    of_covariances = ((samples.T.cov() - covariance).abs() - 0.02 * scale) / errors
    assert float(of_means.max()) < 4.5, f"means: {float(of_means.max()):.1f} standard errors"
    assert float(of_covariances.max()) < 4.5, f"covariances: {float(of_covariances.max()):.1f} standard errors"


def test_a_decoder_before_the_operator_is_passed_through_by_its_derivatives() -> None:
    """For a linear decoder the latents' posterior mean is Bayes' for the product of both matrices."""
    decoder = random(COUNT, COUNT, seed=9) / 4
    operator, prior = AveragePooling(2), torch.eye(COUNT, dtype=torch.float64)

    def measure(latents: Tensor) -> Tensor:
        return operator((latents.flatten(1) @ decoder.T).view(latents.shape))

    x, y = random(2, 1, SIDE, SIDE, seed=10), random(2, 1, 2, 2, seed=11)
    for covariance in ("isotropic", "pigdm", "jacobian"):
        guided = guided_by_measurement(gaussian(prior), measure, y, deviation=0.1, covariance=covariance, iterations=12)
        found = guided(x, torch.full((2,), 2.0, dtype=torch.float64))
        expected = given_both(prior, matrix(operator) @ decoder, x, 2.0, y.flatten(1), 0.1)
        torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch_and_gradients_may_be_off() -> None:
    operator = AveragePooling(2)
    x, y = random(3, 1, SIDE, SIDE, seed=1), random(3, 1, 2, 2, seed=2)
    level = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        together = guided_by_measurement(gaussian(correlated()), operator, y, iterations=2)(x, level)
        alone = guided_by_measurement(gaussian(correlated()), operator, y[1:2], iterations=2)(x[1:2], level[:1])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)
    assert not together.requires_grad


@pytest.mark.parametrize("covariance", ["isotropic", "pigdm", "jacobian"])
def test_a_terminal_level_of_pure_noise_gives_the_measurement_too(covariance: Covariance) -> None:
    operator = AveragePooling(2)
    y = random(2, 3, 2, 2, seed=2)
    guided = guided_by_measurement(denoise_with("v", ZERO_SNR), operator, y, covariance=covariance)
    x = TERMINAL_SIGMA * random(2, 3, SIDE, SIDE, seed=3)
    found = guided(x, torch.full((2,), TERMINAL_SIGMA, dtype=torch.float64))
    torch.testing.assert_close(operator(found), y, rtol=0, atol=1e-6)


def test_conjugate_gradients_solve_and_stay_within_the_range_of_a_singular_matrix() -> None:
    root = random(2, 6, 4, seed=3)
    matrices = root @ root.mT  # rank 4
    solution = torch.einsum("bij,bj->bi", matrices, random(2, 6, seed=4))
    right = torch.einsum("bij,bj->bi", matrices, solution)
    found = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrices, v), right, 4)
    torch.testing.assert_close(found, solution, rtol=0, atol=1e-7)
    assert not conjugate_gradients(lambda v: v, torch.zeros(2, 6), 3).any()


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"deviation": -1.0}, {"prior_deviation": 0.0}, {"iterations": 0}, {"covariance": "none"}):
        with pytest.raises(ValueError, match="guided_by_measurement: found deviation"):
            guided_by_measurement(gaussian(correlated()), AveragePooling(2), torch.zeros(1), **wrong)
