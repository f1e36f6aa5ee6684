"""The training objective: what the network puts out, whose error is minimized, and how it is weighted.

Enters: clean latents, noise and timesteps of a batch, and the network. Leaves: one loss a sample. A target is a line in
TARGETS, a weighting one in WEIGHTS, a distribution of timesteps one in TIMESTEP_SAMPLING.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.models.conditioning import Conditioning

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t (B, C, H, W), t (B,), conditioning) -> prediction (B, C, H, W)."""
Coefficient = Tensor | float
TargetName = Literal["epsilon", "v", "x0"]


@dataclass
class ObjectiveConfig:
    """The loss of a sample: weight(t) times the mean squared error of one view of the network's prediction."""

    parameterization: TargetName = "epsilon"
    """What the network puts out: the noise, the velocity v = alpha noise - sigma x0, or the clean latents."""
    loss: TargetName = "epsilon"
    """Whose error is minimized, after exact conversion of the prediction; independent of the parameterization."""
    weight: Literal["uniform", "min_snr"] = "uniform"
    """Weight of that error: 1, or min(SNR, gamma) in terms of x0's error (Hang et al. 2023) whatever `loss` is. With
    zero terminal SNR min_snr gives the last timestep, where sampling starts, weight 0: uniform suits it better."""
    min_snr_gamma: float = 5.0
    """Gamma of min_snr: the SNR from which on all timesteps have the same weight on x0's error."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of t / T in training: uniform, or logit-normal, which prefers the middle (Esser et al. 2024)."""
    logit_mean: float = 0.0
    """Mean of logit(t / T) with logit_normal; above 0 prefers noisier timesteps."""
    logit_std: float = 1.0
    """Standard deviation of logit(t / T) with logit_normal."""

    def __post_init__(self) -> None:
        choices: dict[str, list[str]] = {
            "parameterization": [*TARGETS],
            "loss": [*TARGETS],
            "weight": [*WEIGHTS],
            "timestep_sampling": [*TIMESTEP_SAMPLING],
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"objective.{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        for name in ("min_snr_gamma", "logit_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name}: found {getattr(self, name)}, expected a positive number")


def check_parameterization(parameterization: str, zero_terminal_snr: bool) -> None:
    """Raises ValueError for a network that puts out the noise where a timestep holds nothing but noise.

    There the prediction is the input itself and tells nothing of x0 = (x_t - sigma noise) / alpha, with alpha = 0.
    """
    if zero_terminal_snr and parameterization == "epsilon":
        raise ValueError(
            "objective.parameterization: found 'epsilon' with zero terminal SNR (noise.rescale_betas_zero_snr), where "
            "x0 cannot be computed from it; expected 'v' or 'x0', or a schedule without rescaling"
        )


# A target is a combination a x0 + b noise; with x_t = alpha x0 + sigma noise it determines both where
# b alpha - a sigma is not 0. Conversions and errors follow from (a, b) alone.


def epsilon_target(alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
    """The noise (Ho et al. 2020, Eq. 14)."""
    return 0.0, 1.0


def v_target(alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
    """The velocity alpha noise - sigma x0 (Salimans & Ho 2022, section 4)."""
    return -sigma, alpha


def x0_target(alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
    """The clean latents (Ho et al. 2020, section 3.2)."""
    return 1.0, 0.0


TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Coefficient, Coefficient]]] = {
    "epsilon": epsilon_target,
    "v": v_target,
    "x0": x0_target,
}


