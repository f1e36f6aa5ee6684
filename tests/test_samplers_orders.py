"""Deterministic samplers: orders of convergence on exact flows, adaptive steps, inversion and back."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from exact_networks import (
    SCHEDULE,
    ZERO_SNR,
    assert_same,
    denoise_with,
    exact_flow,
    gaussian,
    geometric,
    mixture,
    two_modes,
    unit_noise,
)
from torch import Tensor

from ldm.diffusion.adaptive import ode_adaptive
from ldm.diffusion.ancestral import ddim, ddim_inversion
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sampler_contract import Sampler, start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.separate_steps import ERROR as ERROR_WEIGHTS
from ldm.diffusion.separate_steps import NODES, STAGES
from ldm.diffusion.spacing import sigmas
from ldm.diffusion.unipc import unipc

ORDERS: dict[str, tuple[Sampler, int]] = {
    "ddim": (SAMPLERS["ddim"], 1),
    "euler": (SAMPLERS["euler"], 1),
    "heun": (SAMPLERS["heun"], 2),
    "dpm_solver_2": (SAMPLERS["dpm_solver_2"], 2),
    "dpm_solver_3": (SAMPLERS["dpm_solver_3"], 3),
    "dpmpp_2m": (SAMPLERS["dpmpp_2m"], 2),
    "dpmpp_3m": (SAMPLERS["dpmpp_3m"], 3),
    "unipc 1": (partial(unipc, order=1), 2),
    "unipc": (unipc, 3),
    "unipc bh1": (partial(unipc, variant="bh1"), 3),
    "unipc 3": (partial(unipc, order=3), 3),
    "unipc 3 bh1": (partial(unipc, order=3, variant="bh1"), 3),
}
"""Orders of whole runs. UniPC-3 is of order 4 but for its start, of order 3, which little depends on at high noise."""
HIGH, LOW = 14.6, 0.3
COUNTS = [40, 80, 160, 320]


def fitted_order(sample: Sampler, denoise: Denoise, x: Tensor, exact: Tensor, low: float) -> float:
    errors = [(sample(denoise, x, geometric(HIGH, low, steps)) - exact).norm().item() for steps in COUNTS]
    return -float(np.polyfit(np.log(COUNTS), np.log(errors), 1)[0])


def assert_order(name: str, found: float) -> None:
    order = ORDERS[name][1]
    highest = 5 if name.startswith("unipc 3") else 1.2 * order
    assert 0.9 * order <= found <= highest, f"fitted order {found:.3f}, theoretical {order}"


@pytest.mark.parametrize("dims", [1, 16, 64])
@pytest.mark.parametrize("name", [*ORDERS])
def test_convergence_to_the_exact_flow_of_gaussian_data_is_of_the_theoretical_order(name: str, dims: int) -> None:
    draws = np.random.default_rng(dims)
    mean, std = torch.from_numpy(draws.normal(size=dims)), torch.from_numpy(draws.uniform(0.3, 1.5, size=dims))
    x = torch.from_numpy(draws.normal(size=(8, dims))) * math.sqrt(1 + HIGH**2)
    low = 0.05
    exact = mean + (x - mean) * ((std**2 + low**2) / (std**2 + HIGH**2)).sqrt()
    assert_order(name, fitted_order(ORDERS[name][0], gaussian(mean, std), x, exact, low))


MIXTURES: dict[int, tuple[Denoise, Tensor, Tensor]] = {}
"""By dimensions: denoiser, start, exact end."""


def mixture_problem(dims: int) -> tuple[Denoise, Tensor, Tensor]:
    if dims not in MIXTURES:
        draws = np.random.default_rng(dims)
        denoise = mixture(torch.from_numpy(draws.normal(size=(3, dims))), 0.5)
        x = torch.from_numpy(draws.normal(size=(8, dims))) * math.sqrt(1 + HIGH**2)
        MIXTURES[dims] = denoise, x, exact_flow(denoise, x, HIGH, LOW)
    return MIXTURES[dims]


@pytest.mark.parametrize("dims", [1, 8, 64])
@pytest.mark.parametrize("name", [*ORDERS])
def test_convergence_to_the_exact_flow_of_a_mixture_is_of_the_theoretical_order(name: str, dims: int) -> None:
    denoise, x, exact = mixture_problem(dims)
    assert_order(name, fitted_order(ORDERS[name][0], denoise, x, exact, LOW))


def test_higher_orders_need_far_fewer_steps_down_to_zero() -> None:
    """The order of a whole run to sigma = 0: its last step, of order 1, starts so low that it does not matter."""
    mean, std = 0.3, 0.7
    levels_of = {steps: sigmas(SCHEDULE, steps, "karras") for steps in (20, 200)}
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 4)))
    high = float(levels_of[20][0])
    x = z * math.sqrt(1 + high**2)
    exact = mean + (x - mean) * std / math.sqrt(std**2 + high**2)
    error = {
        (name, steps): (sample(gaussian(mean, std), x, levels) - exact).abs().max().item()
        for (name, (sample, _)), (steps, levels) in product(ORDERS.items(), levels_of.items())
    }
    for name, (_, order) in ORDERS.items():
        if order > 1 and name != "unipc 1":
            assert error[name, 20] < error["euler", 200] * 1.5, name
            assert error[name, 200] < 0.012 * error["euler", 20], name


# --- Adaptive steps


def test_the_dormand_prince_table_fulfils_the_conditions_of_orders_5_and_4() -> None:
    """Quadrature conditions sum_i b_i c_i^(q-1) = 1/q, for b up to q = 5 and for the embedded weights up to 4."""
    c, b, e = np.array([0.0, *NODES]), np.array([*STAGES[-1], 0.0]), np.array(ERROR_WEIGHTS)
    for node, stage in zip(NODES, STAGES, strict=True):
        assert sum(stage) == pytest.approx(node, abs=1e-14)
    for q in range(1, 6):
        assert b @ c ** (q - 1) == pytest.approx(1 / q, abs=1e-14)
    for q in range(1, 5):
        assert e @ c ** (q - 1) == pytest.approx(0, abs=1e-14)
    assert abs(e @ c**4) > 1e-4


@pytest.mark.parametrize("dims", [1, 8, 64])
def test_adaptive_steps_keep_the_tolerance_with_fewer_evaluations_than_fixed_ones(dims: int) -> None:
    denoise, x, exact = mixture_problem(dims)
    errors, counts = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        told: list[int] = []
        asked: list[float] = []

        def counted(x: Tensor, sigma: Tensor, asked: list[float] = asked) -> Tensor:
            asked.append(sigma[0].item())
            return denoise(x, sigma)

        found = ode_adaptive(counted, x, geometric(HIGH, LOW, 10), tolerance=tolerance, evaluations=told.append)
        errors.append(((found - exact).abs() / (1 + exact.abs())).max().item())
        counts.append(len(asked))
        assert told == [len(asked)]
        assert LOW * (1 - 1e-12) <= min(asked) <= max(asked) <= HIGH * (1 + 1e-12)
        assert errors[-1] < 20 * tolerance
    assert counts == sorted(counts)
    assert counts[0] < 100
    assert counts[-1] < 400
    euler_error = (SAMPLERS["euler"](denoise, x, geometric(HIGH, LOW, counts[-1])) - exact).norm()
    heun_error = (SAMPLERS["heun"](denoise, x, geometric(HIGH, LOW, counts[-1] // 2)) - exact).norm()
    assert (found - exact).norm() < 0.01 * heun_error < 0.01 * euler_error


def test_adaptive_steps_end_in_the_denoised_latents_and_start_from_infinite_noise() -> None:
    denoise = denoise_with("v", ZERO_SNR)
    levels = torch.cat([sigmas(ZERO_SNR, 10)[:-1], SCHEDULE.sigma_hat(torch.tensor([3])), torch.zeros(1)])
    found = ode_adaptive(denoise, start(unit_noise(), levels), levels, tolerance=1e-6)
    last = ode_adaptive(denoise, start(unit_noise(), levels), levels[:-1], tolerance=1e-6)
    assert_same(found, denoise(last, levels[-2:-1].expand(2)), 1e-12)
    exact = exact_flow(denoise, levels[1] * unit_noise(), float(levels[1]), float(levels[-2]), steps=600)
    assert_same(last, exact, 1e-4)  # the schedule is log-linear between timesteps, which breaks smoothness


def test_adaptive_steps_from_infinite_noise_to_a_single_level_are_eulers_step() -> None:
    """As repeated steps walk: each is a run of two levels."""
    denoise, levels = denoise_with("v", ZERO_SNR), sigmas(ZERO_SNR, 10)[:2]
    x = start(unit_noise(), levels)
    assert_same(ode_adaptive(denoise, x, levels), SAMPLERS["euler"](denoise, x, levels), 1e-6)


def test_a_tolerance_below_the_networks_rounding_is_an_error() -> None:
    def rough(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(0.0, 0.5)(x, sigma).bfloat16().double()

    x, levels = torch.ones(1, 4), geometric(HIGH, LOW, 10)
    with pytest.raises(RuntimeError, match=r"100 steps reached .* tolerance 1e-08 may be below the network's rounding"):
        ode_adaptive(rough, x, levels, tolerance=1e-8, max_steps=100)
    with pytest.raises(RuntimeError, match=r"ODE: 20 steps reached 14\.6"):
        ode_adaptive(lambda x, sigma: x * math.nan, x, levels, max_steps=20)


def test_an_adaptive_sample_is_what_it_is_alone_whatever_its_batch() -> None:
    """Of a mixture with a mode far away, whose samples need other steps than the rest; batches of 4, 2 and 1."""
    denoise = mixture(torch.tensor([[0.0, 0.0], [1.0, -1.0], [40.0, 40.0]], dtype=torch.float64), 0.05)
    x = torch.tensor([[20.0, 3.0], [-9.0, 7.0], [0.1, 0.2], [60.0, 55.0]], dtype=torch.float64)
    levels, progress = torch.cat([geometric(HIGH, 0.02, 10), torch.zeros(1)]), []
    found = ode_adaptive(denoise, x, levels, progress=lambda *counts: progress.append(counts))
    assert progress == [(i, 11) for i in range(1, 12)]
    counts = []
    for size in (2, 1):
        for part in x.split(size):
            alone = ode_adaptive(denoise, part, levels, evaluations=counts.append)
            torch.testing.assert_close(alone, found[(x[:, None] == part).all(-1).any(1)], rtol=0, atol=1e-11)
    assert len(set(counts[2:])) > 1, "all take the same steps, so that nothing is tried"


# --- Inversion


def test_inversion_converges_to_the_flow_backwards_with_order_1() -> None:
    mean, std, low = 0.3, torch.tensor([0.4, 1.0], dtype=torch.float64), 0.05
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 2)))
    exact = mean + (x - mean) * ((std**2 + HIGH**2) / (std**2 + low**2)).sqrt()
    counts = [160, 320, 640, 1280]
    errors = [
        (ddim_inversion(gaussian(mean, std), x, geometric(HIGH, low, steps)) - exact).norm().item() for steps in counts
    ]
    assert 0.9 <= -np.polyfit(np.log(counts), np.log(errors), 1)[0] <= 1.2


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_inversion_and_back_gives_the_picture_again(spacing: str) -> None:
    """PSNR of latents within +-1.7: over 20 dB plain, over 90 dB with 30 refinements, at 50 steps."""
    denoise, levels, x0 = denoise_with("v"), sigmas(SCHEDULE, 50, spacing), 0.8 * unit_noise(3).sign()
    x0 = x0 + 0.3 * unit_noise(4)  # a sample of the data

    def psnr(refinements: int) -> float:
        noise = ddim_inversion(denoise, x0, levels, refinements=refinements)
        back = ddim(denoise, noise, levels)
        return 10 * math.log10(3.4**2 / (back - x0).square().mean().item())

    found = [psnr(refinements) for refinements in (0, 1, 3, 10, 30)]
    assert found == sorted(found), found
    assert found[0] > 20, found
    assert found[-1] > 90, found


def test_inverted_noise_is_unit_noise_scaled_to_the_first_level() -> None:
    """20,000 numbers of the data, seed 5."""
    draws = np.random.default_rng(5)
    modes = 0.8 * torch.from_numpy(draws.choice([-1.0, 1.0], size=(20_000, 1)))
    x0 = modes + 0.3 * torch.from_numpy(draws.normal(size=(20_000, 1)))
    levels, done = sigmas(SCHEDULE, 100, "karras"), []
    found = ddim_inversion(
        lambda x, sigma: two_modes(x, 1.0, sigma.view(-1, 1)), x0, levels, refinements=2,
        progress=lambda *counts: done.append(counts),
    )  # fmt: skip
    assert done == [(i, 100) for i in range(1, 101)]
    expected = math.sqrt(0.8**2 + 0.3**2 + float(levels[0]) ** 2)
    assert found.std().item() == pytest.approx(expected, rel=0.02)
    assert abs(found.mean().item()) < 0.02 * expected


def test_inversion_reaches_the_terminal_level_and_names_levels_from_where_nothing_leads_back() -> None:
    denoise, levels = denoise_with("v", ZERO_SNR), sigmas(ZERO_SNR, 50)
    x0 = 0.8 * unit_noise(3).sign() + 0.3 * unit_noise(4)
    noise = ddim_inversion(denoise, x0, levels, refinements=30)
    assert 0.8 < (noise / levels[0]).std() < 1.2
    assert_same(ddim(denoise, noise, levels), x0, 1e-3)
    with pytest.raises(ValueError, match="expected a level between the terminal one and 0"):
        ddim_inversion(denoise, x0, sigmas(ZERO_SNR, 1))
    with pytest.raises(ValueError, match="refinements: found -1"):
        ddim_inversion(denoise, x0, levels, refinements=-1)
