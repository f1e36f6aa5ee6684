"""The variational bound: closed forms, exact log-densities of Gaussians and mixtures, bits, errors."""

import math

import numpy as np
import pytest
import torch
from exact_mixtures import Mixture, gaussian, hermite, mixture
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.denoiser import Predict, Prediction
from ldm.diffusion.likelihood import (
    Bound,
    ChosenTimesteps,
    bits_per_dimension,
    choose_timesteps,
    continuous_bound,
    elbo,
    gauss_legendre,
    prior_nats,
    without_variance,
)
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.variance import log_variance_bounds

SCHEDULE = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
FEW = Schedule(ScheduleConfig("linear", 0.001, 0.2, 100))
FEW_ZERO_SNR = Schedule(ScheduleConfig("linear", 0.001, 0.2, 100, rescale_betas_zero_snr=True))
POINTS = torch.tensor([-1.6, -0.5, 0.2, 0.9, 1.7], dtype=torch.float64)


def crossed(x0: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """x0 and noise (N nodes, 1, 1, 1) of every pair, and the nodes' weights: each term's expectation by quadrature."""
    points, weights = hermite(nodes)
    rows = x0.repeat_interleave(nodes).view(-1, 1, 1, 1)
    return rows, points.repeat(len(x0)).view(-1, 1, 1, 1), weights


def expected(values: Tensor, weights: Tensor) -> Tensor:
    return (values.view(*values.shape[:-1], -1, len(weights)) * weights).sum(-1)


def best_variance(data: Mixture, schedule: Schedule) -> Predict:
    """Posterior mean, and as raw output the reverse step's true variance given x, whatever its share of the bounds."""
    levels = schedule.sigma_hat(torch.arange(schedule.num_timesteps))

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        mean, variance = data.posterior(x, sigma)
        t = int(torch.searchsorted(levels, float(sigma[0])))
        if t == 0:
            low, high = log_variance_bounds(levels[1], levels[0])[0], 2 * schedule.sigma(torch.tensor(0)).log()
            low = low + 2 * schedule.alpha(torch.tensor(0)).log()
            best = variance
        else:
            low, high = log_variance_bounds(levels[t], levels[t - 1])
            ratio = (levels[t - 1] / levels[t]) ** 2
            best = levels[t - 1] ** 2 * (1 - ratio) + (1 - ratio) ** 2 * variance
        return Prediction(mean, (best.log() - low) / (high - low) * 2 - 1)

    return predict


def test_the_bound_of_unit_normal_data_with_ddpms_beta_is_the_log_density_itself() -> None:
    data = gaussian(0.0, 1.0)
    x0, noise, weights = crossed(POINTS, 8)
    for schedule in (FEW, FEW_ZERO_SNR):
        bound = elbo(without_variance(data.denoise), schedule, x0, lambda t: noise)
        found = -expected(bound.nats, weights)
        torch.testing.assert_close(found, Normal(0.0, 1.0).log_prob(POINTS), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.3), (-0.8, 1.0), (0.0, 1.5)])
def test_the_bound_of_gaussian_data_with_the_best_variance_is_the_log_density_itself(mean: float, std: float) -> None:
    data = gaussian(mean, std)
    x0, noise, weights = crossed(POINTS, 8)
    bound = elbo(best_variance(data, FEW_ZERO_SNR), FEW_ZERO_SNR, x0, lambda t: noise, variance="learned")
    found = -expected(bound.nats, weights)
    torch.testing.assert_close(found, Normal(mean, std).log_prob(POINTS).double(), rtol=1e-7, atol=1e-7)


def test_each_term_of_gaussian_data_is_its_closed_form() -> None:
    """E of a divergence between Gaussians whose means differ by a Gaussian of known variance."""
    std, point = 0.5, 0.7
    data = gaussian(0.0, std)
    x0, noise, weights = crossed(torch.tensor([point], dtype=torch.float64), 8)
    for name in ("beta", "beta_tilde"):
        bound = elbo(without_variance(data.denoise), FEW, x0, lambda t: noise, variance=name)  # type: ignore[arg-type]
        terms = expected(bound.steps, weights).flatten().flip(0)  # of t = 1, ..., T - 1
        assert terms.shape == (99,)
        alphas = FEW.alphas_cumprod.tolist()
        for t in (1, 2, 30, 99):
            now, before = alphas[t], alphas[t - 1]
            beta = 1 - now / before
            tilde = (1 - before) / (1 - now) * beta
            variance = beta if name == "beta" else tilde
            # x0 - E[x0 | x_t] for this x0: mean and variance over the noise.
            gain = math.sqrt(now) * std**2 / (now * std**2 + 1 - now)
            square = (point * (1 - gain * math.sqrt(now))) ** 2 + gain**2 * (1 - now)
            shift = before * beta**2 / (1 - now) ** 2 * square
            divergence = (math.log(variance / tilde) + (tilde + shift) / variance - 1) / 2
            assert terms[t - 1].item() == pytest.approx(divergence, rel=1e-6)
        scale = torch.tensor(alphas[-1], dtype=torch.float64)
        q = Normal(scale.sqrt() * point, (1 - scale).sqrt())
        assert bound.prior[0].item() == pytest.approx(kl_divergence(q, Normal(0 * scale, 1.0)).item(), rel=1e-6)


