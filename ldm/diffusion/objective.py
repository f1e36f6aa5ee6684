"""The training objective: one loss a sample out of one call of the network.

Enters: clean latents, noise and timesteps of a batch, and the network. Leaves: one loss a sample. The parts: targets.py
(what the network puts out), weights.py, timesteps.py, variance.py; settings in objective_config.py.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective_config import (
    ObjectiveConfig,
    check_objective,
)
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import TARGETS, determinant, network_input
from ldm.diffusion.variance import halves, learned_log_variance, step_bounds, step_nats
from ldm.diffusion.weights import weight, weight_of_error
from ldm.models.conditioning import Conditioning

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t (B, C, H, W), t (B,), conditioning) -> prediction (B, C, H, W), or (B, 2C, H, W) with learned variance."""


def coefficients(schedule: ForwardProcess, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of timesteps t (B,), to broadcast over `like` (B, ...), in its dtype but float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = (-1, *[1] * (like.ndim - 1))
    return schedule.alpha(t).to(dtype).view(shape), schedule.sigma(t).to(dtype).view(shape)


def add_noise(schedule: ForwardProcess, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t noise (Ho et al. 2020, Eq. 4), (B, ...), float32 at least; t (B,) int64 in [0, T)."""
    alpha, sigma = coefficients(schedule, t, x0)
    return alpha * x0 + sigma * noise


def with_offset(noise: Tensor, offset: Tensor | None, config: ObjectiveConfig) -> Tensor:
    """noise + offset_noise * offset, the noise of training (B, C, H, W); offset (B, C) is standard normal, keyed.

    Its covariance within a channel is I + offset_noise^2 (Guttenberg 2023, "Diffusion with offset noise").

    Raises:
        ValueError: offset noise without its draw, or a draw of another shape.
    """
    if not config.offset_noise:
        return noise
    if offset is None or offset.shape != noise.shape[:2]:
        raise ValueError(
            f"objective.offset_noise is {config.offset_noise}: found an offset of shape "
            f"{None if offset is None else tuple(offset.shape)}, expected one draw a sample and channel, "
            f"{tuple(noise.shape[:2])}"
        )
    return noise + config.offset_noise * offset.to(noise.dtype)[..., None, None]


def squared(error: Tensor, c: float) -> Tensor:
    """d^2."""
    return error.square()


def huber(error: Tensor, c: float) -> Tensor:
    """d^2 up to |d| = c, 2 c |d| - c^2 above (Huber 1964, times 2)."""
    size = error.abs()
    return torch.where(size <= c, error.square(), c * (2 * size - c))


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c): d^2 far below c, 2 c |d| far above (Charbonnier et al. 1997), times 2 c."""
    square = error.square()
    # Without the difference, which float32 loses for small errors.
    return 2 * c * square / ((square + c**2).sqrt() + c)


DISTANCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "squared": squared,
    "huber": huber,
    "pseudo_huber": pseudo_huber,
}


def loss_per_sample(
    network: Network,
    schedule: ForwardProcess,
    config: ObjectiveConfig,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    offset: Tensor | None = None,
) -> Tensor:
    """weight(t) times the squared error of `config.loss`, mean over all but the batch, (B,).

    x0 and noise are (B, C, H, W), t is (B,) as `timesteps` gives it, on the schedule's device. The network is called
    once, under the caller's autocast; what follows it is float32, or float64 for float64 latents. The error of the
    loss's target is that of the network's own output times a factor of t alone, so that nothing cancels where alpha or
    sigma is small. With learned variance the bound is added, vlb_weight T times its term at t in bits per dimension,
    whose expectation for uniform t is the whole bound; no gradient of it reaches the mean half.

    Args:
        offset: (B, C) standard normal, needed with offset noise.

    Raises:
        ValueError: an objective that the schedule cannot serve; a prediction of another shape than the latents, or than
            twice their channels with learned variance; offset noise without its draw.
    """
    parameterization = config.parameterization
    check_objective(config, schedule)
    alpha, sigma = coefficients(schedule, t, x0)  # (B, 1, 1, 1)
    dtype = alpha.dtype
    x0, noise = x0.to(dtype), with_offset(noise.to(dtype), offset, config)
    x_t = network_input(parameterization, alpha * x0 + sigma * noise, alpha, sigma, config.sigma_data)
    output = network(x_t, _told(schedule, t, dtype), conditioning)
    prediction, raw = _checked(output, x0, config)
    a, b = TARGETS[parameterization](alpha, sigma, config.sigma_data)
    error = prediction.to(dtype) - (a * x0 + b * noise)  # (B, C, H, W)
    levels = schedule.alpha(t), schedule.sigma(t)
    own = determinant(parameterization, *levels, config.sigma_data)
    if config.distance == "squared":
        loss = weight_of_error(schedule, config, t, parameterization).to(dtype) * _mean(error.square())
    else:
        scale = (determinant(config.loss, *levels, config.sigma_data) / own).to(dtype).view(alpha.shape)
        loss = weight(schedule, config, t).to(dtype) * _mean(DISTANCES[config.distance](scale * error, config.huber_c))
    if raw is None:
        return loss
    assert isinstance(schedule, Schedule), "check_objective admits no other with learned variance"
    in_x0 = (levels[1] / own).to(dtype).view(alpha.shape) * error.detach()
    low, high = (bound.to(dtype).view(alpha.shape) for bound in step_bounds(schedule, t))
    nats = step_nats(schedule, t, in_x0.square(), learned_log_variance(raw.to(dtype), low, high))
    return loss + config.vlb_weight * schedule.num_timesteps / math.log(2) * _mean(nats)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)  # (B,)


def _told(schedule: ForwardProcess, t: Tensor, dtype: torch.dtype) -> Tensor:
    """The network's time: integers as they are, others no longer than the latents' precision."""
    time = schedule.network_time(t)
    return time.to(dtype) if time.is_floating_point() else time


def _checked(output: Tensor, x0: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor | None]:
    """Mean half and, with learned variance, variance half of the network's output."""
    expected = (x0.shape[0], x0.shape[1] * (2 if config.learned_variance else 1), *x0.shape[2:])
    if output.shape != expected:
        why = " (twice the latents' channels: objective.learned_variance)" if config.learned_variance else ""
        raise ValueError(f"the network's output has shape {tuple(output.shape)}, expected {tuple(expected)}{why}")
    return halves(output, x0.shape[1])
