"""UniPC: a multistep predictor whose result is corrected once the network was asked there, at no evaluation of its own.

Enters and leaves: as sampler_contract.py says. Data prediction in variance-exploding coordinates: alpha is 1, e^-h is
sigma_next / sigma.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, levels_of, steps

Evaluation = tuple[float, Tensor]
"""A level and D there."""


@torch.no_grad()
def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    order: Literal[1, 2, 3] = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
) -> Tensor:
    """UniPC-p (Zhao et al. 2023, Alg. 1 and 2): predictor of order p, with the corrector order p + 1.

    One evaluation a step; the last step is not corrected. The first steps are of lower order for want of earlier
    evaluations, which keeps the whole of a run with p = 3 at order 3, and so are the last ones of a run to 0, where
    lambda is infinite. `variant` is B(h): h, or 1 - e^-h, which the paper prefers with guidance.

    Raises:
        ValueError: another order or variant.
    """
    if order not in (1, 2, 3) or variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: found order {order}, variant {variant!r}, expected 1 to 3, 'bh1' or 'bh2'")
    levels = levels_of(sigmas)
    count, to_zero = len(levels) - 1, levels[-1] == 0
    history: list[Evaluation] = []
    x_before, p = x, 0
    for i, sigma, sigma_next in steps(sigmas, progress):
        here = (sigma, evaluate(denoise, x, sigma))
        if history:
            x = advance(x_before, sigma, history[-p:], here, variant)
        history = [*history[-2:], here] if sigma < TERMINAL_SIGMA else []
        p = min(order, len(history), count - i if to_zero else order)
        x_before = x
        if p == 0 or sigma_next == 0:
            x = torch.lerp(here[1], x, sigma_next / sigma)
        else:
            x = advance(x, sigma_next, history[-p:], None, variant)
    return x


def advance(x: Tensor, sigma: float, history: list[Evaluation], there: Evaluation | None, variant: str) -> Tensor:
    """x, at the last level of `history`, taken to `sigma`: by UniP, or, with the evaluation `there`, by UniC.

    Zhao et al. 2023, Eq. 3, with D for eps: e^-h x + (1 - e^-h) D_0 + B(h) sum_m rho_m D_m / r_m, where D_m is the
    difference of the m-th evaluation from D_0, and r_m its place in lambda in units of h.
    """
    others = [*history[:-1], *([there] if there is not None else [])]
    sigma_0, d_0 = history[-1]
    h = math.log(sigma_0 / sigma)
    r = [math.log(sigma_0 / level) / h for level, _ in others]
    scale = -math.expm1(-h) if variant == "bh2" else h
    rho = weights(h, r, scale)
    factors = [scale * rho_m / r_m for rho_m, r_m in zip(rho, r, strict=True)]
    x = (sigma / sigma_0) * x
    x.add_(d_0, alpha=-math.expm1(-h) - sum(factors))
    for factor, (_, d_m) in zip(factors, others, strict=True):
        x.add_(d_m, alpha=factor)
    return x


def weights(h: float, r: list[float], scale: float) -> list[float]:
    """rho for as many places r: scale sum_m rho_m r_m^(n-1) = n! J_n (Zhao et al. 2023, Theorem 3.1).

    h^n J_n is the integral over the step of e^(s-h) s^n / n!, so that polynomials are integrated exactly. A single rho
    is 1/2, its limit at h = 0, which gives up no order.
    """
    if len(r) < 2:
        return [0.5] * len(r)
    J, right = -math.expm1(-h), []
    for n in range(1, len(r) + 1):
        J = 1 / math.factorial(n) - J / h
        right.append(math.factorial(n) * J / scale)
    return np.linalg.solve(np.vander(r, increasing=True).T, right).tolist()
