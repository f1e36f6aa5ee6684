"""Pipelines whose network is exact: mixtures of Gaussians, moved by a number in the caption's states; and their shards.

Enters: data over 4x2x2 latents, a schedule, a parameterization. Leaves: a Pipeline with that network, encoded shards
whose latents have exactly that distribution, and their exact log-densities.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from exact_mixtures import Mixture, coefficients_of
from torch import Tensor, nn

from ldm.data.shards import write_shards
from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import TARGETS
from ldm.diffusion.variance import step_bounds
from ldm.models.conditioning import Conditioning
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.pipeline import Pipeline

SHAPE = (4, 2, 2)
DIMS = 16
FACTOR = 0.7
"""tiny_models' scaling factor."""
SPREAD = 0.25
"""Deviation of each stored posterior, unscaled: a good part of the data's own."""


@dataclass
class Elementwise:
    """Elements that are independent, each of a mixture in one dimension: the Jacobian of its denoiser is diagonal."""

    one: Mixture

    @property
    def stds(self) -> Tensor:
        return self.one.stds

    def with_stds(self, stds: Tensor) -> "Elementwise":
        return Elementwise(replace(self.one, stds=stds))

    def posterior(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.one.posterior(x.reshape(-1, 1, 1, 1), sigma.repeat_interleave(DIMS))
        return mean.view(x.shape), variance.view(x.shape)

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        return self.one.log_density(x.reshape(-1, 1, 1, 1), sigma).view(len(x), DIMS).sum(1)

    def sample(self, count: int, seed: int) -> Tensor:
        return self.one.sample(count * DIMS, seed).view(count, DIMS, 1, 1)


@dataclass
class Joint(Mixture):
    """A mixture in all 16 dimensions at once."""

    def with_stds(self, stds: Tensor) -> "Joint":
        return replace(self, stds=stds)


Data = Elementwise | Joint


class ExactNetwork(nn.Module):
    """E[target | x_t, caption] of data that are the mixture moved by the first number of the caption's states.

    With learned variance the second half is the step's true variance given x_t, as its share between the bounds.
    """

    def __init__(self, data: Data, schedule: ForwardProcess, name: TargetName, *, learned: bool = False) -> None:
        super().__init__()
        self.config = UNetConfig(sample_size=2, in_channels=4, out_channels=8 if learned else 4)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.data, self.schedule, self.name, self.learned = data, schedule, name, learned

    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        return conditioning  # it has no attention

    def forward(self, seen: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in coefficients_of(self.schedule, told))
        alpha = alpha.clamp(min=2.0**-26)  # of pure noise in continuous time, where it is 0
        x_t = seen * (sigma**2 + alpha**2).sqrt() if self.name == "edm" else seen
        centre = conditioning.text[:, 0, 0].double().view(-1, 1, 1, 1)
        level = sigma / alpha
        mean, variance = self.data.posterior(x_t / alpha - centre, level.flatten())
        x0 = mean + centre
        a, b = TARGETS[self.name](alpha, sigma, 1.0)
        output = a * x0 + b * (x_t - alpha * x0) / sigma
        return torch.cat([output, self.raw(told, variance)], dim=1) if self.learned else output

    def raw(self, told: Tensor, variance: Tensor) -> Tensor:
        assert isinstance(self.schedule, Schedule)
        t = told.round().long()
        low, high = (bound.view(-1, 1, 1, 1) for bound in step_bounds(self.schedule, t))
        ratio = (self.schedule.sigma_hat((t - 1).clamp(min=0)) / self.schedule.sigma_hat(t)).view(-1, 1, 1, 1) ** 2
        below = self.schedule.sigma_hat((t - 1).clamp(min=0)).view(-1, 1, 1, 1) ** 2
        step = below * (1 - ratio) + (1 - ratio) ** 2 * variance
        best = torch.where(t.view(-1, 1, 1, 1) == 0, variance, step)
        return (best.log() - low) / (high - low) * 2 - 1


def exact_pipeline(
    tiny: Pipeline, data: Data, schedule: ForwardProcess, name: TargetName, *, learned: bool = False
) -> Pipeline:
    """`tiny` (tiny_models.make_pipeline with size 2) with the exact network in place of its own."""
    network = ExactNetwork(data, schedule, name, learned=learned)
    return replace(tiny, unet=network, schedule=schedule, parameterization=name)  # type: ignore[arg-type]


def two_modes() -> Elementwise:
    """Each element of two modes, with mean 0 and about unit variance."""
    means, stds = torch.tensor([[-0.6], [0.9]], dtype=torch.float64), torch.tensor([0.5, 0.7], dtype=torch.float64)
    return Elementwise(Mixture(torch.tensor([0.6, 0.4], dtype=torch.float64), means, stds))


def narrow() -> Elementwise:
    """Gaussian elements, far from unit variance, with mean 0."""
    one = torch.ones(1, dtype=torch.float64)
    return Elementwise(Mixture(one, torch.zeros(1, 1, dtype=torch.float64), 0.5 * one))


def joint_mixture() -> Joint:
    """Three modes in 16 dimensions, with mean 0 and about unit variance."""
    rng = np.random.default_rng(7)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.from_numpy(rng.normal(size=(3, DIMS)))
    means = (means - weights @ means) * 0.8
    return Joint(weights, means, torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64))


def write_exact_shards(
    folder: Path, data: Data, count: int, *, spread: float = SPREAD, seed: int = 0, damaged: tuple[int, ...] = ()
) -> None:
    """Encoded shards of `count` samples: scaled latents, drawn from their moments, are the moved mixture's.

    The states of sample i move it by -0.2 or 0.2; of the `damaged` ones the moments are not numbers.
    """
    narrower = data.with_stds((data.stds**2 - (FACTOR * spread) ** 2).sqrt())
    centres = np.random.default_rng([seed, 1]).choice([-0.2, 0.2], size=count)
    means = (narrower.sample(count, seed).numpy() + centres[:, None, None, None]).reshape(count, *SHAPE) / FACTOR
    moments = np.concatenate([means, np.full_like(means, 2 * np.log(spread))], axis=1).astype(np.float32)
    moments[list(damaged)] = np.nan
    samples = [
        {
            "__key__": f"{i:04d}",
            "moments.npy": moments[i],
            "text.npy": np.full((3, 5), centres[i], dtype=np.float32),
            "txt": f"caption {i}",
        }
        for i in range(count)
    ]
    write_shards(samples, folder, prefix="exact", samples_per_shard=max(2, count // 3), encoder={})


def nats(data: Data, latents: Tensor, conditioning: Conditioning, sigma: float = 0.0) -> Tensor:
    """Minus the exact log-density of latents given their captions, per dimension, (B,)."""
    centre = conditioning.text[:, 0, 0].double().view(-1, 1, 1, 1)
    return -data.log_density(latents.double() - centre, sigma) / DIMS
