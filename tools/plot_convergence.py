"""Draws error against number of network evaluations for each deterministic sampler, where the answer is known.

In: nothing. Out: a PNG (`--out FILE`), and the numbers on standard output. The data is a mixture of Gaussians, whose
score is exact; the error is the distance from the probability-flow ODE's solution, relative to its length.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.diffusion.adaptive import ode_adaptive
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sampler_contract import Sampler
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.separate_steps import integrate_each
from ldm.diffusion.unipc import unipc
from ldm.grid import save_png

HIGH, LOW, RHO = 14.6, 0.002, 7.0
STEPS = (3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 100)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6)
MOST_EVALUATIONS = 220
LINES: dict[str, tuple[Sampler, str]] = {
    "euler, ddim": (SAMPLERS["euler"], "#7f7f7f"),
    "heun": (SAMPLERS["heun"], "#1f77b4"),
    "dpm_solver_2": (SAMPLERS["dpm_solver_2"], "#17becf"),
    "dpmpp_2m": (SAMPLERS["dpmpp_2m"], "#d62728"),
    "dpm_solver_3": (SAMPLERS["dpm_solver_3"], "#2ca02c"),
    "dpmpp_3m": (SAMPLERS["dpmpp_3m"], "#ff7f0e"),
    "unipc": (SAMPLERS["unipc"], "#9467bd"),
    "unipc, order 3": (partial(unipc, order=3), "#e377c2"),
    "ode_adaptive": (ode_adaptive, "#000000"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1100, 720, 90, 220, 50, 70
INK, GRID, PAPER = "#202020", "#dddddd", "#ffffff"

Point = tuple[int, float]
"""Network evaluations, relative error."""


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/plot_convergence.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="PNG to write (convergence.png)")
    parser.add_argument("--dims", type=int, default=16, help="dimensions of the data (16)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    denoise = mixture(torch.from_numpy(draws.normal(size=(6, options.dims))), 0.25)
    x = HIGH * torch.from_numpy(draws.normal(size=(16, options.dims)))
    lines = {name: measure(sample, denoise, x) for name, (sample, _) in LINES.items()}
    for name, points in lines.items():
        print(f"{name:16}", "  ".join(f"{count}: {error:.1e}" for count, error in points))
    title = f"Mixture of 6 Gaussians, {options.dims} dimensions: from sigma {HIGH} to 0, Karras spacing"
    save_png(draw(lines, title), options.out)
    print(options.out)
    return 0


def mixture(centres: Tensor, width: float) -> Denoise:
    """E[x0 | x] of data in equal parts N(centre, width^2); centres (K, d), x (B, d)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = width**2 + sigma.view(-1, 1) ** 2
        centre = (-torch.cdist(x, centres).square() / (2 * variance)).softmax(1) @ centres
        return centre + width**2 / variance * (x - centre)

    return denoise


def measure(sample: Sampler, denoise: Denoise, x: Tensor) -> list[Point]:
    """Points of one line, in the order of evaluations."""
    exact = solution(denoise, x)
    runs: list[tuple[Sampler, int]] = [(sample, steps) for steps in STEPS]
    if sample is ode_adaptive:
        runs = [(partial(ode_adaptive, tolerance=tolerance), 20) for tolerance in TOLERANCES]
    points = []
    for run, steps in runs:
        asked = 0

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return denoise(x, sigma)

        ramp = torch.linspace(HIGH ** (1 / RHO), LOW ** (1 / RHO), steps, dtype=torch.float64) ** RHO
        found = run(counted, x, torch.cat([ramp, torch.zeros(1, dtype=torch.float64)]))
        if asked <= MOST_EVALUATIONS:
            points.append((asked, ((found - exact).norm() / exact.norm()).item()))
    return points


def solution(denoise: Denoise, x: Tensor) -> Tensor:
    """The exact end at sigma 0, to about 1e-10; below sigma = 1e-4 the slope is constant to that precision."""

    def slope(sigma: Tensor, x: Tensor) -> Tensor:
        return (x - denoise(x, sigma)) / sigma[:, None]

    low = 1e-4
    end, last, _ = integrate_each(slope, x, HIGH, low, first_step=0.1, tolerance=1e-11, max_steps=20_000)
    return end - low * last


def draw(lines: dict[str, list[Point]], title: str) -> Image.Image:
    """The figure: both axes logarithmic, each line labelled at its end."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    errors = [error for points in lines.values() for _, error in points]
    bottom, top = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    across = axis(math.log10(3), math.log10(MOST_EVALUATIONS), LEFT, WIDTH - RIGHT)
    upwards = axis(bottom, top, HEIGHT - BOTTOM, TOP)
    for count in (3, 5, 10, 20, 50, 100, 200):
        place = across(math.log10(count))
        pen.line([(place, TOP), (place, HEIGHT - BOTTOM)], fill=GRID)
        pen.text((place, HEIGHT - BOTTOM + 8), str(count), fill=INK, font=font, anchor="mt")
    for power in range(bottom, top + 1):
        place = upwards(power)
        pen.line([(LEFT, place), (WIDTH - RIGHT, place)], fill=GRID)
        pen.text((LEFT - 8, place), f"1e{power}", fill=INK, font=font, anchor="rm")
    pen.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "network evaluations", fill=INK, font=font, anchor="mb")
    pen.text((LEFT + 60, TOP - 8), title, fill=INK, font=font, anchor="ls")
    pen.text((8, TOP - 8), "relative error", fill=INK, font=font, anchor="ls")
    ends = []
    for name, points in lines.items():
        places = [(across(math.log10(count)), upwards(math.log10(error))) for count, error in points]
        colour = LINES[name][1]
        for one, other in pairwise(places):
            pen.line([one, other], fill=colour, width=3)
        for x, y in places:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        ends.append((places[-1], name, colour))
    lowest = 0.0
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        lowest = max(y, lowest + 20)  # labels do not cover each other
        pen.line([(x, y), (WIDTH - RIGHT + 8, lowest)], fill=colour)
        pen.text((WIDTH - RIGHT + 12, lowest), name, fill=colour, font=font, anchor="lm")
    return sheet


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Value -> pixel."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


if __name__ == "__main__":
    raise SystemExit(main())
