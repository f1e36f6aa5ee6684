"""Ancestral samplers and DDIM: DDPM's chain with three variances, and its deterministic limit in both directions.

Enters and leaves: as sampler_contract.py says; with learned variance predict(x, sigma) enters for denoise, Analytic-DPM
takes variances, estimated once, and inversion walks from latents to noise. Variance-exploding coordinates:
x_t = x0 + sigma_t noise, which is Ho's x_t / alpha_t.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Predict
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, given, levels_of, steps
from ldm.diffusion.variance import learned_log_variance, log_variance_bounds


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    variance: Literal["beta_tilde", "beta"] = "beta_tilde",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Alg. 2 and Eq. 7), with the posterior's variance or with beta_t.

    `beta_tilde` is exact for data that is one point, `beta` for unit normal data (section 3.2). No noise in the last
    step.
    """
    if variance not in ("beta_tilde", "beta"):
        raise ValueError(f"variance: found {variance!r}, expected 'beta_tilde' or 'beta'")
    draw = given(noise, "ddpm")
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        x = torch.lerp(denoised, x, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            # beta_t / alphas_cumprod_{t-1}, in variance-exploding coordinates
            beta = (sigma**2 - sigma_next**2) * (1 + sigma_next**2) / (1 + sigma**2)
            beta_tilde = (sigma**2 - sigma_next**2) * sigma_next**2 / sigma**2
            x.add_(draw(i).to(x), alpha=math.sqrt(beta if variance == "beta" else beta_tilde))
    return x


@torch.no_grad()
def ddpm_learned(
    predict: Predict,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """`ddpm` with the variance that the network learned, element by element (Nichol & Dhariwal 2021, Eq. 15).

    Over a step longer than those of training the two bounds are the longer step's, and the share between them is what
    the network says of its own (their section 4). No noise in the last step.

    Args:
        predict: (x, sigma) -> Prediction of a network with 2C channels: denoiser.predictor, guided or not.

    Raises:
        ValueError: of a network with C channels.
    """
    draw = given(noise, "ddpm")
    for i, sigma, sigma_next in steps(sigmas, progress):
        x0, raw = predict(x, torch.full((x.shape[0],), sigma, dtype=torch.float64))
        if raw is None:
            raise ValueError(
                "variance: found 'learned', but the network puts out no second half; expected 'beta_tilde' or 'beta'"
            )
        x = torch.lerp(x0, x, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            # Of 0-dimensional tensors on the CPU, which join those of any device.
            low, high = log_variance_bounds(*torch.tensor([sigma, sigma_next], dtype=torch.float64))
            x.addcmul_(draw(i).to(x), (learned_log_variance(raw, low, high) / 2).exp())
    return x


@torch.no_grad()
def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Euler's step down to sigma_down, then noise of sigma_up back to the next level (k-diffusion's Euler a).

    sigma_up^2 + sigma_down^2 = sigma_next^2; sigma_up is the posterior's deviation (Song et al. 2021b, Eq. 47) times
    `eta` in [0, 1]. With eta 1 it is ddpm with beta_tilde, with another ddim with that eta, in other words.
    """
    check_eta(eta)
    draw = given(noise, "euler_ancestral")
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        ratio = sigma_next / sigma
        sigma_up = eta * sigma_next * math.sqrt(1 - ratio**2)
        # sqrt(sigma_next^2 - sigma_up^2), of which rounding would leave nothing at high levels
        sigma_down = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
        x = torch.lerp(denoised, x, sigma_down / sigma)  # x + (sigma_down - sigma) (x - denoised) / sigma
        if sigma_next > 0:
            x.add_(draw(i).to(x), alpha=sigma_up)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16): eta 0 is deterministic, 1 is ddpm with beta_tilde; order 1."""
    check_eta(eta)
    draw = given(noise, "ddim with eta > 0") if eta > 0 else None
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        ratio = sigma_next / sigma
        # kept^2 + fresh^2 = sigma_next^2, in a form whose rounding cannot make a root's argument negative
        kept = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
        fresh = eta * sigma_next * math.sqrt(1 - ratio**2)
        x = torch.lerp(denoised, x, kept / sigma)
        if draw is not None and sigma_next > 0:
            x.add_(draw(i).to(x), alpha=fresh)
    return x


@torch.no_grad()
def ddim_inversion(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, progress: Progress | None = None, refinements: int = 0
) -> Tensor:
    """DDIM backwards (Song et al. 2021, section 4.3): latents x at level sigmas[-1] -> noise at level sigmas[0].

    A step of ddim is x_s = x_t - (sigma_t - sigma_s) eps(x_t, sigma_t); to solve it for x_t, the network is asked at
    x_s for want of x_t, which inverts the flow with order 1. Each of the `refinements` asks again at the x_t found (one
    more evaluation a step): a fixed-point iteration, with which ddim over the same `sigmas` gives x again.

    Raises:
        ValueError: refinements below 0; levels that leave no step between 0 and the terminal level of a zero-SNR
            schedule, from where nothing leads back.
    """
    if refinements < 0:
        raise ValueError(f"refinements: found {refinements}, expected 0 or more")
    upwards = levels_of(sigmas)[::-1]
    if upwards[0] == 0 and upwards[1] >= TERMINAL_SIGMA:
        raise ValueError(f"sigmas: found {upwards[::-1]}, expected a level between the terminal one and 0")
    for i, (sigma, sigma_above) in enumerate(pairwise(upwards)):
        if sigma_above >= TERMINAL_SIGMA:
            # There x is all noise, so that the step's slope at x_s says nothing, while D, a constant, says all.
            above = x * (sigma_above / sigma)
            denoised = evaluate(denoise, above, sigma_above)
            x = denoised + (x - denoised) * (sigma_above / sigma)
        else:
            above = x
            for _ in range(1 + refinements):
                above = x + (1 - sigma / sigma_above) * (above - evaluate(denoise, above, sigma_above))
            x = above
        if progress is not None:
            progress(i + 1, len(upwards) - 1)
    return x


@torch.no_grad()
def analytic_dpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    variances: Tensor | None = None,
) -> Tensor:
    """Ancestral sampling with the optimal reverse variance (Bao et al. 2022, Theorem 1 with lambda = beta_tilde).

    sigma*^2 = beta_tilde + (1 - sigma_next^2 / sigma^2)^2 Var(x0 | x): exact in mean and variance for Gaussian data,
    in however few steps. `variances` (steps,) are PosteriorVariances.at the same sigmas, here clipped to
    what Theorem 2 allows, [0, sigma^2].

    Raises:
        ValueError: no variances, or of another number of levels.
    """
    draw = given(noise, "analytic_dpm")
    count = len(levels_of(sigmas)) - 1
    if variances is None or variances.shape != (count,):
        found = None if variances is None else tuple(variances.shape)
        raise ValueError(
            f"variances: found {found}, expected ({count},), one for each step: "
            "`python ldm/evaluate.py --scores variances` estimates them"
        )
    posterior = variances.tolist()
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        ratio = (sigma_next / sigma) ** 2
        x = torch.lerp(denoised, x, ratio)
        if sigma_next > 0:
            beta_tilde = sigma_next**2 * (1 - ratio)
            optimal = beta_tilde + (1 - ratio) ** 2 * min(max(posterior[i], 0.0), sigma**2)
            x.add_(draw(i).to(x), alpha=math.sqrt(optimal))
    return x


def check_eta(eta: float) -> None:
    """Raises ValueError unless eta, the share of the posterior's deviation that is drawn anew, is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: found {eta}, expected 0 to 1")