def determinant(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """b alpha - a sigma of a target: its error at fixed x_t is that many times v's; epsilon alpha, v 1, x0 -sigma."""
    a, b = TARGETS[name](alpha, sigma)
    return b * alpha - a * sigma


def convert(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, *, source: str, target: str) -> Tensor:
    """The prediction of `source` as one of `target` ("epsilon", "v", "x0"), for the same x_t = alpha x0 + sigma noise.

    All four tensors broadcast to x_t, (B, C, H, W); `coefficients` gives alpha and sigma of timesteps. Finite at alpha
    = 0 except from epsilon, at sigma = 0 except from x0.
    """
    if source == target:
        return prediction
    a, b = TARGETS[source](alpha, sigma)
    scale = 1 / determinant(source, alpha, sigma)
    data = (b * x_t - sigma * prediction) * scale
    noise = (alpha * prediction - a * x_t) * scale
    c, d = TARGETS[target](alpha, sigma)
    return c * data + d * noise


def coefficients(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of timesteps t (B,), to broadcast over `like` (B, ...), in its dtype but float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = (-1, *[1] * (like.ndim - 1))
    return schedule.alpha(t).to(dtype).view(shape), schedule.sigma(t).to(dtype).view(shape)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t noise (Ho et al. 2020, Eq. 4), (B, ...), float32 at least; t (B,) int64 in [0, T)."""
    alpha, sigma = coefficients(schedule, t, x0)
    return alpha * x0 + sigma * noise


def uniform_weight(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """1: the simple loss when `loss` is epsilon (Ho et al. 2020, Eq. 14)."""
    return torch.ones_like(snr)


MIN_SNR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1),  # min(SNR, gamma) / SNR, and its limit 1 at SNR 0
    "v": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "x0": lambda snr, gamma: snr.clamp(max=gamma),
}


def min_snr(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """min(SNR, gamma) on x0's error, written for the error that `loss` names (Hang et al. 2023, section 3.4)."""
    return MIN_SNR[config.loss](snr, config.min_snr_gamma)


WEIGHTS: dict[str, Callable[[Tensor, ObjectiveConfig], Tensor]] = {"uniform": uniform_weight, "min_snr": min_snr}


def weight(schedule: Schedule, config: ObjectiveConfig, t: Tensor) -> Tensor:
    """Weight of the error of `config.loss` at timesteps t (B,), float64."""
    return WEIGHTS[config.weight](schedule.snr(t), config)


def loss_per_sample(
    network: Network,
    schedule: Schedule,
    config: ObjectiveConfig,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """weight(t) times the squared error of `config.loss`, mean over all but the batch, (B,).

    x0 and noise are (B, C, H, W), t is (B,) int64 on the schedule's device. The network is called once, under the
    caller's autocast; what follows it is float32, or float64 for float64 latents. The error of the loss's target is
    that of the network's own output times a factor of t alone, so that nothing cancels where alpha or sigma is small.

    Raises:
        ValueError: epsilon parameterization with zero terminal SNR; a prediction of another shape than the latents.
    """
    parameterization, loss = config.parameterization, config.loss
    check_parameterization(parameterization, schedule.zero_terminal_snr)
    alpha, sigma = coefficients(schedule, t, x0)  # (B, 1, 1, 1)
    dtype = alpha.dtype
    x0, noise = x0.to(dtype), noise.to(dtype)
    prediction = network(alpha * x0 + sigma * noise, t, conditioning)
    if prediction.shape != x0.shape:
        raise ValueError(f"the network's output has shape {tuple(prediction.shape)}, expected {tuple(x0.shape)}")
    a, b = TARGETS[parameterization](alpha, sigma)
    error = (prediction.to(dtype) - (a * x0 + b * noise)).square().flatten(1).mean(dim=1)  # (B,)
    levels = schedule.alpha(t), schedule.sigma(t)
    factor = (determinant(loss, *levels) / determinant(parameterization, *levels)) ** 2
    return (weight(schedule, config, t) * factor).to(dtype) * error


def uniform_timesteps(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """t / T as it is drawn."""
    return u


def logit_normal(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """t / T whose logit is normal, by inversion of its distribution function (Esser et al. 2024, Eq. 19)."""
    position = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    # Far in the tail sigmoid rounds to 1, which would be timestep T.
    return position.clamp(max=1 - 2**-53)


TIMESTEP_SAMPLING: dict[str, Callable[[Tensor, ObjectiveConfig], Tensor]] = {
    "uniform": uniform_timesteps,
    "logit_normal": logit_normal,
}


def timesteps(u: Tensor, schedule: Schedule, config: ObjectiveConfig | None = None) -> Tensor:
    """Timesteps (B,) int64 in [0, T) of uniform draws u (B,) in [0, 1), on u's device; uniform without a config."""
    config = config or ObjectiveConfig()
    return (TIMESTEP_SAMPLING[config.timestep_sampling](u.double(), config) * schedule.num_timesteps).long()