def test_the_prior_term_is_torchs_divergence_in_several_dimensions() -> None:
    x0 = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 2, 2, 2)))
    alpha = SCHEDULE.alpha(torch.tensor(999))
    q = Normal(alpha * x0, SCHEDULE.sigma(torch.tensor(999)))
    divergence = kl_divergence(q, Normal(torch.zeros_like(x0), 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(prior_nats(x0, SCHEDULE.sigma_max), divergence, rtol=1e-9, atol=0)
    assert prior_nats(x0, ZERO_SNR.sigma_max).max() < 1e-14


def test_the_bound_of_a_mixture_is_its_log_density_within_a_ten_thousandth() -> None:
    data, points = mixture(1), POINTS[::2]
    x0, noise, weights = crossed(points, 24)
    bound = elbo(best_variance(data, ZERO_SNR), ZERO_SNR, x0, lambda t: noise, variance="learned")
    exact = data.log_density(points.view(-1, 1, 1, 1))
    torch.testing.assert_close(-expected(bound.nats, weights), exact, rtol=0, atol=1e-4)


def test_over_the_data_the_bound_is_below_the_log_density_and_the_best_variance_gives_the_best() -> None:
    data = mixture(1)
    points, share = hermite(16)
    x0 = (data.means + data.stds[:, None] * points).flatten()
    share = (data.weights[:, None] * share).flatten()
    entropy = -float(share @ data.log_density(x0.view(-1, 1, 1, 1)))
    rows, noise, weights = crossed(x0, 16)
    gaps = {}
    for name, predict in (
        ("learned", best_variance(data, FEW_ZERO_SNR)),
        ("beta", without_variance(data.denoise)),
        ("beta_tilde", without_variance(data.denoise)),
    ):
        bound = elbo(predict, FEW_ZERO_SNR, rows, lambda t: noise, variance=name)  # type: ignore[arg-type]
        gaps[name] = float(share @ expected(bound.nats, weights)) - entropy
    assert 0 < gaps["learned"] < 1e-3
    assert gaps["learned"] < gaps["beta"] < 0.05
    assert gaps["beta"] < gaps["beta_tilde"]


def test_the_bound_adds_up_over_dimensions_and_is_told_in_bits() -> None:
    data, several = gaussian(0.3, 0.8), gaussian(0.3, 0.8, dims=4)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 4, 1, 1)))
    x0 = several.sample(2, seed=2)
    found = elbo(without_variance(several.denoise), FEW, x0, lambda t: noise)
    each = [
        elbo(without_variance(data.denoise), FEW, x0[:, i : i + 1], lambda t, i=i: noise[:, i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(found.nats, torch.stack([one.nats for one in each]).sum(0))
    torch.testing.assert_close(found.bits_per_dimension, found.nats / 4 / math.log(2))
    assert bits_per_dimension(torch.tensor(4 * math.log(2)), 4).item() == pytest.approx(1)
    assert isinstance(found, Bound)


def test_drawn_timesteps_times_their_shares_have_the_mean_of_the_whole_sum() -> None:
    """Over 4,000 evenly spaced draws, of terms that are anything from 0 to twice those of unit normal latents."""
    draws = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).expand(10, -1)
    for schedule in (FEW, FEW_ZERO_SNR):
        y = torch.log1p(schedule.sigma_hat(torch.arange(100)) ** -2)
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), -y.diff() / 2])
        terms = lost * torch.from_numpy(np.random.default_rng(3).uniform(0, 2, size=100))
        chosen = choose_timesteps(schedule, draws)
        assert bool((chosen.t.diff(dim=0) >= 0).all())
        mean = (terms[chosen.t] * chosen.shares).sum(0).mean()
        assert mean.item() == pytest.approx(terms.sum().item(), rel=1e-3)
        # Of unit normal latents, whose terms are half the information that they lose, each draw gives the sum itself.
        each = (lost[chosen.t] * chosen.shares).sum(0)
        torch.testing.assert_close(each, lost.sum().expand(4000), rtol=1e-12, atol=0)


