"""What differs between engines when a step is taken and its state is read or put back, behind one set of names.

Enters: the network, laid out on its device, and its optimizer. Leaves: the module to call, and an engine that knows how
gradients are exchanged, clipped and applied, and how the part that one process holds and the whole belong together.
Every method is collective unless it says otherwise.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.joint_step import JointStep
from ldm.training.optimizer import (
    clipping_scale,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    step_unless,
)


class Engine(Protocol):
    """How a network is trained by one process or by several.

    A *part* is what this process keeps of a tensor, a *whole* the tensor itself; of engines that do not shard the
    network, and of the weights and average of ZeRO-1 and 2, they are the same.
    """

    network: nn.Module
    """Called in training; `unet` within it owns the parameters under their plain names."""
    optimizer: Any
    """The optimizer or what the engine made of it; its groups have the learning rate."""

    alone_in_forward: bool
    """Whether a forward pass waits for no other process."""

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward pass; gradients are exchanged in the last one, if possible."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, the micro-batch's share of the loss of this process, to those before it."""

    def clip(self, max_norm: float) -> None:
        """Has `step` take gradients scaled down to a global norm over all parts of all processes; 0 leaves them."""

    def average_before_step(self, ema: EMA) -> None:
        """Takes the weights into the average; where that is faster within `step`, which then has to follow."""

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step, or none where gradients are not finite; clears them.

        Returns:
            () float32, 1 where the step was skipped on all processes, else 0; and () the norm before clipping.
        """

    def parts(self) -> list[Tensor]:
        """This process's float32 weights, a tensor for each parameter of the network. Not collective."""

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor for each part, by the network's names; the tensors are not to be changed."""

    def parts_of(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of whole tensors; raises ValueError by name for shapes that differ. Not collective."""

    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        """Puts in whole weights, the same on each process; raises RuntimeError or ValueError by name."""

    def weights(self) -> dict[str, Tensor]:
        """Whole weights, float32: on the main process; others may get none."""

    def average(self, ema: EMA) -> dict[str, Tensor]:
        """Whole averaged weights: on the main process; others may get none."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """`{parameter name}/{state name}` -> whole tensor, on the main process; others may get none."""

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `optimizer_tensors` gave, under whatever engine; raises ValueError by name."""

    def averaged(self, ema: EMA) -> AbstractContextManager[UNet]:
        """A network with the averaged weights that each process may call for itself, within the block."""

    def initial(self) -> AbstractContextManager[UNet]:
        """A network with whole weights that the block may change; at its end they are the run's."""


class WholeNetwork:
    """What engines have in common of which each process holds the whole network and its average."""

    alone_in_forward = True

    def __init__(self, unet: UNet) -> None:
        self._unet = unet
        # Kept: to walk through the modules for it takes as long as to average a small network.
        self._parameters = list(unet.parameters())

    def parts(self) -> list[Tensor]:
        return [p.detach() for p in self._parameters]

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from parts.items()

    def parts_of(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(wholes)

    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        self._unet.load_state_dict(dict(wholes))

    def average_before_step(self, ema: EMA) -> None:
        ema.update()

    def weights(self) -> dict[str, Tensor]:
        return dict(self._unet.state_dict())

    def average(self, ema: EMA) -> dict[str, Tensor]:
        return ema.state_dict()

    @contextmanager
    def averaged(self, ema: EMA) -> Iterator[UNet]:
        with ema.applied():
            yield self._unet


class PlainEngine(WholeNetwork):
    """One process, or several that each hold the whole network (DistributedDataParallel)."""

    def __init__(self, accelerator: Accelerator, unet: UNet, network: nn.Module, optimizer: torch.optim.AdamW) -> None:
        super().__init__(unet)
        self.network = network
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._accelerator = accelerator
        self._grad_norm = torch.zeros(())
        self._grad_scale: Tensor | None = None
        self._joint = JointStep(optimizer)
        self._waiting: EMA | None = None

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._accelerator.no_sync(self.network)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, max_norm: float) -> None:
        if self.optimizer.optimizer.defaults["fused"]:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            self._grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            self._grad_scale = clipping_scale(self._grad_norm, max_norm)
        else:  # In fp16 after unscaling: accelerate knows the scaler.
            self._grad_norm = self._accelerator.clip_grad_norm_(self._parameters, max_norm or math.inf)

    def average_before_step(self, ema: EMA) -> None:
        if self._joint.serves(ema):
            self._waiting = ema
        else:
            ema.update()

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        set_learning_rate(self.optimizer, lr)
        waiting, self._waiting = self._waiting, None
        bad = ~self._grad_norm.isfinite()
        if waiting is not None and not bad:  # on the host, where nothing is waited for
            self._joint.take(waiting, self._grad_scale)
            skipped = torch.zeros(())
        else:
            if waiting is not None:
                waiting.update()
            skipped = step_unless(self.optimizer, bad, self._grad_scale)
        for p in self._parameters:  # as zero_grad does, in a tenth of its time
            p.grad = None
        return skipped, self._grad_norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer.optimizer)

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer.optimizer, tensors)

    def initial(self) -> AbstractContextManager[UNet]:
        return nullcontext(self._unet)
