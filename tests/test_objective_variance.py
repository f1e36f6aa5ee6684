"""Learned variance: bounds against Bayes' rule and diffusers, the bound's terms against torch's KL, the gradients."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective import loss_per_sample
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.variance import halves, learned_log_variance, log_variance_bounds, step_bounds, step_nats
from ldm.models.conditioning import Conditioning

SCHEDULE = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
NOTHING = Conditioning(torch.zeros(1, 1, 1))


def normals(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def ddpm(schedule: Schedule, t: int) -> tuple[float, float, float, float]:
    """beta_t, alphas_cumprod_t and _{t-1}, and beta-tilde by Ho et al. 2020, Eq. 7."""
    now, before = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[t - 1])
    beta = 1 - now / before
    return beta, now, before, (1 - before) / (1 - now) * beta


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["scaled_linear", "zero_snr"])
def test_the_posterior_of_a_step_is_bayes_rule(schedule: Schedule) -> None:
    """q(x_{t-1} | x_t, x0) by products of densities on a grid: its mean and variance."""
    x0 = 0.7
    for t in (1, 2, 50, 500, 998, 999):
        beta, now, before, tilde = ddpm(schedule, t)
        x_t = math.sqrt(now) * x0 - 0.4 * math.sqrt(1 - now)
        centre, width = math.sqrt(before) * x0, math.sqrt(1 - before)
        grid = torch.linspace(centre - 12 * width, centre + 12 * width, 200_001, dtype=torch.float64)
        log_density = -((grid - math.sqrt(before) * x0) ** 2) / (1 - before) / 2
        log_density -= (x_t - math.sqrt(1 - beta) * grid) ** 2 / beta / 2
        density = log_density.softmax(0)
        mean = float((density * grid).sum())
        variance = float((density * (grid - mean) ** 2).sum())
        sigma, sigma_next = schedule.sigma_hat(torch.tensor([t, t - 1]))
        low, high = log_variance_bounds(sigma, sigma_next)
        assert float(low.exp()) * before == pytest.approx(variance, rel=1e-6)
        # 1e-8: the level that stands for infinity
        assert float(low.exp()) * before == pytest.approx(tilde, rel=1e-8)
        assert float(high.exp()) * before == pytest.approx(beta, rel=1e-8)
        if t < 999:  # x = x_t / alpha_t of infinite noise has no coordinates
            ratio = float(sigma_next / sigma) ** 2
            ours = x0 + ratio * (x_t / float(schedule.alpha(torch.tensor(t))) - x0)
            assert ours * math.sqrt(before) == pytest.approx(mean, abs=1e-8)


def test_the_learned_log_variance_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range"
    )
    raw = normals(1, 2, 3, 3, seed=0)
    for t in (1, 2, 100, 999):
        expected = theirs._get_variance(t, predicted_variance=raw)
        low, high = step_bounds(SCHEDULE, torch.tensor([t]))
        to_x_t = 2 * math.log(float(SCHEDULE.alpha(torch.tensor(t - 1))))
        found = learned_log_variance(raw, low, high) + to_x_t
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=3e-3)  # theirs is float32, 1 - 0.998


def test_the_bounds_of_a_longer_step_contain_the_best_variance_of_gaussian_data() -> None:
    for (sigma, sigma_next), std in product([(14.0, 3.0), (3.0, 0.5), (0.5, 0.03125)], [0.01, 0.5, 1.0]):
        # Var(x' | x) of x = x0 + sigma noise for data N(0, std^2).
        ratio = (sigma_next / sigma) ** 2
        posterior = std**2 * sigma**2 / (std**2 + sigma**2)
        best = sigma_next**2 * (1 - ratio) + (1 - ratio) ** 2 * posterior
        low, high = (float(b.exp()) for b in log_variance_bounds(*torch.tensor([sigma, sigma_next]).double()))
        assert low <= best <= high * (1 + 1e-12)
        if std == 1.0:
            assert best == pytest.approx(high, rel=1e-12)


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["scaled_linear", "zero_snr"])
def test_the_terms_of_the_bound_are_torchs_divergences(schedule: Schedule) -> None:
    t = torch.tensor([0, 1, 2, 500, 998, 999])
    x0, predicted, raw = (normals(6, 2, 2, 2, seed=seed) for seed in (1, 2, 3))
    low, high = (bound.view(-1, 1, 1, 1) for bound in step_bounds(schedule, t))
    log_variance = learned_log_variance(raw, low, high)
    found = step_nats(schedule, t, (x0 - predicted).square(), log_variance)
    for i, step in enumerate(t.tolist()):
        if step == 0:
            # In units of the data, whose alpha is 1.
            first = float(schedule.alphas_cumprod[0])
            expected = -Normal(predicted[i], (log_variance[i] / 2).exp()).log_prob(x0[i])
            clipped = ddpm(schedule, 1)[3]
            assert float(low[0].exp()) == pytest.approx(clipped, rel=1e-9)
            assert float(high[0].exp()) == pytest.approx(1 - first, rel=1e-9)
        else:
            beta, now, before, tilde = ddpm(schedule, step)
            # Ho et al. 2020, Eq. 7, for x0 and for what is predicted, at the same x_t.
            gain = math.sqrt(before) * beta / (1 - now)
            q = Normal(gain * x0[i], math.sqrt(tilde))
            p = Normal(gain * predicted[i], math.sqrt(before) * (log_variance[i] / 2).exp())
            expected = kl_divergence(q, p)
        torch.testing.assert_close(found[i], expected, rtol=1e-7, atol=1e-10)


def output_of(weights: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weights, x).tanh()


@pytest.mark.parametrize("source", ["epsilon", "v", "x0", "flow", "edm"])
def test_the_hybrid_loss_is_the_simple_one_and_a_thousandth_of_the_bound(source: str) -> None:
    schedule = SCHEDULE if source == "epsilon" else ZERO_SNR
    t = torch.tensor([0, 1, 300, 999])
    x0, noise = (normals(4, 2, 3, 3, seed=seed) for seed in (4, 5))
    start = normals(4, 2, seed=6)
    calls = []

    def loss(weights: Tensor, **settings: object) -> Tensor:
        def network(x: Tensor, time: Tensor, c: Conditioning) -> Tensor:
            calls.append(x)
            output = output_of(weights, x)
            return output if settings.get("learned_variance") else output[:, :2]

        config = ObjectiveConfig(source, source, **settings)  # type: ignore[arg-type]
        return loss_per_sample(network, schedule, config, x0, noise, t, NOTHING)

    both, simple = (start.clone().requires_grad_() for _ in range(2))
    found, plain = loss(both, learned_variance=True, weight="uniform"), loss(simple)
    assert len(calls) == 2
    # The bound's term out of its definition.
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
    direct = start.clone().requires_grad_()
    x_t = alpha * x0 + sigma * noise
    output = output_of(direct, x_t)  # with data of unit deviation EDM's input is x_t itself
    mean, raw = output[:, :2].detach(), output[:, 2:]
    predicted = {
        "epsilon": (x_t - sigma * mean) / alpha,
        "v": alpha * x_t - sigma * mean,
        "x0": mean,
        "flow": (x_t - sigma * mean) / (alpha + sigma),
        "edm": alpha * x_t + sigma * mean,
    }[source]
    low, high = (bound.view(-1, 1, 1, 1) for bound in step_bounds(schedule, t))
    nats = step_nats(schedule, t, (x0 - predicted).square(), low + (raw + 1) / 2 * (high - low)).flatten(1).mean(1)
    expected = plain + 0.001 * 1000 * nats / math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(both.grad[:2], simple.grad[:2], rtol=1e-12, atol=1e-14)  # no gradient to the mean
    torch.testing.assert_close(both.grad[2:], direct.grad[2:], rtol=1e-7, atol=1e-9)
    assert float(both.grad[2:].abs().min()) > 0


def test_the_best_raw_output_is_where_the_gradient_vanishes() -> None:
    """Gaussian data and the best mean: the variance that minimizes the expected term is the true reverse variance."""
    std = 0.6
    points = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64) * math.sqrt(2)
    x0, noise = (std * points[:, 0]).view(-1, 1, 1, 1), points[:, 1].view(-1, 1, 1, 1)
    for t in (1, 100, 600, 999):
        alpha, sigma = (float(c(torch.tensor(t))) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        level, level_next = SCHEDULE.sigma_hat(torch.tensor([t, t - 1])).tolist()
        ratio = (level_next / level) ** 2
        best = level_next**2 * (1 - ratio) + (1 - ratio) ** 2 * std**2 * level**2 / (std**2 + level**2)
        low, high = step_bounds(SCHEDULE, torch.tensor(t))
        raw = ((math.log(best) - low) / (high - low) * 2 - 1).requires_grad_()

        def network(x: Tensor, time: Tensor, c: Conditioning, a=alpha, s=sigma, r=raw) -> Tensor:
            return torch.cat([a * std**2 / (a**2 * std**2 + s**2) * x, r.expand_as(x)], 1)

        config = ObjectiveConfig("x0", "x0", learned_variance=True)
        loss_per_sample(network, SCHEDULE, config, x0, noise, torch.full((4,), t), NOTHING).mean().backward()
        assert abs(raw.grad.item()) < 1e-9
        assert -1 <= raw.item() <= 1


def test_halves_are_the_mean_and_the_variance_in_order() -> None:
    output = normals(2, 8, 3, 3, seed=9)
    mean, raw = halves(output, 4)
    assert torch.equal(torch.cat([mean, raw], 1), output)
    assert halves(output, 8)[1] is None
    with pytest.raises(ValueError, match="has 8 channels, expected 3, or 6 with learned variance"):
        halves(output, 3)


def test_learned_variance_where_there_is_none_is_an_error() -> None:
    x, t = torch.zeros(1, 2, 2, 2), torch.tensor([3])
    config = ObjectiveConfig("v", "v", learned_variance=True)
    with pytest.raises(ValueError, match=r"output has shape \(1, 2, 2, 2\), expected \(1, 4, 2, 2\)"):
        loss_per_sample(lambda x, *_: x, SCHEDULE, config, x, x, t, NOTHING)
    flow = ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))
    config = ObjectiveConfig("flow", "flow", learned_variance=True)
    with pytest.raises(ValueError, match="schedule of continuous time"):
        loss_per_sample(lambda x, *_: x, flow, config, x, x, torch.tensor([0.5]), NOTHING)
    with pytest.raises(ValueError, match=r"offset_noise: found 0\.1 with learned_variance"):
        ObjectiveConfig(learned_variance=True, offset_noise=0.1)


def test_learned_variance_never_waits_for_the_device() -> None:
    latents = torch.zeros(2, 4, 8, 8, device="meta")
    config = ObjectiveConfig("v", "v", learned_variance=True)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    found = loss_per_sample(
        lambda x, *_: torch.cat([x, x], 1), ZERO_SNR.to("meta"), config, latents, latents, t, NOTHING
    )
    assert found.shape == (2,)
