"""Bad numbers: a step whose loss or gradient is not finite is skipped by all processes, counted and logged.

Enters: each step's losses, positions and gradient norm, as tensors on the device. Leaves: a flag there with which the
optimizer skips the step, one step later the verdict on the host, and a line in `bad_steps.jsonl` for each bad step.

How all agree without a collective of their own: `poisoned` turns a loss that is not finite into a gradient that is not,
and the sum over processes carries that to every process's gradient norm.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

LOG = "bad_steps.jsonl"


class BadNumbersError(FloatingPointError):
    """More steps in a row than allowed had a loss or gradient that is not finite."""


def poisoned(loss: Tensor) -> Tensor:
    """The mean of `loss` (B,), whose gradient is NaN where any of `loss` is not finite; else unchanged bit by bit.

    A loss that overflows to infinity may still have a finite gradient: it would move the weights.
    """
    one = torch.where(loss.detach().isfinite().all(), 1.0, torch.nan)
    return loss.mean() * one


@dataclass
class StepNumbers:
    """What a step leaves on the device until its verdict is read."""

    step: int
    """Number of the step, from 1."""
    positions: list[Tensor]
    """(B,) of each micro-batch of this process."""
    losses: list[Tensor]
    """(B,) likewise."""


class BadSteps:
    """The verdicts on a run's steps, each read while the next one computes, so that no step waits for the device.

    Args:
        path: `bad_steps.jsonl` in the run's folder, written by the main process.
        allowed: bad steps in a row after which the run still goes on.
    """

    def __init__(self, path: Path, allowed: int) -> None:
        self.path = path
        self.allowed = allowed
        self.total = 0
        self.in_a_row = 0
        self.grad_norm = math.nan
        """Gradient norm of the step whose verdict was read last."""
        self._held: StepNumbers | None = None
        self._pair = torch.zeros(2)
        self._arrived: torch.cuda.Event | None = None

    def hold(self, numbers: StepNumbers, skipped: Tensor, grad_norm: Tensor) -> None:
        """Keeps a step's numbers until `verdict`, and sends the two that decide it on their way to the host.

        Args:
            skipped: () float32, 1 where the step was skipped, else 0; equal on all processes.
            grad_norm: () of the global batch.
        """
        assert self._held is None, "the verdict on the step before has not been read"
        self._held = numbers
        pair = torch.stack([skipped, grad_norm.float()])
        if pair.is_cuda:
            # Read later by .item(), they would wait for all that the next step has queued by then.
            self._pair = torch.empty(2, pin_memory=True).copy_(pair, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._pair, self._arrived = pair, None

    def verdict(self, accelerator: Accelerator) -> bool | None:
        """Whether the step held was good; None where none is held. Waits for that step only. Collective.

        Raises:
            BadNumbersError: on all processes, when more than `allowed` steps in a row were bad.
        """
        held, self._held = self._held, None
        if held is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        skipped, self.grad_norm = self._pair.tolist()
        if not skipped:
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        record = self._record(held, accelerator)
        if accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.in_a_row > self.allowed:
            raise BadNumbersError(
                f"{self.in_a_row} steps in a row up to step {held.step} had a loss or gradient that is not finite; "
                f"training.bad_steps_allowed is {self.allowed}. The weights are those from before them. Their samples "
                f"are listed in {self.path}; tools/replay.py computes a step again. It often helps to lower "
                "optimizer.lr, or to set wrapping.mixed_precision to bf16 or no"
            )
        return False

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Takes the counts of a checkpoint."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def _record(self, held: StepNumbers, accelerator: Accelerator) -> dict[str, Any]:
        """The line: positions of the samples whose loss is not finite, or of all where only the gradient is not."""
        positions = torch.cat([one.cpu() for one in held.positions])
        finite = torch.cat([one.float().cpu() for one in held.losses]).isfinite()
        parts = gather_object([(positions.tolist(), positions[~finite].tolist())])
        everything = sorted(position for part, _ in parts for position in part)
        culprits = sorted(position for _, part in parts for position in part)
        return {
            "step": held.step,
            "reason": "loss" if culprits else "gradient",
            "positions": culprits or everything,
            "first_position": everything[0],
            "last_position": everything[-1],
            "grad_norm": str(self.grad_norm),
        }
