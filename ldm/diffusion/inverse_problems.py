"""Linear inverse problems by guidance: a denoiser that knows a measurement y = H x0 + noise of what it denoises.

Enters: denoise(x, sigma), a measuring function that autograd differentiates (an operator, or a decoder and an operator
after it), y. Leaves: denoise(x, sigma), an estimate of E[x0 | x, y], with which every sampler draws x0 given y.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA

Measure = Callable[[Tensor], Tensor]
"""Clean latents (B, C, h, w) -> what is measured of them, (B, ...)."""
Covariance = Literal["isotropic", "pigdm", "jacobian"]
"""What stands for Cov(x0 | x), of which D + Cov A^T (A Cov A^T + deviation^2)^-1 (y - measure(D)) makes E[x0 | x, y].

isotropic: r^2 = sigma^2 s^2 / (sigma^2 + s^2), that of Gaussian data of deviation s, independent in each number. As
cheap as `measure` is; the correction does not pass through the network.
pigdm: r^2 within the inverse and sigma^2 J^T before it, J the denoiser's Jacobian (Song et al. 2023, Eq. 7 and 8 with
appendix A.3): the network spreads the correction to what is not measured, for one backward pass of it.
jacobian: sigma^2 J^T, which is Cov(x0 | x) itself (Rozet et al. 2024, section 4.2), for a backward pass in each
iteration: exact for all Gaussian data, where the others are exact for data that is independent and of deviation s.
"""


def guided_by_measurement(
    denoise: Denoise,
    measure: Measure,
    y: Tensor,
    *,
    deviation: float = 0.0,
    prior_deviation: float = 1.0,
    covariance: Covariance = "pigdm",
    iterations: int = 8,
) -> Denoise:
    """Pseudo-inverse guidance: D moved to the measurement y as far as the noise left in D, and in y, lets it.

    A is the Jacobian of `measure` at D, H itself where it is linear; without noise the correction is then H^+ (y - H D)
    for covariance isotropic. The inverse is applied by conjugate gradients, so that `measure` may be what it likes:
    each iteration is a forward and a backward derivative of it, and as many as A Cov A^T has different eigenvalues
    solve it exactly. At the terminal level of a zero-SNR schedule sigma^2 J is infinity times 0, and r^2 stands for it.

    Args:
        y: (B or 1, ...), of what `measure` gives.
        deviation: of the measurement's noise.
        prior_deviation: s.

    Raises:
        ValueError: a deviation below 0, no prior deviation, no iterations, an unknown covariance.
    """
    if not deviation >= 0 or not prior_deviation > 0 or iterations < 1 or covariance not in get_args(Covariance):
        raise ValueError(
            f"guided_by_measurement: found deviation {deviation}, prior_deviation {prior_deviation}, iterations "
            f"{iterations}, covariance {covariance!r}, expected 0 or more, a number above 0, 1 or more, one of "
            f"{', '.join(get_args(Covariance))}"
        )

    def denoise_measured(x: Tensor, sigma: Tensor) -> Tensor:
        squared = sigma.to(x).view(-1, *[1] * (x.ndim - 1)) ** 2
        spread = squared * prior_deviation**2 / (squared + prior_deviation**2)  # r^2
        through = covariance if not bool((sigma >= TERMINAL_SIGMA).any()) else "isotropic"
        with torch.set_grad_enabled(through != "isotropic"):
            x = x.detach().requires_grad_(through != "isotropic")
            denoised = denoise(x, sigma)
        clean = denoised.detach()
        with torch.enable_grad():
            measured, pullback, *_ = torch.func.vjp(measure, clean)

            def of_network(direction: Tensor) -> Tensor:
                (pulled,) = torch.autograd.grad(denoised, x, direction, retain_graph=True)
                return squared * pulled

            def gram(v: Tensor) -> Tensor:
                (direction,) = pullback(v, retain_graph=True)
                direction = of_network(direction) if through == "jacobian" else spread * direction
                _, change, *_ = torch.func.jvp(measure, (clean,), (direction,))
                return change + deviation**2 * v

            (towards,) = pullback(conjugate_gradients(gram, y.to(measured) - measured, iterations))
            return clean + (spread * towards if through == "isotropic" else of_network(towards))

    return denoise_measured


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """v with apply(v) = right, sample by sample, for a symmetric positive semi-definite `apply` (Hestenes & Stiefel).

    Begins at 0, so that of what `right` has outside of the range of `apply` little enters while iterations are few.

    Args:
        right: (B, ...).
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    v, residual, direction = torch.zeros_like(right), right, right
    power = dot(residual, residual)
    for _ in range(iterations):
        applied = apply(direction)
        curvature = dot(direction, applied)
        step = torch.where(curvature > 0, power / curvature, 0)
        v, residual = v + step * direction, residual - step * applied
        before, power = power, dot(residual, residual)
        direction = residual + torch.where(before > 0, power / before, 0) * direction
    return v
