"""AdamW over named parameters and the learning rate as a function of the optimizer step.

Enters: the network's named parameters and an OptimizerConfig. Leaves: a torch optimizer, `learning_rate(step)`, and
the optimizer's state as one flat dict of named tensors, which is what a checkpoint stores.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, in its shape; besides them it has `step`, a number."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule, counted in optimizer steps whatever the accumulation or process count."""

    lr: float = 1e-4
    """Peak learning rate, of the global batch as it is: never scaled by processes or accumulation."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows warm-up: constant, linear decay or cosine decay to `lr * final_fraction` at the last step."""
    warmup_steps: int = 1000
    """Optimizer steps over which the learning rate rises linearly; step `warmup_steps - 1` is the first at the peak."""
    final_fraction: float = 0.0
    """Share of the peak that linear and cosine decay end at."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Term added to AdamW's denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay, of matrices and convolution kernels; biases and norms are not decayed."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down, after accumulation and unscaling; 0 turns it off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr: found {self.lr}, expected a positive number")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps: found {self.warmup_steps}, expected 0 or more")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"optimizer.final_fraction: found {self.final_fraction}, expected 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}, expected 0 <= {name} < 1")
        if self.max_grad_norm < 0:
            raise ValueError(f"optimizer.max_grad_norm: found {self.max_grad_norm}, expected 0 (off) or more")


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (0, 1, ... total_steps - 1), a pure function: resuming needs no state.

    Warm-up is linear, (step + 1) / warmup_steps; decay reaches `final_fraction` of the peak at step total_steps - 1.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    decay_steps = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step + 1 - config.warmup_steps) / decay_steps)
    if config.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_fraction + (1.0 - config.final_fraction) * share)


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, scaled: bool = False
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: one fused kernel for all tensors, or foreach where gradients are `scaled`.

    A fused step skips overflowed gradients inside its kernel, where nobody sees it: with a loss scaler the caller has
    to know, for the average.
    """
    named = [(name, p) for name, p in named if p.requires_grad]
    decayed = [(name, p) for name, p in named if p.ndim > 1]
    plain = [(name, p) for name, p in named if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=not scaled and all(p.device.type in ("cpu", "cuda") for _, p in named),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clipping_scale(norm: Tensor, max_norm: float) -> Tensor | None:
    """() float32, what gradients of the global norm `norm` are divided by; None where `max_norm` is 0.

    One over the factor of torch's `clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)): the fused kernel divides by it
    as it reads the gradients, in place of a pass over them that reads and writes each once more.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1.0).float() if max_norm else None


def step_unless(optimizer: AcceleratedOptimizer, bad: Tensor, grad_scale: Tensor | None = None) -> Tensor:
    """One optimizer step, or none where `bad` is true: weights, moments and step counts then stay as they are.

    The fused kernel decides on the device, so that the host need not wait; with a loss scaler the scaler decides.

    Args:
        bad: () bool, on the parameters' device.
        grad_scale: of `clipping_scale`, for a fused optimizer.

    Returns:
        () float32, 1 where the step was skipped, else 0.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is not None:
        optimizer.step()
        return bad.new_tensor(optimizer.step_was_skipped, dtype=torch.float32)
    found = bad.to(torch.float32)
    if inner.defaults["fused"]:
        inner.found_inf, inner.grad_scale = found, grad_scale
        optimizer.step()
    elif not found.item():
        optimizer.step()
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `{parameter name}/{state name}` -> tensor; empty before the first step."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave; raises ValueError as `optimizer_state`."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    states = optimizer_state(tensors, {name: parameter.shape for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        step, *moments = states[name]
        # In the parameter's memory format: fused kernels run over storage, and files hold rows of NCHW.
        placed = [torch.empty_like(parameter, dtype=torch.float32).copy_(moment) for moment in moments]
        state = {"step": step.to(parameter.device, torch.float32), **dict(zip(MOMENTS, placed, strict=True))}
        optimizer.state[parameter] = state


def optimizer_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, list[Tensor]]:
    """For each parameter its step and its moments, out of what `optimizer_tensors` gave.

    Raises:
        ValueError: a parameter without state, a state without parameter, or a state of another shape, by name.
    """
    left = dict(tensors)
    states: dict[str, list[Tensor]] = {name: [] for name in shapes}
    problems = []
    for name, shape in shapes.items():
        for key in ("step", *MOMENTS):
            value = left.pop(f"{name}/{key}", None)
            if value is None:
                problems.append(f"{name}/{key} is missing")
            elif key != "step" and value.shape != shape:
                problems.append(f"{name}/{key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            else:
                states[name].append(value)
    problems += [f"{key} belongs to no parameter of this network" for key in left]
    if problems:
        raise ValueError("the optimizer state does not fit this network: " + "; ".join(problems))
    return states
