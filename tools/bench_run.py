"""A run's own steps, measured: real loader, real loop, and where the time of a step goes.

Enters: a run's config and the side of its latents (synthetic_run.py makes what it reads). Leaves: records of pictures
per second, of the shares that waiting for data and the average take, and of waits of the host and compilations after
warm-up.
"""

import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_record import Record, device_name, wait_for
from synthetic_run import synthetic_run
from torch.profiler import ProfilerActivity, profile
from train_ways import fresh_accelerator

from ldm.models.unet import UNet
from ldm.train import measure, train_step
from ldm.training.breakdown import StepParts
from ldm.training.distributed import split_global_batch
from ldm.training.metrics import Clock, peak_memory_gib
from ldm.training.run import Run, build_run
from ldm.training.run_state import resume
from ldm.training.simulation import forward_flop

SAMPLES = 1024
"""Encoded samples on disk; a run that needs more reads them again."""
WARMUP = 10
PUBLISHED = {
    ("H100", "sd21", 64): (145.0, "best published: MLPerf v4.1, fp16, no EMA, no clipping"),
    ("H100", "sd21", 32): (700.0, "goal"),
}
"""By part of the GPU's name, name of the config and side: pictures per second on one GPU."""
DATA_LIMIT, AVERAGE_LIMIT = 0.5, 1.5
"""Per cent of a step that waiting for data and the average may take."""
HOST_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Waits:
    """What stood in the way of a device that should never wait for its host."""

    synchronizations: int = 0
    """Operations that made the host wait for all that the device had been given."""
    places: dict[str, int] = field(default_factory=dict)
    """The same by file and line."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of the driver that wait, by name; those for an event of the step before leave the device busy."""
    compilations: int = 0


@dataclass
class RunFigures:
    """A run's steps after warm-up."""

    steps: int
    seconds: float
    """A step's, on the clock."""
    parts: dict[str, float]
    """Seconds a step of each part (ldm/training/breakdown.py), and of the loop around them."""
    images: int
    """Pictures a step."""
    tflops: float
    peak_gib: float
    waits: Waits | None
    """None on devices that compute while the host waits anyway."""

    def share(self, part: str) -> float:
        """Per cent of a step."""
        return 100 * self.parts[part] / self.seconds


def measure_run(
    name: str,
    config: Path,
    side: int,
    batch: int,
    precision: str,
    steps: int,
    overrides: list[str],
    device: torch.device,
) -> tuple[RunFigures, list[Record]]:
    """Builds a run of `config` on made-up shards, takes WARMUP and then `steps` steps, and tells what they took.

    Args:
        name: of the network, for the records.
        batch: global batch, in one process.
        overrides: dotted options of ldm/train.py.
    """
    with tempfile.TemporaryDirectory(prefix="bench-run-") as scratch:
        settings = [
            f"--training.global_batch={batch}",
            "--training.max_micro_batch=null",
            f"--training.steps={WARMUP + 2 * steps}",
            f"--metrics.log_every={max(10, steps // 2)}",
            f"--wrapping.mixed_precision={precision}",
            f"--data.workers={min(8, max(1, (os.cpu_count() or 1) - 1))}",
            *overrides,
        ]
        made = synthetic_run(Path(scratch), config, side, SAMPLES, settings)
        accelerator = fresh_accelerator(precision)
        accelerator_device = accelerator.device
        if accelerator_device.type != device.type:
            raise ValueError(f"device: accelerate chose {accelerator_device}, expected {device}")
        run = build_run(made, accelerator, split_global_batch(batch, 1, None), lambda line: None)
        resume(run, lambda line: None)
        figures = steps_of(run, steps)
        run.metrics.close()
    named = f"run, {name}, {precision}, batch {batch}, {side}x{side}"
    return figures, records_of(named, name, side, figures, device)


def steps_of(run: Run, steps: int) -> RunFigures:
    """Warm-up, `steps` steps as ldm/train.py takes and logs them, and on CUDA as many again under the profiler."""
    device, config = run.accelerator.device, run.config
    batches = run.data.training_batches(run.share, 0, config.training.steps)
    taken = 0

    def take(count: int, clock: Clock, *, logged: bool) -> None:
        nonlocal taken
        for _ in range(count):
            latents = train_step(run, taken, batches, clock)
            taken += 1
            if logged and taken % config.metrics.log_every == 0:
                run.metrics.write(taken, measure(run, taken, latents, clock))

    take(WARMUP, Clock(), logged=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts = run.parts = StepParts(device)
    wait_for(device)
    begun = time.perf_counter()
    take(steps, Clock(), logged=True)
    wait_for(device)
    seconds = (time.perf_counter() - begun) / steps
    found = {name: value for name, value in parts.read().items() if name != "steps"}
    found["loop"] = seconds - sum(found.values())
    waits = watched(lambda: take(steps, Clock(), logged=False)) if device.type == "cuda" else None
    images = config.training.global_batch
    with torch.device("meta"):
        network = UNet(config.unet)
    side = run.share.latent_shape[1]
    tflop = 3 * forward_flop(network, side, run.share.text_shape[0]) / 1e12
    return RunFigures(steps, seconds, found, images, images * tflop / seconds, peak_memory_gib(device), waits)


def watched(work: Callable[[], None]) -> Waits:
    """What made the host wait for the device, and what was compiled, during `work`; CUDA only."""
    from torch._dynamo.utils import counters

    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, profile(activities=[ProfilerActivity.CUDA]) as profiler:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in waited)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    names = Counter(event.name() for event in profiler.profiler.kineto_results.events())
    calls = {name: names[name] for name in HOST_WAITS if names[name]}
    return Waits(len(waited), dict(places), calls, counters["stats"]["unique_graphs"] - compiled)


def records_of(name: str, network: str, side: int, figures: RunFigures, device: torch.device) -> list[Record]:
    """Records against limits, and against what was published for the device, where something was."""
    rate = figures.images / figures.seconds
    extra = {
        "steps": figures.steps,
        "seconds_a_step": figures.seconds,
        "parts_seconds": figures.parts,
        "pictures_per_second": rate,
        "tflops": figures.tflops,
        "peak_gib": figures.peak_gib,
        "waits": None if figures.waits is None else vars(figures.waits),
    }
    records = [
        Record(f"{name}: waiting for data", figures.share("data"), DATA_LIMIT, "limit", "%", extra=extra),
        Record(f"{name}: average", figures.share("average"), AVERAGE_LIMIT, "limit", "%"),
    ]
    for (gpu, of, latents), (pictures, whose) in PUBLISHED.items():
        if gpu in device_name(device) and (of, latents) == (network, side):
            records.append(Record(f"{name}: pictures", rate, pictures, whose, "pictures/s", extra=extra))
    return records


def told_run(figures: RunFigures) -> str:
    """The breakdown of a step, and what else was seen, as lines of text."""
    lines = [
        f"    {figures.images / figures.seconds:.4g} pictures/s, {figures.tflops:.3g} TFLOP/s, "
        f"{1000 * figures.seconds:.4g} ms a step, peak {figures.peak_gib:.3g} GiB",
        "    " + ", ".join(f"{name} {figures.share(name):.2g} %" for name in figures.parts),
    ]
    waits = figures.waits
    if waits is not None:
        lines.append(
            f"    in {figures.steps} steps: {waits.synchronizations} host synchronizations {waits.places or ''}, "
            f"{waits.compilations} compilations; calls that wait {waits.calls or 'none'}"
        )
    return "\n".join(lines)
