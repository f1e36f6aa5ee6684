"""Dormand-Prince with steps of each sample's own, against closed forms, the shared steps of one, and itself alone."""

import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.adaptive import ToleranceError, integrate
from ldm.diffusion.separate_steps import integrate_each

RATES = torch.tensor([0.0, 0.3, 2.0, 40.0], dtype=torch.float64)[:, None]
"""Of samples that decay: the last needs many more steps than the first."""


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -RATES[: len(x)] * x * t[:, None].cos()


def test_each_sample_arrives_at_its_closed_form_with_steps_of_its_own() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    for tolerance in (1e-4, 1e-6, 1e-8):
        found, steps = integrate_each(decay, x, 0.0, 2.0, first_step=0.1, tolerance=tolerance, max_steps=2000)
        exact = (-RATES * math.sin(2.0)).exp().expand(4, 3)
        torch.testing.assert_close(found, exact, rtol=0, atol=50 * tolerance)
        assert steps[0] < steps[2] < steps[3]


def test_a_sample_is_what_it_is_alone_and_what_shared_steps_give_of_one() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    settings = {"first_step": 0.1, "tolerance": 1e-6, "max_steps": 2000}
    together, steps = integrate_each(decay, x, 0.0, 2.0, **settings)  # type: ignore[arg-type]
    for row in range(4):

        def alone(t: Tensor, x: Tensor, row: int = row) -> Tensor:
            return -RATES[row] * x * t[:, None].cos()

        found, own = integrate_each(alone, x[:1], 0.0, 2.0, **settings)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], together[row], rtol=1e-12, atol=0)
        assert own.item() == steps[row]
        shared, _ = integrate(
            lambda t, x, row=row: -RATES[row] * x * math.cos(t), x[:1], 0.0, 2.0, **settings  # type: ignore[misc, arg-type]
        )  # fmt: skip
        torch.testing.assert_close(found, shared, rtol=1e-9, atol=1e-12)


def test_it_goes_backwards_too_and_from_the_end_to_the_end_at_once() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    there, _ = integrate_each(decay, x, 0.0, 1.0, first_step=0.1, tolerance=1e-9, max_steps=5000)
    back, _ = integrate_each(decay, there, 1.0, 0.0, first_step=0.1, tolerance=1e-9, max_steps=5000)
    torch.testing.assert_close(back[:3], x[:3], rtol=0, atol=1e-6)
    same, steps = integrate_each(decay, x, 1.0, 1.0, first_step=0.1, tolerance=1e-9, max_steps=1)
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
