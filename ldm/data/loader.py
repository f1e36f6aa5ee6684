"""From shards to batches, so that a batch is a function of (manifest, seed, positions) and of nothing else.

In: a manifest, a seed, and the positions of a step. Out: a `Batch` for each micro-batch, in order, with its draws.

    1. step, rank         -> positions           rank_positions: the same global batch for any number of processes
    2. position           -> location            order.Order: block shuffle, each sample once an epoch
    3. location           -> members             shards.ShardReader: by offset, checksums compared
    4. position           -> draws               draws.uniform, .normal: crop, flip, caption, dropout, timestep, noises
    5. members and draws  -> sample              pictures, members; a bad one gives way to a drawn reserve
    6. samples            -> Batch               dataset.SampleDataset, in the worker: one object with whole tensors
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.data.batch import Batch
from ldm.data.dataset import DataConfig, SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.manifest import Manifest


def rank_positions(step: int, rank: int, world: int, micro_batch: int, accumulation: int) -> list[range]:
    """Stage 1: positions of each micro-batch of one process at optimizer step `step`.

    The global batch B = world * accumulation * micro_batch at step k is positions kB .. (k + 1)B - 1; rank r takes its
    r-th part, and micro-batch m the m-th part of that, so that any split of B gives the same global batches.
    """
    first = ((step * world + rank) * accumulation) * micro_batch
    return [range(first + part * micro_batch, first + (part + 1) * micro_batch) for part in range(accumulation)]


class _Plan:
    """The batch sampler: positions of each batch to come, in order, the same at each iteration."""

    def __init__(self, batches: int, positions: Callable[[int], Sequence[int]]) -> None:
        self.batches = batches
        self.positions = positions

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.positions(number)) for number in range(self.batches))


def _whole(batch: Any) -> Any:
    """Collation: the dataset gives whole batches."""
    return batch


def start_worker(_: int = 0) -> None:
    """Sets up a loader's worker process: one torch thread, and the signals that are the main process's to handle.

    Ctrl-C, and Slurm's and torchrun's SIGTERM and SIGUSR1, go to the whole group; the main process then ends its step
    and writes a checkpoint, for which it needs its workers. Only a SIGTERM out of the main process ends a worker.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _loader(dataset: SampleDataset, plan: _Plan, context: str | None) -> DataLoader[Batch]:
    config = dataset.config
    workers: dict[str, Any] = {}
    if config.workers:
        workers = {
            "num_workers": config.workers,
            "prefetch_factor": config.prefetch,
            "persistent_workers": True,
            "worker_init_fn": start_worker,
            "multiprocessing_context": context,
        }
    return DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=_whole,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers, which none of them uses
        **workers,
    )


def make_loader(
    config: DataConfig,
    manifest: Manifest,
    seed: int,
    *,
    latent_shape: tuple[int, int, int],
    rank: int,
    world: int,
    micro_batch: int,
    accumulation: int,
    start_step: int,
    stop_step: int,
    context: str | None = None,
) -> DataLoader[Batch]:
    """Micro-batches of one process from `start_step` up to but without `stop_step`, `accumulation` of them a step.

    Args:
        latent_shape: (C, h, w).
        context: how workers start, "fork", "spawn" or "forkserver"; None is the platform's way.

    Raises:
        ValueError: the shards do not fit the config.
        FileNotFoundError: a shard has vanished. One whose size has changed is warned of (on rank 0).
    """
    if rank == 0:
        manifest.check_files()
    dataset = SampleDataset(config, manifest, seed, latent_shape=latent_shape)

    def positions(number: int) -> range:
        step, part = divmod(number, accumulation)
        return rank_positions(start_step + step, rank, world, micro_batch, accumulation)[part]

    return _loader(dataset, _Plan((stop_step - start_step) * accumulation, positions), context)


def make_validation_loader(
    config: DataConfig,
    manifest: Manifest,
    seed: int,
    *,
    latent_shape: tuple[int, int, int],
    rank: int,
    world: int,
    micro_batch: int,
    samples: int | None = None,
    context: str | None = None,
) -> DataLoader[Batch]:
    """Batches of one process over the first `samples` held-out samples (None: all), the same at each iteration.

    In file order, without dropout, flip or random crop; the draws come from a seed of their own and depend on the
    sample's number alone. Each sample stands in one batch of one process, and all processes get the same number of
    batches, so that sharded engines stay in step; a batch may hold one sample more or fewer than another.

    Args:
        manifest: of the held-out shards.
        micro_batch: about how many samples a batch holds, at most one more.

    Raises:
        ValueError: fewer samples than processes, or shards that do not fit the config.
        FileNotFoundError: a shard has vanished.
    """
    if rank == 0:
        manifest.check_files()
    config = replace(config, caption_dropout=0.0, flip=0.0, crop="center")
    own_seed = int(generator(seed, Purpose.VALIDATION).bit_generator.random_raw())
    dataset = SampleDataset(config, manifest, own_seed, latent_shape=latent_shape, shuffle=False)
    total = min(len(dataset), len(dataset) if samples is None else samples)
    if total < world:
        raise ValueError(f"{manifest.folder} gives {total} validation samples to {world} processes: each needs one")
    batches = min(-(-total // (world * micro_batch)), total // world)
    first, last = total * rank // world, total * (rank + 1) // world

    def positions(number: int) -> range:
        count = last - first
        return range(first + count * number // batches, first + count * (number + 1) // batches)

    return _loader(dataset, _Plan(batches, positions), context)
