"""Guidance: perpendicular negative prompts, autoguidance, errors; test_denoiser.py has the classifier-free formula."""

import math

import pytest
import torch
from exact_networks import SCHEDULE, numpy_noise
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, denoiser
from ldm.diffusion.guidance import autoguided, guided, in_interval, perpendicular, unguided
from ldm.diffusion.samplers import SAMPLERS
from ldm.models.conditioning import Conditioning

SHAPE = (3, 2, 4, 4)
LEVEL = torch.full((3,), 2.0, dtype=torch.float64)


def conditioning(seed: int) -> Conditioning:
    return Conditioning(numpy_noise(seed, (3, 1, 32))(0))


TEXT, EMPTY, NEGATIVE = conditioning(1), conditioning(2), conditioning(3)


def towards_text(x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
    """A denoiser of data that is one point, which the conditioning names, with width 0.3."""
    asked.append(len(x))
    assert len(x) == len(sigma) == len(given)
    mean, level = given.text.view(-1, *SHAPE[1:]), sigma.view(-1, 1, 1, 1)
    return mean + 0.3**2 / (0.3**2 + level**2) * (x - mean)


asked: list[int] = []


def test_perpendicular_takes_away_only_what_is_perpendicular_to_the_prompt() -> None:
    x, weight, scale = numpy_noise(4, SHAPE)(0), 0.7, 5.0
    asked.clear()
    found = perpendicular(towards_text, TEXT, EMPTY, NEGATIVE, scale, weight)(x, LEVEL)
    assert asked == [9]
    for i in range(3):
        row = slice(i, i + 1)
        d_u, d_c, d_n = (towards_text(x[row], LEVEL[row], c.select(row)).flatten() for c in (EMPTY, TEXT, NEGATIVE))
        towards, away = d_c - d_u, d_n - d_u
        # Gram-Schmidt through an orthonormal basis of the two
        basis, _ = torch.linalg.qr(torch.stack([towards, away], 1))
        across = basis[:, 1] * (basis[:, 1] @ away)
        assert abs(across @ towards) < 1e-12
        torch.testing.assert_close(found[i].flatten(), d_u + scale * (towards - weight * across), rtol=0, atol=1e-12)


def test_a_perpendicular_negative_that_says_what_the_prompt_says_changes_nothing() -> None:
    x = numpy_noise(4, SHAPE)(0)
    plain = guided(towards_text, TEXT, EMPTY, 5.0)(x, LEVEL)
    for negative in (TEXT, EMPTY):
        found = perpendicular(towards_text, TEXT, EMPTY, negative, 5.0)(x, LEVEL)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        perpendicular(towards_text, TEXT, EMPTY, NEGATIVE, 5.0, weight=0.0)(x, LEVEL), plain, rtol=0, atol=1e-12
    )
    # A prompt that asks for nothing has no direction: all of the negative is taken away, and nothing is 0 / 0.
    found = perpendicular(towards_text, EMPTY, EMPTY, NEGATIVE, 5.0)(x, LEVEL)
    d_u, d_n = towards_text(x, LEVEL, EMPTY), towards_text(x, LEVEL, NEGATIVE)
    torch.testing.assert_close(found, d_u - 5.0 * (d_n - d_u), rtol=0, atol=1e-12)


def test_autoguidance_leads_away_from_the_weaker_network() -> None:
    x = numpy_noise(4, SHAPE)(0)

    def weak(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.9 * unguided(towards_text, TEXT)(x, sigma) + 0.05

    strong = unguided(towards_text, TEXT)
    for scale in (0.0, 0.5, 2.0):
        expected = (1 - scale) * weak(x, LEVEL) + scale * strong(x, LEVEL)
        torch.testing.assert_close(autoguided(strong, weak, scale)(x, LEVEL), expected, rtol=0, atol=1e-12)
    asked.clear()
    assert torch.equal(autoguided(strong, weak, 1.0)(x, LEVEL), strong(x, LEVEL))
    assert len(asked) == 2
    # It composes with classifier-free guidance and with an interval.
    both = autoguided(guided(towards_text, TEXT, EMPTY, 3.0), weak, 1.5)
    inside = in_interval(both, strong, 0.5, 3.0)
    assert torch.equal(inside(x, LEVEL), both(x, LEVEL))
    assert torch.equal(inside(x, 2 * LEVEL), strong(x, 2 * LEVEL))


def test_autoguidance_undoes_the_error_that_both_networks_share() -> None:
    """A weak network that blurs data of width 0.3 to 0.6, a strong one to 0.45: scale 2 is nearer to the truth."""

    def of_width(width: float) -> Denoise:
        return lambda x, sigma: width**2 / (width**2 + sigma.view(-1, 1, 1, 1) ** 2) * x

    levels = torch.tensor([*torch.linspace(math.log(14.6), math.log(0.02), 60).exp().tolist(), 0.0])
    x = 14.6 * numpy_noise(4, SHAPE)(0)
    truth, strong, weak = of_width(0.3), of_width(0.45), of_width(0.6)
    exact = SAMPLERS["heun"](truth, x, levels)
    plain, guided_ = (SAMPLERS["heun"](d, x, levels) for d in (strong, autoguided(strong, weak, 2.0)))
    assert (guided_ - exact).norm() < 0.5 * (plain - exact).norm()


def test_guidance_wants_something_to_lead_away_from() -> None:
    x = numpy_noise(4, SHAPE)(0)
    for call in (
        lambda: guided(towards_text, TEXT, None, 5.0),
        lambda: perpendicular(towards_text, TEXT, None, NEGATIVE, 5.0),
    ):
        with pytest.raises(ValueError, match=r"found scale 5\.0 with a model that has one conditioning only"):
            call()
    assert torch.equal(guided(towards_text, TEXT, None, 1.0)(x, LEVEL), towards_text(x, LEVEL, TEXT))


def test_wrong_settings_are_errors() -> None:
    strong = unguided(towards_text, TEXT)
    with pytest.raises(ValueError, match="found scale inf"):
        autoguided(strong, strong, math.inf)
    with pytest.raises(ValueError, match="found scale nan"):
        perpendicular(towards_text, TEXT, EMPTY, NEGATIVE, math.nan)
    with pytest.raises(ValueError, match="found weight nan"):
        perpendicular(towards_text, TEXT, EMPTY, NEGATIVE, 2.0, math.nan)
    with pytest.raises(ValueError, match="found 2 unconditional samples, expected 3"):
        guided(towards_text, TEXT, EMPTY.select(slice(2)), 2.0)
    with pytest.raises(ValueError, match="found 1 negative samples, expected 3"):
        perpendicular(towards_text, TEXT, EMPTY, NEGATIVE.select(slice(1)), 2.0)


def test_a_sample_guided_beyond_its_schedule_is_an_error_of_the_denoiser() -> None:
    network = denoiser(lambda x, t, text: x, SCHEDULE, "v")
    with pytest.raises(ValueError, match="sigma: found 80 to 80, expected noise levels from"):
        guided(network, TEXT, EMPTY, 3.0)(numpy_noise(4, SHAPE)(0), 40 * LEVEL)
