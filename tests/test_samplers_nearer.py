"""Samplers beside diffusers' schedulers: which is nearer to the exact solution at the same levels and evaluations.

The exact solution is that of the probability-flow ODE, from the same start, by Runge-Kutta at 600 steps; where the two
libraries compute the same, it is enough to be no farther than by rounding, which is float32's in theirs.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_networks import (
    NOTHING,
    SCHEDULE,
    ZERO_SNR,
    denoise_with,
    exact_flow,
    gaussian,
    geometric,
    mixture,
    network,
    numpy_noise,
    unit_noise,
)
from torch import Tensor

from ldm.diffusion.ancestral import ddpm
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.dpm_solver import dpm_solver_3, dpmpp_3m
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import sigmas

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
LOWEST = 0.0295
"""Where the exact flow ends: just above the schedule's lowest level; from there to 0 D is the data's to 1e-3."""


def run_scheduler(scheduler: Any, denoise: Denoise, x: Tensor, levels: Tensor, last: int | None = None) -> Tensor:
    """A scheduler's result in variance-exploding coordinates, over our levels, of a network in closed form.

    x is in variance-exploding coordinates too, at the first level.
    """
    if hasattr(scheduler, "sigmas") and not isinstance(scheduler, HeunDiscreteScheduler):
        scheduler.sigmas = levels.clone()
        scheduler.timesteps = torch.arange(len(levels) - 1, 0, -1, dtype=torch.float64)
    exploding = isinstance(scheduler, EulerDiscreteScheduler | HeunDiscreteScheduler)
    x = x if exploding else x / math.sqrt(1 + float(levels[0]) ** 2)
    for i, t in enumerate(scheduler.timesteps[:last]):
        level = SCHEDULE.sigma_hat(t.long()) if isinstance(scheduler, DDIMScheduler) else scheduler.sigmas[i]
        factor = 1.0 if exploding else math.sqrt(1 + float(level) ** 2)
        scheduler.scale_model_input(x, t)
        noisy = x.double() * factor
        noise = (noisy - denoise(noisy, level.double().expand(len(x)))) / level
        x = scheduler.step(noise, t, x).prev_sample
    reached = 0.0 if last is None else float(levels[last])
    return x.double() if exploding else x.double() * math.sqrt(1 + reached**2)


# diffusers' DDIM has whole timesteps only.
@pytest.mark.parametrize(
    ("name", "spacing"), [(n, s) for n in SCHEDULERS for s in ("trailing", "karras") if (n, s) != ("ddim", "karras")]
)
def test_no_shared_sampler_is_farther_from_the_exact_solution_than_its_counterpart(name: str, spacing: str) -> None:
    scheduler, settings = SCHEDULERS[name]
    denoise = denoise_with("epsilon")
    z = unit_noise()
    x = start(z, sigmas(SCHEDULE, 5))
    low = exact_flow(denoise, x, float(sigmas(SCHEDULE, 5)[0]), LOWEST)
    exact = denoise(low, torch.full((2,), LOWEST, dtype=torch.float64))
    for steps in (5, 10, 20, 50):
        levels = sigmas(SCHEDULE, steps, spacing)
        placed = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
        theirs = scheduler(**STABLE_DIFFUSION, **settings, **placed)
        theirs.set_timesteps(steps)
        their_error = (run_scheduler(theirs, denoise, x, levels) - exact).norm()
        our_error = (SAMPLERS[name](denoise, x, levels) - exact).norm()
        assert our_error <= their_error * (1 + 1e-4) + 1e-4, f"{steps} steps: ours {our_error}, theirs {their_error}"


# --- Where ours differ on purpose


def problems() -> list[tuple[Denoise, Tensor]]:
    """Gaussians and mixtures in 1 to 64 dimensions, with a start at 14.6."""
    draws = np.random.default_rng(0)
    found: list[tuple[Denoise, Tensor]] = []
    for dims in (1, 8, 64):
        x = 14.6 * torch.from_numpy(draws.normal(size=(4, dims)))
        std = torch.from_numpy(draws.uniform(0.2, 1.5, size=dims))
        centres = torch.from_numpy(draws.normal(size=(4, dims)))
        found += [(gaussian(0.0, std), x), (mixture(centres, 0.3), x), (mixture(centres / 2, 0.15), x)]
    return found


def test_dpmpp_3m_is_of_order_3_where_diffusers_is_of_order_2() -> None:
    """Its D2 is half the second derivative, but has the factor of the whole one; and its first step is of order 1."""
    denoise, x = problems()[4]
    low, counts = 0.3, [40, 80, 160, 320]
    exact = exact_flow(denoise, x, 14.6, low)
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for steps in counts:
        levels = geometric(14.6, low, steps)
        theirs = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, solver_order=3, lower_order_final=False)
        theirs.set_timesteps(steps + 1)
        padded = torch.cat([levels, torch.tensor([0.0])])
        errors["theirs"].append((run_scheduler(theirs, denoise, x, padded, last=steps) - exact).norm().item())
        errors["ours"].append((dpmpp_3m(denoise, x, levels) - exact).norm().item())
    orders = {key: -np.polyfit(np.log(counts), np.log(found), 1)[0] for key, found in errors.items()}
    assert orders["ours"] > 2.7, (orders, errors)
    assert orders["theirs"] < 2.5, (orders, errors)


@pytest.mark.parametrize(
    ("steps", "spacing", "bound"),
    [
        *((steps, spacing, 1.0) for steps in (5, 10, 20, 50) for spacing in ("karras", "log_snr")),
        (20, "leading", 0.7),  # its last step is 4 times as long in lambda as the one before
        (20, "linspace", 0.7),
    ],
)
def test_dpmpp_3m_is_nearer_to_the_exact_solution_than_diffusers(steps: int, spacing: str, bound: float) -> None:
    """Error at the last level above 0, which both libraries leave for D; geometric mean over 9 problems."""
    ratios = []
    for denoise, x in problems():
        levels = sigmas(SCHEDULE, steps, spacing)
        exact = exact_flow(denoise, x, float(levels[0]), float(levels[-2]), steps=200)
        theirs = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, solver_order=3)
        theirs.set_timesteps(steps)
        their_error = (run_scheduler(theirs, denoise, x, levels, last=steps - 1) - exact).norm()
        ratios.append(((dpmpp_3m(denoise, x, levels[:-1]) - exact).norm() / their_error).item())
    assert np.exp(np.mean(np.log(ratios))) < bound, ratios


def test_dpm_solver_3_is_nearer_than_diffusers_singlestep_of_order_3_at_equal_evaluations() -> None:
    """Theirs takes the second evaluation's place by a step of order 2 in midpoint form, and one level an evaluation."""
    ratios = []
    for denoise, x in problems():
        for steps in (5, 10, 20):
            levels = sigmas(SCHEDULE, steps + 1, "log_snr")[:-1]
            exact = exact_flow(denoise, x, float(levels[0]), float(levels[-1]), steps=200)
            theirs = DPMSolverSinglestepScheduler(
                **STABLE_DIFFUSION, algorithm_type="dpmsolver", solver_order=3, lower_order_final=False,
                final_sigmas_type="sigma_min",
            )  # fmt: skip
            theirs.set_timesteps(3 * steps)
            their_levels = sigmas(SCHEDULE, 3 * steps + 1, "log_snr")[:-1]
            their_error = (run_scheduler(theirs, denoise, x, their_levels, last=3 * steps) - exact).norm()
            ratios.append(((dpm_solver_3(denoise, x, levels) - exact).norm() / their_error).item())
    assert np.exp(np.mean(np.log(ratios))) < 1, ratios


