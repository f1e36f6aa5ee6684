"""Samplers against diffusers' schedulers: the same network in closed form, the same noise, 5 to 50 steps."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_networks import NOTHING, SCHEDULE, ZERO_SNR, assert_same, denoise_with, network, step_noise, unit_noise
from torch import Tensor

from ldm.diffusion.ancestral import ddim, ddpm, euler_ancestral
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.dpm_solver import dpm_solver_2, dpmpp_2m, dpmpp_2m_sde
from ldm.diffusion.sampler_contract import Noise, start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import sigmas
from ldm.diffusion.unipc import unipc

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = [5, 10, 20, 50]
TO_DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def sample_with_diffusers(
    scheduler: Any, parameterization: str, x: Tensor, *, last: int | None = None, noise: Noise | None = None,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """The loop of a diffusers pipeline over a scheduler whose timesteps are set, in the scheduler's own coordinates."""
    predict = network(parameterization, ZERO_SNR if scheduler.config.get("rescale_betas_zero_snr") else SCHEDULE)
    for i, t in enumerate(scheduler.timesteps[:last]):
        model_input = scheduler.scale_model_input(x, t).double()
        if noise is not None:
            settings["variance_noise"] = noise(i)
        x = scheduler.step(predict(model_input, t.expand(2), NOTHING), t, x, **settings).prev_sample
    return x


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_gives_what_diffusers_gives(spacing: str, parameterization: str) -> None:
    # Not linspace: diffusers steps to t - T // steps whatever the spacing, ours to the next level of the run.
    z = unit_noise()
    for steps, eta in product(STEPS, (0.0, 0.4, 1.0)):
        theirs = DDIMScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            clip_sample=False,
            timestep_spacing=spacing,
            set_alpha_to_one=True,
        )
        theirs.set_timesteps(steps)
        noise = step_noise()
        levels = sigmas(SCHEDULE, steps, spacing)
        ours = ddim(denoise_with(parameterization), start(z, levels), levels, noise=noise, eta=eta)
        generator = torch.Generator().manual_seed(1)
        assert_same(ours, sample_with_diffusers(theirs, parameterization, z, eta=eta, generator=generator))


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddpm_gives_what_diffusers_gives(spacing: str, variance: str, parameterization: str) -> None:
    z = unit_noise()
    for steps in STEPS:
        theirs = DDPMScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            variance_type={"beta_tilde": "fixed_small", "beta": "fixed_large"}[variance],
            clip_sample=False,
            timestep_spacing=spacing,
        )
        theirs.set_timesteps(steps)
        levels = sigmas(SCHEDULE, steps, spacing)
        last = None
        if spacing == "trailing" and variance == "beta":
            # diffusers adds no noise at t = 0, but trailing ends above it: beta_t's noise stays in its result. Ours, as
            # Ho et al. 2020, Alg. 2, adds none in the last step, which is left out of the comparison.
            last, levels = -1, levels[:-1]
        ours = ddpm(denoise_with(parameterization), start(z, levels), levels, noise=step_noise(), variance=variance)  # type: ignore[arg-type]
        ours = ours / math.sqrt(1 + float(levels[-1]) ** 2)
        assert_same(
            ours,
            sample_with_diffusers(theirs, parameterization, z, last=last, generator=torch.Generator().manual_seed(1)),
        )


ODE_SCHEDULERS = {"euler": EulerDiscreteScheduler, "heun": HeunDiscreteScheduler}


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
@pytest.mark.parametrize("name", [*ODE_SCHEDULERS])
def test_euler_and_heun_give_what_diffusers_gives(name: str, spacing: str, parameterization: str) -> None:
    z = unit_noise()
    for steps in STEPS:
        theirs = ODE_SCHEDULERS[name](
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            **({"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}),
        )
        theirs.set_timesteps(steps)
        levels = sigmas(SCHEDULE, steps, spacing)
        x = start(z, levels)
        ours = SAMPLERS[name](denoise_with(parameterization), x, levels)
        assert_same(ours, sample_with_diffusers(theirs, parameterization, x))


@pytest.mark.parametrize("parameterization", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "leading_1", "linspace"])
def test_euler_ancestral_gives_what_diffusers_gives(spacing: str, parameterization: str) -> None:
    z = unit_noise()
    for steps in STEPS:
        theirs = EulerAncestralDiscreteScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            timestep_spacing=spacing.removesuffix("_1"),
            steps_offset=int(spacing == "leading_1"),
        )
        theirs.set_timesteps(steps)
        levels = sigmas(SCHEDULE, steps, spacing)
        if spacing == "linspace":
            # It interpolates between timesteps, the spacing rounds them: their levels are given to it.
            theirs.timesteps, theirs.sigmas = SCHEDULE.timestep(levels[:-1]).float(), levels.float()
        x = start(z, levels)
        ours = euler_ancestral(denoise_with(parameterization), x, levels, noise=step_noise())
        generator = torch.Generator().manual_seed(1)
        assert_same(ours, sample_with_diffusers(theirs, parameterization, x, generator=generator))


