"""The figure of a bound: bits per dimension against the noise at which they are lost.

Enters: the terms of a bound with the noise levels that each stands for. Leaves: a Pillow image.
"""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 620, 90, 40, 80, 80
INK, GRID, PAPER, FILL, LINE, REFERENCE = "#202020", "#dddddd", "#ffffff", "#cfe0f1", "#1f77b4", "#d62728"
HIGHEST = 1e3
"""Noise level at which the axis ends: beyond it nothing is left to lose, up to pure noise."""


@dataclass(frozen=True)
class Level:
    """One term: the mean over samples, in bits per dimension, and from where to where it reaches in sigma / alpha."""

    low: float
    high: float
    bits: float

    @property
    def density(self) -> float:
        """Bits per dimension for each decade of noise."""
        return self.bits / math.log10(self.high / self.low)


def draw_levels(levels: list[Level], title: str) -> Image.Image:
    """The figure, whose area is the sum of the terms; dashed, what latents that are unit normal noise would cost."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    shown = [one for one in levels if one.low < HIGHEST]
    first, last = math.log10(shown[0].low), math.log10(min(shown[-1].high, HIGHEST))
    most = max([one.density for one in shown] + [unit_normal(shown[0].low)])
    tick = 10 ** math.floor(math.log10(most / 2))
    tick *= next(factor for factor in (1, 2, 5, 10) if most / (tick * factor) <= 6)
    top = tick * math.ceil(most / tick)

    def across(sigma: float) -> float:
        return LEFT + (math.log10(min(sigma, HIGHEST)) - first) / (last - first) * (WIDTH - RIGHT - LEFT)

    def upwards(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    for one in shown:
        pen.rectangle([across(one.low), upwards(max(one.density, 0)), across(one.high), upwards(0)], fill=FILL)
    for count in range(round(top / tick) + 1):
        place = upwards(count * tick)
        pen.line([(LEFT, place), (WIDTH - RIGHT, place)], fill=GRID)
        pen.text((LEFT - 8, place), f"{count * tick:.4g}", fill=INK, font=font, anchor="rm")
    for power in range(math.ceil(first), math.floor(last) + 1):
        for factor in (1, 2, 5):
            sigma = factor * 10.0**power
            if math.log10(sigma) <= last:
                pen.line([(across(sigma), HEIGHT - BOTTOM), (across(sigma), HEIGHT - BOTTOM + 6)], fill=INK)
                pen.text((across(sigma), HEIGHT - BOTTOM + 10), f"{sigma:g}", fill=INK, font=font, anchor="mt")
    outline = [(across(end), upwards(one.density)) for one in shown for end in (one.low, one.high)]
    pen.line(outline, fill=LINE, width=2)
    steps = [first + (last - first) * i / 240 for i in range(241)]
    curve = [(across(10**step), upwards(unit_normal(10**step))) for step in steps]
    for i in range(0, 240, 4):
        pen.line(curve[i : i + 3], fill=REFERENCE, width=2)
    pen.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)
    pen.text((LEFT, TOP - 50), title, fill=INK, font=font, anchor="ls")
    pen.text((LEFT, TOP - 10), "bits per dimension and decade of noise;", fill=LINE, font=font, anchor="ls")
    beside = LEFT + font.getlength("bits per dimension and decade of noise;  ")
    pen.text((beside, TOP - 10), "dashed: of unit normal latents", fill=REFERENCE, font=font, anchor="ls")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18), "noise level sigma / alpha", fill=INK, font=font, anchor="mb")
    return sheet


def unit_normal(sigma: float) -> float:
    """Bits per dimension and decade of a perfect network of unit normal latents: half of what `information` falls."""
    return math.log2(10) / (1 + sigma**2)
