"""FSDP2: torch's fully_shard over all processes; weights, gradients, optimizer state and average are sharded.

Enters: the network, laid out on its device, whole. Leaves: the same network with DTensor parameters, and its engine.
The same calls run on GPUs over nccl and on CPUs over gloo, which accelerate's own FSDP2 is never chosen for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.models.blocks import ResidualBlock, SpatialTransformer
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.optimizer import (
    MOMENTS,
    clipping_scale,
    load_optimizer_tensors,
    optimizer_state,
    optimizer_tensors,
    set_learning_rate,
)


def shard(unet: UNet, device: torch.device, *, offload: bool) -> DeviceMesh:
    """Shards `unet` in place over all processes, a unit for each residual block and each transformer.

    Args:
        offload: parts, gradients and optimizer state stay on the host.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    units = [module for module in unet.modules() if isinstance(module, ResidualBlock | SpatialTransformer)]
    for module in [*units, unet]:
        fully_shard(module, mesh=mesh, offload_policy=policy)
    return mesh


class FSDP2Engine:
    """Several processes that each hold a part of every parameter; gradients are averaged where they are scattered.

    Args:
        unet: sharded by `shard`.
        optimizer: over the sharded parameters.
        plain: makes an empty network of the same settings, ready to be called, on the device.
    """

    alone_in_forward = False

    def __init__(
        self,
        unet: UNet,
        mesh: DeviceMesh,
        optimizer: torch.optim.AdamW,
        device: torch.device,
        plain: Callable[[], UNet],
    ) -> None:
        self.network: Any = unet
        self.optimizer = optimizer
        self._unet = cast(FSDPModule, unet)
        # Between the passes of a step the module itself may hold whole parameters.
        self._parameters: dict[str, DTensor] = {name: cast(DTensor, p) for name, p in unet.named_parameters()}
        self._mesh = mesh
        self._device = device
        self._plain = plain
        self._grad_norm = torch.zeros((), device=device)
        self._grad_scale: Tensor | None = None

    @contextmanager
    def exchanging(self, last: bool) -> Iterator[None]:
        self._unet.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float) -> None:
        gradients = [cast(DTensor, p.grad).to_local() for p in self._parameters.values() if p.grad is not None]
        total = torch.stack(torch._foreach_norm(gradients)).double().square().sum().to(self._device)
        dist.all_reduce(total)
        self._grad_norm = total.sqrt().float()
        self._grad_scale = clipping_scale(self._grad_norm, max_norm)

    def average_before_step(self, ema: EMA) -> None:
        ema.update()

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        set_learning_rate(self.optimizer, lr)
        bad = (~self._grad_norm.isfinite()).float()
        # As in `step_unless`: the fused kernel decides on the device; all processes have the same norm.
        device, optimizer = self.parts()[0].device, cast(Any, self.optimizer)
        optimizer.found_inf = bad.to(device)
        optimizer.grad_scale = None if self._grad_scale is None else self._grad_scale.to(device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return bad, self._grad_norm

    def parts(self) -> list[Tensor]:
        return [p.to_local().detach() for p in self._parameters.values()]

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, part in parts.items():
            yield name, self._sharded(part.to(self._device), self._parameters[name]).full_tensor()

    def parts_of(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_shapes(wholes, {name: p.shape for name, p in self._parameters.items()})
        return {name: self._part(wholes[name], p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        for own, part in zip(self.parts(), self.parts_of(wholes).values(), strict=True):
            own.copy_(part)

    def weights(self) -> dict[str, Tensor]:
        return on_main_host(self.wholes(dict(zip(self._parameters, self.parts(), strict=True))))

    def average(self, ema: EMA) -> dict[str, Tensor]:
        return on_main_host(self.wholes(ema.state_dict()))

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return on_main_host(
            (key, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            for key, tensor in optimizer_tensors(self.optimizer).items()
        )

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        states = optimizer_state(tensors, {name: p.shape for name, p in self._parameters.items()})
        sharded = {}
        for name, p in self._parameters.items():
            sharded[f"{name}/step"], *moments = states[name]
            for key, moment in zip(MOMENTS, moments, strict=True):
                sharded[f"{name}/{key}"] = self._sharded(self._part(moment, p).to(p.device), p)
        load_optimizer_tensors(self.optimizer, sharded)

    @contextmanager
    def averaged(self, ema: EMA) -> Iterator[UNet]:
        yield filled(self._plain(), self.wholes(ema.state_dict()))

    @contextmanager
    def initial(self) -> Iterator[UNet]:
        unet = filled(self._plain(), self.wholes(dict(zip(self._parameters, self.parts(), strict=True))))
        yield unet
        self.load_weights(unet.state_dict())

    def _sharded(self, part: Tensor, like: DTensor) -> DTensor:
        return DTensor.from_local(
            part, self._mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _part(self, whole: Tensor, like: DTensor) -> Tensor:
        # Without a source rank nothing is sent: each process cuts its own part out of what all have.
        sharded = distribute_tensor(whole.to(self._device), self._mesh, like.placements, src_data_rank=None)
        return sharded.to_local()


def check_shapes(wholes: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError with the names that are missing, too many, or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in wholes]
    problems += [f"{name} is not in this network" for name in wholes if name not in expected]
    problems += [
        f"{name} has shape {tuple(wholes[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in wholes and wholes[name].shape != shape
    ]
    if problems:
        raise ValueError("the weights do not fit this network: " + "; ".join(problems))


@torch.no_grad()
def filled(unet: UNet, wholes: Iterator[tuple[str, Tensor]]) -> UNet:
    """`unet` with whole weights."""
    own = dict(unet.named_parameters())
    for name, tensor in wholes:
        own[name].copy_(tensor)
    return unet


def on_main_host(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of whole tensors on the main process's host, one at a time; nothing on the others."""
    main = dist.get_rank() == 0
    whole = {}
    for name, tensor in named:  # each process takes part in putting each tensor together
        if main:
            whole[name] = tensor.detach().to("cpu", copy=True)
    return whole
