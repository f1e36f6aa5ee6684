"""Convolutions of a network that samples on a CPU, with their kernels in the order in which the CPU reads them.

Enters: a network. Leaves: the same network; within the block each convolution's kernel is laid out once, where torch
lays it out anew at each call: a third of a small network's time. The values are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ldm.models.autocast import autocast_dtype
from ldm.models.compiled import is_compiled

PackedKernel = tuple[Tensor, Tensor | None]
"""A kernel in oneDNN's order, and the bias, both in the dtype of computation."""


@contextmanager
def packed_convolutions(*networks: nn.Module) -> Iterator[None]:
    """Lays out each kernel at its first call within the block, for the shape and the dtype of that call.

    On another device than the CPU, of a compiled network, where torch has no oneDNN and where a gradient is wanted,
    nothing changes. Weights must not change within the block, which costs the memory of all kernels once more, in the
    dtype of computation.
    """
    eager = [network for network in networks if not is_compiled(network)]
    found = [module for network in eager for module in network.modules() if _packs(module)]
    for convolution in found:
        convolution.forward = partial(_convolve, convolution, {})  # type: ignore[method-assign]
    try:
        yield
    finally:
        for convolution in found:
            del convolution.forward


def _packs(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    # A forward of its own was put there by someone else, who expects it to be called.
    return bool(
        isinstance(module, nn.Conv2d)
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.padding_mode == "zeros"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _convolve(module: nn.Conv2d, packed: dict[torch.dtype, PackedKernel], x: Tensor) -> Tensor:
    dtype = autocast_dtype(x.device) or x.dtype
    if torch.is_grad_enabled() or dtype not in (torch.float32, torch.bfloat16):
        return nn.Conv2d.forward(module, x)
    x, padding = x.to(dtype), module.padding
    assert not isinstance(padding, str)
    geometry = (list(padding), list(module.stride), list(module.dilation), module.groups)
    if dtype not in packed:
        weight = module.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        packed[dtype] = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape)), bias
    weight, bias = packed[dtype]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
