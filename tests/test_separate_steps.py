"""Dormand-Prince with steps of each sample's own, against closed forms and itself alone."""

import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.separate_steps import ToleranceError, integrate_each

RATES = torch.tensor([0.0, 0.3, 2.0, 40.0], dtype=torch.float64)[:, None]
"""Of samples that decay: the last needs many more steps than the first."""


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -RATES[: len(x)] * x * t[:, None].cos()


def test_each_sample_arrives_at_its_closed_form_with_steps_of_its_own() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    for tolerance in (1e-4, 1e-6, 1e-8):
        found, _, steps = integrate_each(decay, x, 0.0, 2.0, first_step=0.1, tolerance=tolerance, max_steps=2000)
        exact = (-RATES * math.sin(2.0)).exp().expand(4, 3)
        torch.testing.assert_close(found, exact, rtol=0, atol=50 * tolerance)
        assert steps[0] < steps[2] < steps[3]


def test_a_sample_is_what_it_is_alone() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    settings = {"first_step": 0.1, "tolerance": 1e-6, "max_steps": 2000}
    together, slope, steps = integrate_each(decay, x, 0.0, 2.0, **settings)  # type: ignore[arg-type]
    for row in range(4):

        def alone(t: Tensor, x: Tensor, row: int = row) -> Tensor:
            return -RATES[row] * x * t[:, None].cos()

        found, own_slope, own = integrate_each(alone, x[:1], 0.0, 2.0, **settings)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], together[row], rtol=1e-12, atol=0)
        torch.testing.assert_close(own_slope[0], slope[row], rtol=1e-12, atol=0)
        assert own.item() == steps[row]


def test_it_goes_both_ways_with_the_slope_at_the_end_and_says_how_far_the_last_sample_is() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[0.0, 500.0]], [[3e6, 1.0]]], dtype=torch.float64)
    for t, end in ((0.0, 2.0), (2.0, 0.0)):
        reached: list[float] = []
        found, slope, _ = integrate_each(
            lambda t, x: x * t.cos().view(-1, 1, 1), x, t, end,
            first_step=0.01, tolerance=1e-9, max_steps=200, reached=reached.append,
        )  # fmt: skip
        exact = x * math.exp(math.sin(end) - math.sin(t))
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(slope, found * math.cos(end), rtol=1e-12, atol=0)
        assert reached[-1] == end
        assert end not in reached[:-1]
        assert reached == sorted(reached, reverse=end < t)


def test_it_goes_backwards_too_and_from_the_end_to_the_end_at_once() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    there = integrate_each(decay, x, 0.0, 1.0, first_step=0.1, tolerance=1e-9, max_steps=5000).x
    back = integrate_each(decay, there, 1.0, 0.0, first_step=0.1, tolerance=1e-9, max_steps=5000).x
    torch.testing.assert_close(back[:3], x[:3], rtol=0, atol=1e-6)
    same, _, steps = integrate_each(decay, x, 1.0, 1.0, first_step=0.1, tolerance=1e-9, max_steps=1)
    assert torch.equal(same, x)
    assert steps.tolist() == [0] * 4


def test_one_sample_that_does_not_arrive_is_an_error() -> None:
    x = torch.ones(4, 1, dtype=torch.float64)
    with pytest.raises(ToleranceError, match="ODE: 20 steps reached"):
        integrate_each(decay, x, 0.0, 2.0, first_step=0.1, tolerance=1e-8, max_steps=20)

    def bad(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(torch.arange(4)[:, None] == 2, torch.nan, x)

    with pytest.raises(ToleranceError, match="ODE: 30 steps reached 0 on the way to 2"):
        integrate_each(bad, x, 0.0, 2.0, first_step=0.1, tolerance=1e-3, max_steps=30)
