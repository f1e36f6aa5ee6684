"""How likely a checkpoint finds latents: the variational bound term by term, and the exact log-density by the ODE.

Enters: a Pipeline and batches of latents with their captions (latent_samples.py). Leaves: `elbo.json`, `elbo.png`,
`ode.json`: means with standard errors, and a row for each sample.

What the numbers mean: latents are continuous, so that these are densities, of the scaled latents that the network
knows, given their captions, without guidance; minus their logarithm, in bits for each element. A density depends on the
scale: for latents as the autoencoder gives them, log2(scaling_factor) is taken away. It says nothing of how well
pictures are decoded, and compares checkpoints on the same latents only.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.draws import Purpose, uniform
from ldm.diffusion.denoiser import Denoise, Predict, denoiser, predictor
from ldm.diffusion.guidance import unguided
from ldm.diffusion.likelihood import (
    Bound,
    bits_per_dimension,
    choose_timesteps,
    continuous_bound,
    elbo,
    gauss_legendre,
    information,
)
from ldm.diffusion.ode_likelihood import log_density, rademacher
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import VarianceName
from ldm.evaluation.latent_samples import LatentBatch, likelihood_seed
from ldm.evaluation.likelihood_plot import Level, draw_levels
from ldm.grid import save_png
from ldm.pipeline.fit import inpaints
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import addressed_noise

QUARTERS = 4


@dataclass
class SampleBound:
    """The bound of one sample, in bits per dimension."""

    key: str
    caption: str
    prior: float
    """L_T."""
    steps: list[float]
    """The terms between, from clean to noisy."""
    quarters: list[float]
    """Their sums over each quarter of the noise range, from clean to noisy."""
    reconstruction: float
    """L_0."""

    @property
    def total(self) -> float:
        return self.prior + sum(self.steps) + self.reconstruction


@dataclass
class SampleDensity:
    """The log-density of one sample."""

    key: str
    caption: str
    bits_per_dimension: float
    """Minus the log-density, in bits."""
    probe_error: float | None
    """Standard error that Hutchinson's probes leave in it; None with one probe."""
    evaluations: int
    """Of the network, each with a backward pass a probe."""


def check_pipeline(pipeline: Pipeline) -> None:
    """Raises ValueError for a network whose output says nothing of the density of latents given a caption."""
    if inpaints(pipeline.unet.config, pipeline.autoencoder.config):
        raise ValueError(
            f"unet/config.json: in_channels is {pipeline.unet.config.in_channels}: an inpainting network, which takes "
            "a picture and a mask besides; expected one of latents and caption alone"
        )


def conditioned(pipeline: Pipeline, batch: LatentBatch) -> tuple[Denoise, Predict]:
    """The network with a batch's captions inside: as a denoiser, and with its variance where it learned one."""
    parts = pipeline.unet, pipeline.schedule, pipeline.parameterization, pipeline.sigma_data
    predict = predictor(*parts)
    return unguided(denoiser(*parts), batch.conditioning), lambda x, sigma: predict(x, sigma, batch.conditioning)


def variance_of(pipeline: Pipeline) -> VarianceName:
    """The variance of the reverse steps that the bound is of: learned where there is one, else DDPM's beta."""
    return "learned" if pipeline.learned_variance else "beta"


