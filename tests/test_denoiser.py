"""Denoiser and guidance: closed forms for Gaussian data, what the network is given, guidance against its formulas."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser, denoiser
from ldm.diffusion.guidance import guided, in_interval, unguided
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.conditioning import Conditioning

SCHEDULE = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
STD = 0.5


def conditioning(*means: float) -> Conditioning:
    """The mean of the data that a sample's text asks for."""
    return Conditioning(torch.tensor(means, dtype=torch.float64).view(-1, 1, 1))


def gaussian_network(parameterization: str, schedule: Schedule) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """The best predictor, as a function of (x_t, t), for data N(mean in the text, STD^2) in every dimension."""
    alphas_cumprod = schedule.alphas_cumprod.numpy()
    levels = np.sqrt((1 - alphas_cumprod) / np.maximum(alphas_cumprod, TERMINAL_SIGMA**-2))

    def predict(x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        sigma_hat = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), np.log(levels))))
        alpha = ((1 + sigma_hat**2) ** -0.5).view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        mean = text.text.view(-1, 1, 1, 1)
        x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * mean)
        noise = (x_t - alpha * x0) / sigma
        return {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}[parameterization]

    return predict


def expected_x0(x: Tensor, sigma: Tensor, mean: float) -> Tensor:
    gain = STD**2 / (STD**2 + sigma**2)
    return mean + gain.view(-1, 1, 1, 1) * (x - mean)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
