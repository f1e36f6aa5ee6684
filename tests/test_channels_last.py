"""Feature maps stay channels_last: no operator of UNet or autoencoder, forward or backward, copies one elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unet_pairs import random_inputs, small_pair

from ldm.models import norms
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.convolution import Conv2d

BATCH, SIDES = 2, (20, 10)
"""Samples, and sides of the maps that the networks here have inside; no other tensor has such sizes."""


class Maps(TorchDispatchMode):
    """Records operators that put out a map that is not channels_last, and copies of maps to another order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.left: list[str] = []
        self.copied: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__  # type: ignore[attr-defined]
        if func.is_view:  # type: ignore[attr-defined]
            return out
        maps = [tensor for tensor in tree_leaves(out) if is_map(tensor)]
        self.seen |= {name} if maps else set()
        for tensor in maps:
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                self.left.append(f"{name} {tuple(tensor.shape)} {tensor.stride()}")
        if name in ("clone", "copy_", "_to_copy", "contiguous"):
            given = next(tensor for tensor in reversed(tree_leaves(args)) if isinstance(tensor, Tensor))
            result = tree_leaves(out)[0]
            # Five dimensions are the neighbourhoods of a convolution, gathered to be multiplied.
            if (
                result.dim() < 5
                and result.numel() >= BATCH * min(SIDES) ** 2 * 16
                and given.stride() != result.stride()
            ):
                self.copied.append(f"{name} {tuple(given.shape)} {given.stride()} -> {result.stride()}")
        return out


def is_map(tensor: object) -> bool:
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
    return len(shape) == 4 and shape[0] == BATCH and shape[2] == shape[3] and shape[2] in SIDES


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("linear", [False, True])
def test_maps_of_the_unet_stay_channels_last_forward_and_backward(
    linear: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "NARROW", 0)  # the detour of bfloat16 on CPUs, which no GPU takes
    ours, _ = small_pair(use_linear_projection=linear, layers_per_block=2)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, t, conditioning = random_inputs(ours.config, 0, (20, 20))
    x = x.contiguous(memory_format=torch.channels_last)
    with Maps() as maps:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = ours(x, t, conditioning)
        out.float().square().sum().backward()
    check(maps, ours)
    assert {"upsample_nearest2d", "cat", "native_group_norm", "upsample_nearest2d_backward"} <= maps.seen


def test_maps_of_the_autoencoder_stay_channels_last_forward_and_backward() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        norm_num_groups=4,
    )
    ours = AutoencoderKL(config)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(BATCH, 4, 10, 10).contiguous(memory_format=torch.channels_last)
    with Maps() as maps:
        (ours.encode(images).square().sum() + ours.decode(latents).square().sum()).backward()
    check(maps, ours)
    assert {"native_group_norm", "native_group_norm_backward", "silu"} <= maps.seen


def check(maps: Maps, network: nn.Module) -> None:
    assert not maps.left, sorted(set(maps.left))
    assert not maps.copied, sorted(set(maps.copied))
    gradients = {name: p.grad for name, p in network.named_parameters() if p.dim() == 4}
    # A gradient in another order than its weight is copied when it is stored, and again by the optimizer.
    for name, gradient in gradients.items():
        assert gradient is not None
        assert gradient.is_contiguous(memory_format=torch.channels_last), name
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(module, Conv2d) for module in convolutions)
