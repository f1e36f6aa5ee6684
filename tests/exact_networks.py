"""Networks and denoisers in closed form for the sampler tests: exact expectations of Gaussians and mixtures of them.

Enters: a parameterization and a schedule, or the data's moments. Leaves: the network, its denoiser, the exact flow of a
denoiser, and noise for both libraries to share.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, denoiser
from ldm.diffusion.guidance import unguided
from ldm.diffusion.sampler_contract import Noise
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.conditioning import Conditioning

SCHEDULE = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
NOTHING = Conditioning(torch.zeros(2, 1, 1))
SHAPE = (2, 3, 4, 4)
MODE, WIDTH = 0.8, 0.3
"""The data: in every dimension one of two modes, +-MODE, with deviation WIDTH; E[x0 | x] is not linear in x."""


def two_modes(x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """E[x0 | x_t = alpha x0 + sigma noise]."""
    variance = alpha**2 * WIDTH**2 + sigma**2
    centre = MODE * torch.tanh(alpha * MODE * x_t / variance)
    return centre + alpha * WIDTH**2 / variance * (x_t - alpha * centre)


def network(parameterization: str, schedule: Schedule) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """The best predictor as a function of (x_t, t); between timesteps the level is log-linear in t."""
    log_levels = schedule.sigma_hat(torch.arange(1000)).log().numpy()

    def predict(x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        sigma_hat = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), log_levels)))
        alpha = (1 + sigma_hat**2).rsqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        x0 = two_modes(x_t, alpha, sigma)
        noise = (x_t - alpha * x0) / sigma
        return {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}[parameterization]

    return predict


def denoise_with(parameterization: str, schedule: Schedule = SCHEDULE) -> Denoise:
    return unguided(denoiser(network(parameterization, schedule), schedule, parameterization), NOTHING)


def gaussian(mean: Tensor | float, std: Tensor | float) -> Denoise:
    """E[x0 | x] for data N(mean, std^2) in every dimension; x is (B, d)."""
    return lambda x, sigma: mean + std**2 / (std**2 + sigma.view(-1, 1) ** 2) * (x - mean)


def mixture(centres: Tensor, width: float) -> Denoise:
    """E[x0 | x] for data in equal parts N(centre, width^2), centres (K, d); x is (B, d)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = width**2 + sigma.view(-1, 1) ** 2
        nearness = (-torch.cdist(x, centres).square() / (2 * variance)).softmax(1)
        centre = nearness @ centres
        return centre + width**2 / variance * (x - centre)

    return denoise


def geometric(high: float, low: float, steps: int) -> Tensor:
    """Levels evenly spaced in log sigma, both ends included."""
    return torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp()


def exact_flow(denoise: Denoise, x: Tensor, high: float, low: float, steps: int = 600) -> Tensor:
    """x taken along the probability-flow ODE: classical Runge-Kutta of order 4 in log sigma, error below 1e-8."""
    for sigma, sigma_next in pairwise(geometric(high, low, steps).tolist()):
        h = math.log(sigma_next / sigma)

        def slope(x: Tensor, part: float, sigma: float = sigma, h: float = h) -> Tensor:
            return x - denoise(x, torch.full((len(x),), sigma * math.exp(part * h), dtype=torch.float64))

        k1 = slope(x, 0)
        k2 = slope(x + h / 2 * k1, 0.5)
        k3 = slope(x + h / 2 * k2, 0.5)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, 1))
    return x


def numpy_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """Noise of any number of draws, keyed by (seed, draw)."""
    return lambda draw: torch.from_numpy(np.random.default_rng([seed, draw]).normal(size=shape))


def unit_noise(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=SHAPE))


def step_noise(seed: int = 1) -> Noise:
    """What diffusers draws from a generator with this seed, one tensor a step, in the order of the steps."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []

    def noise(step: int) -> Tensor:
        while len(drawn) <= step:
            drawn.append(torch.randn(SHAPE, generator=generator, dtype=torch.float64))
        return drawn[step]

    return noise


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=tolerance)
