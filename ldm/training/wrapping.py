"""From a plain network to the one that trains: memory format, checkpointing, compile and engine, in one order.

Enters: a UNet on the host, WrappingConfig and the engine's name. Leaves: the engine that trains it; the UNet itself
stays the owner of the parameters, and its state-dict names stay as they are.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.models.attention import select_backend
from ldm.models.compiled import compile_blocks
from ldm.models.conditioning import Conditioning
from ldm.models.parity_gate import Trial, check_compiled
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.distributed import BatchSplit
from ldm.training.engine import Engine, PlainEngine
from ldm.training.fp8 import use_fp8
from ldm.training.launched import DistributedConfig, EngineError
from ldm.training.optimizer import OptimizerConfig, make_optimizer
from ldm.training.recomputation import Policy, recompute

PRECISION: dict[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN = ("single", "ddp")
"""Engines that hold the network as it is; the others keep it, or what its optimizer works on, in flat pieces."""


@dataclass
class WrappingConfig:
    """How the network is laid out and executed; none of it changes what is computed beyond rounding."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "bf16"
    """Autocast of forward and backward; weights, average and optimizer state stay float32. fp16 scales the loss. auto
    is bf16 where the device has instructions for it, else no: losses then depend on the device in their third digit."""
    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "xformers"] = "auto"
    """Attention backend; auto takes the first that passes a forward and backward on the device: on Hopper GPUs cudnn,
    else sdpa, which is torch's choice among its kernels cudnn, flash and efficient."""
    channels_last: bool = True
    """Keep activations as (B, H, W, C) in memory, which convolutions on tensor cores and on CPU prefer."""
    gradient_checkpointing: Policy | bool = "none"
    """Blocks whose activations are computed again in the backward pass, not kept: none, transformers, outer (all of the
    outermost level, whose maps are the largest) or all, which costs about a third more time. plan_run tells each one's
    memory. true and false, as earlier checkpoints have it, are all and none."""
    compile: bool = False
    """torch.compile each residual and transformer block: about a minute at start, then faster steps on GPUs. Outputs
    and gradients are compared with the network's own before the first step, and the run stops where they differ."""
    fp8: bool = False
    """An experiment: matrix products of transformer blocks in 8-bit floats, where the GPU has them (needs torchao, best
    with compile). Parameters, average and checkpoints stay float32."""

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "all" if self.gradient_checkpointing else "none"


