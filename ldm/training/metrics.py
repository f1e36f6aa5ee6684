"""What a run tells about itself: sums kept on the device, read on logging steps, written as JSON lines and to trackers.

Enters: per-sample losses and timings of each step. Leaves: one object a logged step in `metrics.jsonl`, the same
numbers in TensorBoard (and W&B where asked for), sample grids beside them.
"""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

QUARTERS = 4


@dataclass
class MetricsConfig:
    """Where a run's numbers go besides `metrics.jsonl`."""

    log_every: int = 50
    """Optimizer steps between two lines of metrics; the only steps on which the device is waited for."""
    tensorboard: bool = True
    """Write TensorBoard files into the run's folder."""
    wandb_project: str | None = None
    """Project on Weights & Biases to log to as well; needs the `wandb` package."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"metrics.log_every: found {self.log_every}, expected 1 or more")
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"metrics.wandb_project is {self.wandb_project}, but wandb is not installed: pip install wandb"
            )


class LossWindow:
    """Sums of losses since the last logged step, on the device, without a host synchronization.

    Row q of `sums` and `counts` is the q-th quarter of the noise range (timesteps 0-249, 250-499, ... of 1000; quarters
    of continuous time, and for edm of the logarithm of sigma), so that loss and loss by quarter come from the same
    numbers. The sums are part of a checkpoint: the line that a resumed run logs next is that of an undisturbed run.
    """

    def __init__(self, device: torch.device) -> None:
        # Double precision: the order in which processes and micro-batches add up is then below what a line shows.
        self.sums = torch.zeros(QUARTERS, dtype=torch.float64, device=device)
        self.counts = torch.zeros(QUARTERS, dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, position: Tensor, dropped: Tensor) -> None:
        """Adds a micro-batch: loss (B,), positions (B,) in [0, 1] of the noise range, dropped captions (B,) bool."""
        quarter = (position * QUARTERS).long().clamp(max=QUARTERS - 1)  # the noisiest end is in the last
        # A loss that is not finite is counted elsewhere (bad_numbers.py); in these sums it would hide all others.
        finite = loss.isfinite()
        self.sums.index_add_(0, quarter, torch.where(finite, loss.double(), 0.0))
        self.counts.index_add_(0, quarter, finite.double())
        self.dropped += (dropped & finite).sum()

    def total(self) -> Tensor:
        """Sums over all processes as one (2 * QUARTERS + 1,) tensor; collective."""
        packed = torch.cat([self.sums, self.counts, self.dropped[None]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(packed)
        return packed

    def restore(self, packed: Tensor, is_main: bool) -> None:
        """Puts back what `total` gave: on the main process, zeros elsewhere, so that the next total is right."""
        self.clear()
        if is_main:
            packed = packed.to(self.sums)
            self.sums.copy_(packed[:QUARTERS])
            self.counts.copy_(packed[QUARTERS : 2 * QUARTERS])
            self.dropped.copy_(packed[-1])

    def clear(self) -> None:
        self.sums.zero_()
        self.counts.zero_()
        self.dropped.zero_()


def window_metrics(packed: Tensor) -> dict[str, float | None]:
    """Loss, loss by quarter of the noise range (None where no sample fell) and share of dropped captions."""
    sums, counts, dropped = (
        packed[:QUARTERS].tolist(),
        packed[QUARTERS : 2 * QUARTERS].tolist(),
        packed[-1].item(),
    )
    samples = sum(counts)
    if not samples:
        return dict.fromkeys(["loss", *(f"loss_quarter_{q + 1}" for q in range(QUARTERS)), "captions_dropped"])
    values: dict[str, float | None] = {"loss": sum(sums) / samples}
    for q in range(QUARTERS):
        values[f"loss_quarter_{q + 1}"] = sums[q] / counts[q] if counts[q] else None
    values["captions_dropped"] = dropped / samples
    return values


class Console:
    """Standard error for bars and lines; a reader that is gone, as `| tee` after Ctrl-C, takes nothing from the run."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


@dataclass
class Clock:
    """Wall-clock seconds since the last logged step, and how many of them were spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0

    def read(self) -> dict[str, float]:
        """Pictures per second and share of time waiting for data; starts the next interval."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        values = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0
        return values

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the block (sampling, validation, checkpoints) out of the interval."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Writes `metrics.jsonl` and the trackers of accelerate; on the main process only, elsewhere it does nothing."""

    def __init__(
        self, accelerator: Accelerator, run_dir: Path, config: MetricsConfig, settings: dict[str, Any]
    ) -> None:
        self._accelerator = accelerator
        self._path = run_dir / "metrics.jsonl"
        self._trackers: list[Any] = []
        self._start = lambda step: _start_trackers(run_dir, config, settings, step)

    def start(self, step: int) -> None:
        """Opens the trackers for a run that goes on after `step`, and drops the lines of later steps."""
        if self._accelerator.is_main_process:
            forget_after(self._path, step)
            self._trackers = self._start(step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line for optimizer step `step` (the number of steps done); non-finite numbers become null."""
        if not self._accelerator.is_main_process:
            return
        record = {"step": step} | {name: _finite(value) for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Shows a picture in the trackers."""
        array = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        array = array.reshape(1, picture.height, picture.width, 3)  # (N, H, W, 3)
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: array.numpy()}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of a JSON-lines file that tell of steps past `step`: a resumed run does that work again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".jsonl.partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _start_trackers(run_dir: Path, config: MetricsConfig, settings: dict[str, Any], step: int) -> list[Any]:
    from accelerate.tracking import (
        TensorBoardTracker,
        WandBTracker,
    )  # imports TensorBoard: seconds, main process only

    trackers: list[Any] = []
    if config.tensorboard:
        # Points past `step`, of work that is done again, disappear from the curves.
        trackers.append(TensorBoardTracker(run_name="tensorboard", logging_dir=run_dir, purge_step=step + 1))
    if config.wandb_project:
        trackers.append(WandBTracker(config.wandb_project, id=run_dir.name, dir=str(run_dir), resume="allow"))
        trackers[-1].store_init_configuration(settings)
    for tracker in trackers:
        if hasattr(tracker, "start"):
            tracker.start()
    return trackers


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash is written again


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
