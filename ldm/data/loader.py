"""From shards to batches, so that a batch is a function of (manifests, seed, positions) and of nothing else.

In: manifests, a seed, and the positions of a step. Out: a `Batch` for each micro-batch, in order, with its draws.

    1. step, rank         -> positions           positions.Positions: the same global batch for any number of processes
    2. positions          -> places              mixing.RunOrder: sources, buckets, block shuffle; once an epoch each
    3. places             -> members             shards.ShardReader: by offset, checksums compared
    4. positions          -> draws               samples.draw: crop, flip, caption, dropout, timestep
    5. members and draws  -> contents            samples.Contents; a bad one gives way to a drawn reserve
    6. contents           -> Batch               samples.collate: with the noises, in the worker, whole tensors
"""

import gc
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ldm.data.batch import Batch
from ldm.data.buckets import warn_of_small_buckets
from ldm.data.data_config import DataConfig
from ldm.data.dataset import SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions

PARENT_SECONDS = 2.0  # between looks of a worker whether its training process is still there


def _whole(batch: Any) -> Any:
    """Collation: the dataset gives whole batches."""
    return batch


def start_worker(_: int = 0) -> None:
    """Sets up a loader's worker process: one torch thread, memory, and the signals that the main process handles.

    Ctrl-C, and Slurm's and torchrun's SIGTERM and SIGUSR1, go to the whole group; the main process then ends its step
    and writes a checkpoint, for which it needs its workers. Only a SIGTERM out of the main process ends a worker, or
    that process's own death: killed, it leaves its workers' last batches in pipes that nobody will read.
    """
    torch.set_num_threads(1)
    gc.freeze()  # each full search for garbage would go through all that was imported, for 0.1 s
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, PARENT_SECONDS)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)


def loader_options(config: DataConfig, context: str | None) -> dict[str, Any]:
    """Options of a DataLoader that every one of a run has: its workers, pinned memory, a generator of its own."""
    options: dict[str, Any] = {
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # the loader draws a seed for its workers, which none of them uses
    }
    if config.workers:
        options |= {
            "num_workers": config.workers,
            "prefetch_factor": config.prefetch,
            "persistent_workers": True,
            "worker_init_fn": start_worker,
            "multiprocessing_context": context,
        }
    return options


def _loader(dataset: SampleDataset, plan: Iterable[list[int]], context: str | None) -> DataLoader[Batch]:
    return DataLoader(dataset, batch_sampler=plan, collate_fn=_whole, **loader_options(dataset.config, context))


def make_loader(
    config: DataConfig,
    manifests: Manifest | Sequence[Manifest],
    seed: int,
    positions: Positions,
    *,
    latent_shape: tuple[int, int, int],
    offset: bool = False,
    more_noise: int = 0,
    context: str | None = None,
) -> DataLoader[Batch]:
    """Micro-batches of one process, in order.

    With buckets all micro-batches of a step, on all processes, are of one bucket.

    Args:
        manifests: of the sources in `config.shards`, in their order.
        latent_shape: (C, h, w) of a square picture.
        offset: draw the offsets of offset noise, too.
        more_noise: channels that the noise has more than the latents.
        context: how workers start, "fork", "spawn" or "forkserver"; None is the platform's way.

    Raises:
        ValueError: the shards do not fit the config.
        FileNotFoundError: a shard has vanished. One whose size has changed is warned of (on rank 0).
        StorageError: a shard at a URL cannot be read.
    """
    several = [manifests] if isinstance(manifests, Manifest) else manifests
    first = positions.rank == 0
    if first:
        for manifest in several:
            manifest.check_files()
    global_batch = positions.global_batch
    dataset = SampleDataset(
        config,
        several,
        seed,
        latent_shape=latent_shape,
        global_batch=global_batch,
        offset=offset,
        more_noise=more_noise,
        progress=first,
    )
    if first and len(dataset.buckets) > 1:
        warn_of_small_buckets(dataset.buckets, dataset.order.counts, global_batch)
    return _loader(dataset, positions, context)


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
    offset: bool = False,
    more_noise: int = 0,
    context: str | None = None,
) -> DataLoader[Batch]:
    """Batches of one process over the first `samples` held-out samples (None: all), the same at each iteration.

    In file order, without dropout, flip or random crop; the draws come from a seed of their own and depend on the
    sample's number alone. Each sample stands in one batch of one process, and all processes get the same number of
    batches, so that sharded engines stay in step; a batch may hold one sample more or fewer than another. With buckets
    each batch is of one bucket, the samples of a bucket in file order.

    Args:
        manifest: of the held-out shards.
        micro_batch: about how many samples a batch holds, at most one more.
        offset: draw the offsets of offset noise, too.
        more_noise: channels that the noise has more than the latents.

    Raises:
        ValueError: too few samples for the processes, or shards that do not fit the config.
        FileNotFoundError: a shard has vanished.
        StorageError: a shard at a URL cannot be read.
    """
    if rank == 0:
        manifest.check_files()
    config = replace(config, caption_dropout=0.0, flip=0.0, crop="center")
    own_seed = int(generator(seed, Purpose.VALIDATION).bit_generator.random_raw())
    dataset = SampleDataset(
        config, manifest, own_seed, latent_shape=latent_shape, shuffle=False, offset=offset, more_noise=more_noise
    )
    total = min(len(dataset), len(dataset) if samples is None else samples)
    groups: list[Sequence[int]] = [range(total)]
    if len(dataset.buckets) > 1:
        buckets = dataset.order.locate_many(np.arange(total)).buckets
        groups = [np.flatnonzero(buckets == bucket).tolist() for bucket in np.unique(buckets)]
    batches = validation_batches(groups, world, micro_batch)
    if not batches:
        raise ValueError(
            f"{manifest.folder} gives {total} validation samples to {world} processes: each needs one in as many "
            f"batches as the others{f', and they are of {len(groups)} buckets' if len(groups) > 1 else ''}"
        )
    own = batches[rank * len(batches) // world : (rank + 1) * len(batches) // world]
    return _loader(dataset, [list(positions) for positions in own], context)


def validation_batches(groups: Sequence[Sequence[int]], world: int, micro_batch: int) -> list[Sequence[int]]:
    """Cuts groups of positions into batches, as many for each of `world` processes; none where there are too few.

    Each batch lies in one group and holds at most `micro_batch` positions, or one more where they are few; the batches
    of a group differ by one at most.
    """
    cuts = [-(-len(group) // micro_batch) for group in groups]
    wanted = -(-sum(cuts) // world) * world
    if wanted > sum(map(len, groups)):
        wanted -= world
    if wanted < len(groups):
        return []
    while sum(cuts) != wanted:
        more = sum(cuts) < wanted
        free = [
            number for number, group in enumerate(groups) if (cuts[number] < len(group) if more else cuts[number] > 1)
        ]
        sizes = {number: len(groups[number]) / cuts[number] for number in free}
        cuts[max(sizes, key=sizes.__getitem__) if more else min(sizes, key=sizes.__getitem__)] += 1 if more else -1
    return [
        group[len(group) * number // cut : len(group) * (number + 1) // cut]
        for group, cut in zip(groups, cuts, strict=True)
        for number in range(cut)
    ]