def test_ddpm_with_beta_leaves_no_noise_in_its_result_where_diffusers_does() -> None:
    """With trailing spacing diffusers' last step, from t = 99 of 10, adds noise; 20,000 numbers of N(0, 0.3^2)."""
    std, levels, shape = 0.3, sigmas(SCHEDULE, 10), (2, 10_000)
    denoise, x = gaussian(0.0, std), start(numpy_noise(40, shape)(100), levels)
    theirs = DDPMScheduler(
        **STABLE_DIFFUSION, variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    y, generator = x / math.sqrt(1 + float(levels[0]) ** 2), torch.Generator().manual_seed(1)
    for t, level in zip(theirs.timesteps, levels, strict=False):
        noisy = y * math.sqrt(1 + float(level) ** 2)
        noise = (noisy - denoise(noisy, level.expand(2))) / level
        y = theirs.step(noise, t, y, generator=generator).prev_sample
    ours = ddpm(denoise, x, levels, noise=numpy_noise(41, shape), variance="beta")
    assert abs(ours.std().item() - std) < 0.6 * abs(y.std().item() - std), (ours.std(), y.std())


def test_from_zero_terminal_snr_ours_is_nearer_to_the_limit_than_diffusers_level_of_4096() -> None:
    """DPM-Solver++ 2M of v: from pure noise the limit of the first step is D + sigma_next noise."""
    denoise, z = denoise_with("v", ZERO_SNR), unit_noise()
    levels = sigmas(ZERO_SNR, 10)
    limit = SAMPLERS["dpmpp_2m"](denoise, levels[1] * z, levels[1:])  # D is 0 there: the mean of both modes
    theirs = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    x = z
    predict = network("v", ZERO_SNR)
    for t in theirs.timesteps:
        x = theirs.step(predict(x.double(), t.expand(2), NOTHING), t, x).prev_sample
    ours = SAMPLERS["dpmpp_2m"](denoise, start(z, levels), levels)
    assert (ours - limit).abs().max() < 0.1 * (x - limit).abs().max()
