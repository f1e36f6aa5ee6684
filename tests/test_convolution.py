"""Convolutions as matrix products against torch's own in double precision: values, gradients, memory order."""

import os
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models import convolution
from ldm.models.convolution import Conv2d, neighbourhoods

TRIALS = int(os.environ.get("LDM_CONVOLUTION_TRIALS", "120"))
SEED = int(os.environ.get("LDM_CONVOLUTION_SEED", "0"))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def set_limits(monkeypatch: pytest.MonkeyPatch, *, weights: bool, maps: bool) -> None:
    """Makes every convolution a product, or none: for the gradient of the weights, and for the maps."""
    monkeypatch.setattr(convolution, "SMALL_FOR_WEIGHTS", 1e9 if weights else 0.0)
    monkeypatch.setattr(convolution, "SMALL_FOR_MAPS", 1e9 if maps else 0.0)
    monkeypatch.setattr(convolution, "REORDERED_IN_CACHE", 0)


def passes(module: torch.nn.Conv2d, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    assert module.bias is not None
    return [out.detach(), *torch.autograd.grad(out, [x, module.weight, module.bias], upstream.to(out.dtype))]


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max()) / max(float(b.abs().max()), 1e-12)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("weights", "maps"), [(True, False), (True, True), (False, False)])
def test_outputs_and_gradients_are_torchs_on_random_shapes(
    monkeypatch: pytest.MonkeyPatch, weights: bool, maps: bool
) -> None:
    """120 shapes (LDM_CONVOLUTION_TRIALS), seed 0 (LDM_CONVOLUTION_SEED), kernels 1 to 5, strides 1 to 3."""
    set_limits(monkeypatch, weights=weights, maps=maps)
    rng = random.Random(SEED)
    worst, products = 0.0, 0
    for trial in range(TRIALS):
        size, stride, padding = rng.choice([1, 2, 3, 3, 3, 5]), rng.choice([1, 1, 2, 3]), rng.randint(0, 2)
        inner, outer, batch = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3)
        height, width = (rng.randint(max(1, size - 2 * padding), 9) for _ in range(2))
        generator = torch.Generator().manual_seed(trial)
        x = torch.randn(batch, inner, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
        ours = Conv2d(inner, outer, size, stride=stride, padding=padding)
        ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        exact = torch.nn.Conv2d(inner, outer, size, stride=stride, padding=padding).double()
        exact.load_state_dict(ours.state_dict())
        upstream = torch.randn(exact(x.double()).shape, generator=generator)
        with Operators() as operators:
            found = passes(ours, x, upstream)
        products += "convolution_backward" not in operators.names
        worst = max(worst, largest(found, passes(exact, x.double(), upstream)))
        if maps or (weights and size > 1):
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in found[:3])
    print(f"\n{TRIALS} shapes, seed {SEED}, weights {weights}, maps {maps}: {worst}, {products} without convolutions")
    assert worst < 5e-6
    assert products == TRIALS if maps else products < TRIALS / 2  # 1x1 alone


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    for maps in (False, True):
        set_limits(monkeypatch, weights=True, maps=maps)
        for stride in (1, 2):
            module = Conv2d(2, 3, 3, stride=stride, padding=1).double()
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = torch.randn(2, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
            assert torch.autograd.gradcheck(module, x.requires_grad_())


def test_neighbourhoods_are_those_of_unfold() -> None:
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    found = neighbourhoods(x, 3, 2, 1)
    expected = F.unfold(x, 3, padding=1, stride=2).view(2, 3, 9, 3, 3)  # B, C, k k, h, w
    assert torch.equal(found.view(2, 3, 3, 9, 3), expected.permute(0, 3, 4, 2, 1))


@pytest.mark.parametrize("maps", [False, True])
def test_autocast_computes_in_bfloat16_and_leaves_float32_gradients(
    monkeypatch: pytest.MonkeyPatch, maps: bool
) -> None:
    set_limits(monkeypatch, weights=True, maps=maps)
    torch.manual_seed(0)
    module = Conv2d(32, 48, 3, padding=1)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(2, 48, 6, 6)
    expected = passes(module, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = passes(module, x, upstream)
        theirs = passes(plain(module), x, upstream)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in theirs]
    assert found[2].dtype == torch.float32
    # As near to float32 as torch's own convolution in bfloat16 is: nine shares of a gradient are not added in bfloat16.
    for ours, other, exact in zip(found, theirs, expected, strict=True):
        assert (ours - exact).norm() < 1.2 * (other - exact).norm()


def plain(module: Conv2d) -> torch.nn.Conv2d:
    copy = torch.nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1)
    copy.load_state_dict(module.state_dict())
    return copy


def test_small_maps_of_many_channels_are_products_as_it_is_set_and_large_ones_are_not() -> None:
    kinds = {}
    for name, channels, side in (("inner", 256, 2), ("middle", 32, 4), ("outer", 8, 16)):
        module = Conv2d(channels, channels, 3, padding=1)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        with Operators() as operators:
            module(x).sum().backward()
        kinds[name] = operators.names.count("convolution"), operators.names.count("convolution_backward")
        with Operators() as operators, torch.no_grad():
            module(x)
        assert operators.names.count("convolution") == 1
    # The middle one's is for its input alone.
    assert kinds == {"inner": (0, 0), "middle": (1, 1), "outer": (1, 1)}


def test_maps_in_another_order_and_frozen_weights_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, weights=True, maps=True)
    module = Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 5)
    with Operators() as operators:
        assert torch.equal(module(x), F.conv2d(x, module.weight, module.bias, padding=1))
    assert "convolution" in operators.names
    module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with Operators() as operators:
        torch.autograd.grad(module(leaf).sum(), leaf)
    assert "convolution" in operators.names, "of a network that samples the gradient of its input alone is wanted"
    frozen = Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = x.contiguous(memory_format=torch.channels_last)
    # Forward-mode derivatives, of which a product has none: guidance by a measurement takes them of the autoencoder.
    change = torch.func.jvp(frozen, (given,), (given,))[1]
    torch.testing.assert_close(change, F.conv2d(given, frozen.weight, padding=1))
