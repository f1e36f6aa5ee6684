"""What a network costs in training, found by running it without numbers: operations, and memory at its peak.

Enters: the network's settings, the shape of its inputs, precision and checkpointing. Leaves: a NetworkCost. The forward
and the backward pass run on the meta device: every tensor has its shape and lives as long as it would, none has data.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.attention import BACKENDS
from ldm.models.blocks import ResidualBlock, SpatialTransformer
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.recomputation import Policy, recompute

BYTES = {"no": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class NetworkCost:
    """One network in training, per sample of a micro-batch where nothing else is said."""

    parameters: int
    largest_units: tuple[int, int]
    """Parameters of the two largest blocks that a sharding engine holds whole at a time."""
    outside_units: int
    """Parameters outside of these blocks, which it holds whole from the first layer to the last."""
    forward_flop: float
    """Operations of the forward pass; a multiply-accumulate is two."""
    recomputed_flop: float
    """Operations that checkpointing computes again in the backward pass; 0 without it."""
    fixed_bytes: float
    """Memory of the passes that does not depend on the batch: copies of the weights in autocast's precision."""
    sample_bytes: float
    """Memory of the passes at their peak, beside weights and summed gradients."""

    @property
    def training_flop(self) -> float:
        """Operations of both passes as useful work is counted: three times the forward pass, nothing twice."""
        return 3 * self.forward_flop


@contextmanager
def _flash() -> Iterator[None]:
    """Attention as kernels on GPUs compute it: the matrix of scores is never stored. On meta tensors it would be."""
    kept = BACKENDS["sdpa"]
    BACKENDS["sdpa"] = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    try:
        yield
    finally:
        BACKENDS["sdpa"] = kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within the block that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leaves out what was there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def network_cost(
    config: UNetConfig, side: int, text_length: int, *, precision: str, checkpointing: Policy
) -> NetworkCost:
    """Simulates forward and backward of one and of two samples.

    Args:
        side: height and width of the latents.
        text_length: tokens of the text states.
        precision: of autocast: no, bf16 or fp16. Weights and their gradients are float32.
        checkpointing: which activations are computed again, as wrapping.gradient_checkpointing says it.
    """
    with torch.device("meta"):
        unet = UNet(config).to(_DTYPES[precision])
    inputs = [_inputs(config, batch, side, text_length, "meta") for batch in (1, 2)]
    forward, recomputed = forward_flop(unet, side, text_length), 0.0
    if checkpointing != "none":
        plain = _flop(unet, inputs[0])
        recompute(unet, checkpointing)
        recomputed = _flop(unet, inputs[0]) - plain
    one, two = (peak_bytes(unet, some) for some in inputs)
    units = sorted((_count(module) for module in sharded_units(unet)), reverse=True)
    parameters = _count(unet)
    # Autocast computes with copies of matrices and kernels, which the backward pass wants again. With checkpointing of
    # all the copies are made anew for each block, whose share of them the peak of two samples holds already.
    kept = checkpointing != "all" and precision != "no"
    copied = sum(p.numel() for p in unet.parameters() if p.dim() > 1) if kept else 0
    return NetworkCost(
        parameters=parameters,
        largest_units=(units[0], units[1]),
        outside_units=parameters - sum(units),
        forward_flop=forward,
        recomputed_flop=recomputed,
        fixed_bytes=max(0, 2 * one - two) + copied * BYTES[precision],
        sample_bytes=two - one,
    )


def forward_flop(unet: UNet, side: int, text_length: int) -> float:
    """Operations of the forward pass of one sample; a multiply-accumulate is two."""
    device = str(next(unet.parameters()).device)
    counter = FlopCounterMode(display=False)
    with counter, _flash(), torch.no_grad():
        unet(*_inputs(unet.config, 1, side, text_length, device))
    return float(counter.get_total_flops())


def sharded_units(unet: UNet) -> list[nn.Module]:
    """The blocks that engines gather one at a time: residual blocks and transformers."""
    return [module for module in unet.modules() if isinstance(module, ResidualBlock | SpatialTransformer)]


def peak_bytes(unet: UNet, inputs: tuple[Tensor, Tensor, Conditioning]) -> int:
    """Memory of one forward and backward pass at its peak, without weights, inputs and summed gradients."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None  # counted by the engine, which sums it up in a place of its own

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in unet.parameters()]
    live = LiveBytes()
    live.ignore([*unet.parameters(), *(part for part in (*inputs[:2], inputs[2].text) if part is not None)])
    try:
        with _flash(), live:
            unet(*inputs).float().square().mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peak


def _flop(unet: UNet, inputs: tuple[Tensor, Tensor, Conditioning]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, _flash():
        unet(*inputs).float().square().mean().backward()
    unet.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _inputs(
    config: UNetConfig, batch: int, side: int, text_length: int, device: str
) -> tuple[Tensor, Tensor, Conditioning]:
    text = torch.zeros(batch, text_length, config.cross_attention_dim, device=device)
    pooled = sizes = None
    if config.pooled_channels:
        pooled = torch.zeros(batch, config.pooled_channels, device=device)
        sizes = torch.zeros(batch, 6, device=device)
    latents = torch.zeros(batch, config.in_channels, side, side, device=device)
    return latents, torch.zeros(batch, device=device), Conditioning(text, pooled, sizes)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
