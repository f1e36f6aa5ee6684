"""Log-density by the probability-flow ODE: exact Gaussians and mixtures, every parameterization, the trace's error."""

import math

import numpy as np
import pytest
import torch
from exact_mixtures import gaussian, mixture
from torch import Tensor

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import unguided
from ldm.diffusion.ode_likelihood import log_density, rademacher
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.conditioning import Conditioning

NOTHING = Conditioning(torch.zeros(1, 1, 1))


def normals(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("dims", [1, 2, 8, 64])
def test_the_exact_trace_gives_the_log_density_of_a_mixture(dims: int) -> None:
    data = mixture(dims)
    x = data.sample(2, seed=dims)
    found = log_density(data.denoise, x, sigma_min=1e-3, sigma_max=TERMINAL_SIGMA)
    exact = data.log_density(x, 1e-3)
    torch.testing.assert_close(found.nats / dims, exact / dims, rtol=0, atol=1e-4)
    # That of the data themselves is within a thousandth of a nat as well.
    torch.testing.assert_close(found.nats / dims, data.log_density(x) / dims, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.bits_per_dimension, -found.nats / dims / math.log(2))


def test_a_finite_highest_level_costs_what_the_prior_misses() -> None:
    data = mixture(2)
    x = data.sample(3, seed=0)
    errors = []
    for sigma_max in (10.0, 100.0, 1000.0):
        found = log_density(data.denoise, x, sigma_min=1e-2, sigma_max=sigma_max)
        errors.append(float((found.nats - data.log_density(x, 1e-2)).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3


def test_the_latents_go_to_their_place_in_the_prior() -> None:
    data = gaussian(0.5, 0.7, dims=3)
    x = data.sample(4, seed=1)
    found = log_density(data.denoise, x, sigma_min=1e-3, sigma_max=TERMINAL_SIGMA)
    # The flow of a Gaussian keeps each point's number of deviations from the mean.
    torch.testing.assert_close(found.noise, (x - 0.5) / math.sqrt(0.49 + 1e-6), rtol=0, atol=1e-5)


def test_one_rademacher_probe_is_exact_where_the_jacobian_is_diagonal() -> None:
    data = gaussian(0.2, 0.6, dims=6)
    x = data.sample(3, seed=2)
    probes = rademacher(normals(1, *x.shape, seed=3))
    assert sorted(set(probes.flatten().tolist())) == [-1, 1]
    found = log_density(data.denoise, x, sigma_min=1e-3, sigma_max=TERMINAL_SIGMA, probes=probes)
    torch.testing.assert_close(found.nats, data.log_density(x, 1e-3), rtol=0, atol=1e-4)
    assert bool(found.standard_error.isnan().all())


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_hutchinsons_estimate_is_within_its_stated_error(kind: str) -> None:
    """Two samples of a mixture in 4 dimensions, 24 probes: mean within 4 standard errors, which are right."""
    data, seed = mixture(4), 5
    x = data.sample(2, seed=seed)
    noise = normals(24, *x.shape, seed=seed)
    probes = rademacher(noise) if kind == "rademacher" else noise
    found = log_density(data.denoise, x, sigma_min=1e-2, sigma_max=1e3, probes=probes, tolerance=1e-4)
    exact = log_density(data.denoise, x, sigma_min=1e-2, sigma_max=1e3, tolerance=1e-4)
    assert found.by_probe.shape == (24, 2)
    assert bool(((found.nats - exact.nats).abs() < 4 * found.standard_error).all()), f"seed {seed}"
    assert bool((exact.by_probe.std(0, correction=0) == 0).all())
    torch.testing.assert_close(found.standard_error, found.by_probe.std(0) / math.sqrt(24))


@pytest.mark.parametrize("name", ["zero_snr", "flow", "edm"])
def test_networks_of_each_kind_give_the_log_density(name: str) -> None:
    """Between the timesteps of zero_snr, network and denoiser interpolate the level alike."""
    data = mixture(2)
    if name == "zero_snr":
        schedule, source = Schedule(ScheduleConfig(rescale_betas_zero_snr=True)), "v"
    else:
        schedule, source = ContinuousSchedule(ContinuousScheduleConfig(kind=name, sigma_max=1e5)), name  # type: ignore[arg-type, assignment]
    definition = {
        "v": lambda alpha, sigma: (-sigma, alpha),
        "flow": lambda alpha, sigma: (-1.0, 1.0),
        "edm": lambda alpha, sigma: (sigma / (sigma**2 + 1).sqrt(), -1 / (sigma**2 + 1).sqrt()),
    }[source]
    network = data.network(schedule, definition, (lambda x, a, s: x * (s**2 + 1).sqrt()) if source == "edm" else None)
    # The network in closed form divides by alpha: up to nearly pure noise, 1e5.
    denoise = unguided(denoiser(network, schedule, source), NOTHING)
    x = data.sample(2, seed=4)
    found = log_density(
        denoise, x, sigma_min=schedule.sigma_min, sigma_max=min(schedule.sigma_max, 1e5), max_steps=3000
    )
    exact = data.log_density(x, schedule.sigma_min)
    torch.testing.assert_close(found.nats / 2, exact / 2, rtol=0, atol=1e-4)


def test_what_cannot_be_integrated_is_an_error() -> None:
    data = gaussian(0.0, 1.0)
    x = torch.zeros(2, 1, 1, 1)
    for low, high in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max"):
            log_density(data.denoise, x, sigma_min=low, sigma_max=high)
    with pytest.raises(ValueError, match=r"probes: found shape \(1, 1, 1\), expected \(K, 2, 1, 1, 1\)"):
        log_density(data.denoise, x, sigma_min=0.1, sigma_max=1.0, probes=torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError, match="steps reached"):
        log_density(data.denoise, x, sigma_min=1e-3, sigma_max=1e3, max_steps=2)
    with pytest.raises(RuntimeError, match="steps reached"):
        log_density(lambda x, sigma: x * math.nan, x, sigma_min=1e-3, sigma_max=1e3, max_steps=20)
