"""Estimates on latents what Analytic-DPM samples with: the variance of x0 given noisy latents, at each noise level.

Enters: a Pipeline and batches of latents with their captions (latent_samples.py). Leaves: PosteriorVariances and what
`variances.json` says of their making.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.draws import Purpose
from ldm.diffusion.reverse_variances import PosteriorVariances, squared_errors
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import sigmas
from ldm.evaluation.latent_likelihood import check_pipeline, conditioned
from ldm.evaluation.latent_samples import LatentBatch, likelihood_seed
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import addressed_noise


class Estimate(NamedTuple):
    """Variances by level, and the same from score norms."""

    variances: PosteriorVariances
    from_score_norms: list[float | None]
    """The estimate of Bao et al. 2022, for comparison; None at pure noise."""
    samples: int

    def about(self) -> dict[str, Any]:
        return {"variances_from_score_norms": self.from_score_norms, "samples": self.samples}


def estimate_variances(pipeline: Pipeline, batches: Iterable[LatentBatch], *, levels: int, seed: int) -> Estimate:
    """Variances at `levels` evenly spaced times of the schedule, both ends included; 0: at every timestep.

    The network is told the captions, without guidance. A sample's noise is a function of seed, its number and level.

    Raises:
        ValueError: an inpainting network, one level, more than a discrete schedule has, or every one of continuous
            time.
    """
    check_pipeline(pipeline)
    schedule, seed = pipeline.schedule, likelihood_seed(seed)
    count = schedule.num_timesteps if isinstance(schedule, Schedule) and not levels else levels
    if count < 2:
        raise ValueError(f"timesteps: found {levels}, expected 2 or more: variances are interpolated between levels")
    if isinstance(schedule, Schedule) and count > schedule.num_timesteps:
        raise ValueError(
            f"timesteps: found {levels}, expected 2 to {schedule.num_timesteps}, which the checkpoint's noise schedule "
            "has, or 0 for all of them"
        )
    visited = sigmas(schedule, count, "linspace")
    sums = torch.zeros(3, count, dtype=torch.float64)  # residuals, score norms, elements
    samples = 0
    for batch in batches:
        shape = tuple(batch.latents.shape[1:])
        denoise, _ = conditioned(pipeline, batch)

        def noise(level: int, batch: LatentBatch = batch, shape: tuple[int, ...] = shape) -> Tensor:
            return addressed_noise(seed, Purpose.NOISE, batch.numbers, shape, level)

        with pipeline.precision():
            residuals, score_norms = squared_errors(denoise, batch.latents, visited, noise=noise)
        elements = batch.latents[0].numel()
        counted = torch.full((count,), elements * len(batch.latents), dtype=torch.float64)
        sums += torch.stack([residuals.sum(1).cpu() * elements, score_norms.sum(1).cpu() * elements, counted])
        samples += len(batch.latents)
    means = (sums[:2] / sums[2]).flip(1)  # ascending, as levels are stored
    from_score_norms = [None if one != one else one for one in means[1].tolist()]
    return Estimate(PosteriorVariances(visited[:-1].flip(0), means[0]), from_score_norms, samples)