def test_a_bound_at_drawn_timesteps_estimates_that_at_all() -> None:
    data = gaussian(0.0, 0.6)
    x0, asked = data.sample(2000, seed=1), []
    rng = np.random.default_rng(2)

    def noise(term: int) -> Tensor:
        asked.append(term)
        return torch.from_numpy(rng.normal(size=x0.shape))

    predict = without_variance(data.denoise)
    whole = elbo(predict, FEW, x0, noise)
    assert asked == [*range(99, 0, -1), 0]
    assert whole.times[:, 0].tolist() == [*range(99, 0, -1)]
    asked.clear()
    some = elbo(predict, FEW, x0, noise, at=choose_timesteps(FEW, torch.from_numpy(rng.uniform(size=(8, 2000)))))
    assert asked == [*range(8, 0, -1), 0]
    assert some.steps.shape == some.times.shape == (8, 2000)
    assert bool((some.times.diff(dim=0) <= 0).all())
    difference = some.nats - whole.nats
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(2000), "seeds 1, 2"
    torch.testing.assert_close(some.prior, whole.prior)


def test_what_is_known_of_the_noise_is_taken_from_the_terms_error_and_not_from_their_mean() -> None:
    """Of unit normal data all that is left is the product of point and noise, which two opposite noises cancel."""
    data, x0 = gaussian(0.0, 1.0), POINTS.view(-1, 1, 1, 1)
    noise = torch.from_numpy(np.random.default_rng(4).normal(size=x0.shape))
    predict = without_variance(data.denoise)
    nats = sum(elbo(predict, FEW, x0, lambda t, sign=sign: sign * noise).nats for sign in (1, -1)) / 2
    torch.testing.assert_close(-nats, Normal(0.0, 1.0).log_prob(POINTS), rtol=0, atol=1e-9)
    flow = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    nats = sum(continuous_bound(data.denoise, flow, x0, lambda t, sign=sign: sign * noise).nats for sign in (1, -1))
    torch.testing.assert_close(-nats / 2, Normal(0.0, 1.0).log_prob(POINTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "sigma_max"), [("edm", 1e3), ("flow", None), ("cosine", None)])
def test_in_continuous_time_the_bound_of_gaussian_data_is_the_log_density(kind: str, sigma_max: float | None) -> None:
    schedule = ContinuousSchedule(ContinuousScheduleConfig(kind=kind, sigma_min=1e-3, sigma_max=sigma_max))  # type: ignore[arg-type]
    x0, noise, weights = crossed(POINTS, 8)
    for mean, std in ((0.0, 1.0), (0.4, 0.5)):
        data = gaussian(mean, std)
        bound = continuous_bound(data.denoise, schedule, x0, lambda node: noise, nodes=60)
        found = -expected(bound.nats, weights)
        torch.testing.assert_close(found, Normal(mean, std).log_prob(POINTS).double(), rtol=0, atol=1e-5)


def test_in_continuous_time_the_bound_of_a_mixture_is_the_log_density() -> None:
    schedule = ContinuousSchedule(ContinuousScheduleConfig(kind="edm", sigma_min=1e-3, sigma_max=1e3))
    data = mixture(1)
    x0, noise, weights = crossed(POINTS, 48)
    bound = continuous_bound(data.denoise, schedule, x0, lambda node: noise, nodes=60)
    exact = data.log_density(POINTS.view(-1, 1, 1, 1))
    torch.testing.assert_close(-expected(bound.nats, weights), exact, rtol=0, atol=1e-4)


def test_gauss_legendre_is_numpys() -> None:
    for nodes in (1, 2, 7, 64):
        points, weights = np.polynomial.legendre.leggauss(nodes)
        found = gauss_legendre(nodes)
        np.testing.assert_allclose(found[0], points, atol=1e-13)
        np.testing.assert_allclose(found[1], weights, atol=1e-13)


def test_wrong_requests_are_errors() -> None:
    predict = without_variance(gaussian(0, 1).denoise)
    x0 = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="variance: found 'fixed'"):
        elbo(predict, SCHEDULE, x0, lambda t: x0, variance="fixed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the network puts out no second half"):
        elbo(predict, SCHEDULE, x0, lambda t: x0, variance="learned")
    one = torch.ones(1, 1, dtype=torch.float64)
    for t in ([[0]], [[1000]], [[5, 6]], torch.empty(0, 1)):
        with pytest.raises(ValueError, match=r"expected \(N, 1\) from 1 to 999"):
            elbo(predict, SCHEDULE, x0, lambda t: x0, at=ChosenTimesteps(torch.as_tensor(t), one))
    flow = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    with pytest.raises(ValueError, match="nodes: found 0"):
        continuous_bound(gaussian(0, 1).denoise, flow, x0, lambda node: x0, nodes=0)
