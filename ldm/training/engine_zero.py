"""DeepSpeed's ZeRO: optimizer state sharded (1), gradients too (2), weights and average too (3).

Enters: the network, laid out on its device, whole, with its optimizer. Leaves: the engine that trains it.
DeepSpeed computes in float32 here, with autocast inside the network as under the other engines: the weights that are
averaged and stored are the optimizer's own. Nothing of its checkpoints is used: they are pickles.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.engine import WholeNetwork
from ldm.training.engine_fsdp2 import check_shapes, filled, on_main_host
from ldm.training.optimizer import MOMENTS, optimizer_state, set_learning_rate


def zero_settings(
    stage: int, offload: str, *, micro_batch: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration; everything in it follows from the run's own."""
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero["memory_efficient_linear"] = False  # it would take autocast's place in linear layers
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        # torch's fused AdamW runs on the host too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def start_deepspeed(unet: UNet, optimizer: torch.optim.AdamW, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine around `unet`, on the process group that is there already."""
    import deepspeed  # seconds, and lines on the screen, for runs that use it
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Its extension for processes of one host takes a compiler and 45 s, and gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # one process alone needs no launcher, but is asked for its rank
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed.initialize(model=unet, optimizer=optimizer, config=settings, dist_init_required=False)[0]


class Zero12Engine(WholeNetwork):
    """ZeRO-1 and 2: every process holds the whole network, and a part of the optimizer's state.

    Args:
        settings: of `zero_settings`. Gradients are reduced once a step (1), or in each micro-batch's backward pass (2).
    """

    def __init__(self, unet: UNet, optimizer: torch.optim.AdamW, settings: dict[str, Any]) -> None:
        super().__init__(unet)
        self._names = [name for name, _ in unet.named_parameters()]
        self.optimizer = optimizer
        self.network = start_deepspeed(unet, optimizer, settings)
        self._zero = self.network.optimizer
        for flat in self._flat_tensors():  # there even if no step was ever good
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)}
            optimizer.state[flat] |= {key: torch.zeros_like(flat) for key in MOMENTS}

    @contextmanager
    def exchanging(self, last: bool) -> Iterator[None]:
        self.network.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss, scale_wrt_gas=False)  # the loss is divided already

    def clip(self, max_norm: float) -> None:
        pass  # DeepSpeed's step does, by its settings

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        set_learning_rate(self.optimizer, lr)
        self.network.step()
        skipped = bool(self._zero.overflow)  # a norm that is not finite, on all processes
        norm = torch.nan if skipped else float(self.network.get_global_grad_norm())
        return torch.tensor(float(skipped)), torch.tensor(norm)

    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        super().load_weights(wholes)
        self._zero.refresh_fp32_params()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return on_main_host(self._state_tensors())

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        shapes = {name: p.shape for name, p in self._unet.named_parameters()}
        states = optimizer_state(tensors, shapes)
        for flat, members in self._groups():
            state = self.optimizer.state[flat]
            for name, here, there in members:
                state["step"].copy_(states[name][0])
                for key, moment in zip(MOMENTS, states[name][1:], strict=True):
                    state[key][here] = moment.flatten()[there].to(flat)

    @contextmanager
    def initial(self) -> Iterator[UNet]:
        yield self._unet
        self._zero.refresh_fp32_params()

    def _flat_tensors(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _groups(self) -> Iterator[tuple[Tensor, list[tuple[str, slice, slice]]]]:
        """Flat optimizer tensors; for each parameter its name, and which elements of the flat are which of its own."""
        names = {id(p): name for name, p in self._unet.named_parameters()}
        for flat, parameters in zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True):
            members = []
            for p in parameters:
                here = there = slice(0, 0)
                if p._hp_mapping is not None:  # else all of it is another process's
                    flats, own = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                    here = slice(flats.start, flats.start + flats.numel)
                    there = slice(own.start, own.start + own.numel)
                members.append((names[id(p)], here, there))
            yield flat, members

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self._unet.named_parameters())
        for flat, members in self._groups():
            state = self.optimizer.state[flat]
            for name, here, there in members:
                yield f"{name}/step", state["step"]
                for key in MOMENTS:
                    whole = torch.zeros_like(parameters[name], memory_format=torch.contiguous_format)
                    whole.view(-1)[there] = state[key][here].to(whole)
                    dist.reduce(whole, dst=0)  # each element is one process's: a sum with zeros
                    yield f"{name}/{key}", whole


