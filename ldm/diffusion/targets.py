"""What a network can put out, and the exact way from one of these to another.

Enters: a prediction, x_t and its alpha and sigma. Leaves: the same prediction as another target. A target is one
function and one line in TARGETS.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective_config import SIGMA_DATA

Coefficient = Tensor | float

# A target is a combination a x0 + b noise; with x_t = alpha x0 + sigma noise it determines both where
# b alpha - a sigma is not 0. Conversions and errors follow from (a, b) alone.


def epsilon_target(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Coefficient, Coefficient]:
    """The noise (Ho et al. 2020, Eq. 14)."""
    return 0.0, 1.0


def v_target(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Coefficient, Coefficient]:
    """The velocity alpha noise - sigma x0 (Salimans & Ho 2022, section 4)."""
    return -sigma, alpha


def x0_target(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Coefficient, Coefficient]:
    """The clean latents (Ho et al. 2020, section 3.2)."""
    return 1.0, 0.0


def flow_target(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Coefficient, Coefficient]:
    """The velocity noise - x0 of the straight path from data to noise (Liu et al. 2023, Eq. 1; Esser et al. 2024)."""
    return -1.0, 1.0


def edm_target(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Coefficient, Coefficient]:
    """(x0 - c_skip x) / c_out of x = x0 + sigma_hat noise (Karras et al. 2022, Eq. 7 and table 1), unit variance.

    With s = sigma_data and r^2 = sigma^2 + alpha^2 s^2 this is (sigma x0 - alpha s^2 noise) / (s r): for s = 1 and
    alpha^2 + sigma^2 = 1 it is -v.
    """
    r = _rms(alpha, sigma, sigma_data)
    return sigma / (sigma_data * r), -alpha * sigma_data / r


TARGETS: dict[str, Callable[[Tensor, Tensor, float], tuple[Coefficient, Coefficient]]] = {
    "epsilon": epsilon_target,
    "v": v_target,
    "x0": x0_target,
    "flow": flow_target,
    "edm": edm_target,
}


def determinant(name: str, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """b alpha - a sigma of a target: at fixed x_t the errors of two targets have the ratio of their determinants.

    epsilon alpha, v alpha^2 + sigma^2, x0 -sigma, flow alpha + sigma, edm -sqrt(sigma^2 + alpha^2 sigma_data^2) /
    sigma_data.
    """
    if name == "edm":
        return -_rms(alpha, sigma, sigma_data) / sigma_data
    a, b = TARGETS[name](alpha, sigma, sigma_data)
    return b * alpha - a * sigma


def convert(
    prediction: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    source: str,
    target: str,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """The prediction of `source` as one of `target`, names of TARGETS, for the same x_t = alpha x0 + sigma noise.

    All four tensors broadcast to x_t, (B, C, H, W); `objective.coefficients` gives alpha and sigma of timesteps. Finite
    at alpha = 0 except from epsilon, at sigma = 0 except from x0. `sigma_data` matters to edm only.
    """
    if source == target:
        return prediction
    a, b = TARGETS[source](alpha, sigma, sigma_data)
    scale = 1 / determinant(source, alpha, sigma, sigma_data)
    data = (b * x_t - sigma * prediction) * scale
    noise = (alpha * prediction - a * x_t) * scale
    c, d = TARGETS[target](alpha, sigma, sigma_data)
    return c * data + d * noise


def network_input(name: str, x_t: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """What a network that puts out this target sees of x_t: x_t itself, or c_in x for edm (Karras et al., table 1).

    c_in x = x_t / sqrt(sigma^2 + alpha^2 sigma_data^2), which has unit variance for data of deviation sigma_data.
    """
    return x_t / _rms(alpha, sigma, sigma_data) if name == "edm" else x_t


def _rms(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Root mean square of x_t for data of deviation sigma_data."""
    return torch.sqrt(sigma**2 + alpha**2 * sigma_data**2)
