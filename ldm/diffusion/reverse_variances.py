"""The variances that Analytic-DPM samples with, as a function of the noise level.

Enters: a denoiser, clean latents that stand for the data, noise levels. Leaves: estimates that batches add up to, and
`PosteriorVariances`, which gives those of any levels that a sampler visits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, evaluate, levels_of


@dataclass(frozen=True)
class PosteriorVariances:
    """E Var(x0 | x0 + sigma noise) for each element, at ascending noise levels.

    Raises:
        ValueError: fewer than two levels, levels that do not ascend from above 0, variances that are not finite and
            above 0, or another number of them.
    """

    levels: Tensor
    """(K,) float64"""
    variances: Tensor
    """(K,) float64"""

    def __post_init__(self) -> None:
        levels, variances = self.levels, self.variances
        ascend = len(levels) > 1 and float(levels[0]) > 0 and bool((levels.diff() > 0).all())
        if not ascend or variances.shape != levels.shape or not bool((variances.isfinite() & (variances > 0)).all()):
            raise ValueError(
                f"variances: found {tuple(variances.shape)} of {tuple(levels.shape)} levels, expected finite numbers "
                "above 0, one for each of two or more ascending levels"
            )

    def at(self, sigmas: Tensor) -> Tensor:
        """Those of a run's levels but the last, (steps,) float64, as `ancestral.analytic_dpm` takes them.

        Interpolated in log sigma as a share of sigma^2 / (1 + sigma^2), that of unit normal data.

        Raises:
            ValueError: a level outside of those that were estimated.
        """
        wanted = torch.tensor(levels_of(sigmas)[:-1], dtype=torch.float64)
        low, high = float(self.levels[0]), float(self.levels[-1])
        if not (low * (1 - 1e-6) <= float(wanted.min()) and float(wanted.max()) <= high * (1 + 1e-6)):
            raise ValueError(
                f"variances: found estimates from sigma {low:.6g} to {high:.6g}, expected them to reach from "
                f"{float(wanted.min()):.6g} to {float(wanted.max()):.6g}: they are of another noise schedule"
            )
        share = self.variances / unit_normal_variance(self.levels)
        known, x = self.levels.log(), wanted.clamp(low, high).log()
        above = torch.searchsorted(known, x).clamp(1, len(known) - 1)
        part = (x - known[above - 1]) / (known[above] - known[above - 1])
        return torch.lerp(share[above - 1], share[above], part) * unit_normal_variance(wanted)


def unit_normal_variance(sigma: Tensor) -> Tensor:
    """Var(x0 | x0 + sigma noise) of unit normal data."""
    return 1 / (1 + sigma.double() ** -2)


@torch.no_grad()
def squared_errors(denoise: Denoise, x0: Tensor, sigmas: Tensor, *, noise: Noise) -> tuple[Tensor, Tensor]:
    """What E Var(x0 | x) is estimated by at each level of a run but the last, two ways, each (steps, B) float64.

    The first is the mean of (x0 - D(x))^2 over a sample's elements: sigma^2 E (noise - predicted noise)^2, whose mean
    is E Var(x0 | x) for an exact network, and for another one the best variance around its mean (Bao et al. 2022b).
    The second is that of Bao et al. 2022 from the norm of the score, sigma^2 (1 - E predicted noise^2), for comparison:
    the two have the same mean for an exact network, but its fluctuation is larger by sigma and more, and a network's
    error counts in it by itself, not by its square. It is not a number at pure noise.

    Args:
        x0: (B, ...) clean latents.
        noise: number of a level, 0 for sigmas[0] -> noise like x0.
    """
    x0 = x0.double()
    dims = tuple(range(1, x0.ndim))
    residuals, score_norms = [], []
    for i, sigma in enumerate(levels_of(sigmas)[:-1]):
        z = noise(i).to(x0)
        x = x0 + sigma * z
        denoised = evaluate(denoise, x, sigma).double()
        residuals.append((x0 - denoised).square().mean(dims))
        if sigma >= TERMINAL_SIGMA:
            score_norms.append(torch.full_like(residuals[-1], torch.nan))
        else:
            score_norms.append(sigma**2 * (z**2 - ((x - denoised) / sigma) ** 2).mean(dims))
    return torch.stack(residuals), torch.stack(score_norms)
