"""GEGLU over one tensor that holds both halves, without copies of them.

Enters: a projection (..., 2 C). Leaves: value * gelu(gate), (..., C).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def geglu(projection: Tensor) -> Tensor:
    """a * gelu(b), (a, b) the halves of the last dimension (Shazeer 2020, arXiv:2002.05202); differentiable once.

    Keeps the projection alone for the backward pass, gelu(b) being computed again, and writes both halves of its
    gradient where they belong. torch.compile does so by itself from the plain formula.
    """
    if torch.compiler.is_compiling():
        value, gate = projection.chunk(2, dim=-1)
        return value * F.gelu(gate)
    out: Tensor = _GEGLU.apply(projection)
    return out


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: Tensor) -> Tensor:
        ctx.save_for_backward(projection)
        value, gate = projection.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (projection,) = ctx.saved_tensors
        value, gate = projection.chunk(2, dim=-1)
        gradient = torch.empty_like(projection)
        of_value, of_gate = gradient.chunk(2, dim=-1)
        torch.mul(upstream, F.gelu(gate), out=of_value)
        torch.ops.aten.gelu_backward.grad_input(upstream * value, gate, grad_input=of_gate)
        return gradient
