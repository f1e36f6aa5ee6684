"""On an NVIDIA GPU: kernels, compilation and precisions give what float64, the processor and diffusers give.

Skipped where there is none. LDM_CHECK_DEVICE=cpu runs what can run without one, to try the tests themselves.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train_ways import (
    Compiled,
    Inputs,
    Ours,
    Script,
    check_same,
    check_updates,
    deviation,
    fresh_accelerator,
    initial_weights,
    reference,
)

from ldm.models.attention import BACKENDS, TORCH_KERNELS, attention, select_backend
from ldm.models.conditioning import Conditioning
from ldm.models.norms import GroupNorm
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

DEVICE = torch.device(os.environ.get("LDM_CHECK_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")

WIDTH, SIDE, BATCH = 64, 16, 2
# By dtype: of attention and norms, whose reference is float64 on the same rounded inputs.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SHAPES = {
    "self-attention of SD 1.x": ((2, 8, 1024, 40), 1024),
    "cross-attention of SD 1.x": ((2, 8, 1024, 40), 77),
    "self-attention of SD 2.x": ((2, 5, 1024, 64), 1024),
    "cross-attention of SD 2.x": ((2, 20, 64, 64), 77),
    "innermost of SD 1.x": ((2, 8, 64, 160), 64),
}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without TF32, which the limits in float32 do not allow for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def config() -> UNetConfig:
    return UNetConfig(
        sample_size=SIDE, block_out_channels=[WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH], cross_attention_dim=768
    )


@pytest.fixture(scope="module")
def weights(config: UNetConfig) -> dict[str, Tensor]:
    return initial_weights(config, DEVICE)


@pytest.fixture(scope="module")
def inputs(config: UNetConfig) -> Inputs:
    return Inputs.random(config, BATCH, SIDE, 77, DEVICE)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def with_gradients(function, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_attention_backend_gives_the_formula_and_its_gradients(backend, shape, dtype):
    if not ON_GPU and (dtype != torch.float32 or backend != "sdpa"):
        pytest.skip("needs an NVIDIA GPU")
    try:
        select_backend(backend, DEVICE, dtype)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[1])
    form, keys = SHAPES[shape]
    q, upstream = (draw(*form, seed=seed, dtype=dtype) for seed in (1, 2))
    k, v = (draw(form[0], form[1], keys, form[3], seed=seed, dtype=dtype) for seed in (3, 4))
    found = with_gradients(lambda *qkv: attention(*qkv, backend), [q, k, v], upstream)
    doubled = [one.double() for one in (q, k, v)]

    def formula(q, k, v):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v

    expected = with_gradients(formula, doubled, upstream.double())
    for one, right in zip(found, expected, strict=True):
        assert float((one.double() - right).norm() / right.norm()) < LIMITS[dtype]


def test_auto_finds_a_backend_in_every_precision():
    for dtype in LIMITS:
        assert select_backend("auto", DEVICE, dtype) in BACKENDS
    assert set(TORCH_KERNELS) < set(BACKENDS)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "with SiLU"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (3, 640, 16, 16), (2, 1280, 8, 8), (1, 96, 7, 5)], ids=str)
def test_norms_with_their_silu_give_what_float64_gives(shape, channels_last, silu, dtype):
    norm = GroupNorm(32, shape[1], 1e-5, silu=silu).to(DEVICE)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(shape[1], seed=5, dtype=torch.float32))
        norm.bias.copy_(0.3 * draw(shape[1], seed=6, dtype=torch.float32))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # A mean far from zero: sums of squares would lose it.
    x = (3 + draw(*shape, seed=7, dtype=torch.float32)).to(dtype).contiguous(memory_format=layout)
    upstream = draw(*shape, seed=8, dtype=dtype).contiguous(memory_format=layout)

    x.requires_grad_()
    out = norm(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    found = [out.detach(), *torch.autograd.grad(out, [x, norm.weight, norm.bias], upstream)]

    exact = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    right = F.group_norm(exact, 32, weight, bias, 1e-5)
    right = F.silu(right) if silu else right
    expected = [right.detach(), *torch.autograd.grad(right, [exact, weight, bias], upstream.double())]
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < LIMITS[dtype]


@gpu_only
def test_channels_last_maps_on_the_gpu_go_through_the_triton_kernels():
    from torch.profiler import ProfilerActivity, profile

    norm, x = GroupNorm(32, 320, 1e-5, silu=True).to(DEVICE), draw(2, 320, 32, 32, seed=1, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    norm(x)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        norm(x)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert any("_statistics" in name for name in names), names


def test_the_step_in_float32_is_diffusers(config, weights, inputs):
    accelerator = fresh_accelerator("no")
    ours, peer = (way(config, weights, inputs, accelerator) for way in (Ours, Script))
    print(check_same(ours, peer, "no"))
    check_updates(ours, peer, "no")


def test_the_step_in_bfloat16_is_as_near_to_float32_as_diffusers(config, weights, inputs):
    accelerator = fresh_accelerator("bf16")
    ours, peer = (way(config, weights, inputs, accelerator) for way in (Ours, Script))
    print(check_same(ours, peer, "bf16", reference(config, weights, inputs)))
    check_updates(ours, peer, "bf16")


@gpu_only
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_compiled_step_is_diffusers_compiled_and_not(config, weights, inputs, precision):
    accelerator = fresh_accelerator(precision)
    exact = reference(config, weights, inputs)
    ours = Ours(config, weights, inputs, accelerator, compiled=True)
    for way in (Script, Compiled) if precision == "bf16" else (Script,):
        print(check_same(ours, way(config, weights, inputs, accelerator), precision, exact))


@gpu_only
def test_the_gate_passes_what_this_machine_compiles(config, weights):
    from ldm.models.compiled import compile_blocks
    from ldm.models.parity_gate import Trial, check_compiled

    unet = UNet(config).to(DEVICE).to(memory_format=torch.channels_last)
    unet.load_state_dict(weights)
    compile_blocks(unet)
    print(check_compiled(unet, Trial(BATCH, SIDE, 77), DEVICE, torch.bfloat16))


def test_the_gpu_gives_what_the_processor_gives(config, weights, inputs):
    found = Ours(config, weights, inputs, fresh_accelerator("no")).gradients()
    at_home = Inputs(*(one.cpu() for one in (inputs.x, inputs.t, inputs.text, inputs.target)))
    expected = reference(config, {name: one.cpu() for name, one in weights.items()}, at_home)
    assert deviation(found[0].cpu(), expected[0]) < 1e-4
    for name, gradient in found[1].items():
        apart = (gradient.cpu() - expected[1][name]).norm() / expected[1][name].norm().clamp(min=1e-4)
        assert float(apart) < 1e-3, name


@gpu_only
def test_a_replayed_graph_draws_what_the_network_gives(config, weights, inputs):
    from ldm.sampling.graphs import replayed

    unet = UNet(config).to(DEVICE).to(memory_format=torch.channels_last).eval()
    unet.load_state_dict(weights)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        replay, text = replayed(unet), Conditioning(inputs.text)
        for t in (900, 500, 20):  # the first is recorded
            step = torch.full((BATCH,), t, device=DEVICE)
            x = inputs.x * (t / 500)
            assert deviation(replay(x, step, text), unet(x, step, text)) < 1e-2


@gpu_only
def test_a_step_of_a_run_waits_for_nothing_and_compiles_nothing(tmp_path: Path):
    from bench_run import WARMUP, steps_of
    from synthetic_run import synthetic_run

    from ldm.training.distributed import split_global_batch
    from ldm.training.run import build_run
    from ldm.training.run_state import resume

    steps, root = 20, Path(__file__).parent.parent
    overrides = ["--training.global_batch=8", f"--training.steps={WARMUP + 2 * steps}", "--metrics.log_every=10"]
    overrides += ["--wrapping.mixed_precision=bf16", "--wrapping.channels_last=true"]
    made = synthetic_run(tmp_path, root / "configs/demo.yaml", SIDE, 64, overrides)
    run = build_run(made, fresh_accelerator("bf16"), split_global_batch(8, 1, None), print)
    resume(run, print)
    waits = steps_of(run, steps).waits
    assert waits is not None
    assert (waits.synchronizations, waits.compilations) == (0, 0), waits
