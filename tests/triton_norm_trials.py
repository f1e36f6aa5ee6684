"""The Triton kernels of GroupNorm and SiLU on random shapes against torch's formula in double precision.

Enters: trials and seed, on the command line. Leaves: one line of JSON. Runs on the GPU where there is one; elsewhere
in Triton's interpreter, which has to be chosen (TRITON_INTERPRET=1) before anything imports the kernels.
"""

import json
import random
import sys
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models import triton_norm
from ldm.models.norms import GroupNorm
from ldm.models.triton_norm import fused_group_norm


def main(trials: int, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng, worst = random.Random(seed), defaultdict[str, float](float)
    for trial in range(trials):
        groups, batch = rng.choice([1, 2, 4, 8]), rng.randint(1, 3)
        channels = groups * rng.randint(1, 40)
        height, width = rng.randint(1, 13), rng.randint(1, 13)
        if channels // groups * height * width <= 2:
            # Of one number the deviation is zero; of two the gradient is what cancels: torch's own in float32 is off
            # by a fifth of it.
            width += 2
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        silu, eps = rng.random() < 0.7, rng.choice([1e-5, 1e-6])
        triton_norm.PIECES = rng.choice([1, 2, 128])
        generator = torch.Generator().manual_seed(trial)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: B023, E731
        # A mean of 30 deviations: a variance taken as the difference of two squares would be off by 1e-4.
        scale = rng.choice([0.1, 1.0, 3.0])
        x = scale * (draw(batch, channels, height, width) + rng.choice([0.0, 30.0]))
        # Tiles of a map differ in their means, as those of a picture do.
        x += rng.choice([0.0, 2.0]) * torch.arange(height).view(-1, 1)
        leaves = [x.to(dtype).to(memory_format=torch.channels_last), 1 + 0.5 * draw(channels), draw(channels)]
        upstream = draw(batch, channels, height, width).to(dtype)
        if rng.random() < 0.5:
            upstream = upstream.to(memory_format=torch.channels_last)
        ours = [leaf.to(device).requires_grad_() for leaf in leaves]
        y = fused_group_norm(ours[0], ours[1], ours[2], groups, eps, silu)
        found = [y.detach(), *torch.autograd.grad(y, ours, upstream.to(device))]
        assert (y.dtype, found[2].dtype, found[3].dtype) == (dtype, torch.float32, torch.float32)
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in found[:2])
        exact = [leaf.double().requires_grad_() for leaf in leaves]
        expected = formula(exact, groups, eps, silu)
        gradients = torch.autograd.grad(expected, exact, upstream.double())
        for name, a, b in zip(("y", "dx", "dw", "db"), found, (expected.detach(), *gradients), strict=True):
            off = float((a.cpu().double() - b).abs().max()) / max(float(b.abs().max()), 1e-6)
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            worst[key] = max(worst[key], off)
    check_registration(device)
    print(json.dumps({"trials": trials, "seed": seed, "device": device, "worst": worst}))


def formula(leaves: list[Tensor], groups: int, eps: float, silu: bool) -> Tensor:
    normal = F.group_norm(leaves[0], groups, leaves[1], leaves[2], eps)
    return F.silu(normal) if silu else normal


def check_registration(device: str) -> None:
    """Schema, shapes without numbers, gradient and tracing by torch's own check; equal calls give equal bits."""
    x = torch.randn(2, 12, 5, 3, device=device).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 12, device=device)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    x, weight, bias = inputs
    torch.library.opcheck(triton_norm._forward, (x, weight, bias, 4, 1e-5, True))
    repeats = []
    for _ in range(3):
        y = fused_group_norm(x, weight, bias, 4, 1e-5, True)
        repeats.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for other in repeats[1:] for a, b in zip(repeats[0], other, strict=True))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):  # type: ignore[func-returns-value]
        fused_group_norm(x, weight, bias, 4, 1e-5, True)
    large = [tensor for tensor in kept if tensor.numel() > 24]
    assert [tensor.data_ptr() for tensor in large] == [inputs[0].data_ptr()]
    assert sorted(tensor.numel() for tensor in kept if tensor.numel() <= 24) == [8, 8, 12, 12]
    if device == "cuda":  # the module takes the kernels by itself
        module = GroupNorm(4, 12, 1e-5, silu=True).to(device)
        with torch.profiler.profile() as profile:
            module(x)
        assert any("group_norm_silu" in event.key for event in profile.key_averages())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
