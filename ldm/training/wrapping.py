"""From a plain network to the one that trains: memory format, checkpointing, compile and engine, in one order.

Enters: a UNet on the host and WrappingConfig. Leaves: the module to call in training; the UNet itself stays the owner
of the parameters, and its state-dict names stay as they are.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from ldm.models.attention import select_backend
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig


@dataclass
class WrappingConfig:
    """How the network is laid out and executed; none of it changes what is computed beyond rounding."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "bf16"
    """Autocast of forward and backward; weights, average and optimizer state stay float32. fp16 scales the loss. auto
    is bf16 where the device has instructions for it, else no: losses then depend on the device in their third digit."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Attention backend; auto takes the first that passes a forward and backward on the device."""
    channels_last: bool = True
    """Keep activations as (B, H, W, C) in memory, which convolutions on tensor cores and on CPU prefer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network: about a minute at start, then faster steps on GPUs."""


def resolve_precision(name: str) -> str:
    """The precision that "auto" means on the device at hand; any other name as it is."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # Without these instructions bfloat16 is emulated, and slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def wrap_network(unet: UNet, accelerator: Accelerator, config: WrappingConfig) -> torch.nn.Module:
    """Prepares `unet` in place and returns the module whose forward and backward the engine manages."""
    # 1. Device and memory format, before anything holds a reference to a parameter's storage.
    unet.to(accelerator.device)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # 2. The attention backend is tried on the device in the precision that autocast will use.
    precision: dict[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = precision[accelerator.mixed_precision]
    unet.set_attention_backend(select_backend(config.attention, accelerator.device, dtype))
    # 3. Checkpointing changes the graph, so it comes before compile.
    if config.gradient_checkpointing:
        unet.enable_checkpointing()
    # 4. Module.compile() works in place: no `_orig_mod.` in names that a checkpoint or the average would inherit.
    if config.compile:
        unet.compile()
    # 5. The engine's wrapper goes around everything. Optimizers made from `unet` stay valid: parameters are the same.
    wrapped: Any = accelerator.prepare_model(unet)
    return wrapped


def settle_buckets(
    network: torch.nn.Module,
    config: UNetConfig,
    side: int,
    text_length: int,
    micro_batch: int,
    accelerator: Accelerator,
) -> None:
    """A forward and backward of zeros before the first step, on a network that several processes train.

    DDP lays out its buckets anew in the order of the first backward pass, and the layout decides in which order four
    processes or more add up: without this the first step of a resumed run would be rounded in another way than the
    same step of an undisturbed one. Costs one step of computing at each start. Collective.
    """
    if not isinstance(network, DistributedDataParallel):
        return
    x = torch.zeros(micro_batch, config.in_channels, side, side, device=accelerator.device)
    conditioning = Conditioning(torch.zeros(micro_batch, text_length, config.cross_attention_dim))
    if config.pooled_channels:
        conditioning.pooled = torch.zeros(micro_batch, config.pooled_channels)
        conditioning.sizes = torch.zeros(micro_batch, 6)
    t = torch.zeros(micro_batch, dtype=torch.int64, device=accelerator.device)
    accelerator.backward(network(x, t, conditioning.to(accelerator.device)).square().mean())
    network.zero_grad(set_to_none=True)
