"""The noise schedule of training.

Enters: a ScheduleConfig, in diffusers' field names. Leaves: a Schedule of float64 tables gathered by timestep, and the
timestep of a noise level sigma_hat = sigma / alpha.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

# Stands for the infinite level of a schedule with zero terminal SNR. At 2^26 float64 represents sqrt(1 + sigma^2) as
# sigma, so that the network is given the start noise bit by bit, and a sampler's step from here differs from its limit
# at infinity by about 1e-8 of the noise, which is also what rounding costs there: a larger level would not be closer.
TERMINAL_SIGMA = 2.0**26


@dataclass
class ScheduleConfig:
    """The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), alpha_t^2 + sigma_t^2 = 1."""

    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    """How beta grows with t: `scaled_linear` is linear in sqrt(beta) (Stable Diffusion; CompVis calls it linear),
    `linear` is linear in beta itself (DDPM), `squaredcos_cap_v2` the cosine of Nichol and Dhariwal, which takes neither
    beta_start nor beta_end."""
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


BETA_SCHEDULES: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
}


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod, its root shifted to end at exactly 0 and scaled to keep its first (Lin et al. 2023, Alg. 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


class Schedule:
    """Tables of the forward process, (T,) float64; gathered by timestep on their device, without host synchronization.

    Raises:
        ValueError: noise levels that float64 does not hold apart, or that reach TERMINAL_SIGMA without rescaling.
    """

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
        self.zero_terminal_snr = config.rescale_betas_zero_snr
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self._alpha = alphas_cumprod.sqrt()
        self._sigma = (1 - alphas_cumprod).sqrt()
        self._snr = alphas_cumprod / (1 - alphas_cumprod)
        self._sigma_hat = levels.clamp(max=TERMINAL_SIGMA)

    def to(self, device: torch.device | str) -> Self:
        """The same schedule with its tables on `device`."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data in x_t, sqrt(alphas_cumprod[t]), float64 of t's shape; t is int64 in [0, T)."""
        return self._gather(self._alpha, t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t, sqrt(1 - alphas_cumprod[t]), float64 of t's shape."""
        return self._gather(self._sigma, t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, float64 of t's shape; exactly 0 at a zero-SNR terminal timestep."""
        return self._gather(self._snr, t)

    def sigma_hat(self, t: Tensor) -> Tensor:
        """Noise level sigma / alpha in variance-exploding coordinates; TERMINAL_SIGMA where the SNR is zero."""
        return self._gather(self._sigma_hat, t)

    def timestep(self, sigma_hat: Tensor) -> Tensor:
        """Timestep of a noise level: the inverse of `sigma_hat`, exact on timesteps, log-linear between them.

        float64 of the argument's shape, on the device of the tables, where the range check waits for an accelerator.
        Levels outside by up to 1e-6 of themselves, float32's rounding, count as the ends.

        Raises:
            ValueError: a level outside of the schedule's, or NaN.
        """
        levels = self._sigma_hat
        low, high = levels[[0, -1]].tolist()
        level = sigma_hat.to(levels)
        if not bool(((level >= low * (1 - 1e-6)) & (level <= high * (1 + 1e-6))).all()):
            raise ValueError(
                f"sigma: found {level.min().item():.6g} to {level.max().item():.6g}, "
                f"expected noise levels from {low:.6g} to {high:.6g}, those this schedule was trained with"
            )
        level = level.clamp(low, high)
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
