"""Processes and engine: starts accelerate, checks that what runs is what was asked for, and splits the global batch.

Enters: DistributedConfig, the mixed precision and the global batch. Leaves: an Accelerator, a BatchSplit, and the
run's first lines. Everything here is collective: each process calls it at the same point.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
)


class EngineError(RuntimeError):
    """The processes or the engine that run are not those that were asked for."""


@dataclass
class DistributedConfig:
    """What the launcher is expected to have started; the run stops at once when it is something else."""

    engine: Literal["auto", "single", "ddp"] = "auto"
    """Engine that must be active: single (one process), ddp, or auto (ddp when there are several processes)."""
    processes: int | None = None
    """Total number of processes that must be running; unset: what the launcher's own command line asks for."""
    timeout_minutes: float = 10.0
    """Minutes after which a collective that a lost process does not join ends the run with an error."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"distributed.processes: found {self.processes}, expected 1 or more")
        if self.engine == "single" and self.processes not in (None, 1):
            raise ValueError(f"distributed.engine is single, but distributed.processes is {self.processes}")
        if self.timeout_minutes <= 0:
            raise ValueError(f"distributed.timeout_minutes: found {self.timeout_minutes}, expected a positive number")


@dataclass(frozen=True)
class BatchSplit:
    """How one global batch is shared: global_batch = processes * accumulation * micro_batch."""

    global_batch: int
    processes: int
    accumulation: int
    micro_batch: int


def split_global_batch(global_batch: int, processes: int, max_micro_batch: int | None) -> BatchSplit:
    """Splits the global batch over processes and accumulation, with the largest micro-batch that is allowed.

    Raises:
        ValueError: the global batch is no multiple of the number of processes.
    """
    if global_batch % processes:
        near = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        fitting = ", ".join(str(n) for n in near if n <= 2 * processes)
        raise ValueError(
            f"training.global_batch {global_batch} cannot be split over {processes} processes in equal parts; "
            f"use a multiple of {processes}, or a number of processes that divides it ({fitting})"
        )
    share = global_batch // processes
    limit = share if max_micro_batch is None else max_micro_batch
    accumulation = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= limit)
    return BatchSplit(global_batch, processes, accumulation, share // accumulation)


def start_accelerator(config: DistributedConfig, mixed_precision: str) -> Accelerator:
    """Starts accelerate on the devices at hand and checks engine and number of processes.

    Raises:
        EngineError: the launcher started fewer processes than asked for, processes that do not talk to each other, or
            another engine than the configured one.
    """
    wanted = config.processes if config.processes is not None else processes_asked_of_launcher()
    has_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in (
        "1",
        "true",
        "yes",
    )
    handlers: list[KwargsHandler] = [
        # Gradients are views into the buffer that is reduced: no copy after the all-reduce.
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Named for one process alone, a backend makes accelerate look for a process group that nobody started.
        backend = "nccl" if has_gpu else "gloo"
        handlers.append(InitProcessGroupKwargs(backend, timeout=timedelta(minutes=config.timeout_minutes)))
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not has_gpu, kwargs_handlers=handlers)
    check_processes(accelerator, wanted, config.engine)
    return accelerator


def processes_asked_of_launcher() -> int | None:
    """The --num_processes (or --nproc_per_node) of the launcher that is this program's parent; None when it has none.

    `accelerate launch --cpu --num_processes 2` runs one process and exits 0: only the launcher's own command line tells
    what its user meant.
    """
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    if not any("accelerate" in Path(word).name or "torchrun" in Path(word).name for word in words[:4]):
        return None
    return processes_in_command(words)


def processes_in_command(words: Sequence[str]) -> int | None:
    """Total number of processes that a launcher's command line asks for, its --config_file included."""
    options: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.endswith(".py"):  # from here on the words are the program's own
            break
        if word.startswith("--"):
            name, _, value = word.partition("=")
            following = words[i + 1] if i + 1 < len(words) else ""
            options[name.lstrip("-").replace("-", "_")] = value or following
    if "num_processes" in options:
        return _integer(options["num_processes"])
    if "nproc_per_node" in options:
        per_node, nodes = _integer(options["nproc_per_node"]), _integer(options.get("nnodes", "1"))
        return per_node * nodes if per_node is not None and nodes is not None else None
    if "config_file" in options:
        try:
            content = yaml.safe_load(Path(options["config_file"]).read_text())
        except (OSError, yaml.YAMLError):
            return None  # the launcher itself has the better message for a file that it cannot read
        found = content.get("num_processes") if isinstance(content, dict) else None
        return int(found) if found is not None else None
    return None


def _integer(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def check_processes(accelerator: Accelerator, wanted: int | None, engine: str) -> None:
    """Raises EngineError unless `wanted` processes run under `engine` and really exchange data."""
    running = accelerator.num_processes
    spawned = int(os.environ.get("WORLD_SIZE", "1"))
    how = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or torchrun --nproc_per_node N"
    if spawned != running:
        raise EngineError(
            f"the launcher started {spawned} processes, but accelerate joined {running}: they would each train alone. "
            f"On CPU use {how}."
        )
    if wanted is not None and wanted != running:
        raise EngineError(
            f"{wanted} processes were asked for (launcher or distributed.processes), but {running} "
            f"{'is' if running == 1 else 'are'} running. `accelerate launch --cpu` starts only one; on CPU use {how}."
        )
    active = (
        "ddp" if accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU) else "single"
    )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
    ):
        raise EngineError(f"engine {accelerator.distributed_type.value} is not supported; use one process or DDP")
    if engine != "auto" and engine != active:
        raise EngineError(f"distributed.engine is {engine}, but the launcher started {active} with {running} processes")
    if running > 1:
        ranks = torch.full((1,), float(accelerator.process_index), device=accelerator.device)
        dist.all_reduce(ranks)
        if int(ranks.item()) != running * (running - 1) // 2:
            raise EngineError(f"{running} processes do not reach each other: sum of ranks {ranks.item()}")


def first_lines(accelerator: Accelerator, split: BatchSplit) -> list[str]:
    """What a run says before anything else: engine, processes, devices, precision, split of the global batch."""
    world = accelerator.num_processes
    engine = "one process" if world == 1 else f"DDP over {dist.get_backend()}, {world} processes"
    device = (
        torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return [
        f"engine: {engine}; {device} each; host {platform.node()}; mixed precision {accelerator.mixed_precision}",
        f"global batch {split.global_batch} = {split.processes} processes x {split.accumulation} accumulation "
        f"x {split.micro_batch} micro-batch; torch {torch.__version__}",
    ]


class Agreement:
    """Numbers that all processes agree on, over gloo on the host: no step waits for the device's queue to drain."""

    def __init__(self, accelerator: Accelerator, timeout_minutes: float) -> None:
        several = accelerator.num_processes > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) if several else None

    def largest(self, value: int) -> int:
        """The largest of all processes' values. Collective."""
        if self._group is None:
            return value
        shared = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared.item())

    def wait(self, ready: Callable[[], bool], every_seconds: float = 0.05) -> None:
        """Returns on all processes once `ready()` is true on each: no wait that a collective's timeout could end.

        Whatever `ready` raises on one process is raised there, and ends the others with an EngineError. Collective.
        """
        while True:
            state, problem = 1, None
            try:
                state = 0 if ready() else 1
            except Exception as error:
                state, problem = 2, error
            agreed = self.largest(state)
            if problem is not None:
                raise problem
            if agreed == 2:
                raise EngineError("another process has failed; its own error says why")
            if agreed == 0:
                return
            time.sleep(every_seconds)