class Zero3Engine(Zero12Engine):
    """ZeRO-3: every process holds a flat, padded part of each parameter, too.

    Args:
        plain: makes an empty network of the same settings, ready to be called, on the device.
    """

    alone_in_forward = False

    def __init__(
        self, unet: UNet, optimizer: torch.optim.AdamW, settings: dict[str, Any], plain: Callable[[], UNet]
    ) -> None:
        self._shapes = {name: p.shape for name, p in unet.named_parameters()}
        super().__init__(unet, optimizer, settings)
        self._plain = plain
        self._device = next(unet.parameters()).device

    def parts(self) -> list[Tensor]:
        return [_part_of(p).detach() for p in self._unet.parameters()]

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, part in parts.items():
            shape = self._shapes[name]
            padded = torch.empty(part.numel() * dist.get_world_size(), dtype=part.dtype, device=self._device)
            dist.all_gather_into_tensor(padded, part.to(self._device))
            yield name, padded[: shape.numel()].view(shape)

    def parts_of(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_shapes(wholes, self._shapes)
        return {name: self._part(wholes[name], own) for name, own in zip(self._names, self.parts(), strict=True)}

    @torch.no_grad()
    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        self.network.empty_partition_cache()  # small parameters may lie whole on each process
        for own, part in zip(self.parts(), self.parts_of(wholes).values(), strict=True):
            own.copy_(part)
        self._zero.refresh_fp32_params()

    def weights(self) -> dict[str, Tensor]:
        return on_main_host(self.wholes(dict(zip(self._names, self.parts(), strict=True))))

    def average(self, ema: EMA) -> dict[str, Tensor]:
        return on_main_host(self.wholes(ema.state_dict()))

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        states = optimizer_state(tensors, self._shapes)
        parameters = dict(self._unet.named_parameters())
        for name, flat, start in self._places():
            own = _part_of(parameters[name])
            state = self.optimizer.state[flat]
            state["step"].copy_(states[name][0])
            for key, moment in zip(MOMENTS, states[name][1:], strict=True):
                state[key][start : start + own.numel()] = self._part(moment, own).to(flat)

    @contextmanager
    def averaged(self, ema: EMA) -> Iterator[UNet]:
        yield filled(self._plain(), self.wholes(ema.state_dict()))

    @contextmanager
    def initial(self) -> Iterator[UNet]:
        unet = filled(self._plain(), self.wholes(dict(zip(self._names, self.parts(), strict=True))))
        yield unet
        self.load_weights(unet.state_dict())

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        size = like.numel()
        padded = F.pad(whole.detach().flatten(), (0, size * dist.get_world_size() - whole.numel()))
        return padded[size * dist.get_rank() : size * (dist.get_rank() + 1)].to(like)

    def _flat_tensors(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _places(self) -> Iterator[tuple[str, Tensor, int]]:
        """For each parameter its name, the flat optimizer tensor that its part is in, and where it begins there."""
        for name, p in self._unet.named_parameters():
            group, start, _ = self._zero.grad_position[self._zero.get_param_id(p)]
            yield name, self._zero.fp32_partitioned_groups_flat[group], start

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self._unet.named_parameters())
        for name, flat, start in self._places():
            state, size = self.optimizer.state[flat], _part_of(parameters[name]).numel()
            yield f"{name}/step", state["step"]
            for key in MOMENTS:
                ((_, whole),) = self.wholes({name: state[key][start : start + size].contiguous()})
                yield f"{name}/{key}", whole


def _part_of(parameter: nn.Parameter) -> Tensor:
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return part
