"""Samplers: what all keep to: dtype, input, progress, levels, noise, the step from infinite noise, errors."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from exact_networks import (
    NOTHING,
    SCHEDULE,
    SHAPE,
    ZERO_SNR,
    assert_same,
    denoise_with,
    gaussian,
    numpy_noise,
    step_noise,
    unit_noise,
)
from torch import Tensor

from ldm.diffusion.adaptive import ode_adaptive
from ldm.diffusion.ancestral import analytic_dpm, ddim, ddpm, euler_ancestral
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from ldm.diffusion.guidance import unguided
from ldm.diffusion.langevin import annealed_langevin, predictor_corrector
from ldm.diffusion.ode_solvers import euler, heun
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Sampler, start
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC
from ldm.diffusion.spacing import sigmas
from ldm.diffusion.unipc import unipc

LANGEVIN = 3
"""Steps a level of annealed Langevin dynamics, which takes 100 by default."""
FRESH = {"ddpm", "euler_ancestral", "dpmpp_2m_sde", "analytic_dpm", "predictor_corrector"}
"""Samplers whose step adds noise of its own to D; annealed_langevin adds it afterwards."""


def samplers(steps: int) -> dict[str, Sampler]:
    """All of SAMPLERS, those that need settings with some."""
    return SAMPLERS | {
        "analytic_dpm": partial(analytic_dpm, variances=torch.linspace(0.5, 0.01, steps)),
        "annealed_langevin": partial(annealed_langevin, langevin_steps=LANGEVIN),
    }


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize(
    "name", [name for name in SAMPLERS if name not in ("predictor_corrector", "annealed_langevin")]
)
def test_the_step_from_infinite_noise_is_its_limit(name: str, parameterization: str) -> None:
    """From sigma = infinity they go to denoised + sigma_next * noise: fresh noise, or the start's if they add none."""
    z, noise, denoise = unit_noise(), step_noise(), denoise_with(parameterization, ZERO_SNR)
    levels = sigmas(ZERO_SNR, 10)
    kwargs = {"variances": torch.zeros(10)} if name == "analytic_dpm" else {}
    rest = {"variances": torch.zeros(9)} if name == "analytic_dpm" else {}
    found = SAMPLERS[name](denoise, start(z, levels), levels, noise=noise, **kwargs)
    denoised = torch.zeros(SHAPE, dtype=torch.float64)  # the mean of both modes
    x = denoised + levels[1] * (noise(0) if name in FRESH else z)
    expected = SAMPLERS[name](denoise, x, levels[1:], noise=lambda step: noise(step + 1), **rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_langevin_samplers_step_from_infinite_noise_and_go_on_at_the_next_level() -> None:
    z, noise, denoise = unit_noise(), numpy_noise(1, SHAPE), denoise_with("v", ZERO_SNR)
    levels = sigmas(ZERO_SNR, 10)
    sigma = float(levels[1])

    def score(x: Tensor) -> Tensor:
        return (denoise(x, levels[1].expand(2)) - x) / sigma**2

    x = sigma * noise(0)  # the predictor's step; the mean of both modes is 0
    norms = [v.square().sum((1, 2, 3), keepdim=True).sqrt() for v in (noise(1), score(x))]
    epsilon = 2 * (0.16 * norms[0] / norms[1]) ** 2
    x = x + epsilon * score(x) + (2 * epsilon).sqrt() * noise(1)
    expected = predictor_corrector(denoise, x, levels[1:], noise=lambda draw: noise(draw + 2))
    assert_same(predictor_corrector(denoise, start(z, levels), levels, noise=noise), expected, 1e-6)

    x = sigma * z
    for draw in range(LANGEVIN):
        x = x + 0.1 * sigma**2 * score(x) + math.sqrt(0.2) * sigma * noise(draw)
    expected = annealed_langevin(
        denoise, x, levels[1:], noise=lambda draw: noise(draw + LANGEVIN), langevin_steps=LANGEVIN
    )
    assert_same(
        annealed_langevin(denoise, start(z, levels), levels, noise=noise, langevin_steps=LANGEVIN), expected, 1e-6
    )


def test_start_noise_has_the_deviation_of_noisy_unit_data() -> None:
    """1,000,000 samples, seed 20."""
    z = numpy_noise(20, (2, 1_000_000))(0)
    levels = sigmas(SCHEDULE, 10)
    x = start(z[0], levels)
    assert (x.dtype, start(z[0].float(), levels).dtype) == (torch.float64, torch.float32)
    forward = z[1] + float(levels[0]) * z[0]  # unit data with noise
    assert x.std().item() == pytest.approx(forward.std().item(), rel=4.5e-3)
    assert x.std().item() == pytest.approx(math.sqrt(1 / 0.0046600985), rel=4.5e-3)


def asked_of(name: str, levels: list[float]) -> list[float]:
    """The levels at which a sampler asks the network, from its paper."""
    asked = []
    for sigma, sigma_next in pairwise(levels):
        if sigma_next == 0:
            asked.append(sigma)
        elif name in ("heun", "predictor_corrector"):
            asked += [sigma, sigma_next]
        elif name == "dpm_solver_2":
            asked += [sigma, math.sqrt(sigma * sigma_next)]
        elif name == "dpm_solver_3":
            asked += [sigma, sigma ** (2 / 3) * sigma_next ** (1 / 3), sigma ** (1 / 3) * sigma_next ** (2 / 3)]
        elif name == "annealed_langevin":
            asked += [sigma_next] * LANGEVIN
        else:
            asked.append(sigma)
    return asked


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_a_sampler_keeps_dtype_and_input_and_reports_each_step(name: str) -> None:
    levels, done = sigmas(SCHEDULE, 6), []
    x = start(unit_noise(), levels)
    before, asked = x.clone(), []
    denoise, sample, noise = denoise_with("v"), samplers(6)[name], numpy_noise(1, SHAPE)

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        assert sigma.shape == (2,)
        assert sigma.dtype == torch.float64
        assert sigma.device.type == "cpu"
        asked.append(sigma[0].item())
        result = denoise(x, sigma)
        handed_out.extend([(x, x.clone()), (result, result.clone())])
        return result

    handed_out: list[tuple[Tensor, Tensor]] = []
    found = sample(watched, x, levels, noise=noise, progress=lambda *counts: done.append(counts))
    assert done == [(i, 6) for i in range(1, 7)]
    assert torch.equal(x, before)
    assert found.dtype == torch.float64
    if name == "ode_adaptive":
        assert asked[0] == levels[0]
        assert levels[-2] == pytest.approx(min(asked), rel=1e-12)
    else:
        assert asked == pytest.approx(asked_of(name, levels.tolist()), rel=1e-12)
    for tensor, copy in handed_out:
        assert torch.equal(tensor, copy), "a denoiser may keep what it was given and what it returned"
    single = sample(denoise, x.float(), levels, noise=noise)
    assert single.dtype == torch.float32
    assert_same(found, single, 1e-4 if name == "ode_adaptive" else 1e-5)
    assert not sample(lambda x, s: x.requires_grad_(), x, levels, noise=noise).requires_grad


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ode_adaptive"])
def test_a_sampler_and_its_denoiser_never_wait_for_the_device(name: str) -> None:
    # The meta device has no values: whatever would be fetched to the host raises. ode_adaptive reads its error.
    x = torch.zeros(SHAPE, device="meta")
    denoise = unguided(denoiser(lambda x_t, t, text: x_t * t.view(-1, 1, 1, 1), SCHEDULE, "v"), NOTHING)
    found = samplers(5)[name](denoise, x, sigmas(SCHEDULE, 5), noise=lambda step: torch.zeros_like(x))
    assert found.device.type == "meta"


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_one_step_gives_the_denoised_start(name: str) -> None:
    levels, denoise = sigmas(SCHEDULE, 1), denoise_with("epsilon")
    x = start(unit_noise(), levels)
    found = samplers(1)[name](denoise, x, levels, noise=step_noise())
    assert_same(found, denoise(x, levels[:1].expand(2)), 1e-12)


DRAWS: dict[str, list[int]] = {
    "ddpm": [0, 1, 2, 3, 4, 5],
    "euler_ancestral": [0, 1, 2, 3, 4, 5],
    "dpmpp_2m_sde": [0, 1, 2, 3, 4, 5],
    "analytic_dpm": [0, 1, 2, 3, 4, 5],
    "predictor_corrector": [*range(12)],
    "annealed_langevin": [*range(18)],
}


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_each_draw_is_asked_for_once_and_none_in_the_last_step(name: str) -> None:
    denoise, levels, drawn = denoise_with("v"), sigmas(SCHEDULE, 7), []
    seen: list[Tensor] = []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return torch.full(SHAPE, 0.1 * draw)

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(denoise(x, sigma))
        return seen[-1]

    found = samplers(7)[name](watched, start(unit_noise(), levels), levels, noise=noise)
    assert drawn == DRAWS.get(name, [])
    if name != "ode_adaptive":
        assert torch.equal(found, seen[-1]), "the last step is the denoised latents themselves"


@pytest.mark.parametrize(
    ("sample", "settings"),
    [(ddpm, {"variance": "beta"}), (ddim, {"eta": 1.0}), (ddim, {"eta": 0.3}), (heun, {"s_churn": 2.0})],
)
def test_settings_that_add_noise_draw_it_once_a_step(sample: Callable[..., Tensor], settings: dict) -> None:
    levels, drawn = sigmas(SCHEDULE, 7), []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return torch.zeros(SHAPE)

    sample(denoise_with("v"), start(unit_noise(), levels), levels, noise=noise, **settings)
    # Churn has no room at the first level, and room at the last one above 0.
    assert drawn == ([1, 2, 3, 4, 5, 6] if sample is heun else [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("name", [*SAMPLERS])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "expected .steps . 1,. with 1 step or more"),
        ([1.0], "expected .steps . 1,. with 1 step or more"),
        (1.0, "expected .steps . 1,. with 1 step or more"),
        ([1.0, 1.0, 0.0], "finite levels that descend"),
        ([0.5, 1.0, 0.0], "finite levels that descend"),
        ([1.0, -0.1], "finite levels that descend"),
        ([math.inf, 1.0, 0.0], "finite levels that descend"),
        ([1.0, math.nan, 0.0], "finite levels that descend"),
    ],
)
def test_wrong_levels_are_errors(name: str, levels: list[float], message: str) -> None:
    sigmas = torch.tensor(levels)
    settings = {"variances": torch.zeros(max(sigmas.numel() - 1, 0))} if name == "analytic_dpm" else {}
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](gaussian(0.0, 1.0), torch.zeros(1, 1), sigmas, noise=lambda step: torch.zeros(1, 1), **settings)


