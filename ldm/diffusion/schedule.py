"""The discrete noise schedule of training.

Enters: a ScheduleConfig, in diffusers' field names. Leaves: a Schedule of float64 tables gathered by timestep, and the
timestep of a noise level sigma_hat = sigma / alpha. continuous.py has the schedules of continuous time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.process import TERMINAL_SIGMA, VARIANCE_PRESERVING, ForwardProcess


@dataclass
class ScheduleConfig:
    """The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), alpha_t^2 + sigma_t^2 = 1."""

    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    """How beta grows with t: `scaled_linear` is linear in sqrt(beta) (Stable Diffusion; CompVis calls it linear),
    `linear` is linear in beta itself (DDPM), `squaredcos_cap_v2` the cosine of Nichol and Dhariwal, which takes neither
    beta_start nor beta_end, `sigmoid` rises in an S between the two (GeoDiff)."""
    beta_start: float = 0.00085
    """Beta of the first timestep."""
    beta_end: float = 0.012
    """Beta of the last timestep."""
    num_train_timesteps: int = 1000
    """Number of timesteps T; t counts from 0 to T - 1."""
    rescale_betas_zero_snr: bool = False
    """Shift and scale sqrt(alphas_cumprod) so that the last timestep is pure noise (Lin et al. 2023); wants
    parameterization v or x0."""

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"noise.beta_schedule: found {self.beta_schedule!r}, expected one of {[*BETA_SCHEDULES]}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"noise.beta_start, noise.beta_end: found {self.beta_start}, {self.beta_end}, "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if self.num_train_timesteps < 2:
            raise ValueError(f"noise.num_train_timesteps: found {self.num_train_timesteps}, expected 2 or more")


def scaled_linear(config: ScheduleConfig) -> Tensor:
    """Betas whose square roots grow linearly (Rombach et al. 2022), (T,) float64."""
    start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    return torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float64) ** 2


def linear(config: ScheduleConfig) -> Tensor:
    """Betas that grow linearly (Ho et al. 2020, section 4), (T,) float64."""
    return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64)


def squaredcos_cap_v2(config: ScheduleConfig) -> Tensor:
    """Betas of a squared cosine alphas_cumprod, at most 0.999 (Nichol & Dhariwal 2021, Eq. 17), (T,) float64."""
    time = torch.linspace(0, 1, config.num_train_timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def sigmoid(config: ScheduleConfig) -> Tensor:
    """Betas on a logistic curve from -6 to 6, from start to end to 0.25 % of the range (Xu et al. 2022), (T,)."""
    rise = torch.linspace(-6, 6, config.num_train_timesteps, dtype=torch.float64).sigmoid()
    return config.beta_start + (config.beta_end - config.beta_start) * rise


BETA_SCHEDULES: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
    "sigmoid": sigmoid,
}


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod, its root shifted to end at exactly 0 and scaled to keep its first (Lin et al. 2023, Alg. 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


class Schedule(ForwardProcess):
    """Tables of the forward process, (T,) float64; gathered by timestep on their device, without host synchronization.

    Times are timesteps, int64 in [0, T); those that `timestep` returns for levels between are fractional.

    Raises:
        ValueError: noise levels that float64 does not hold apart, or that reach TERMINAL_SIGMA without rescaling.
    """

    path = VARIANCE_PRESERVING

    def __init__(self, config: ScheduleConfig) -> None:
        betas = BETA_SCHEDULES[config.beta_schedule](config)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.rescale_betas_zero_snr:
            alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
            betas = torch.cat([1 - alphas_cumprod[:1], 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]])
        levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        highest = float(levels[-2 if config.rescale_betas_zero_snr else -1])
        if not (float(levels[0]) > 0 and bool((levels.diff() > 0).all()) and highest < TERMINAL_SIGMA):
            raise ValueError(
                f"noise: found noise levels from {levels[0]:.3g} to {highest:.3g}, expected them to rise within "
                f"(0, {TERMINAL_SIGMA:.3g}); change noise.beta_start, noise.beta_end or noise.num_train_timesteps"
            )
        self.config = config
        self.num_timesteps = config.num_train_timesteps
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self._alpha = alphas_cumprod.sqrt()
        self._sigma = (1 - alphas_cumprod).sqrt()
        self._snr = alphas_cumprod / (1 - alphas_cumprod)
        self._sigma_hat = levels.clamp(max=TERMINAL_SIGMA)
        self.sigma_min, self.sigma_max = float(self._sigma_hat[0]), float(self._sigma_hat[-1])

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data in x_t, sqrt(alphas_cumprod[t]), float64 of t's shape; t is int64 in [0, T)."""
        return self._gather(self._alpha, t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t, sqrt(1 - alphas_cumprod[t]), float64 of t's shape."""
        return self._gather(self._sigma, t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, float64 of t's shape; exactly 0 at a zero-SNR terminal timestep."""
        return self._gather(self._snr, t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Natural logarithm of the signal-to-noise ratio; -inf at a zero-SNR terminal timestep."""
        return self.snr(t).log()

    def sigma_hat(self, t: Tensor) -> Tensor:
        """Noise level sigma / alpha in variance-exploding coordinates; TERMINAL_SIGMA where the SNR is zero."""
        return self._gather(self._sigma_hat, t)

    def at(self, position: Tensor) -> Tensor:
        """Timestep floor(position T), int64, of a position in [0, 1): each timestep has the same share."""
        return (position * self.num_timesteps).long()

    def position(self, t: Tensor) -> Tensor:
        """Middle of a timestep's share of [0, 1], (t + 1/2) / T."""
        return (t.double() + 0.5) / self.num_timesteps

    def nearest(self, sigma_hat: Tensor) -> Tensor:
        """Timestep, int64, that is nearest to a level in log sigma_hat; levels outside count as the ends."""
        return self._time(self._level(sigma_hat).clamp(self.sigma_min, self.sigma_max)).round().long()

    def network_time(self, t: Tensor) -> Tensor:
        """The timestep itself."""
        return t

    def _level(self, sigma_hat: Tensor) -> Tensor:
        return sigma_hat.to(self._sigma_hat)

    def _time(self, level: Tensor) -> Tensor:
        levels = self._sigma_hat
        below = (torch.searchsorted(levels, level, right=True) - 1).clamp(max=self.num_timesteps - 2)
        # Ratios first: on a timestep's own level they are exactly 1, or equal, and so are the logarithms' 0 and 1.
        return below + (level / levels[below]).log() / (levels[below + 1] / levels[below]).log()

    def _gather(self, table: Tensor, t: Tensor) -> Tensor:
        if t.is_floating_point():
            raise TypeError(f"timestep: found dtype {t.dtype}, expected an integer one")
        # Elsewhere the check would wait for the device; there an index that is too large is caught by its kernel.
        if t.device.type == "cpu" and not bool(((t >= 0) & (t < self.num_timesteps)).all()):
            raise ValueError(f"timestep: found {t.min()} to {t.max()}, expected 0 to {self.num_timesteps - 1}")
        return table[t]
