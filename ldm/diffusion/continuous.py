"""Noise schedules of continuous time: the VP process, cosine, the straight path of flow matching, and EDM's.

Enters: a ContinuousScheduleConfig. Leaves: a ContinuousSchedule with the methods of the discrete one, for float64 times
t; in closed form both ways, so that the time of a level is as precise as float64.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.process import (
    STRAIGHT,
    TERMINAL_SIGMA,
    VARIANCE_EXPLODING,
    VARIANCE_PRESERVING,
    ForwardProcess,
    Path,
)

# Networks were built for timesteps 0 to 1000; times in [0, 1] are told on that scale (Stable Diffusion 3, diffusers).
NETWORK_TIME = 1000.0


@dataclass
class ContinuousScheduleConfig:
    """The forward process x_t = alpha(t) x0 + sigma(t) noise in continuous time."""

    kind: Literal["vp", "cosine", "flow", "edm"] = "flow"
    """`vp` the variance-preserving SDE of Song et al. 2021 (Eq. 32); `cosine` alpha = cos(pi t / 2), sigma = sin(pi t
    / 2); `flow` the straight path alpha = 1 - t, sigma = t; `edm` alpha = 1, sigma = t (Karras et al. 2022)."""
    sigma_min: float | None = None
    """Lowest noise level sigma / alpha; unset, that of t = 1e-5 for vp (Song et al. 2021, appendix C), 0.001 for
    cosine and flow, 0.002 for edm (Karras et al. 2022, table 1)."""
    sigma_max: float | None = None
    """Highest noise level sigma / alpha; unset, that of t = 1 for vp, pure noise for cosine and flow, 80 for edm."""
    beta_min: float = 0.1
    """beta(0) of vp; beta(t) is linear."""
    beta_max: float = 20.0
    """beta(1) of vp."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"continuous_noise.kind: found {self.kind!r}, expected one of {[*KINDS]}")
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"continuous_noise.beta_min, continuous_noise.beta_max: found {self.beta_min}, {self.beta_max}, "
                "expected 0 < beta_min <= beta_max"
            )
        low = 0.0 if self.sigma_min is None else self.sigma_min
        high = TERMINAL_SIGMA if self.sigma_max is None else self.sigma_max
        if not (0 <= low < high <= TERMINAL_SIGMA and (self.sigma_min is None or self.sigma_min > 0)):
            raise ValueError(
                f"continuous_noise.sigma_min, continuous_noise.sigma_max: found {self.sigma_min}, {self.sigma_max}, "
                f"expected 0 < sigma_min < sigma_max <= {TERMINAL_SIGMA:.0f}, which stands for pure noise"
            )


