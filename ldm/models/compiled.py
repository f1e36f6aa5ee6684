"""Compilation by repeated block: each residual and transformer block of a network, in place.

Enters: a network of such blocks. Leaves: the same network, whose blocks run compiled; names in its state dict and the
modules themselves stay. Blocks of one shape share one compiled program, so that a UNet of 41 blocks compiles a few.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ldm.models.blocks import Attention, ResidualBlock, TransformerBlock

PROGRAMS = 1 << 14
"""Programs that one function may be compiled to. All blocks of a kind are one function to torch, which gives up after
8 by default: SDXL's network with 11 buckets has 132 for its steps and as many for each batch size of its validation."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles each residual and transformer block in place at its first call; returns their number.

    Shapes are compiled as they come, none as a variable: that would make channels variable too, as blocks of different
    widths share their code. A new shape therefore costs a compilation.
    """
    _allow_programs()
    blocks = repeated_blocks(network)
    for block in blocks:
        # xformers' kernels break the graph; of everything else a break is a mistake, and told.
        whole = not any(module.backend == "xformers" for module in block.modules() if isinstance(module, Attention))
        block.compile(backend=backend, dynamic=False, fullgraph=whole)
    return len(blocks)


def compile_frozen(network: nn.Module) -> None:
    """Compiles a network as a whole, in place, its weights as constants of the program: for weights that stay.

    On a CPU torch then lays them out once in the order in which its kernels read them, which block by block, as blocks
    share programs, it cannot; a small network draws up to 1.8 times as fast. Each shape costs a compilation of the
    whole. Where gradients are wanted weights are read as they are.
    """
    from torch._inductor import config  # takes a second, which no run without a compiler should

    _allow_programs()
    network.compile(dynamic=False)
    compiled = network._compiled_call_impl
    assert compiled is not None

    def frozen(*given: Any, **named: Any) -> Any:
        # As an option of torch.compile it reaches the code generator alone: tracing has made inputs of the weights.
        with config.patch(freezing=True):
            return compiled(*given, **named)

    network._compiled_call_impl = frozen


def _allow_programs() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, PROGRAMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * PROGRAMS)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that compile_blocks compiles, in the network's order."""
    return [module for module in network.modules() if isinstance(module, ResidualBlock | TransformerBlock)]


def is_compiled(network: nn.Module) -> bool:
    """Whether a block of it, or the network itself, runs compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Within the block nothing of the network runs compiled."""
    compiled = {module: module._compiled_call_impl for module in network.modules()}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
