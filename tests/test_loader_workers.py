"""The loader's worker processes: signals, threads and generators stay where they belong."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_shards import (
    config,
    loader_of,
    raw_sample,
    write,
)

from ldm.data.batch import Batch
from ldm.data.loader import start_worker
from ldm.data.manifest import Manifest


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("raw"), raw_sample)


def test_no_global_generator_takes_part_in_loading(raw: Manifest) -> None:
    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    settings = config(raw.folder, flip=0.5, crop="random")
    before = states()
    for workers in (0, 1):
        list(loader_of(raw, dataclasses.replace(settings, workers=workers), stop_step=1))
    assert states() == before


def _children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_workers_outlive_the_signals_that_the_whole_group_gets_and_end_with_the_loader(encoded: Manifest) -> None:
    loader = loader_of(encoded, config(encoded.folder, workers=2, prefetch=1), stop_step=40)
    iterator: Iterator[Batch] = iter(loader)
    next(iterator), next(iterator)  # one of each worker: both have begun, and set their signals
    workers = _children()
    assert len(workers) == 2
    sender = os.fork()  # a SIGTERM of the main process itself does end them
    if sender == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for worker in workers:
                os.kill(worker, number)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(iterator)) == 38
    assert _children() == workers
    os.kill(workers[0], signal.SIGTERM)
    deadline = time.monotonic() + 30
    while workers[0] in _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children() == workers[1:]
    started = time.monotonic()
    del iterator, loader
    while _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children() == []
    assert time.monotonic() - started < 30


class _Threads(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> int:
        return torch.get_num_threads()


def test_workers_use_one_torch_thread() -> None:
    loader = torch.utils.data.DataLoader(_Threads(), num_workers=1, worker_init_fn=start_worker)
    assert [int(threads) for threads in loader] == [1, 1]