class ContinuousSchedule(ForwardProcess):
    """A schedule of times t in [t_min, t_max], float64: within [0, 1], or EDM's t = sigma.

    Raises:
        ValueError: vp with a sigma_max above that of t = 1, or a sigma_min that is not below it.
    """

    def __init__(self, config: ContinuousScheduleConfig) -> None:
        self.config = config
        _, low, high = KINDS[config.kind]
        if config.kind == "vp":
            low, high = self._level_of_time(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()
            if (config.sigma_max or 0) > high * (1 + 1e-12):
                raise ValueError(
                    f"continuous_noise.sigma_max: found {config.sigma_max}, expected at most {high:.6g}, vp's at t = 1"
                )
        self.sigma_min = low if config.sigma_min is None else config.sigma_min
        self.sigma_max = high if config.sigma_max is None else config.sigma_max
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"continuous_noise.sigma_min: found {self.sigma_min:.6g}, expected less than the highest, "
                f"{self.sigma_max:.6g}"
            )
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
        self.t_min, self.t_max = self._time_of_level(ends).tolist()
        if self.zero_terminal_snr and config.kind in ("cosine", "flow"):
            self.t_max = 1.0

    @property
    def path(self) -> Path:
        """How alpha and sigma follow from the level."""
        return KINDS[self.config.kind][0]

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data in x_t, float64 of t's shape; t is float64 in [t_min, t_max]."""
        t = self._checked(t)
        if self.config.kind == "vp":
            return (-self._beta_integral(t) / 2).exp()
        if self.config.kind == "cosine":
            return (math.pi / 2 * (1 - t)).sin()  # exactly 0 at t = 1, where the cosine is 6e-17
        return 1 - t if self.config.kind == "flow" else torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t, float64 of t's shape."""
        t = self._checked(t)
        if self.config.kind == "vp":
            return (-torch.expm1(-self._beta_integral(t))).sqrt()
        return (math.pi / 2 * t).sin() if self.config.kind == "cosine" else t

    def sigma_hat(self, t: Tensor) -> Tensor:
        """Noise level sigma / alpha in variance-exploding coordinates; TERMINAL_SIGMA where the SNR is zero."""
        return self._level_of_time(self._checked(t)).clamp(max=TERMINAL_SIGMA)

    def at(self, position: Tensor) -> Tensor:
        """Time at a position in [0, 1]: linear between the ends, in the logarithm of t = sigma for edm."""
        if self.config.kind == "edm":
            return (math.log(self.t_min) + math.log(self.t_max / self.t_min) * position.double()).exp()
        return self.t_min + (self.t_max - self.t_min) * position.double()

    def position(self, t: Tensor) -> Tensor:
        """Position in [0, 1] of a time: the inverse of `at`."""
        t = self._checked(t)
        if self.config.kind == "edm":
            return (t / self.t_min).log() / math.log(self.t_max / self.t_min)
        return (t - self.t_min) / (self.t_max - self.t_min)

    def nearest(self, sigma_hat: Tensor) -> Tensor:
        """Time of a level; levels outside count as the ends."""
        return self._time(sigma_hat.double().clamp(self.sigma_min, self.sigma_max))

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, and for edm c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return t.log() / 4 if self.config.kind == "edm" else NETWORK_TIME * t

    def _time(self, level: Tensor) -> Tensor:
        # The ends are exact, also where the highest stands for infinity.
        inner = self._time_of_level(level)
        return torch.where(level >= self.sigma_max, torch.full_like(inner, self.t_max), inner)

    def _beta_integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t, -2 log alpha (Song et al. 2021, Eq. 33)."""
        return t * (self.config.beta_min + t * (self.config.beta_max - self.config.beta_min) / 2)

    def _level_of_time(self, t: Tensor) -> Tensor:
        if self.config.kind == "vp":
            return torch.expm1(self._beta_integral(t)).sqrt()
        if self.config.kind == "cosine":
            # Each half by the function that is precise there.
            return torch.where(t < 0.5, (math.pi / 2 * t).tan(), 1 / (math.pi / 2 * (1 - t)).tan())
        return t / (1 - t) if self.config.kind == "flow" else t

    def _time_of_level(self, level: Tensor) -> Tensor:
        if self.config.kind == "vp":
            # The root of (beta_max - beta_min) t^2 / 2 + beta_min t = L, written without a difference.
            integral, low = torch.log1p(level**2), self.config.beta_min
            return 2 * integral / (low + (low**2 + 2 * (self.config.beta_max - low) * integral).sqrt())
        if self.config.kind == "cosine":
            return level.atan() * (2 / math.pi)
        return level / (1 + level) if self.config.kind == "flow" else level

    def _checked(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            raise TypeError(f"time: found dtype {t.dtype}, expected a floating one: this schedule is continuous")
        t = t.double()
        low, high = self.t_min * (1 - 1e-6), self.t_max * (1 + 1e-6)
        # Elsewhere the check would wait for the device.
        if t.device.type == "cpu" and not bool(((t >= low) & (t <= high)).all()):
            raise ValueError(f"time: found {t.min()} to {t.max()}, expected {self.t_min:.6g} to {self.t_max:.6g}")
        return t.clamp(self.t_min, self.t_max)


KINDS: dict[str, tuple[Path, float, float]] = {
    "vp": (VARIANCE_PRESERVING, 0.0, TERMINAL_SIGMA),  # its ends follow from its betas
    "cosine": (VARIANCE_PRESERVING, 1e-3, TERMINAL_SIGMA),
    "flow": (STRAIGHT, 1e-3, TERMINAL_SIGMA),
    "edm": (VARIANCE_EXPLODING, 0.002, 80.0),
}
"""Of each kind its path, and its lowest and highest level where the config sets none."""
