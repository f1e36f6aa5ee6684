"""Mixtures of Gaussians, of which everything is known: density, posterior mean and variance at any noise level.

Enters: weights, means and deviations of the modes. Leaves: the exact denoiser, networks of every parameterization, the
log-density of noisy data, and residual errors by integration on a grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule
from ldm.models.conditioning import Conditioning

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]


@dataclass
class Mixture:
    """Modes with isotropic deviations in `dims` dimensions; samples are (B, dims, 1, 1)."""

    weights: Tensor
    """(K,), sum 1"""
    means: Tensor
    """(K, dims)"""
    stds: Tensor
    """(K,)"""

    @property
    def dims(self) -> int:
        return self.means.shape[1]

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Of x0 + sigma noise at x, (B,)."""
        return self._log_joint(x, torch.full((len(x),), sigma, dtype=torch.float64)).logsumexp(1)

    def posterior(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, dims, 1, 1) and variance of each element (same) of x0 given x0 + sigma noise = x; sigma is (B,)."""
        share = self._log_joint(x, sigma).softmax(1)[..., None]  # (B, K, 1)
        squared = sigma.double()[:, None, None] ** 2
        gain = self.stds[:, None] ** 2 / (self.stds[:, None] ** 2 + squared)  # (B, K, 1)
        means = self.means + gain * (x.flatten(1)[:, None] - self.means)  # (B, K, dims)
        mean = (share * means).sum(1)
        variance = (share * (gain * squared + (means - mean[:, None]) ** 2)).sum(1)
        return mean.view(x.shape), variance.view(x.shape)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma noise = x]."""
        return self.posterior(x, sigma)[0]

    def network(
        self, schedule: ForwardProcess, target: Coefficients, seen: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    ) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """The best network for the target a x0 + b noise; `seen` undoes the input's scaling.

        It knows the level from what a network is told: timesteps, fractional ones log-linear; 1000 t; ln(sigma) / 4.
        """

        def predict(x_t: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
            alpha, sigma = (c.view(-1, 1, 1, 1) for c in coefficients_of(schedule, told))
            if seen is not None:
                x_t = seen(x_t, alpha, sigma)
            x0 = self.denoise(x_t / alpha, (sigma / alpha).flatten())
            a, b = target(alpha, sigma)
            return a * x0 + b * (x_t - alpha * x0) / sigma

        return predict

    def sample(self, count: int, seed: int) -> Tensor:
        """(count, dims, 1, 1)."""
        rng = np.random.default_rng(seed)
        modes = torch.from_numpy(rng.choice(len(self.weights), size=count, p=self.weights.numpy()))
        noise = torch.from_numpy(rng.normal(size=(count, self.dims)))
        return (self.means[modes] + self.stds[modes, None] * noise).view(count, self.dims, 1, 1)

    def residual(self, sigma: float) -> float:
        """E Var(x0 | x0 + sigma noise) in one dimension: over the density of x, by the trapezoidal rule."""
        assert self.dims == 1
        reach = 12 * math.sqrt(float(self.stds.max()) ** 2 + sigma**2)
        low, high = float(self.means.min()) - reach, float(self.means.max()) + reach
        width = math.sqrt(float(self.stds.min()) ** 2 + sigma**2)
        grid = torch.linspace(low, high, int((high - low) / width * 12) + 1, dtype=torch.float64).view(-1, 1, 1, 1)
        _, variance = self.posterior(grid, torch.full((len(grid),), sigma, dtype=torch.float64))
        step = float(grid[1, 0, 0, 0] - grid[0, 0, 0, 0])
        return float((self.log_density(grid, sigma).exp() * variance.flatten()).sum() * step)

    def _log_joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = self.stds**2 + sigma.double()[:, None] ** 2  # (B, K)
        squared = ((x.flatten(1)[:, None] - self.means) ** 2).sum(2)
        return self.weights.log() - (squared / variance + self.dims * (2 * math.pi * variance).log()) / 2


def coefficients_of(schedule: ForwardProcess, told: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of what a network is told."""
    if isinstance(schedule, Schedule):
        if not told.is_floating_point():
            return schedule.alpha(told), schedule.sigma(told)
        log_levels = schedule.sigma_hat(torch.arange(schedule.num_timesteps)).log().numpy()
        level = np.exp(np.interp(told.double().numpy(), np.arange(schedule.num_timesteps), log_levels))
        alpha = (1 + torch.from_numpy(level) ** 2).rsqrt()
        return alpha, alpha * torch.from_numpy(level)
    t = (4 * told.double()).exp() if schedule.path.name == "variance_exploding" else told.double() / 1000
    return schedule.alpha(t), schedule.sigma(t)


def mixture(dims: int, modes: int = 3, seed: int = 0) -> Mixture:
    """A mixture of a few modes, about unit variance in all."""
    rng = np.random.default_rng([seed, dims, modes])
    weights = torch.from_numpy(rng.dirichlet(np.full(modes, 5.0)))
    means = torch.from_numpy(rng.normal(size=(modes, dims)))
    return Mixture(weights, means, torch.from_numpy(rng.uniform(0.3, 0.8, size=modes)))


def gaussian(mean: float, std: float, dims: int = 1) -> Mixture:
    """One mode."""
    values = torch.ones(1, dtype=torch.float64)
    return Mixture(values, mean * torch.ones(1, dims, dtype=torch.float64), std * values)


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (nodes,) of the expectation over a standard normal variable."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
