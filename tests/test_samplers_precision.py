"""Samplers in float32 and float64: the state's dtype, rounding, and tensors that are the caller's."""

import math

import pytest
import torch
from exact_networks import NOTHING, SCHEDULE, ZERO_SNR, denoise_with, network, numpy_noise
from test_samplers import samplers
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, denoiser
from ldm.diffusion.guidance import unguided
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import sigmas

SHAPE = (2, 3, 4, 4)
IN_FLOAT64 = {"ode_adaptive"}
"""Samplers that work in float64 whatever they are given."""


def run(name: str, schedule: Schedule, spacing: str, dtype: torch.dtype, steps: int, denoise: Denoise) -> Tensor:
    levels, draw = sigmas(schedule, steps, spacing), numpy_noise(3, SHAPE)
    x = start(numpy_noise(2, SHAPE)(0).to(dtype), levels)
    return samplers(steps)[name](denoise, x, levels, noise=lambda step: draw(step).to(dtype))


@pytest.mark.parametrize(
    ("schedule", "parameterization", "spacing"),
    [(SCHEDULE, "epsilon", "trailing"), (SCHEDULE, "v", "log_snr"), (ZERO_SNR, "v", "trailing")],
    ids=["epsilon-trailing", "v-log_snr", "terminal"],
)
@pytest.mark.parametrize("name", [*SAMPLERS])
def test_float32_gives_what_float64_gives_up_to_rounding(
    name: str, schedule: Schedule, parameterization: str, spacing: str
) -> None:
    """From the terminal level too, where x is 2^26 times the noise and D would be lost in differences from it."""
    if name == "analytic_dpm" and schedule is ZERO_SNR:
        pytest.skip("its variances need finite levels")
    seen = set()

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add(x.dtype)
        return denoise_with(parameterization, schedule)(x, sigma)

    for steps in (5, 20):
        single, double = (
            run(name, schedule, spacing, dtype, steps, watched) for dtype in (torch.float32, torch.float64)
        )
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=0, atol=5e-5 if name == "annealed_langevin" else 2e-5)
    assert seen == {torch.float64} if name in IN_FLOAT64 else {torch.float32, torch.float64}


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_what_denoise_and_noise_return_is_left_as_it_was(name: str) -> None:
    """The same few tensors at every call, as of a denoiser that keeps what it returned; x is kept as well."""
    returned, fresh = [numpy_noise(4, SHAPE)(i) for i in range(3)], numpy_noise(5, SHAPE)(0)
    before = [tensor.clone() for tensor in (*returned, fresh)]
    levels = sigmas(SCHEDULE, 8)
    x = start(numpy_noise(6, SHAPE)(0), levels)
    given = x.clone()
    kept: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append((x, x.clone()))
        return returned[0 if name in IN_FLOAT64 else len(kept) % 3]  # of which no step size is small enough

    samplers(8)[name](denoise, x, levels, noise=lambda step: fresh)
    assert all(torch.equal(*pair) for pair in zip((*returned, fresh), before, strict=True))
    assert torch.equal(x, given)
    assert all(torch.equal(*pair) for pair in kept), "x was changed after the network had seen it"


def test_a_float32_network_is_told_the_start_noise_bit_for_bit_of_a_float32_start() -> None:
    z, seen = numpy_noise(7, SHAPE)(0).float(), []
    predict = network("v", ZERO_SNR)

    def watched(x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return predict(x, *rest).float()  # type: ignore[arg-type]

    levels = sigmas(ZERO_SNR, 3)
    assert float(levels[0]) == TERMINAL_SIGMA == math.sqrt(1 + TERMINAL_SIGMA**2)
    SAMPLERS["ddim"](unguided(denoiser(watched, ZERO_SNR, "v"), NOTHING), start(z, levels), levels)
    assert torch.equal(seen[0], z)