def resolve_precision(name: str) -> str:
    """The precision that "auto" means on the device at hand; any other name as it is."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # Without these instructions bfloat16 is emulated, and slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def check_engine(engine: str, offload: str, config: WrappingConfig) -> None:
    """Raises EngineError with every setting that an engine cannot do, and why."""
    problems = []
    if config.mixed_precision == "fp16" and engine not in PLAIN:
        problems.append(f"wrapping.mixed_precision is fp16, whose loss scaling {engine} here lacks: use bf16 or no")
    if config.compile and engine in ("fsdp2", "zero3"):
        problems.append(
            f"wrapping.compile is true: {engine} puts parameters together in hooks, which a compiled network leaves out"
        )
    if config.fp8 and engine not in PLAIN:
        problems.append(f"wrapping.fp8 is true: with {engine} it has not been tried; set it false, or use ddp")
    allowed = {"fsdp2": ("none", "parameters"), "zero3": ("none", "optimizer", "parameters")}
    allowed |= dict.fromkeys(("zero1", "zero2"), ("none", "optimizer"))
    if offload not in allowed.get(engine, ("none",)):
        choice = ", ".join(allowed.get(engine, ("none",)))
        problems.append(f"distributed.offload is {offload}: with {engine} it can be {choice}")
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        problems.append("deepspeed is not installed: pip install 'ldm[deepspeed]'")
    if problems:
        raise EngineError(f"engine {engine} cannot do what is set:\n  " + "\n  ".join(problems))


def wrap_network(
    unet: UNet,
    accelerator: Accelerator,
    config: WrappingConfig,
    engine: str,
    distributed: DistributedConfig,
    optimizer: OptimizerConfig,
    split: BatchSplit,
    trial: Trial | None = None,
) -> Engine:
    """Prepares `unet` in place, makes its optimizer, and returns the engine that trains it.

    Args:
        trial: what a compiled network is tried on before anything trains it; None: it is not tried.

    Raises:
        EngineError: the engine cannot do what is set.
        ParityError: the compiled network computes something else than the network.
    """
    check_engine(engine, distributed.offload, config)
    # 1.-3. Device, memory format, attention.
    lay_out(unet, accelerator, config, keeps_format=engine in PLAIN)
    # 4. Other modules around the same parameters. Then checkpointing, which changes the graph: before compile.
    if config.fp8:
        use_fp8(unet, accelerator.device)
    assert isinstance(config.gradient_checkpointing, str)
    recompute(unet, config.gradient_checkpointing)
    # 5. Module.compile() works in place: no `_orig_mod.` in names that a checkpoint or the average would inherit. The
    # trial comes before an engine's hooks, which would take its gradients for a step's.
    if config.compile:
        compile_blocks(unet)
        if trial is not None:
            check_compiled(unet, trial, accelerator.device, PRECISION[accelerator.mixed_precision])
    # 6. The engine goes around everything.
    if engine in PLAIN:
        wrapped: Any = accelerator.prepare_model(unet)
        # Optimizers made from `unet` stay valid: parameters are the same.
        made = make_optimizer(unet.named_parameters(), optimizer, scaled=accelerator.scaler is not None)
        return PlainEngine(accelerator, unet, wrapped, made)
    _autocast(unet, accelerator)

    def plain() -> UNet:
        with torch.device("meta"):
            whole = UNet(unet.config)
        whole.to_empty(device=accelerator.device)
        lay_out(whole, accelerator, config, keeps_format=True)
        _autocast(whole, accelerator)
        return whole.requires_grad_(False)

    if engine == "fsdp2":
        from ldm.training.engine_fsdp2 import FSDP2Engine, shard

        mesh = shard(unet, accelerator.device, offload=distributed.offload == "parameters")
        made = make_optimizer(unet.named_parameters(), optimizer)
        return FSDP2Engine(unet, mesh, made, accelerator.device, plain)
    from ldm.training.engine_zero import Zero3Engine, Zero12Engine, zero_settings

    settings = zero_settings(
        int(engine.removeprefix("zero")),
        distributed.offload,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        max_grad_norm=optimizer.max_grad_norm,
    )
    made = make_optimizer(unet.named_parameters(), optimizer)
    return Zero3Engine(unet, made, settings, plain) if engine == "zero3" else Zero12Engine(unet, made, settings)


def lay_out(unet: UNet, accelerator: Accelerator, config: WrappingConfig, *, keeps_format: bool) -> None:
    """Puts `unet` on its device, in its memory format and with its attention backend.

    Args:
        keeps_format: weights stay in the memory format that they are given; else only what enters the network has it.
    """
    # 1. Device and memory format, before anything holds a reference to a parameter's storage.
    unet.to(accelerator.device)
    if config.channels_last and keeps_format:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif config.channels_last:  # convolutions follow their input
        unet.register_forward_pre_hook(_to_channels_last)
    # 2. The attention backend is tried on the device in the precision that autocast will use.
    dtype = PRECISION[accelerator.mixed_precision]
    unet.set_attention_backend(select_backend(config.attention, accelerator.device, dtype))


def _to_channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = inputs
    return x.contiguous(memory_format=torch.channels_last), *others


def _autocast(unet: UNet, accelerator: Accelerator) -> None:
    """Autocast around the network's forward, as accelerate's prepare_model puts it; float32 comes out."""
    if accelerator.mixed_precision == "no":
        return
    forward, device, dtype = unet.forward, accelerator.device.type, PRECISION[accelerator.mixed_precision]

    def autocast_forward(*inputs: Any) -> Tensor:
        # Cast weights that are kept until the end would be the whole network on each process.
        with torch.autocast(device, dtype, cache_enabled=False):
            return forward(*inputs).float()

    unet.forward = autocast_forward  # type: ignore[method-assign, assignment]


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
