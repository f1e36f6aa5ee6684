"""Normalizations in the dtype of what they are given, also under autocast, and GroupNorm with its SiLU in one pass.

Enters: feature maps (B, C, H, W) or tokens (B, N, C). Leaves: the same, normalized; memory order (channels_last) stays.
On CUDA, channels_last maps go through the Triton kernels of triton_norm.py where Triton is there: torch's own kernel
would copy them to another memory order and back.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autocast import without_autocast

if importlib.util.find_spec("triton") is not None:
    from ldm.models.triton_norm import fused_group_norm
else:
    fused_group_norm = None  # type: ignore[assignment]


MOST_ROWS = 65_535
"""Samples of a batch that CUDA starts a kernel for along one axis of its grid."""
NARROW = 16
"""Channels of a group below which torch's bfloat16 kernel for channels_last maps on CPUs, whose registers hold what one
position has of a group, takes up to ten times as long as the kernel for the other order and two copies."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018), with `silu` the SiLU after it too, in the dtype of its input; sums are float32.

    Autocast on CUDA would run both in float32: three times the memory traffic and twice the saved activations, for a
    result that the next convolution rounds anyway.
    """

    def __init__(self, groups: int, channels: int, eps: float, *, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        if fused_group_norm is not None and _fusible(x):
            return fused_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        turned = self._turns(x)
        if turned:
            given = _Ordered.apply(x, torch.contiguous_format, torch.channels_last)
        else:  # torch's kernel for channels_last maps has no forward-mode derivative
            given = x.contiguous() if _transformed() else x
        with without_autocast(x.device):
            out = F.group_norm(given, self.num_groups, _for(x, self.weight), _for(x, self.bias), self.eps)
        out = F.silu(out) if self.silu else out
        return _Ordered.apply(out, torch.channels_last, torch.contiguous_format) if turned else out

    def _turns(self, x: Tensor) -> bool:
        """Whether the map is better normalized in the other memory order; a compiler writes a kernel of its own."""
        narrow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.num_channels < NARROW * self.num_groups
        eager = narrow and not torch.compiler.is_compiling() and not _transformed()
        return eager and x.is_contiguous(memory_format=torch.channels_last)


class _Ordered(torch.autograd.Function):
    """A map in memory order `there`, and its gradient in the order `back`: autograd alone would not turn it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: torch.memory_format, back: torch.memory_format) -> Tensor:
        ctx.back = back
        return x.contiguous(memory_format=there)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream.contiguous(memory_format=ctx.back), None, None


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, also under autocast, as GroupNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.layer_norm(x, self.normalized_shape, _for(x, self.weight), _for(x, self.bias), self.eps)


def _for(x: Tensor, parameter: Tensor) -> Tensor:
    """A parameter as torch's kernels take it: beside half-precision inputs, those of the CPU read float32."""
    mixed = x.device.type == "cpu" and parameter.dtype == torch.float32
    return parameter if mixed else parameter.to(x.dtype)


def _fusible(x: Tensor) -> bool:
    # Forward-mode derivatives (torch.func.jvp) are not defined for the kernels.
    whole = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not _transformed()
    return whole and len(x) <= MOST_ROWS


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())
