"""Attention backends against the formula in float64, and their selection by a real forward and backward."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.attention import BACKENDS, TORCH_KERNELS, attention, select_backend, tried_by_auto

SHAPES = [
    (2, 4, 64, 64, 40),
    (1, 8, 64, 77, 64),
    (3, 1, 5, 1, 8),
    (2, 5, 33, 33, 160),
    (2, 2, 16, 17, 4),
]  # B, heads, N, M, d
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as the projections leave them: heads are a view of (B, N, heads * d)."""
    batch, heads, queries, keys, features = shape
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(batch, n, heads * features, generator=generator) for n in (queries, keys, keys)]
    return [x.to(device, dtype).unflatten(-1, (heads, features)).transpose(1, 2).requires_grad_() for x in flat]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def outputs(kernel: str | None, qkv: list[Tensor]) -> list[Tensor]:
    out = formula(*qkv) if kernel is None else attention(*qkv, kernel)
    upstream = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, qkv, upstream)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sdpa_output_and_gradients_are_the_formula(shape: tuple[int, ...]) -> None:
    expected = outputs(None, [x.detach().double().requires_grad_() for x in inputs(shape)])
    for found, exact in zip(outputs("sdpa", inputs(shape)), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_keys_that_fill_a_register_are_attended_to_by_nobody() -> None:
    """What fills 77 keys up to 80 must not count, not even where all true scores are far below zero."""
    q, k, v = inputs((2, 3, 40, 77, 8), dtype=torch.float64)
    with torch.no_grad():
        q.copy_(q.abs() + 1)
        k.copy_(-20 * (k.abs() + 1))
    for found, exact in zip(outputs("sdpa", [q, k, v]), outputs(None, [q, k, v]), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TORCH_KERNELS)
def test_a_named_kernel_of_torch_that_the_device_has_not_is_an_error_with_its_cause(name: str) -> None:
    if name == "flash":  # the CPU has this one
        assert select_backend(name, "cpu", torch.float32) == name
        return
    with pytest.raises(RuntimeError, match=f"'{name}' does not work on cpu in torch.float32(.|\n)*RuntimeError: No "):
        select_backend(name, "cpu", torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_put_first_leaves_shapes_that_it_cannot_do_to_others(shape: tuple[int, ...]) -> None:
    expected = outputs("sdpa", inputs(shape))
    for name in TORCH_KERNELS:
        for found, exact in zip(outputs(name, inputs(shape)), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_auto_tries_cudnn_first_on_hopper_and_later_and_nothing_else_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tried_by_auto(torch.device("cpu")) == ["sdpa", "xformers"]
    for capability, expected in (
        ((8, 0), ["sdpa", "xformers"]),
        ((9, 0), ["cudnn", "sdpa", "xformers"]),
        ((10, 0), ["cudnn", "sdpa", "xformers"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tried_by_auto(torch.device("cuda")) == expected


def test_a_kernel_put_first_is_part_of_a_compiled_graph() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, "flash")

    q, k, v = inputs((1, 2, 16, 16, 8))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@needs_cuda
@pytest.mark.parametrize("name", TORCH_KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchs_kernels_give_what_sdpa_gives_on_gpus(shape: tuple[int, ...], name: str) -> None:
    select_backend(name, "cuda", torch.bfloat16)
    ours, theirs = (outputs(kind, inputs(shape, "cuda", torch.bfloat16)) for kind in (name, "sdpa"))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 0.02


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_xformers_and_sdpa_give_the_same_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("xformers")
    select_backend("xformers", "cuda", dtype)
    ours, theirs = (outputs(name, inputs(shape, "cuda", dtype)) for name in ("xformers", "sdpa"))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_on_cpu_ends_in_sdpa(dtype: torch.dtype) -> None:
    assert select_backend("auto", "cpu", dtype) == "sdpa"


def test_xformers_by_name_on_cpu_is_an_error_with_its_cause() -> None:
    pytest.importorskip("xformers")
    with pytest.raises(
        RuntimeError, match=r"'xformers' does not work on cpu in torch.float32; use auto or sdpa"
    ) as error:
        select_backend("xformers", "cpu", torch.float32)
    assert "NotImplementedError: No operator found" in str(error.value)


def test_xformers_that_is_not_installed_is_an_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # what import gives for a package that is not there
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(RuntimeError, match=r"xformers: ModuleNotFoundError: .*xformers"):
        select_backend("xformers", "cpu", torch.float32)
    assert select_backend("auto", "cpu", torch.float32) == "sdpa"


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="found 'fastest', expected auto, sdpa, xformers, cudnn"):
        select_backend("fastest", "cpu", torch.float32)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def without_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).detach()


def gradient_of_k_lost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.detach() + 0 * k, v)


def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) * torch.nan


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (unscaled, "wrong values: the output"),
        (without_backward, "RuntimeError"),
        (gradient_of_k_lost, "wrong values: the gradient of k"),
        (not_a_number, "wrong values: the output is nan"),
    ],
)
def test_a_backend_that_runs_but_is_wrong_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, broken: object, cause: str
) -> None:
    monkeypatch.setattr("ldm.models.attention.BACKENDS", {"broken": broken, **BACKENDS})
    assert select_backend("auto", "cpu", torch.float32) == "sdpa"
    with pytest.raises(RuntimeError, match=cause):
        select_backend("broken", "cpu", torch.float32)


def test_the_trial_runs_where_gradients_and_autocast_are_switched_otherwise() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert select_backend("sdpa", "cpu", torch.float32) == "sdpa"
