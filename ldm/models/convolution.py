"""Convolutions as matrix products, where that is the faster way to the same numbers.

Enters: feature maps (B, C, H, W) and a convolution's weights. Leaves: feature maps. Names in a state dict are those of
nn.Conv2d. Only channels_last maps and weights are products without being copied; others go to nn.Conv2d's own kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ldm.models.autocast import autocast_dtype, without_autocast

# Positions of a map for each channel, below which a product of gathered neighbourhoods is faster on the CPU: of
# neighbourhoods and gradients (that of the weights), and of neighbourhoods and weights (output, gradient of the input).
# oneDNN reorders weights, and torch their gradients, in each call, whatever the size of the map: on the inner levels of
# a UNet that takes up to ten times as long as the product.
SMALL_FOR_WEIGHTS, SMALL_FOR_MAPS = 4.0, 0.25
REORDERED_IN_CACHE = 1 << 16
"""Input times output channels below which oneDNN's reordering costs less than gathering shares of a gradient."""


class Conv2d(nn.Conv2d):
    """nn.Conv2d: a linear layer where its kernel is 1x1, and on the CPU a product of neighbourhoods for small maps.

    Equal to nn.Conv2d within rounding, in outputs and gradients, which keep channels_last. The products of small maps
    are for training: of a network in eval mode often the gradient of the input alone is wanted, and they give all.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)  # what the products know of

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and _channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if trains and self._is_small_for(SMALL_FOR_WEIGHTS, x):
            return self._product(x)
        return super().forward(x)

    def _is_small_for(self, limit: float, x: Tensor) -> bool:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        positions = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        small = positions <= limit * max(self.in_channels, self.out_channels)
        return small and _channels_last(x) and _channels_last(self.weight)

    def _product(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        assert self.bias is not None
        assert not isinstance(self.padding, str)
        with without_autocast(x.device):
            out: Tensor = _Product.apply(
                x.to(dtype),
                self.weight.to(dtype),
                self.bias.to(dtype),
                self.stride[0],
                self.padding[0],
                self.in_channels * self.out_channels >= REORDERED_IN_CACHE and self._is_small_for(SMALL_FOR_MAPS, x),
            )
        return out


class _Product(torch.autograd.Function):
    """Convolution of a channels_last map with square kernels, the gradient of the weights being one matrix product.

    `maps`: output and gradient of the input are products too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, maps: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.maps = stride, padding, maps
        if not maps:
            return F.conv2d(x, weight, bias, stride, padding)
        size = weight.shape[2]
        near = neighbourhoods(x, size, stride, padding)  # (B, h, w, k k I)
        return F.linear(near, _as_matrix(weight), bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        outer, inner, size, _ = weight.shape
        rows = upstream.permute(0, 2, 3, 1).reshape(-1, outer)  # (P, O)
        near = neighbourhoods(x, size, ctx.stride, ctx.padding).reshape(len(rows), -1)  # (P, k k I)
        of_weight = (rows.t() @ near).view(outer, size, size, inner).permute(0, 3, 1, 2)
        of_x = None
        if ctx.needs_input_grad[0] and ctx.maps:
            shares = (rows @ _as_matrix(weight)).view(*upstream.shape[:1], *upstream.shape[2:], size, size, inner)
            of_x = _gathered(shares, x, ctx.stride, ctx.padding)
        elif ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, upstream, ctx.stride, ctx.padding)
        return of_x, of_weight, rows.sum(0), None, None, None


def neighbourhoods(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The inputs of each position of a convolution, (B, h, w, k k C), of a channels_last map (B, C, H, W)."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    batch, height, width, channels = x.shape
    down, along = (height - size) // stride + 1, (width - size) // stride + 1
    step = x.stride()
    # A row of a neighbourhood, k pixels of C channels, is one piece of memory.
    rows = x.as_strided(
        (batch, down, along, size, size * channels), (step[0], stride * step[1], stride * step[2], step[1], 1)
    )
    return rows.reshape(batch, down, along, size * size * channels)


def _gathered(shares: Tensor, like: Tensor, stride: int, padding: int) -> Tensor:
    """The transpose of `neighbourhoods`: sums shares (B, h, w, k, k, C) where they were taken from, in float32."""
    batch, channels, height, width = like.shape
    total = torch.zeros(batch, height, width, channels, dtype=torch.promote_types(shares.dtype, torch.float32))
    for i in range(shares.shape[3]):
        taken, rows = _touched(shares.shape[1], height, i - padding, stride)
        for j in range(shares.shape[4]):
            taken_along, columns = _touched(shares.shape[2], width, j - padding, stride)
            total[:, rows, columns] += shares[:, taken, taken_along, i, j]
    return total.to(shares.dtype).permute(0, 3, 1, 2)


def _touched(outputs: int, inputs: int, offset: int, stride: int) -> tuple[slice, slice]:
    """Outputs whose tap at an offset lies within the inputs, and these inputs."""
    first = max(0, -(offset // stride))
    last = min(outputs, (inputs - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + offset, (last - 1) * stride + offset + 1, stride)


def _as_matrix(weight: Tensor) -> Tensor:
    """(O, I, k, k) -> (O, k k I), a view when the weights are channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
