"""Denoiser of flow, EDM and learned-variance networks on every schedule: the exact posterior mean, what is told."""

import math

import numpy as np
import pytest
import torch
from exact_mixtures import Coefficients, mixture
from torch import Tensor

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.denoiser import denoiser, predictor
from ldm.diffusion.process import TERMINAL_SIGMA, ForwardProcess
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.conditioning import Conditioning

SIGMA_DATA = 0.7
NOTHING = Conditioning(torch.zeros(1, 1, 1))
SCHEDULES: dict[str, ForwardProcess] = {
    "scaled_linear": Schedule(ScheduleConfig()),
    "zero_snr": Schedule(ScheduleConfig(rescale_betas_zero_snr=True)),
    **{kind: ContinuousSchedule(ContinuousScheduleConfig(kind=kind)) for kind in ("vp", "cosine", "flow", "edm")},  # type: ignore[arg-type]
}
SERVED = {
    "scaled_linear": ["epsilon", "v", "x0", "flow", "edm"],
    "zero_snr": ["v", "x0", "flow", "edm"],
    "vp": ["epsilon", "v", "x0", "flow", "edm"],
    "cosine": ["v", "x0", "flow", "edm"],
    "flow": ["x0", "flow", "edm"],
    "edm": ["edm"],
}


def edm(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022, Eq. 8 and table 1."""
    s = sigma / alpha
    c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
    return (1 - c_skip) / c_out, -c_skip * s / c_out


DEFINITIONS: dict[str, Coefficients] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
    "edm": edm,
}


def unscale(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return x * alpha * ((sigma / alpha) ** 2 + SIGMA_DATA**2).sqrt()


@pytest.mark.parametrize(("name", "source"), [(name, source) for name, served in SERVED.items() for source in served])
def test_denoised_is_the_exact_posterior_mean_of_a_mixture(name: str, source: str) -> None:
    schedule, data = SCHEDULES[name], mixture(3)
    network = data.network(schedule, DEFINITIONS[source], unscale if source == "edm" else None)
    D = denoiser(network, schedule, source, SIGMA_DATA)
    sigma = torch.tensor([0.03, 0.2, 1.0, 5.0, 14.0], dtype=torch.float64)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 1, 1)))
    x = data.sample(5, seed=1) + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(D(x, sigma, NOTHING), data.denoise(x, sigma), rtol=0, atol=1e-7)


def test_what_the_network_is_told_and_sees_follows_the_schedule() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append((x, told))
        return torch.zeros_like(x)

    x, sigma = torch.ones(1, 2, 2, 2, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    expected = {
        "flow": ("flow", 750.0, 1 / 4),
        "cosine": ("v", 1000 * 2 / math.pi * math.atan(3), 1 / math.sqrt(10)),
        "edm": ("edm", math.log(3) / 4, 1 / math.sqrt(9 + SIGMA_DATA**2)),
    }
    for name, (source, told, scale) in expected.items():
        denoiser(network, SCHEDULES[name], source, SIGMA_DATA)(x, sigma, NOTHING)
        found, time = seen.pop()
        assert time.item() == pytest.approx(told)
        assert found.flatten()[0].item() == pytest.approx(scale)


@pytest.mark.parametrize(("name", "source"), [("cosine", "v"), ("flow", "flow"), ("flow", "x0"), ("flow", "edm")])
def test_at_pure_noise_the_mean_of_the_data_comes_out(name: str, source: str) -> None:
    mean = 0.3

    def network(x: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        # x is the noise itself; of x0 nothing but its mean is known.
        return {"v": x * 0 - mean, "flow": x - mean, "x0": x * 0 + mean, "edm": x * 0 + mean / SIGMA_DATA}[source]

    noise = torch.from_numpy(np.random.default_rng(2).normal(size=(1, 2, 2, 2)))
    level = torch.tensor([TERMINAL_SIGMA], dtype=torch.float64)
    x = noise * math.sqrt(1 + TERMINAL_SIGMA**2)
    found = denoiser(network, SCHEDULES[name], source, SIGMA_DATA)(x, level, NOTHING)
    torch.testing.assert_close(found, torch.full_like(found, mean), rtol=0, atol=3e-7)


def test_of_a_network_with_twice_the_channels_the_first_half_is_the_mean() -> None:
    schedule = SCHEDULES["scaled_linear"]
    x, sigma = torch.ones(2, 3, 2, 2), torch.tensor([1.0, 2.0])
    raw = torch.full((2, 3, 2, 2), 0.25)
    found = predictor(lambda x, *_: torch.cat([x, raw], 1), schedule, "v")(x, sigma, NOTHING)
    plain = predictor(lambda x, *_: x, schedule, "v")(x, sigma, NOTHING)
    assert torch.equal(found.x0, plain.x0)
    assert found.raw_variance is not None
    assert torch.equal(found.raw_variance, raw)
    assert plain.raw_variance is None
    with pytest.raises(ValueError, match="has 9 channels, expected 3, or 6 with learned variance"):
        denoiser(lambda x, *_: torch.cat([x, x, x], 1), schedule, "v")(x, sigma, NOTHING)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("flow", "v", "found 'v' on a straight process"),
        ("flow", "epsilon", "found 'epsilon' with zero terminal SNR"),
        ("edm", "x0", "found 'x0' on a variance-exploding process"),
    ],
)
def test_a_parameterization_that_the_schedule_cannot_serve_is_an_error(name: str, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser(lambda x, *_: x, SCHEDULES[name], source)