MULTISTEP_SPACINGS = {"trailing": "trailing", "leading": "leading_1_multistep", "linspace": "linspace_multistep"}
"""diffusers' name of a spacing in its multistep schedulers, and ours."""


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", [*MULTISTEP_SPACINGS])
def test_sde_dpmpp_2m_gives_what_diffusers_gives(spacing: str, parameterization: str) -> None:
    z = unit_noise()
    for steps in STEPS:
        theirs = DPMSolverMultistepScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            algorithm_type="sde-dpmsolver++",
            timestep_spacing=spacing,
            steps_offset=1,
        )
        theirs.set_timesteps(steps)
        levels = sigmas(SCHEDULE, steps, MULTISTEP_SPACINGS[spacing])
        ours = dpmpp_2m_sde(denoise_with(parameterization), start(z, levels), levels, noise=step_noise())
        assert_same(ours, sample_with_diffusers(theirs, parameterization, z, noise=step_noise()))


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", [*MULTISTEP_SPACINGS])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_gives_what_diffusers_gives(variant: str, spacing: str, parameterization: str) -> None:
    z = unit_noise()
    for steps, order in product(STEPS, (1, 2, 3)):
        theirs = UniPCMultistepScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            solver_order=order,
            solver_type=variant,
            timestep_spacing=spacing,
            steps_offset=1,
        )
        theirs.set_timesteps(steps)
        levels = sigmas(SCHEDULE, steps, MULTISTEP_SPACINGS[spacing])
        denoise, asked = denoise_with(parameterization), []

        def watched(x: Tensor, sigma: Tensor, denoise: Denoise = denoise, asked: list[Tensor] = asked) -> Tensor:
            asked.append(x)
            return denoise(x, sigma)

        ours = unipc(watched, start(z, levels), levels, order=order, variant=variant)  # type: ignore[arg-type]
        # With bh1 diffusers' last step, where h is infinite, is 0 times infinity: that one is left out.
        last = -1 if variant == "bh1" else None
        theirs_found = sample_with_diffusers(theirs, parameterization, z, last=last)
        if last is not None:
            ours = asked[-1] / math.sqrt(1 + float(levels[-2]) ** 2)
        assert_same(ours, theirs_found)


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
def test_dpm_solver_2_gives_what_diffusers_singlestep_gives_on_the_same_levels(parameterization: str) -> None:
    z = unit_noise()
    for evaluations in (6, 10, 20, 50):
        theirs = DPMSolverSinglestepScheduler(
            **STABLE_DIFFUSION,
            prediction_type=TO_DIFFUSERS[parameterization],
            algorithm_type="dpmsolver",
            solver_order=2,
            lower_order_final=False,
            final_sigmas_type="sigma_min",
        )
        theirs.set_timesteps(evaluations)
        levels = sigmas(SCHEDULE, evaluations // 2 + 1, "karras")[:-1]
        # It takes both evaluations of a step from its levels, where ours takes the second at their geometric mean.
        between = (levels[:-1] * levels[1:]).sqrt()
        theirs.sigmas = torch.cat([torch.stack([levels[:-1], between], 1).flatten(), levels[-1:]])
        theirs.timesteps = SCHEDULE.timestep(theirs.sigmas[:-1])
        ours = dpm_solver_2(denoise_with(parameterization), start(z, levels), levels)
        result = sample_with_diffusers(theirs, parameterization, z)
        assert_same(ours, result * math.sqrt(1 + float(levels[-1]) ** 2))


@pytest.mark.parametrize("parameterization", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_dpmpp_2m_gives_what_diffusers_gives(spacing: str, parameterization: str) -> None:
    z = unit_noise()
    for steps in STEPS:
        theirs = DPMSolverMultistepScheduler(
            **STABLE_DIFFUSION, prediction_type=TO_DIFFUSERS[parameterization], timestep_spacing=spacing
        )
        levels = sigmas(SCHEDULE, steps, spacing)
        if spacing == "trailing":
            theirs.set_timesteps(steps)
        else:
            # This scheduler's leading and linspace divide by steps + 1 and so differ from those of diffusers' others,
            # which ours follow: it is given the timesteps.
            theirs.set_timesteps(timesteps=SCHEDULE.timestep(levels[:-1]).long().tolist())
        ours = dpmpp_2m(denoise_with(parameterization), start(z, levels), levels)
        assert_same(ours, sample_with_diffusers(theirs, parameterization, z))


def test_zero_terminal_snr_gives_what_diffusers_ddim_gives() -> None:
    # Only DDIM: diffusers' other schedulers put sigma = 4096 where the SNR is zero, ours are within 1e-7 of the limit.
    # Not eta 1, where diffusers takes the root of 1 - alphas_cumprod - std^2, rounded below 0, and gives NaN. That ours
    # with eta 1 is ddpm, and ddpm's step from the terminal level, are tested below.
    z = unit_noise()
    for steps, eta in product(STEPS, (0.0, 0.5, 0.9)):
        theirs = DDIMScheduler(
            **STABLE_DIFFUSION,
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        theirs.set_timesteps(steps)
        levels = sigmas(ZERO_SNR, steps)
        ours = ddim(denoise_with("v", ZERO_SNR), start(z, levels), levels, noise=step_noise(), eta=eta)
        assert_same(ours, sample_with_diffusers(theirs, "v", z, eta=eta, generator=torch.Generator().manual_seed(1)))


def test_start_noise_is_that_of_diffusers_with_leading_spacing() -> None:
    # With the other spacings diffusers starts at sigma_max: 0.2 % below the deviation that noisy unit data has.
    theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading")
    theirs.set_timesteps(10)
    expected = start(torch.ones(1), sigmas(SCHEDULE, 10, "leading")).item()
    assert float(theirs.init_noise_sigma) == pytest.approx(expected, rel=1e-5)
