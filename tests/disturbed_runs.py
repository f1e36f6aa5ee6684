"""Disturbances put into one process of a run, for the fork server's hooks.

Enters: what a test told, in each forked process before the program starts. Leaves: the program with one process that
fails, sleeps or stands still.
"""

import os
import re
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import ldm.train
from ldm.data.batch import Batch
from ldm.diffusion.objective import Network
from ldm.training.run import Run


def disturb(told: dict[str, Any]) -> None:
    """Disturbs one process before the loss of a step, or of each step.

    Args:
        told: {"rank": r, "how": "fail", "sleep" or "stand still", "step": from 1, or None for each}; a process that
            stands still goes on once its stacks are in the run's output.
    """
    if int(os.environ.get("RANK", "0")) != told["rank"]:
        return
    loss_of = ldm.train.batch_loss

    def disturbed(run: Run, network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        step = int(batch.positions[0]) // run.config.training.global_batch + 1
        if told["step"] in (None, step):
            if told["how"] == "fail":
                raise ValueError("this process was told to fail")
            if told["how"] == "sleep":
                time.sleep(told["seconds"])
            while told["how"] == "stand still" and not told_of_silence(step - 1):
                time.sleep(0.05)
        return loss_of(run, network, batch)

    ldm.train.batch_loss = disturbed


def told_of_silence(after: int) -> bool:
    """Whether the run's output has this process's stacks of a silence after that step."""
    written = Path("output.log").read_text(errors="replace")
    start = rf"\(pid {os.getpid()}\) has shown no sign of life for \d+ s, after step {after} "
    return bool(re.search(start + r"[\s\S]*disturbed_runs\.py", written))
