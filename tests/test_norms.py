"""GroupNorm with SiLU and LayerNorm: the formula, dtypes under autocast; the Triton kernels in their interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.models.norms import GroupNorm, LayerNorm

TRIALS = int(os.environ.get("LDM_NORM_TRIALS", "12"))
SEED = int(os.environ.get("LDM_NORM_SEED", "0"))


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_and_silu_are_the_formula_and_keep_channels_last(silu: bool) -> None:
    module = GroupNorm(3, 12, 1e-5, silu=silu)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    grouped = x.double().reshape(2, 3, -1)
    normal = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = normal.reshape(x.shape) * module.weight.double().view(-1, 1, 1) + module.bias.double().view(-1, 1, 1)
    expected = expected / (1 + torch.exp(-expected)) if silu else expected
    found = module(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("module", [GroupNorm(2, 8, 1e-5, silu=True), LayerNorm(8)], ids=["group", "layer"])
def test_half_precision_stays_under_autocast_and_parameters_keep_float32_gradients(module: torch.nn.Module) -> None:
    shape = (2, 8, 3, 3) if isinstance(module, GroupNorm) else (2, 9, 8)
    x = torch.randn(shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), module(x.float()), rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}
    assert module.bfloat16()(x).dtype == torch.bfloat16  # weights of the same precision, as in a pipeline in bfloat16
    assert module(x.float()).dtype == torch.float32  # weights of a lower one are cast, on any device


@pytest.mark.parametrize("groups", [2, 16])
def test_bfloat16_maps_of_narrow_and_of_wide_groups_are_float32s_within_rounding(groups: int) -> None:
    torch.manual_seed(0)
    module = GroupNorm(groups, 32, 1e-5, silu=True)
    torch.nn.init.normal_(module.weight)
    given = torch.randn(2, 32, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(2, 32, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x = given.to(dtype).requires_grad_()
        out = module(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        found.append([out, *torch.autograd.grad(out, [x, *module.parameters()], upstream.to(dtype))])
        assert found[-1][1].is_contiguous(memory_format=torch.channels_last)
    for half, whole in zip(*found, strict=True):
        assert (half.float() - whole).norm() / whole.norm() < 0.01


def test_eps_is_inside_the_root_as_in_torch() -> None:
    x = torch.full((1, 4, 2, 2), 3.0)
    x[0, :, 0] += 1e-3
    module = GroupNorm(1, 4, 1e-2)
    torch.testing.assert_close(module(x), F.group_norm(x, 1, eps=1e-2))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; it comes with CUDA")
def test_triton_kernels_are_torchs_formula_forward_and_backward_on_random_shapes() -> None:
    """12 shapes (LDM_NORM_TRIALS), seed 0 (LDM_NORM_SEED), in float32, float16 and bfloat16, with and without SiLU."""
    script = Path(__file__).with_name("triton_norm_trials.py")
    interpreted = not torch.cuda.is_available()
    if interpreted and version("triton").startswith("3.6.") and int(np.__version__.split(".")[1]) >= 4:
        pytest.skip("the interpreter of Triton 3.6 (torch 2.11's) runs with numpy up to 2.3 and with no later one")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, str(script), str(TRIALS), str(SEED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{result}")
    for name, off in result["worst"].items():
        # Half-precision inputs and outputs are rounded once; sums and parameters' gradients are float32.
        kept_in_half = name.startswith(("y", "dx"))
        limit = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[name.split()[1]] if kept_in_half else 2e-5
        assert off < limit, (name, off)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; it comes with CUDA")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_triton_kernels_compile_to_the_machine_code_of_gpus(dtype: str, capability: int) -> None:
    """Through Triton and NVIDIA's assembler, which need no GPU: the interpreter takes what a compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ldm.models import triton_norm as kernels

    constants = {"TILE": kernels.POSITIONS, "WIDTH": kernels.CHANNELS, "SILU": True, "PIECES": 128, "SIZE": 16}
    maps, numbers = {"x", "y", "dy", "dx"}, {"positions", "channels", "length", "pieces", "groups", "rows"}
    names = ("_statistics", "_join", "_normalize", "_sums", "_join_sums", "_gradient")
    for kernel in (getattr(kernels, name) for name in names):
        types = {}
        for name in kernel.arg_names:
            types[name] = f"*{dtype}" if name in maps else "i32" if name in numbers else "*fp32"
            types[name] = "constexpr" if name in constants else "fp32" if name == "eps" else types[name]
        given = {(kernel.arg_names.index(name),): constants[name] for name in constants if name in kernel.arg_names}
        done = compile(ASTSource(kernel, types, given), target=GPUTarget("cuda", capability, 32))
        assert done.asm["cubin"][:4] == b"\x7fELF"