def test_denoised_is_the_posterior_mean_on_and_between_timesteps(parameterization: str) -> None:
    schedules = [SCHEDULE] if parameterization == "epsilon" else [SCHEDULE, ZERO_SNR]
    for schedule in schedules:
        grid = schedule.sigma_hat(torch.tensor([0, 1, 500, 998, 999]))
        between = torch.tensor([0.03, 0.123, 1.0, 7.5, 14.0], dtype=torch.float64)
        for sigma in (grid, between):
            x = normal(5, 2, 3, 3) * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
            D = denoiser(gaussian_network(parameterization, schedule), schedule, parameterization)
            found = D(x, sigma, conditioning(*[0.7] * 5))
            torch.testing.assert_close(found, expected_x0(x, sigma, 0.7), rtol=0, atol=1e-7)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_at_the_terminal_level_the_network_sees_the_start_noise_and_the_mean_comes_out(parameterization: str) -> None:
    noise, seen = normal(2, 4, 8, 8).float().double(), []
    best = gaussian_network(parameterization, ZERO_SNR)

    def network(x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        seen.append((x_t, t))
        return best(x_t, t, text)

    x, level = noise * math.sqrt(1 + TERMINAL_SIGMA**2), torch.full((2,), TERMINAL_SIGMA, dtype=torch.float64)
    found = denoiser(network, ZERO_SNR, parameterization)(x, level, conditioning(0.7, -0.3))
    expected = torch.tensor([0.7, -0.3], dtype=torch.float64).view(2, 1, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    ((x_t, t),) = seen
    assert torch.equal(x_t, noise)
    assert t.tolist() == [999, 999]


class Recorder(nn.Module):
    """One weight, and what the network was called with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        self.calls.append((x_t, t))
        return self.weight * x_t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_network_is_given_its_own_dtype_and_timesteps_that_are_not_rounded(dtype: torch.dtype) -> None:
    network = Recorder(dtype)
    x, sigma = normal(2, 4, 4, 4), SCHEDULE.sigma_hat(torch.tensor([999, 501]))
    with torch.no_grad():
        found = denoiser(network, SCHEDULE, "v")(x, sigma, conditioning(0, 0))
    ((x_t, t),) = network.calls
    assert x_t.dtype == dtype
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert t.tolist() == [999, 501]
    assert found.dtype == torch.float64
    expected = x / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6)


def test_a_level_outside_of_the_schedule_is_an_error_before_the_network_runs() -> None:
    network = Recorder(torch.float32)
    for sigma in (15.0, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected noise levels from"):
            denoiser(network, SCHEDULE, "v")(normal(1, 1, 2, 2), torch.tensor([sigma]), conditioning(0))
    assert not network.calls


def test_wrong_parameterization_is_an_error() -> None:
    with pytest.raises(ValueError, match="parameterization: found 'sample'"):
        denoiser(Recorder(torch.float32), SCHEDULE, "sample")
    with pytest.raises(ValueError, match="found 'epsilon' with zero terminal SNR"):
        denoiser(Recorder(torch.float32), ZERO_SNR, "epsilon")


def counted(D: Denoiser) -> tuple[Denoiser, list[int]]:
    batches: list[int] = []

    def call(x: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        assert len(x) == len(sigma) == len(text)
        batches.append(len(x))
        return D(x, sigma, text)

    return call, batches


LEVEL = torch.full((3,), 2.0, dtype=torch.float64)
TEXT, EMPTY = conditioning(0.5, -0.4, 2.0), conditioning(0, 0, 0)


def test_guidance_scale_1_is_the_conditional_and_0_the_unconditional_denoiser() -> None:
    D, batches = counted(denoiser(gaussian_network("v", SCHEDULE), SCHEDULE, "v"))
    x = normal(3, 2, 4, 4)
    assert torch.equal(guided(D, TEXT, EMPTY, 1.0)(x, LEVEL), D(x, LEVEL, TEXT))
    assert batches == [3, 3]
    torch.testing.assert_close(guided(D, TEXT, EMPTY, 0.0)(x, LEVEL), D(x, LEVEL, EMPTY), rtol=0, atol=1e-14)
    assert torch.equal(unguided(D, TEXT)(x, LEVEL), D(x, LEVEL, TEXT))


def test_guidance_is_that_of_the_networks_noise_with_both_halves_in_one_batch() -> None:
    network = gaussian_network("epsilon", SCHEDULE)
    D, batches = counted(denoiser(network, SCHEDULE, "epsilon"))
    x = normal(3, 2, 4, 4)
    t, x_t = SCHEDULE.timestep(LEVEL), x / math.sqrt(5)
    for scale in (-1.0, 0.5, 4.0, 7.5):
        batches.clear()
        without, with_text = network(x_t, t, EMPTY), network(x_t, t, TEXT)
        expected = x - 2.0 * (without + scale * (with_text - without))
        torch.testing.assert_close(guided(D, TEXT, EMPTY, scale)(x, LEVEL), expected, rtol=0, atol=1e-12)
        assert batches == [6]


def test_guidance_rescale_is_the_formula_of_diffusers_on_x0() -> None:
    best = denoiser(gaussian_network("v", SCHEDULE), SCHEDULE, "v")

    def D(x: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        # The closed form's two halves differ by a constant: here their deviations differ as well.
        return best(x, sigma, text) * (1 + text.text.view(-1, 1, 1, 1))

    x = normal(3, 2, 4, 4)
    with_text, without = D(x, LEVEL, TEXT), D(x, LEVEL, EMPTY)
    for scale, rescale in product((0.0, 3.0, 7.5), (0.0, 0.3, 0.7, 1.0)):
        plain = without + scale * (with_text - without)
        expected = rescale_noise_cfg(plain, with_text, guidance_rescale=rescale)
        found = guided(D, TEXT, EMPTY, scale, rescale)(x, LEVEL)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if rescale == 1:
            torch.testing.assert_close(found.std((1, 2, 3)), with_text.std((1, 2, 3)))


def test_guidance_in_an_interval_is_on_for_its_levels_only() -> None:
    D, batches = counted(denoiser(gaussian_network("v", SCHEDULE), SCHEDULE, "v"))
    on, off = guided(D, TEXT, EMPTY, 3.0), unguided(D, TEXT)
    partly = in_interval(on, off, low=0.5, high=2.0)
    x = normal(3, 2, 4, 4)
    for sigma, inside in ((0.3, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)):
        level = torch.full((3,), sigma, dtype=torch.float64)
        batches.clear()
        found = partly(x, level)
        assert batches == [6 if inside else 3]
        assert torch.equal(found, (on if inside else off)(x, level))
    mixed = torch.tensor([1.0, 2.1, 0.6], dtype=torch.float64)
    expected = torch.where(torch.tensor([True, False, True]).view(3, 1, 1, 1), on(x, mixed), off(x, mixed))
    assert torch.equal(partly(x, mixed), expected)


def test_wrong_guidance_settings_are_errors() -> None:
    D = denoiser(gaussian_network("v", SCHEDULE), SCHEDULE, "v")
    with pytest.raises(ValueError, match="found scale nan"):
        guided(D, TEXT, EMPTY, math.nan)
    with pytest.raises(ValueError, match=r"found rescale 1\.5, expected 0 to 1"):
        guided(D, TEXT, EMPTY, 3.0, 1.5)
    with pytest.raises(ValueError, match=r"found low 2\.0, high 1\.0"):
        in_interval(unguided(D, TEXT), unguided(D, TEXT), 2.0, 1.0)
