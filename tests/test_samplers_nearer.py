"""Samplers beside diffusers' schedulers: which is nearer to the exact solution at the same levels and evaluations.

The exact solution is that of the probability-flow ODE, from the same start, by Runge-Kutta at 600 steps; where the two
libraries compute the same, it is enough to be no farther than by rounding, which is float32's in theirs.
"""

import math
import os
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


MIXTURES = int(os.environ.get("LDM_MIXTURES", "32"))
"""Random mixtures in each of 2 and 32 dimensions, a quarter of them of each of DEVIATIONS."""
DEVIATIONS = [(0.01, 0.1), (0.05, 0.6), (0.5, 1.5), (0.01, 1.5)]
"""Range of the deviations of the modes of a mixture: fine, middling, wide, and all in each picture."""


def random_mixtures(dims: int, seed: int) -> tuple[Denoise, Tensor]:
    """MIXTURES problems as rows of a batch: denoiser of x (MIXTURES, 4, dims), and its unit noise."""
    draws = np.random.default_rng([seed, dims])
    low, high = (torch.tensor(bounds).log() for bounds in zip(*DEVIATIONS, strict=True))
    kind = torch.arange(MIXTURES) % len(DEVIATIONS)
    low, high, last = (v[kind].view(-1, 1, 1) for v in (low, high, torch.arange(len(DEVIATIONS)) == 3))
    drawn = torch.from_numpy(draws.uniform(size=(MIXTURES, 1, dims)))
    std = (low + (high - low) * torch.where(last, drawn, drawn[..., :1])).exp()  # of each dimension, or of the mixture
    centres = torch.from_numpy(draws.normal(size=(MIXTURES, 5, dims)) * draws.uniform(0.2, 1.2, size=(MIXTURES, 1, 1)))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = std**2 + sigma.view(-1, 1, 1) ** 2  # (MIXTURES, 1, dims)
        distance = ((x[:, :, None] - centres[:, None]) ** 2 / variance[:, :, None]).sum(3)  # (MIXTURES, 4, 5)
        centre = (-distance / 2).softmax(2) @ centres
        return centre + std**2 / variance * (x - centre)

    return denoise, torch.from_numpy(draws.normal(size=(MIXTURES, 4, dims)))


@pytest.mark.parametrize(
    ("spacing", "bound"),
    [("trailing", 1.1), ("leading", 0.8), ("linspace", 0.8), ("karras", 0.8), ("log_snr", 0.8)],
)
def test_dpmpp_3m_is_at_least_as_near_to_the_exact_solution_as_diffusers(spacing: str, bound: float) -> None:
    """Error at the last level above 0, which both libraries leave for D; geometric mean over random mixtures, seed 1.

    With trailing spacing both are about as near, and the mean of so few varies by 10 %.
    """
    for steps in (5, 10, 20, 50):
        levels, ratios = sigmas(SCHEDULE, steps, spacing), []
        for dims in (2, 32):
            denoise, z = random_mixtures(dims, seed=1)
            x = start(z, levels)
            exact = exact_flow(denoise, x, float(levels[0]), float(levels[-2]), steps=100)
            theirs = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, solver_order=3)
            theirs.set_timesteps(steps)
            found = dpmpp_3m(denoise, x, levels[:-1]), run_scheduler(theirs, denoise, x, levels, last=steps - 1)
            ours, their_error = ((result - exact).norm(dim=(1, 2)) for result in found)
            ratios.append((ours / their_error).log())
        ratio = torch.cat(ratios).mean().exp().item()
        print(f"dpmpp_3m, {spacing}, {steps} steps: {ratio:.2f} of diffusers' error, {2 * MIXTURES} mixtures, seed 1")
        assert ratio < bound
        if spacing == "leading" and steps <= 10:
            fine = torch.stack(ratios)[:, :: len(DEVIATIONS)].mean().exp().item()
            assert fine < 1, "a last step that divides sigma by 12 and more goes too far in fine mixtures"


def test_the_second_step_of_dpmpp_3m_is_that_of_dpmpp_2m_after_the_correction_of_the_first() -> None:
    """Of a D that x does not change, steps of unequal lengths: 1 - (1 - e^-h) / h of the difference, carried on."""
    values = {9.0: 1.0, 4.0: 3.0}
    levels, x = torch.tensor([9.0, 4.0, 3.0], dtype=torch.float64), torch.full((1, 1), 5.0, dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, values[float(sigma[0])])

    h = math.log(9 / 4)
    correction = (1 - (1 - 4 / 9) / h) * (3.0 - 1.0) * 3 / 4
    expected = SAMPLERS["dpmpp_2m"](denoise, x, levels).item() + correction
    assert dpmpp_3m(denoise, x, levels).item() == pytest.approx(expected, rel=1e-12)


def test_a_long_step_of_dpmpp_3m_takes_the_last_two_evaluations_and_a_short_one_three() -> None:
    for end, depends in ((0.2, False), (2.0, True)):
        added = []
        for oldest in (1.0, 7.0):
            values, asked = {9.0: oldest, 4.0: 3.0, 3.0: 2.0}, []
            levels = torch.tensor([9.0, 4.0, 3.0, end], dtype=torch.float64)

            def denoise(x: Tensor, sigma: Tensor, values: dict = values, asked: list = asked) -> Tensor:  # type: ignore[type-arg]
                asked.append(x.item())
                return torch.full_like(x, values[float(sigma[0])])

            end_x = dpmpp_3m(denoise, torch.full((1, 1), 5.0, dtype=torch.float64), levels).item()
            added.append(end_x - end / 3 * asked[-1])
        assert (abs(added[0] - added[1]) > 1e-6) == depends, added


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
