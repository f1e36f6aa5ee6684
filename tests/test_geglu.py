"""GEGLU against diffusers' layer, finite differences and the plain formula; what it keeps; autocast and compile."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU as DiffusersGEGLU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ldm.models.blocks import GEGLU
from ldm.models.geglu import geglu


def formula(projection: Tensor) -> Tensor:
    value, gate = projection.chunk(2, dim=-1)
    return value * F.gelu(gate)


def passes(function: object, projection: Tensor, upstream: Tensor) -> list[Tensor]:
    projection = projection.detach().requires_grad_()
    out = function(projection)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, projection, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 12), (7, 2), (1, 3, 4, 10)], ids=str)
def test_output_and_gradient_are_the_formulas_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    projection, upstream = torch.randn(shape).to(dtype) * 3, torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    found, expected = passes(geglu, projection, upstream), passes(formula, projection, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layer_and_its_gradients_are_those_of_diffusers() -> None:
    theirs, ours = DiffusersGEGLU(6, 10), GEGLU(6, 10)
    ours.load_state_dict(theirs.state_dict())
    x, upstream = torch.randn(2, 3, 6), torch.randn(2, 3, 10)
    for layer in (ours, theirs):
        layer(x).backward(upstream)
    torch.testing.assert_close(ours(x), theirs(x))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(geglu, torch.randn(3, 8, dtype=torch.float64).requires_grad_())


def test_the_projection_alone_is_kept_and_no_half_is_copied() -> None:
    kept: list[Tensor] = []
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    projection = torch.randn(2, 5, 16).requires_grad_()
    with Names():
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):  # type: ignore[func-returns-value]
            out = geglu(projection)
        out.backward(torch.randn_like(out))
    assert [tensor.data_ptr() for tensor in kept] == [projection.data_ptr()]
    assert not {"cat", "clone", "copy_", "slice_backward", "split_backward"} & set(names)


def test_under_autocast_and_checkpointing_it_stays_the_formula() -> None:
    layer = GEGLU(6, 10)
    x = torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), formula(layer.proj(x)))
    expected = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    again = checkpoint(layer, x, use_reentrant=False).sin().sum()
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, list(layer.parameters())), expected, strict=True)
    )


def test_compiled_it_is_one_graph_with_the_same_gradient() -> None:
    projection, upstream = torch.randn(2, 5, 12), torch.randn(2, 5, 6)
    compiled = torch.compile(geglu, backend="aot_eager", fullgraph=True)
    for a, b in zip(passes(compiled, projection, upstream), passes(formula, projection, upstream), strict=True):
        torch.testing.assert_close(a, b)
