"""Learned variance, step by step: exact for Gaussian data in however few, diffusers' on one network, fitted, guided."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from exact_networks import MODE, NOTHING, SCHEDULE, SHAPE, WIDTH, ZERO_SNR, assert_same, network, two_modes, unit_noise
from exact_networks import step_noise as noise_of_diffusers
from torch import Tensor

from ldm.diffusion.ancestral import ddpm, ddpm_learned
from ldm.diffusion.denoiser import Prediction, predictor
from ldm.diffusion.guidance import guided, guided_prediction
from ldm.diffusion.objective import loss_per_sample
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import sigmas
from ldm.diffusion.variance import log_variance_bounds
from ldm.models.conditioning import Conditioning


def raw_of(x_t: Tensor) -> Tensor:
    """A variance half that differs from element to element, in and a little beyond [-1, 1]."""
    return 1.3 * torch.sin(5 * x_t)


@pytest.mark.parametrize("std", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["scaled_linear", "zero_snr"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_the_exact_variance_gives_gaussian_data_their_own_in_however_few_steps(steps, schedule, std):
    levels = sigmas(schedule, steps)
    following = dict(zip(levels.tolist(), levels.tolist()[1:], strict=False))

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        level, after = float(sigma[0]), following[float(sigma[0])]
        posterior = std**2 * level**2 / (std**2 + level**2)
        raw = torch.zeros_like(x)
        if after > 0:
            # Bayes' rule for x' at the next level, given x; Bao et al. 2022 call it the optimal reverse variance.
            ratio = (after / level) ** 2
            optimal = after**2 * (1 - ratio) + (1 - ratio) ** 2 * posterior
            low, high = (float(one) for one in log_variance_bounds(torch.tensor(level), torch.tensor(after)))
            raw += 2 * (math.log(optimal) - low) / (high - low) - 1
        return Prediction(std**2 / (std**2 + level**2) * x, raw)

    def run(x: float, unit: int) -> float:
        """The sampler is linear in x and in the noises: one of them at a time."""
        found = ddpm_learned(
            predict, torch.full((1, 1), x, dtype=torch.float64), levels,
            noise=lambda step: torch.full((1, 1), float(step == unit), dtype=torch.float64),
        )  # fmt: skip
        return float(found)

    gains = [run(0.0, step) for step in range(steps)]
    # In the last step, with no noise, what is left of the data's own deviation below the last level is not drawn.
    last = float(levels[-2])
    kept = std**2 / (std**2 + last**2)
    x = math.sqrt(1 + float(levels[0]) ** 2)
    # x at the first level has the variance 1 + sigma^2 of unit data, of which the exact one differs by its own.
    found = run(x, -1) ** 2 * (std**2 + float(levels[0]) ** 2) / x**2 + sum(gain**2 for gain in gains)
    assert gains[-1] == 0, "no noise in the last step"
    assert found == pytest.approx(kept**2 * (std**2 + last**2), rel=1e-6)


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_learned_steps_are_those_of_diffusers_learned_range(spacing: str, parameterization: str) -> None:
    for steps, zero_snr in product([5, 10, 20, 50], [False, True]):
        if zero_snr and parameterization == "epsilon":
            continue
        schedule = ZERO_SNR if zero_snr else SCHEDULE
        theirs = DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[parameterization],
            variance_type="learned_range", timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr,
        )  # fmt: skip
        theirs.set_timesteps(steps)
        mean = network(parameterization, schedule)

        def both(x_t: Tensor, t: Tensor, text: Conditioning, mean=mean) -> Tensor:
            return torch.cat([mean(x_t, t, text), raw_of(x_t)], 1)

        x, generator = unit_noise(), torch.Generator().manual_seed(1)
        for t in theirs.timesteps:
            x = theirs.step(both(x, t.expand(2), NOTHING), t, x, generator=generator).prev_sample
        levels = sigmas(schedule, steps, spacing)
        predict = predictor(both, schedule, parameterization)
        ours = ddpm_learned(
            lambda x, sigma, predict=predict: predict(x, sigma, NOTHING), start(unit_noise(), levels), levels,
            noise=noise_of_diffusers(),
        )  # fmt: skip
        assert_same(ours, x)


def test_shares_of_zero_and_one_are_the_small_and_the_large_variance() -> None:
    levels = sigmas(SCHEDULE, 8)
    predict = predictor(network("v", SCHEDULE), SCHEDULE, "v")
    for raw, name in ((-1.0, "beta_tilde"), (1.0, "beta")):
        found = ddpm_learned(
            lambda x, sigma, raw=raw: Prediction(predict(x, sigma, NOTHING).x0, torch.full_like(x, raw)),
            start(unit_noise(), levels), levels, noise=noise_of_diffusers(),
        )  # fmt: skip
        expected = ddpm(
            lambda x, sigma: predict(x, sigma, NOTHING).x0, start(unit_noise(), levels), levels,
            noise=noise_of_diffusers(), variance=name,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_network_without_a_second_half_and_missing_noise_are_errors() -> None:
    levels = sigmas(SCHEDULE, 3)
    predict = predictor(network("v", SCHEDULE), SCHEDULE, "v")
    x = start(unit_noise(), levels)
    with pytest.raises(ValueError, match="found 'learned', but the network puts out no second half"):
        ddpm_learned(lambda x, sigma: predict(x, sigma, NOTHING), x, levels, noise=noise_of_diffusers())
    with pytest.raises(ValueError, match="ddpm adds noise"):
        ddpm_learned(lambda x, sigma: predict(x, sigma, NOTHING), x, levels)


@pytest.mark.parametrize("t", [100, 400])
def test_a_fitted_variance_tends_to_the_posteriors_of_a_mixture_place_by_place(t: int) -> None:
    """A table over x_t, fitted by the bound's term alone, against Bayes' rule for two modes."""
    count, bins = 60_000, 12
    rng = np.random.default_rng(7)
    x0 = torch.from_numpy(rng.choice([-MODE, MODE], count) + WIDTH * rng.standard_normal(count)).view(-1, 1, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(count)).view(-1, 1, 1, 1)
    alpha, sigma = (float(one(torch.tensor(t))) for one in (SCHEDULE.alpha, SCHEDULE.sigma))
    x_t = alpha * x0 + sigma * noise
    edges = torch.quantile(x_t, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    place = torch.bucketize(x_t, edges)
    table = torch.zeros(bins, dtype=torch.float64, requires_grad=True)
    best = two_modes(x_t, alpha, sigma)

    def both(x: Tensor, time: Tensor, text: Conditioning) -> Tensor:
        return torch.cat([best, table[place]], 1)

    config = ObjectiveConfig("x0", "x0", learned_variance=True, vlb_weight=1.0)
    optimizer = torch.optim.LBFGS([table], lr=1, max_iter=60, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        steps = torch.full((count,), t)
        loss = loss_per_sample(both, SCHEDULE, config, x0, noise, steps, NOTHING).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    variance = alpha**2 * WIDTH**2 + sigma**2
    weight = torch.sigmoid(2 * alpha * MODE * x_t / variance)
    apart = 2 * MODE * (1 - alpha**2 * WIDTH**2 / variance)  # of the modes' posterior means
    posterior = WIDTH**2 * sigma**2 / variance + weight * (1 - weight) * apart**2
    now, before = SCHEDULE.alphas_cumprod[t].item(), SCHEDULE.alphas_cumprod[t - 1].item()
    beta = 1 - now / before
    small = (1 - before) / (1 - now) * beta
    gain = math.sqrt(before) * beta / (1 - now)
    expected = torch.tensor([small + gain**2 * float(posterior[place == one].mean()) for one in range(bins)])
    fitted = math.log(small) + (table.detach() + 1) / 2 * (math.log(beta) - math.log(small))
    shares = [(one - math.log(small)) / (math.log(beta) - math.log(small)) for one in (fitted, expected.double().log())]
    # 5000 squared errors a place: each mean is known to about 2 %.
    torch.testing.assert_close(shares[0], shares[1], rtol=0.1, atol=0)
    assert shares[1].max() > 1.3 * shares[1].min(), "one variance for all places would do"


class Both:
    """Predictor whose halves are known functions of x and of the text, and that counts its calls."""

    def __init__(self, learned: bool = True) -> None:
        self.learned, self.rows = learned, []

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Prediction:
        self.rows.append(len(x))
        text = conditioning.text.mean((1, 2)).view(-1, 1, 1, 1)
        return Prediction(x * text, torch.cos(x) * text if self.learned else None)


def test_guidance_leads_the_variance_half_as_the_mean_in_the_same_call_and_rescaling_leaves_it() -> None:
    x, sigma = unit_noise(), torch.full((2,), 3.0, dtype=torch.float64)
    with_text, without = (Conditioning(torch.full((2, 1, 1), value, dtype=torch.float64)) for value in (0.7, -0.4))
    for rescale in (0.0, 0.6):
        both = Both()
        found = guided_prediction(both, with_text, without, 3.5, rescale)(x, sigma)
        assert both.rows == [2 * SHAPE[0]]
        torch.testing.assert_close(found.raw_variance, torch.cos(x) * (-0.4 + 3.5 * (0.7 + 0.4)))
        mean = guided(lambda x, s, c: Both()(x, s, c).x0, with_text, without, 3.5, rescale)(x, sigma)
        torch.testing.assert_close(found.x0, mean)
    both = Both()
    alone = guided_prediction(both, with_text, None, 1.0)(x, sigma)
    assert both.rows == [SHAPE[0]]
    torch.testing.assert_close(alone.raw_variance, torch.cos(x) * 0.7)
    assert guided_prediction(Both(learned=False), with_text, without, 2.0)(x, sigma).raw_variance is None
    with pytest.raises(ValueError, match="one conditioning only"):
        guided_prediction(Both(), with_text, None, 2.0)
    with pytest.raises(ValueError, match=r"rescale 2\.0, expected 0 to 1"):
        guided_prediction(Both(), with_text, without, 2.0, 2.0)


def test_log_linear_guidance_is_the_variance_of_the_guided_product_to_first_order() -> None:
    """p_u^(1 - s) p_c^s of two Gaussians has the precision (1 - s) / v_u + s / v_c."""
    low, high, scale = math.log(0.02), math.log(0.05), 3.0
    errors = []
    for apart in (0.1, 0.05):
        raw_u, raw_c = 0.2, 0.2 + apart
        log_u, log_c = (low + (raw + 1) / 2 * (high - low) for raw in (raw_u, raw_c))
        exact = -math.log((1 - scale) * math.exp(-log_u) + scale * math.exp(-log_c))
        errors.append(abs(log_u + scale * (log_c - log_u) - exact))
    assert errors[0] < 0.02
    assert errors[1] < 0.3 * errors[0], "the error falls with the square of the difference"


def test_a_schedule_that_ends_in_noise_alone_takes_its_first_step_finitely() -> None:
    schedule: Schedule = ZERO_SNR
    levels = sigmas(schedule, 4)
    predict = predictor(lambda x, t, text: torch.cat([x * 0, x * 0 + 0.5], 1), schedule, "v")
    found = ddpm_learned(
        lambda x, sigma: predict(x, sigma, NOTHING), start(unit_noise(), levels), levels, noise=noise_of_diffusers()
    )
    assert found.isfinite().all()
