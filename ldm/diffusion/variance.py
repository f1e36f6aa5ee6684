"""The variance of one reverse step: its two bounds, the learned one between them, and the bound's term it learns from.

Enters: noise levels of a step, and the second half of a network's output. Leaves: log-variances in the
variance-exploding coordinates of samplers, and the terms of the variational bound in nats.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

VarianceName = Literal["beta_tilde", "beta", "learned"]
"""Variance of a model's reverse steps: the smaller bound, the larger one (Ho et al. 2020, section 3.2), or learned."""
VARIANCES: dict[str, VarianceName] = {"small": "beta_tilde", "large": "beta", "learned": "learned"}
"""By the names of command lines, which are those of diffusers (fixed_small, fixed_large)."""


def halves(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Mean half and variance half of a network's output: (B, C, ...) is the mean alone, (B, 2C, ...) both, in order.

    Raises:
        ValueError: another number of channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    raise ValueError(
        f"the network's output has {output.shape[1]} channels, expected {channels}, or {2 * channels} with learned "
        "variance"
    )


# In x = x0 + sigma noise, the posterior of x' at sigma' given x and x0 has the mean x0 + (sigma'/sigma)^2 (x - x0) and
# the variance sigma'^2 (1 - (sigma'/sigma)^2): DDPM's Eq. 6 and 7, divided by alpha'.


def log_variance_bounds(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of beta-tilde and beta of a step from sigma to sigma_next > 0, in x = x0 + sigma noise; float64.

    The best variance lies between: beta-tilde is that of data which is one point, beta that of unit normal data
    (Ho et al. 2020, section 3.2). Times alpha_next^2 they are those of x_t. At one step of a discrete schedule beta is
    its beta_t; over longer ones 1 - alphas_cumprod / alphas_cumprod_next.
    """
    sigma, sigma_next = sigma.double(), sigma_next.double()
    ratio = sigma_next / sigma
    low = 2 * sigma_next.log() + torch.log1p(-(ratio**2))
    return low, low + torch.log1p(sigma_next**-2) - torch.log1p(sigma**-2)


def learned_log_variance(raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log-variance that a network's second half stands for: from low at -1 to high at 1, linear, unbounded beyond.

    (Nichol & Dhariwal 2021, Eq. 15, with v = (raw + 1) / 2.) `low` and `high` broadcast over raw, (B, C, H, W).
    """
    share = (raw + 1) / 2
    return low + share * (high - low)


def step_bounds(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """`log_variance_bounds` of the reverse step from timestep t (B,) to t - 1, and of the decoder at t = 0; float64.

    The last step, from t = 0 to the data, is the Gaussian decoder: its posterior variance is 0, for which that of t = 1
    stands in (Nichol & Dhariwal 2021, section 3.1), in units of the data.
    """
    first = t == 0
    one = t.clamp(min=1)
    sigma, sigma_next = schedule.sigma_hat(one), schedule.sigma_hat(one - 1)
    low, high = log_variance_bounds(sigma, sigma_next)
    to_data = 2 * schedule.alpha(one - 1).log()  # of x at t = 0 in x_t's coordinates
    decoder_high = 2 * schedule.sigma(torch.zeros_like(t)).log()  # beta_0 = 1 - alphas_cumprod_0
    return torch.where(first, low + to_data, low), torch.where(first, decoder_high, high)


def step_nats(schedule: Schedule, t: Tensor, squared_error: Tensor, log_variance: Tensor) -> Tensor:
    """Term of the variational bound at timesteps t (B,), nats in each element, (B, ...).

    For t > 0 the KL divergence of the posterior q(x_{t-1} | x_t, x0) from the model's Gaussian (Ho et al. 2020, Eq. 5,
    L_{t-1}); at t = 0 minus the log-density of the data under the Gaussian decoder, L_0, which for latents takes the
    place of the discretized one for pixels of 256 values: it is a density's, and can be negative.

    Args:
        squared_error: (x0 - predicted x0)^2, (B, ...).
        log_variance: of the model, in the coordinates of `step_bounds`, broadcasting over it.
    """
    one = t.clamp(min=1)
    sigma, sigma_next = schedule.sigma_hat(one), schedule.sigma_hat(one - 1)
    low, _ = log_variance_bounds(sigma, sigma_next)
    shape, dtype = (-1, *[1] * (squared_error.ndim - 1)), squared_error.dtype
    shift = (1 - (sigma_next / sigma) ** 2).to(dtype).view(shape)  # of the mean, for an error of 1 in x0
    low = low.to(dtype).view(shape)
    precision = (-log_variance).exp()
    divergence = (log_variance - low + (low - log_variance).exp() + shift**2 * squared_error * precision - 1) / 2
    decoder = (math.log(2 * math.pi) + log_variance + squared_error * precision) / 2
    return torch.where((t == 0).view(shape), decoder, divergence)
