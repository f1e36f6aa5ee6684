"""Linear operators and their pseudo-inverses: the Moore-Penrose conditions, and the same measured in other ways."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.corruption import Blur
from ldm.diffusion.linear_operators import (
    LEAST_SINGULAR,
    AveragePooling,
    GaussianBlur,
    LinearOperator,
    Masking,
    satisfying,
)

HEIGHT, WIDTH = 12, 8
MEASURED = torch.from_numpy(np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.4)
OPERATORS: dict[str, LinearOperator] = {
    "super_resolution": AveragePooling(4),
    "blur": GaussianBlur(HEIGHT, WIDTH, 0.8),
    "strong blur": GaussianBlur(HEIGHT, WIDTH, 2.5),
    "mask": Masking(MEASURED),
}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def matrix(function, height: int, width: int) -> Tensor:
    """Of a linear function of one-channel pictures, (outputs, height * width)."""
    units = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return function(units).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_four_conditions_of_moore_and_penrose(name: str) -> None:
    operator = OPERATORS[name]
    x = random(2, 3, HEIGHT, WIDTH)
    size = operator(x).shape[-2:]
    H, pinv = matrix(operator, HEIGHT, WIDTH), matrix(operator.pseudo_inverse, *size)
    for found, expected in (
        (H @ pinv @ H, H),
        (pinv @ H @ pinv, pinv),
        ((H @ pinv).T, H @ pinv),
        ((pinv @ H).T, pinv @ H),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(pinv, torch.linalg.pinv(H, rtol=1e-9), rtol=0, atol=1e-9)
    # Of a batch of many channels as of each alone.
    torch.testing.assert_close(operator(x).flatten(2), x.flatten(2) @ H.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name: str) -> None:
    operator = OPERATORS[name]
    x = random(2, 3, HEIGHT, WIDTH)
    y = random(*operator(x).shape, seed=2)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-12, atol=0)
    assert operator.adjoint(y).shape == x.shape


def test_super_resolution_measures_the_means_of_squares() -> None:
    x = random(1, 3, HEIGHT, WIDTH)
    means = x.numpy().reshape(1, 3, HEIGHT // 4, 4, WIDTH // 4, 4).mean(axis=(3, 5))
    torch.testing.assert_close(AveragePooling(4)(x), torch.from_numpy(means))


def convolved(x: Tensor, deviation: float) -> Tensor:
    """(B, C, H, W) convolved with a sampled Gaussian, rows and columns, mirrored at the borders."""
    reach = 12
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    for axis in (2, 3):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), mode="valid")
    return torch.from_numpy(padded)


@pytest.mark.parametrize("deviation", [1.5, 2.5])
def test_blur_is_convolution_but_for_waves_that_are_lost(deviation: float) -> None:
    x = random(1, 3, 32, 32)
    ours, theirs = GaussianBlur(32, 32, deviation)(x), convolved(x, deviation)
    corrupted = Blur(32, 32, [deviation])(x, torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(corrupted, theirs, rtol=0, atol=2e-3)
    difference = corrupted - ours
    assert 0 < float(difference.norm()) < LEAST_SINGULAR * float(x.norm())
    # What is missing is only what the operator sees nothing of.
    assert float(GaussianBlur(32, 32, deviation)(difference).abs().max()) < 1e-12


def test_the_projection_is_the_nearest_picture_that_satisfies_its_measurement() -> None:
    for operator in OPERATORS.values():
        x, other = 0.1 * random(1, 1, HEIGHT, WIDTH), 0.1 * random(1, 1, HEIGHT, WIDTH, seed=3)
        y = operator(other)
        found = satisfying(x, operator, y, -9, 9)
        torch.testing.assert_close(operator(found), y, rtol=0, atol=1e-12)
        H = matrix(operator, HEIGHT, WIDTH)
        nearest = torch.linalg.lstsq(H, (y - operator(x)).flatten(), driver="gelsd").solution
        torch.testing.assert_close((found - x).flatten(), nearest, rtol=0, atol=1e-9)


def test_a_picture_within_its_range_satisfies_its_measurement_too() -> None:
    truth = random(1, 3, 32, 32).clamp(-1, 1)  # a third of it at the ends of the range
    operator = AveragePooling(4)
    found = satisfying(3 * random(1, 3, 32, 32, seed=5), operator, operator(truth), -1, 1)
    assert float(found.abs().max()) <= 1
    assert float((operator(found) - operator(truth)).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AveragePooling(1), "super_resolution: found factor 1, expected 2 or more"),
        (lambda: AveragePooling(4)(torch.zeros(1, 3, 8, 6)), "found a picture of 8x6 pixels, expected multiples of"),
        (lambda: GaussianBlur(8, 8, 0.0), "blur: found sigma 0.0, expected a number of pixels above 0"),
        (lambda: GaussianBlur(8, 8, float("inf")), "blur: found sigma inf"),
        (lambda: GaussianBlur(8, 8, 1.0)(torch.zeros(1, 3, 8, 6)), r"blur: found pictures of \(8, 6\) pixels"),
    ],
)
def test_operators_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
