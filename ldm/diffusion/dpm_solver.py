"""DPM-Solver and DPM-Solver++: exponential integrators in lambda = -log sigma, singlestep, multistep and stochastic.

Enters and leaves: as sampler_contract.py says. In variance-exploding coordinates alpha is 1, e^-h is sigma_next /
sigma, and the papers' linear term of a step is a mean of D and x. DPM-Solver (Lu et al. 2022a) holds the noise eps =
(x - D) / sigma for a polynomial in lambda, DPM-Solver++ (2022b) D.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, given, steps


@torch.no_grad()
def dpm_solver_2(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver-2 (Lu et al. 2022a, Alg. 1): order 2, two evaluations a step, the second halfway in lambda.

    One evaluation in a step to sigma 0, where lambda is infinite, and in the step from the terminal level of a zero-SNR
    schedule, where it was: both are then exact in the limit, if D is constant there.
    """
    dtype, x = x.dtype, x.double()
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        if sigma_next == 0 or sigma >= TERMINAL_SIGMA:
            x = torch.lerp(denoised, x, sigma_next / sigma)
            continue
        middle = math.sqrt(sigma * sigma_next)
        u = torch.lerp(denoised, x, middle / sigma)
        x = x.add(u - evaluate(denoise, u, middle), alpha=(sigma_next - sigma) / middle)
    return x.to(dtype)


@torch.no_grad()
def dpm_solver_3(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver-3 (Lu et al. 2022a, Alg. 2, r1 = 1/3, r2 = 2/3): order 3, three evaluations a step.

    One in a step to sigma 0 and from a terminal level, as dpm_solver_2.
    """
    dtype, x = x.dtype, x.double()
    r_1, r_2 = 1 / 3, 2 / 3
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        if sigma_next == 0 or sigma >= TERMINAL_SIGMA:
            x = torch.lerp(denoised, x, sigma_next / sigma)
            continue
        h = math.log(sigma / sigma_next)
        s_1, s_2 = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)
        eps = (x - denoised) / sigma
        u_1 = x.add(eps, alpha=s_1 - sigma)
        d_1 = (u_1 - evaluate(denoise, u_1, s_1)) / s_1 - eps
        u_2 = x.add(eps, alpha=s_2 - sigma)
        u_2.add_(d_1, alpha=-s_2 * r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1))
        d_2 = (u_2 - evaluate(denoise, u_2, s_2)) / s_2 - eps
        x = x.add(eps, alpha=sigma_next - sigma)
        x.add_(d_2, alpha=-sigma_next / r_2 * (math.expm1(h) / h - 1))
    return x.to(dtype)


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): order 2 with one evaluation a step; any spacing of the levels.

    The first step is of order 1, as there is no earlier evaluation, and so is a step to sigma 0, where lambda is
    infinite, and the one after the terminal level of a zero-SNR schedule, where it was.
    """
    dtype, x = x.dtype, x.double()
    previous: tuple[float, Tensor] | None = None
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        target = denoised
        if previous is not None and sigma_next > 0:
            sigma_before, denoised_before = previous
            r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            target = torch.lerp(denoised_before, denoised, 1 + 1 / (2 * r))  # D + (D - D_before) / (2 r)
        x = torch.lerp(target, x, sigma_next / sigma)
        previous = (sigma, denoised) if sigma < TERMINAL_SIGMA else None
    return x.to(dtype)


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5): the reverse SDE with dpmpp_2m's D; one evaluation a step.

    Orders of the first and last steps as dpmpp_2m; without the difference of D it is ddpm with beta_tilde. No noise in
    a step to 0.
    """
    draw, dtype, x = given(noise, "dpmpp_2m_sde"), x.dtype, x.double()
    previous: tuple[float, Tensor] | None = None
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        target = denoised
        if previous is not None and sigma_next > 0:
            sigma_before, denoised_before = previous
            r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            target = torch.lerp(denoised_before, denoised, 1 + 1 / (2 * r))
        x = torch.lerp(target, x, (sigma_next / sigma) ** 2)  # e^-2h
        if sigma_next > 0:
            x.add_(draw(i).to(x), alpha=sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
        previous = (sigma, denoised) if sigma < TERMINAL_SIGMA else None
    return x.to(dtype)


@torch.no_grad()
def dpmpp_3m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(3M): order 3 with one evaluation a step, D a parabola in lambda (Lu et al. 2022b, section 4, k = 3).

    The first step is of order 1 and the second of order 2, for want of earlier evaluations; a step to 0 is of order 1,
    and one more than twice as long as the one before of order 2. Three things differ from the usual code, which is of
    order 2 only:
    - D'' keeps its factor of Taylor's series, which for a divided difference is 2 / 2!.
    - The first step, whose error of order h^2 would be the run's, is corrected once D is known at its end (UniC-1, Zhao
      et al. 2023), for which no evaluation is needed.
    - D'' is damped by e^(-h/2): D approaches its limit as a power of sigma = e^-lambda, so that differences of earlier
      levels are too large for this step; in long steps that costs more than D'' gains.
    """
    dtype, x = x.dtype, x.double()
    history: list[tuple[float, Tensor, Tensor | None]] = []  # sigma, D, how D differs from the one before
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        difference = denoised - history[-1][1] if history else None
        if difference is not None and len(history) == 1:
            h = math.log(history[0][0] / sigma)
            x = x.add(difference, alpha=1 + math.expm1(-h) / h)
        ratio = sigma_next / sigma
        x = torch.lerp(denoised, x, ratio)
        if difference is not None and sigma_next > 0:
            h = -math.log(ratio)
            sigma_1, _, difference_1 = history[-1]
            r_0 = math.log(sigma_1 / sigma) / h
            if difference_1 is None or r_0 < 0.5:
                x.add_(difference, alpha=(1 - ratio) / (2 * r_0))  # as dpmpp_2m
            else:
                r_1 = math.log(history[-2][0] / sigma_1) / h
                # Integrals over the step of e^(s-h) s / h and e^(s-h) s^2 / (2 h^2)
                phi_2 = 1 + math.expm1(-h) / h
                phi_3 = 0.5 - phi_2 / h
                # h D' = difference / r_0 + r_0 curvature; h^2 D'' = 2 curvature,
                # curvature = (difference / r_0 - difference_1 / r_1) / (r_0 + r_1)
                curved = math.sqrt(ratio) * (phi_2 * r_0 + 2 * phi_3) / (r_0 + r_1)
                x.add_(difference, alpha=(phi_2 + curved) / r_0).add_(difference_1, alpha=-curved / r_1)
        history = [*history[-1:], (sigma, denoised, difference)] if sigma < TERMINAL_SIGMA else []
    return x.to(dtype)
