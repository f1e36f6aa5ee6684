"""The forward process x_t = alpha x0 + sigma noise: what discrete and continuous schedules have in common.

Enters: times t of a schedule, or noise levels sigma_hat = sigma / alpha. Leaves: alpha, sigma, SNR, log-SNR and
sigma_hat of a time, the time of a level, and how the two coefficients follow from the level alone (`Path`).
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

# Stands for the infinite level of a schedule with zero terminal SNR. At 2^26 float64 represents sqrt(1 + sigma^2) as
# sigma, so that the network is given the start noise bit by bit, and a sampler's step from here differs from its limit
# at infinity by about 1e-8 of the noise, which is also what rounding costs there: a larger level would not be closer.
TERMINAL_SIGMA = 2.0**26


@dataclass(frozen=True)
class Path:
    """How alpha and sigma of a process follow from the level sigma_hat = sigma / alpha, and the level from either.

    Each inverse is as precise as its argument: alpha near 1, or sigma near 1, tells the level to its own rounding only.
    """

    name: Literal["variance_preserving", "straight", "variance_exploding"]
    alpha: Callable[[Tensor], Tensor]
    """alpha of sigma_hat."""
    level_of_alpha: Callable[[Tensor], Tensor] | None
    """sigma_hat of alpha in (0, 1]; None where alpha is 1 at every level."""
    level_of_sigma: Callable[[Tensor], Tensor]
    """sigma_hat of sigma."""


VARIANCE_PRESERVING = Path(
    "variance_preserving",
    alpha=lambda level: (1 + level**2).rsqrt(),
    level_of_alpha=lambda alpha: ((1 - alpha) * (1 + alpha)).sqrt() / alpha,
    level_of_sigma=lambda sigma: sigma / ((1 - sigma) * (1 + sigma)).sqrt(),
)
"""alpha^2 + sigma^2 = 1 (Ho et al. 2020, Eq. 4)."""
STRAIGHT = Path(
    "straight",
    alpha=lambda level: 1 / (1 + level),
    level_of_alpha=lambda alpha: (1 - alpha) / alpha,
    level_of_sigma=lambda sigma: sigma / (1 - sigma),
)
"""alpha + sigma = 1 (Lipman et al. 2023, Eq. 22; Liu et al. 2023)."""
VARIANCE_EXPLODING = Path(
    "variance_exploding",
    alpha=torch.ones_like,
    level_of_alpha=None,
    level_of_sigma=lambda sigma: sigma,
)
"""alpha = 1 (Song et al. 2021, Eq. 9; Karras et al. 2022)."""


class ForwardProcess(ABC):
    """Alpha and sigma of times, and times of levels; times are int64 of a discrete schedule, float64 of a continuous.

    Results are float64, of the argument's shape, on its device. What takes times or positions never waits for an
    accelerator; `timestep` does, to check its range.
    """

    sigma_min: float
    """Lowest noise level sigma_hat."""
    sigma_max: float
    """Highest noise level; TERMINAL_SIGMA where the last time is pure noise."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """How alpha and sigma follow from the level."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data in x_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t."""

    @abstractmethod
    def sigma_hat(self, t: Tensor) -> Tensor:
        """Noise level sigma / alpha in variance-exploding coordinates; TERMINAL_SIGMA where the SNR is zero."""

    @abstractmethod
    def at(self, position: Tensor) -> Tensor:
        """Time at a position in [0, 1) of the schedule's range, 0 being the least noisy end."""

    @abstractmethod
    def position(self, t: Tensor) -> Tensor:
        """Position in [0, 1] of a time: the inverse of `at`, up to the rounding of discrete times."""

    @abstractmethod
    def nearest(self, sigma_hat: Tensor) -> Tensor:
        """Time of this schedule that is nearest to a level, levels outside counting as the ends; never waits."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What a network is told of a time, fractional ones included."""

    @abstractmethod
    def _time(self, level: Tensor) -> Tensor:
        """Time of a level within [sigma_min, sigma_max], fractional between those of a discrete schedule."""

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last time is pure noise."""
        return self.sigma_max == TERMINAL_SIGMA

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2; exactly 0 at a time of pure noise."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def log_snr(self, t: Tensor) -> Tensor:
        """Natural logarithm of the signal-to-noise ratio; -inf at a time of pure noise."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def timestep(self, sigma_hat: Tensor) -> Tensor:
        """Time of a noise level: the inverse of `sigma_hat`, exact on the timesteps of a discrete schedule.

        Levels outside by up to 1e-6 of themselves, float32's rounding, count as the ends.

        Raises:
            ValueError: a level outside of the schedule's, or NaN.
        """
        low, high = self.sigma_min, self.sigma_max
        level = self._level(sigma_hat)
        if not bool(((level >= low * (1 - 1e-6)) & (level <= high * (1 + 1e-6))).all()):
            raise ValueError(
                f"sigma: found {level.min().item():.6g} to {level.max().item():.6g}, "
                f"expected noise levels from {low:.6g} to {high:.6g}, those this schedule was trained with"
            )
        return self._time(level.clamp(low, high))

    def _level(self, sigma_hat: Tensor) -> Tensor:
        return sigma_hat.double()

    def timestep_of_alpha(self, alpha: Tensor) -> Tensor:
        """Time of a factor of the data; raises ValueError out of range, or where alpha is 1 at every time."""
        if self.path.level_of_alpha is None:
            raise ValueError(f"alpha is 1 at every time of a {self.path.name} process; give sigma or log-SNR")
        return self.timestep(self.path.level_of_alpha(alpha.double()))

    def timestep_of_sigma(self, sigma: Tensor) -> Tensor:
        """Time of a standard deviation of the noise; raises ValueError out of range."""
        return self.timestep(self.path.level_of_sigma(sigma.double()))

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Time of a log-SNR; raises ValueError out of range. -inf is the time of pure noise, where there is one."""
        level = (-log_snr.double() / 2).exp()
        return self.timestep(level.clamp(max=TERMINAL_SIGMA) if self.zero_terminal_snr else level)

    def to(self, device: torch.device | str) -> Self:
        """The same schedule with its tables on `device`."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved
