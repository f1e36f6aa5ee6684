"""Processes and engine: starts accelerate, checks that what runs is what was asked for, and splits the global batch.

Enters: DistributedConfig, the mixed precision and the global batch. Leaves: an Accelerator, a BatchSplit, and the
run's first lines. Everything here is collective: each process calls it at the same point.
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    gather_object,
)

from ldm.training.launched import (
    DistributedConfig,
    EngineError,
    engine_name,
    processes_asked_of_launcher,
    without_plugins,
)


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
    engine = engine_name(config, int(os.environ.get("WORLD_SIZE", "1")))
    with without_plugins():
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not has_gpu, kwargs_handlers=handlers)
    check_processes(accelerator, wanted, engine)
    if engine not in ("single", "ddp") and not dist.is_initialized():  # one process that offloads
        dist.init_process_group("nccl" if has_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return accelerator


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
    if engine in ("single", "ddp") and engine != active:
        raise EngineError(f"distributed.engine is {engine}, but the launcher started {active} with {running} processes")
    if running > 1:
        ranks = torch.full((1,), float(accelerator.process_index), device=accelerator.device)
        dist.all_reduce(ranks)
        if int(ranks.item()) != running * (running - 1) // 2:
            raise EngineError(f"{running} processes do not reach each other: sum of ranks {ranks.item()}")


TITLES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


@dataclass(frozen=True)
class Peer:
    """One process of the run."""

    rank: int
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"process {self.rank} on host {self.host} (pid {self.pid})"


def roll_call(accelerator: Accelerator) -> list[Peer]:
    """All processes of the run, by rank. Collective."""
    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return list(gather_object([Peer(accelerator.process_index, platform.node(), os.getpid(), device)]))


def first_lines(accelerator: Accelerator, split: BatchSplit, peers: Sequence[Peer], engine: str) -> list[str]:
    """What a run says before anything else: engine, processes, devices, precision, split of the global batch."""
    count = "one process" if len(peers) == 1 else f"{len(peers)} processes"
    title = count if engine == "single" else f"{TITLES[engine]} over {dist.get_backend()}, {count}"
    devices = ", ".join(f"{number} x {device}" for device, number in Counter(peer.device for peer in peers).items())
    hosts = ", ".join(f"{host} ({number})" for host, number in Counter(peer.host for peer in peers).items())
    return [
        f"engine: {title}; {devices}; hosts: {hosts}; mixed precision {accelerator.mixed_precision}",
        f"global batch {split.global_batch} = {split.micro_batch} micro-batch x {split.accumulation} accumulation "
        f"x {split.processes} processes; torch {torch.__version__}",
    ]


def check_same(peers: Sequence[Peer], what: Mapping[str, Any]) -> None:
    """Raises EngineError on all processes, with each name whose value is not that of the main process. Collective.

    Args:
        what: flat, of plain values.
    """
    everyone = gather_object([dict(what)])
    first = everyone[0]
    lines = [
        f"{name}: {first.get(name)!r} for {peers[0]}, {theirs.get(name)!r} for {peer}"
        for peer, theirs in zip(peers, everyone, strict=True)
        for name in sorted(first.keys() | theirs.keys())
        if first.get(name) != theirs.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise EngineError(
            "the processes were not started for the same run; give all hosts the same config, data and versions:\n  "
            + "\n  ".join(lines[:20])
            + more
        )


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

    def each(self, value: float) -> list[float]:
        """The value of each process, by rank. Collective."""
        if self._group is None:
            return [value]
        shared = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        shared[dist.get_rank()] = value
        dist.all_reduce(shared, group=self._group)
        return list(shared.tolist())

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