def test_a_level_outside_of_the_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sigma: found 80 to 80, expected noise levels from"):
        heun(denoise_with("v"), unit_noise(), torch.tensor([80.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="expected noise levels from"):
        dpmpp_2m(denoise_with("v"), unit_noise(), torch.tensor([TERMINAL_SIGMA, 1.0, 0.0]))


def test_the_stochastic_samplers_are_those_that_draw() -> None:
    assert {*STOCHASTIC} == {*DRAWS}


@pytest.mark.parametrize("name", [*DRAWS])
def test_a_stochastic_sampler_wants_its_noise(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} adds noise: give noise="):
        samplers(1)[name](gaussian(0.0, 1.0), torch.zeros(1, 1), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("sample", "settings", "message"),
    [
        (ddim, {"eta": 0.5, "noise": None}, "ddim with eta > 0 adds noise"),
        (ddim, {"eta": 1.5}, r"eta: found 1\.5, expected 0 to 1"),
        (euler_ancestral, {"eta": -0.1}, r"eta: found -0\.1, expected 0 to 1"),
        (ddpm, {"variance": "learned"}, "variance: found 'learned'"),
        (heun, {"s_churn": 1.0, "noise": None}, "heun with s_churn > 0 adds noise"),
        (heun, {"s_churn": -1.0}, r"found s_churn -1\.0"),
        (unipc, {"order": 4}, "unipc: found order 4"),
        (unipc, {"variant": "bh3"}, "variant 'bh3'"),
        (ode_adaptive, {"tolerance": 0.0}, r"tolerance: found 0\.0"),
        (predictor_corrector, {"snr": 1.0}, r"snr 1\.0, expected"),
        (predictor_corrector, {"corrector_steps": -1}, "found corrector_steps -1"),
        (annealed_langevin, {"langevin_steps": 0}, "found langevin_steps 0"),
        (annealed_langevin, {"step_size": 4.0}, r"step_size 4\.0, expected"),
        (
            analytic_dpm,
            {},
            "variances: found None, expected .1,., one for each step: .python ldm/evaluate.py --scores variances",
        ),
        (analytic_dpm, {"variances": torch.ones(3)}, "variances: found .3,., expected .1,."),
    ],
)
def test_wrong_settings_are_errors(sample: Callable[..., Tensor], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(gaussian(0.0, 1.0), torch.zeros(1, 1), torch.tensor([1.0, 0.0]), **{"noise": step_noise()} | settings)


def test_samplers_that_are_others_in_other_words_agree() -> None:
    z, denoise = unit_noise(), denoise_with("v")
    runs = [sigmas(SCHEDULE, 12, spacing) for spacing in ("trailing", "leading", "karras")]
    runs += [sigmas(ZERO_SNR, steps) for steps in (1, 2, 3, 5, 8, 10, 13, 20, 30)]
    for levels in runs:
        terminal = levels[0] == TERMINAL_SIGMA
        if terminal:
            denoise = denoise_with("v", ZERO_SNR)
        x = start(z, levels)
        ancestral = ddpm(denoise, x, levels, noise=step_noise())
        assert_same(ddim(denoise, x, levels, noise=step_noise(), eta=1.0), ancestral, 1e-12)
        assert_same(euler_ancestral(denoise, x, levels, noise=step_noise()), ancestral, 1e-12)
        no_variance = torch.zeros(len(levels) - 1)
        assert_same(analytic_dpm(denoise, x, levels, noise=step_noise(), variances=no_variance), ancestral, 1e-12)
        without = predictor_corrector(denoise, x, levels, noise=step_noise(), corrector_steps=0)
        assert_same(without, ancestral, 1e-12)
        partly = ddim(denoise, x, levels, noise=step_noise(), eta=0.4)
        assert_same(euler_ancestral(denoise, x, levels, noise=step_noise(), eta=0.4), partly, 1e-12)
        assert_same(ddim(denoise, x, levels), euler(denoise, x, levels), 1e-12)
        if len(levels) <= 3:
            # Two steps have no third evaluation to make a difference of.
            sde = dpmpp_2m_sde(denoise, x, levels, noise=step_noise())
            assert_same(sde, ancestral, 1e-12)