def bounds(pipeline: Pipeline, batches: Iterable[LatentBatch], *, timesteps: int, seed: int) -> list[SampleBound]:
    """The variational bound of each sample.

    A sample's numbers are a function of seed, its number and its latents: batches change them by rounding only.

    Args:
        timesteps: terms between L_T and L_0 that are evaluated, drawn for each sample anew (nodes of the integral in
            continuous time); 0: every one.

    Raises:
        ValueError: an inpainting network, or every timestep of continuous time.
    """
    check_pipeline(pipeline)
    schedule, seed, found = pipeline.schedule, likelihood_seed(seed), []
    discrete = isinstance(schedule, Schedule)
    if not discrete and not timesteps:
        raise ValueError("timesteps: found 0, every one, expected 1 or more: continuous time has no last one")
    for batch in batches:
        shape = tuple(batch.latents.shape[1:])
        denoise, predict = conditioned(pipeline, batch)

        def noise(term: int, batch: LatentBatch = batch, shape: tuple[int, ...] = shape) -> Tensor:
            # Of two neighbours one takes the other's noise reversed: what is odd in it goes out of their sum.
            drawn = addressed_noise(seed, Purpose.NOISE, batch.numbers, shape, term // 2)
            return -drawn if term % 2 else drawn

        with pipeline.precision():
            if isinstance(schedule, Schedule):
                at = None
                if timesteps:
                    at = choose_timesteps(schedule, timestep_draws(seed, batch.numbers, timesteps))
                bound = elbo(predict, schedule, batch.latents, noise, variance=variance_of(pipeline), at=at)
            else:
                bound = continuous_bound(denoise, schedule, batch.latents, noise, nodes=timesteps)
        found += sample_bounds(pipeline, batch, bound)
    return found


def timestep_draws(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """Uniform draws (count, B) in [0, 1), each addressed by its sample's number."""
    drawn = [[uniform(seed, Purpose.TIMESTEP, number, part) for number in numbers] for part in range(count)]
    return torch.tensor(drawn, dtype=torch.float64)


def sample_bounds(pipeline: Pipeline, batch: LatentBatch, bound: Bound) -> list[SampleBound]:
    """A row a sample, in bits per dimension."""
    bits = bits_per_dimension(bound.steps, bound.dimensions).cpu()
    prior = bits_per_dimension(bound.prior, bound.dimensions).tolist()
    reconstruction = bits_per_dimension(bound.reconstruction, bound.dimensions).tolist()
    quarter = (pipeline.schedule.to("cpu").position(bound.times.cpu()) * QUARTERS).long().clamp(0, QUARTERS - 1)
    sums = torch.stack([(bits * (quarter == q)).sum(0) for q in range(QUARTERS)])  # (4, B)
    return [
        SampleBound(key, caption, prior[row], bits[:, row].flip(0).tolist(), sums[:, row].tolist(), reconstruction[row])
        for row, (key, caption) in enumerate(zip(batch.keys, batch.captions, strict=True))
    ]


def densities(
    pipeline: Pipeline, batches: Iterable[LatentBatch], *, probes: int, tolerance: float, seed: int
) -> list[SampleDensity]:
    """The log-density of each sample by the probability-flow ODE with Hutchinson's trace, of keyed Rademacher probes.

    It is the density of latents with noise of the schedule's lowest level added, the cleanest that the network knows,
    taken at latents without it (as Song et al. 2021 do at 1e-5). Where they are finer than that noise, the number is
    too good, by up to log2(e) / 2 = 0.72 bits per dimension; that of the bound is not.

    Args:
        tolerance: of each step of the solver; below the network's rounding it cannot be reached.

    Raises:
        ValueError: an inpainting network, or one in less than float32.
        ToleranceError: the solver cannot reach the tolerance.
    """
    check_pipeline(pipeline)
    if pipeline.dtype != torch.float32:
        raise ValueError(f"dtype: found {pipeline.dtype}, expected float32: the ODE's steps are lost in less precision")
    schedule, seed, found = pipeline.schedule, likelihood_seed(seed), []
    for batch in batches:
        shape, numbers = tuple(batch.latents.shape[1:]), batch.numbers
        drawn = [addressed_noise(seed, Purpose.SAMPLER_NOISE, numbers, shape, probe) for probe in range(probes)]
        density = log_density(
            conditioned(pipeline, batch)[0],
            batch.latents.double(),
            sigma_min=schedule.sigma_min,
            sigma_max=schedule.sigma_max,
            probes=rademacher(torch.stack(drawn)),
            tolerance=tolerance,
        )
        errors = bits_per_dimension(density.standard_error, density.dimensions).tolist()
        rows = zip(
            batch.keys, batch.captions, density.bits_per_dimension.tolist(), errors, density.evaluations.tolist(),
            strict=True,
        )  # fmt: skip
        found += [
            SampleDensity(key, caption, bits, None if math.isnan(error) else error, evaluations)
            for key, caption, bits, error, evaluations in rows
        ]
    return found


def elbo_report(pipeline: Pipeline, found: Sequence[SampleBound], timesteps: int) -> dict[str, Any]:
    """What `elbo.json` says, but for the settings."""
    quarters = [average([one.quarters[q] for one in found])[0] for q in range(QUARTERS)]
    return {
        **summary(pipeline, [one.total for one in found]),
        "L_T": average([one.prior for one in found])[0],
        "L_between": sum(quarters),
        "L_0": average([one.reconstruction for one in found])[0],
        "L_between_by_quarter_of_the_noise": quarters,
        "variance": variance_of(pipeline) if isinstance(pipeline.schedule, Schedule) else "infinitely many steps",
        "levels": [
            {"from_sigma": one.low, "to_sigma": one.high, "bits_per_dimension": one.bits}
            for one in levels_of(pipeline, found, timesteps)
        ],
        "samples": [
            {
                "key": one.key,
                "caption": one.caption,
                "bits_per_dimension": one.total,
                "L_T": one.prior,
                "L_between_by_quarter_of_the_noise": one.quarters,
                "L_0": one.reconstruction,
            }
            for one in found
        ],
    }


def ode_report(pipeline: Pipeline, found: Sequence[SampleDensity], probes: int) -> dict[str, Any]:
    """What `ode.json` says, but for the settings."""
    errors = [one.probe_error for one in found if one.probe_error is not None]
    return {
        **summary(pipeline, [one.bits_per_dimension for one in found]),
        "probes": probes,
        "standard_error_of_probes": math.hypot(*errors) / len(found) if errors else None,
        "lowest_sigma": pipeline.schedule.sigma_min,
        "most_evaluations": max(one.evaluations for one in found),
        "samples": [
            {
                "key": one.key,
                "caption": one.caption,
                "bits_per_dimension": one.bits_per_dimension,
                "standard_error_of_probes": one.probe_error,
                "evaluations": one.evaluations,
            }
            for one in found
        ],
    }


def summary(pipeline: Pipeline, bits: Sequence[float]) -> dict[str, Any]:
    """Mean over samples, its standard error, and the mean for latents as the autoencoder gives them."""
    mean, error = average(bits)
    # z = x / factor + shift: its density is that of x, times the factor for each element.
    unscaled = mean - math.log2(pipeline.autoencoder.config.scaling_factor)
    return {
        "bits_per_dimension": mean,
        "standard_error": error,
        "nats_per_dimension": mean * math.log(2),
        "unscaled_bits_per_dimension": unscaled,
    }


def average(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None of one value."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(tensor.mean()), error


def levels_of(pipeline: Pipeline, found: Sequence[SampleBound], timesteps: int) -> list[Level]:
    """The mean of each term between, with the noise levels that it stands for, from clean to noisy."""
    schedule = pipeline.schedule
    if isinstance(schedule, Schedule) and not timesteps:
        edges = schedule.sigma_hat(torch.arange(schedule.num_timesteps)).tolist()
    else:
        shares = [1 / timesteps] * timesteps
        if not isinstance(schedule, Schedule):
            shares = [weight / 2 for weight in gauss_legendre(timesteps)[1]]
        low, high = (
            information(torch.tensor(one, dtype=torch.float64)) for one in (schedule.sigma_min, schedule.sigma_max)
        )
        parts = torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0)
        inner = torch.expm1(low + (high - low) * parts) ** -0.5
        edges = [schedule.sigma_min, *inner[1:-1].tolist(), schedule.sigma_max]
    means = torch.tensor([one.steps for one in found], dtype=torch.float64).mean(0).tolist()
    return [Level(edges[i], edges[i + 1], mean) for i, mean in enumerate(means)]


def write_elbo(out: Path, report: dict[str, Any], title: str) -> None:
    """Writes `elbo.json` and `elbo.png` into the folder `out`."""
    write_report(out / "elbo.json", report)
    levels = [Level(one["from_sigma"], one["to_sigma"], one["bits_per_dimension"]) for one in report["levels"]]
    texts = {name: f"{report[name]:.4f}" for name in ("bits_per_dimension", "L_T", "L_between", "L_0")}
    save_png(draw_levels(levels, title), out / "elbo.png", texts)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a JSON file, and its folder if there is none; raises ValueError for numbers that are not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
