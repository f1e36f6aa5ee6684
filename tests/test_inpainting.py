"""Inpainting with any denoiser: the known part at every level, and the drawn part against exact conditionals.

A correlated Gaussian of two numbers, the first of which is known to be KNOWN: the second is then
N(RHO KNOWN, 1 - RHO^2). Replacement alone does not draw from that, which is why steps are repeated.
"""

import math

import numpy as np
import pytest
import torch
from exact_networks import SCHEDULE, denoise_with, geometric, numpy_noise
from torch import Tensor

from ldm.diffusion.ancestral import ddpm
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.inpainting import known_region, known_start, resampled
from ldm.diffusion.ode_solvers import euler
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.samplers import OF_NOISE_ALONE, SAMPLERS
from ldm.diffusion.spacing import sigmas

RHO, KNOWN = 0.8, 1.0
FREE = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
SHAPE = (3, 2, 4, 4)
HALF = torch.cat([torch.zeros(4, 2), torch.ones(4, 2)], 1).view(1, 1, 4, 4)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def correlated(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for unit variances and correlation RHO; x is (B, 2, 1, 1)."""
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
    noisy = covariance + float(sigma[0]) ** 2 * torch.eye(2, dtype=torch.float64)
    return (x.flatten(1) @ torch.linalg.solve(noisy, covariance)).view(x.shape)


def watched(denoise: Denoise, seen: list[tuple[float, Tensor]]) -> Denoise:
    def keep(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((float(sigma[0]), x.clone()))
        return denoise(x, sigma)

    return keep


@pytest.mark.parametrize("name", [name for name in OF_NOISE_ALONE if name != "ode_adaptive"])
def test_every_sampler_keeps_the_known_latents_exactly_and_passes_by_them_at_every_level(name: str) -> None:
    known, noise, fresh = normal(1, *SHAPE[1:], seed=1), normal(*SHAPE, seed=2), numpy_noise(3, SHAPE)
    levels, seen = sigmas(SCHEDULE, 6), []
    denoise = known_region(watched(denoise_with("v"), seen), known, HALF)
    x = known_start(start(noise, levels), known, HALF, noise, float(levels[0]))
    out = SAMPLERS[name](denoise, x, levels, noise=fresh)
    kept = (HALF == 0).expand(SHAPE)
    assert torch.equal(out[kept], known.expand(SHAPE)[kept])
    assert not torch.isclose(out, known.expand(SHAPE))[~kept].any()
    # The last evaluation of each level, as Langevin dynamics enters it with the noise of the level above. Of 24 numbers
    # the deviation from the known ones is sigma within a third or so.
    for sigma, x in dict(seen).items():
        spread = float((x - known)[kept].std()) / sigma
        assert 0.6 < spread < 1.5, f"{name}: at level {sigma:.3g} the known part is {spread:.2f} times as noisy"


def test_a_deterministic_run_passes_exactly_by_the_original_with_that_much_of_the_same_noise() -> None:
    known, noise, levels = normal(1, *SHAPE[1:], seed=1), normal(*SHAPE, seed=2), sigmas(SCHEDULE, 8)
    seen: list[tuple[float, Tensor]] = []
    x = known_start(start(noise, levels), known, HALF, noise, float(levels[0]))
    euler(known_region(watched(denoise_with("v"), seen), known, HALF), x, levels)
    kept = (HALF == 0).expand(SHAPE)
    assert [sigma for sigma, _ in seen] == levels[:-1].tolist()
    for sigma, x in seen:
        torch.testing.assert_close(x[kept], (known + sigma * noise)[kept], rtol=0, atol=1e-12)
    assert torch.equal(seen[0][1][~kept], start(noise, levels)[~kept])


def conditional_samples(repeats: int, levels: int, count: int) -> tuple[Tensor, Tensor]:
    noise = numpy_noise(5, (count, 2, 1, 1))
    steps = torch.cat([geometric(30, 0.05, levels), torch.zeros(1, dtype=torch.float64)])
    known, z = torch.full((1, 2, 1, 1), KNOWN, dtype=torch.float64), normal(count, 2, 1, 1, seed=6)
    x = known_start(30 * z, known, FREE, z, 30.0)
    out = resampled(ddpm, known_region(correlated, known, FREE), x, steps, repeats=repeats, noise=noise)
    return out[:, 0].flatten(), out[:, 1].flatten()


def test_repeated_steps_draw_the_free_part_as_the_known_part_demands() -> None:
    """4,000 samples: mean and variance within 4.5 standard errors and 0.03, RePaint's own bias with 20 repeats."""
    count = 4_000
    known, drawn = conditional_samples(repeats=20, levels=120, count=count)
    assert bool((known == KNOWN).all())
    variance = 1 - RHO**2
    assert abs(float(drawn.mean()) - RHO * KNOWN) < 4.5 * math.sqrt(variance / count) + 0.03
    assert abs(float(drawn.var()) / variance - 1) < 4.5 * math.sqrt(2 / count) + 0.03
    # Replacement alone hardly looks at what is known: what the steps are repeated for.
    _, careless = conditional_samples(repeats=1, levels=120, count=count)
    assert float(careless.mean()) < 0.6 * RHO * KNOWN


def test_one_repeat_is_the_sampler_itself_and_all_repeats_have_noise_of_their_own() -> None:
    noise, levels = normal(*SHAPE, seed=2), sigmas(SCHEDULE, 5)
    denoise, drawn = denoise_with("v"), []

    def fresh(draw: int) -> Tensor:
        drawn.append(draw)
        return normal(*SHAPE, seed=draw)

    once = resampled(euler, denoise, start(noise, levels), levels, repeats=1, noise=fresh)
    torch.testing.assert_close(once, euler(denoise, start(noise, levels), levels), rtol=0, atol=1e-12)
    assert not drawn
    told: list[tuple[int, int]] = []
    resampled(ddpm, denoise, start(noise, levels), levels, repeats=3, noise=fresh, progress=lambda *n: told.append(n))
    assert told == [(i, 13) for i in range(1, 14)]  # four steps three times, the last one once
    assert len(drawn) == len(set(drawn)) == 4 * 3 + 4 * 2
    assert max(drawn) < 2**64


def test_repeats_keep_the_level_of_the_noise() -> None:
    """For a denoiser that says 0 and zero noise in x, what is left is the noise that was put in between."""
    levels, count = torch.tensor([2.0, 1.0], dtype=torch.float64), 20_000
    noise = numpy_noise(4, (count, 1))
    x = 2 * noise(-1 % 2**63)
    out = resampled(ddpm, lambda x, sigma: torch.zeros_like(x), x, levels, repeats=4, noise=noise)
    assert abs(float(out.var()) - 1) < 4.5 * math.sqrt(2 / count)


def test_repeats_below_one_are_refused() -> None:
    levels = sigmas(SCHEDULE, 2)
    with pytest.raises(ValueError, match="repeats: found 0, expected 1 or more"):
        resampled(ddpm, denoise_with("v"), normal(*SHAPE, seed=1), levels, repeats=0, noise=numpy_noise(1, SHAPE))
