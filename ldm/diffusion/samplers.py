"""Samplers: from noise to latents along descending noise levels; one function, and one line in SAMPLERS, each.

Enters: denoise(x, sigma) -> expected x0, x at the first level (`start`), and the levels (`spacing.sigmas`). Leaves: x
at the last level, 0: the latents. Coordinates are variance-exploding, x = x0 + sigma noise; arithmetic is in x's dtype.
"""

from ldm.diffusion.adaptive import ode_adaptive
from ldm.diffusion.ancestral import analytic_dpm, ddim, ddpm, euler_ancestral
from ldm.diffusion.dpm_solver import dpm_solver_2, dpm_solver_3, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from ldm.diffusion.langevin import annealed_langevin, predictor_corrector
from ldm.diffusion.ode_solvers import euler, heun
from ldm.diffusion.sampler_contract import Sampler
from ldm.diffusion.unipc import unipc

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
    "euler_ancestral": euler_ancestral,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "ode_adaptive": ode_adaptive,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
    "analytic_dpm": analytic_dpm,
}
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "predictor_corrector", "annealed_langevin", "analytic_dpm")
"""Samplers that draw noise of their own in each step: no start noise alone leads to their samples."""
OF_NOISE_ALONE = tuple(name for name in SAMPLERS if name != "analytic_dpm")
"""Samplers that need nothing but the model: Analytic-DPM wants variances, estimated beforehand from clean latents."""
