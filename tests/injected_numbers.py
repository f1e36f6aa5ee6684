"""Bad numbers put into a run's loss or gradient at chosen places, and the plain loop that leaves those steps out.

Enters: what a test told the fork server, in each forked process before the program starts. Leaves: the program with
wrapped losses, which also writes what each process came to; `train_without`, a program for the fork server too.
"""

import json
import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import ldm.train
from ldm.config import parse_config
from ldm.data.batch import Batch
from ldm.diffusion.objective import Network
from ldm.models.pretrained import weights_hash
from ldm.training.distributed import split_global_batch, start_accelerator
from ldm.training.optimizer import learning_rate, optimizer_tensors, set_learning_rate
from ldm.training.run import Run, build_run

VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
left_out: set[int] = set()


def install(told: list[dict[str, Any]]) -> None:
    """Makes the run bad where it is told to.

    Args:
        told: {"position": p, "kind": "nan", "inf", "-inf", "nan times" or "huge"} for the loss of one sample, or
            {"step": from 1, "rank": r, "kind": "nan gradient" or "inf gradient", "parameter": n} for one parameter's
            gradient, with a loss that is finite.
    """
    rank, runs = int(os.environ.get("RANK", "0")), []
    loss_of, train = ldm.train.batch_loss, ldm.train.train
    losses = {one["position"]: one["kind"] for one in told if "position" in one}
    gradients = {one["step"]: one for one in told if one.get("rank") == rank}

    def bad_loss(run: Run, network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        runs.append(run)
        loss, t, latents = loss_of(run, network, batch)
        for row, position in enumerate(batch.positions.tolist()):
            if position in losses:
                hit, kind = torch.arange(len(loss)) == row, losses[position]
                if kind == "nan times":  # the gradient is NaN too, as of a network that overflowed
                    loss = torch.where(hit, loss * math.nan, loss)
                elif kind == "huge":
                    loss = torch.where(hit, loss * 1e38, loss)
                else:  # the gradient of a constant is 0
                    loss = torch.where(hit, torch.full_like(loss, VALUES[kind]), loss)
        step = int(batch.positions[0]) // run.config.training.global_batch + 1
        if step in gradients:
            parameters = list(run.pipeline.unet.parameters())
            parameter = parameters[gradients[step]["parameter"] % len(parameters)]
            value = VALUES[gradients.pop(step)["kind"].split()[0]]
            handle = parameter.register_hook(lambda gradient: spoiled(gradient, value, handle))
        return loss, t, latents

    def telling(*arguments: Any) -> tuple[str, int]:
        ended = train(*arguments)
        came_to = {"weights": weights_hash(runs[-1].pipeline.unet.state_dict().items()), "end": ended}
        came_to["average"] = weights_hash(runs[-1].ema.state_dict().items())
        Path(f"rank-{rank}.json").write_text(json.dumps(came_to))
        return ended

    ldm.train.batch_loss, ldm.train.train = bad_loss, telling


def spoil(told: list[dict[str, Any]]) -> None:
    """As `install`, without what each process came to: weights may be in parts."""
    train = ldm.train.train
    install(told)
    ldm.train.train = train


def spoiled(gradient: Tensor, value: float, handle: Any) -> Tensor:
    """The gradient with one bad number in it, once."""
    handle.remove()
    gradient = gradient.clone()
    gradient[(0,) * gradient.ndim] = value
    return gradient


def leave_out(told: list[int]) -> None:
    """Tells `train_without` the steps, from 1, that it is not to do."""
    left_out.update(told)


def clip(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Gradients divided, as the fused kernel does, by one over the factor of torch's `clip_grad_norm_`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_div_(gradients, ((norm + 1e-6) / max_norm).clamp(min=1.0))


def train_without(words: list[str]) -> int:
    """A plain loop over the parts of a run: the steps told are not done, nothing looks for bad numbers.

    The main process writes `weights.safetensors`, `average.safetensors` and `optimizer.safetensors`.
    """
    config = parse_config(words, prog="plain loop", description="")
    accelerator = start_accelerator(config.distributed, "no")
    split = split_global_batch(config.training.global_batch, accelerator.num_processes, config.training.max_micro_batch)
    run = build_run(config, accelerator, split, lambda line: None)
    batches = run.data.training_batches(run.share, 0, config.training.steps)
    for step in range(config.training.steps):
        micro_batches = [next(batches) for _ in range(split.accumulation)]
        if step + 1 in left_out:
            continue
        for micro, batch in enumerate(micro_batches):
            last = micro == split.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(run.engine.network):
                loss, _, _ = ldm.train.batch_loss(run, run.engine.network, batch)
                accelerator.backward(loss.mean() / split.accumulation)
        clip(run.pipeline.unet.parameters(), config.optimizer.max_grad_norm)
        set_learning_rate(run.engine.optimizer, learning_rate(step, config.training.steps, config.optimizer))
        run.engine.optimizer.step()
        run.engine.optimizer.zero_grad()
        run.ema.update()
    if accelerator.is_main_process:
        tensors = {"weights": run.pipeline.unet.state_dict(), "average": run.ema.state_dict()}
        for name, state in (tensors | {"optimizer": optimizer_tensors(run.engine.optimizer.optimizer)}).items():
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, f"{name}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0
