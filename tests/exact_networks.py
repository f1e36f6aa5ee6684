"""A network in closed form for the sampler tests: the exact expectations of data with two modes, for every (x_t, t).

Enters: a parameterization and a schedule. Leaves: the network, its denoiser, and noise for both libraries to share.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, denoiser
from ldm.diffusion.guidance import unguided
from ldm.diffusion.samplers import Noise
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
