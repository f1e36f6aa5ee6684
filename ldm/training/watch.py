"""A run's watch: who takes part, whose process is gone, and what each thread does when nothing moves any more.

Enters: a sign of life at the end of each step. Leaves: stacks of all threads on standard error after a silence; and an
error that names rank and host of a process that was lost, in place of what a broken connection says.

Processes count their beats in a store beside the process group, once a second; whoever is cut off from its collectives
looks there whose count stands still.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ldm.training.distributed import Peer
from ldm.training.launched import EngineError

T = TypeVar("T")
BEAT_SECONDS = 1.0
PATIENCE = 5
"""Beats without which a process counts as lost, once a collective has failed."""


class LostError(EngineError):
    """A process of the run is gone; names rank and host."""


class Watch:
    """A thread beside the run, within a `with` block; making it is collective.

    Args:
        hang_minutes: silence after which stacks are written; 0 never.
    """

    def __init__(self, accelerator: Accelerator, peers: list[Peer], hang_minutes: float) -> None:
        self._peers = peers
        self._own = peers[accelerator.process_index]
        self._limit = hang_minutes * 60
        self._done: int | None = None
        self._last = time.monotonic()
        self._told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._store = _meeting_store(accelerator) if len(peers) > 1 else None

    def alive(self, done: int) -> None:
        """A sign of life of this process, after `done` steps."""
        self._done, self._last, self._told = done, time.monotonic(), False

    def __enter__(self) -> "Watch":
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self._store is not None:
                if broken_connection(error):
                    raise LostError(self._asked(error)) from error
                told = f"{type(error).__name__}: {error}"[:500]
                _within(lambda: self._store.set(_failed(self._own.rank), told) if self._store else None)
        finally:
            self._ended.set()
            self._thread.join(BEAT_SECONDS * 2)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if self._store is not None:
                with suppress(Exception):  # a store that is gone is found out by whoever asks it
                    self._store.add(_beats(self._own.rank), 1)
            silence = time.monotonic() - self._last
            if self._limit and silence > self._limit and not self._told:
                self._told = True
                self._report(silence)

    def _report(self, silence: float) -> None:
        where = "before the first step" if self._done is None else f"after step {self._done}"
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"\n{self._own} has shown no sign of life for {silence:.0f} s, {where} (distributed.hang_minutes); "
                "stacks of its threads:\n"
            )
            sys.stderr.flush()
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _asked(self, error: BaseException) -> str:
        """Who is lost, and what the connection said."""
        step = "before its first step" if self._done is None else f"after step {self._done}"
        store = f"{self._peers[0]}, which keeps the list of the living, is gone, or out of reach"
        return (
            f"{self._own} lost the connection {step}: {_within(self._blame) or store}. Start the same command again to "
            f"resume. The connection said: {str(error).strip()[:300]}"
        )

    def _blame(self) -> str:
        """What is known of those who do not answer: their own errors, or counts that stand still."""
        others = [peer for peer in self._peers if peer != self._own]
        assert self._store is not None
        first = {peer: self._count(peer) for peer in others}
        silent = others
        for _ in range(PATIENCE):
            failed = [f"{peer} failed: {text}" for peer in others if (text := self._failure(peer))]
            if failed:
                return "; ".join(failed)
            time.sleep(BEAT_SECONDS)
            silent = [peer for peer in silent if self._count(peer) == first[peer]]
        if silent:
            return "; ".join(f"{peer} is gone, or out of reach" for peer in silent)
        return "all processes are there: the network failed, or one was slower than distributed.timeout_minutes"

    def _count(self, peer: Peer) -> int:
        assert self._store is not None
        return int(self._store.add(_beats(peer.rank), 0))

    def _failure(self, peer: Peer) -> str:
        assert self._store is not None
        return self._store.get(_failed(peer.rank)).decode() if self._store.check([_failed(peer.rank)]) else ""


def _within(ask: Callable[[], T]) -> T | None:
    """What `ask` gives; None when it raised, or has not come back after a while: a cut cable answers nothing."""
    answers: list[T] = []

    def run() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=run, name="asking", daemon=True)
    thread.start()
    thread.join(BEAT_SECONDS * (PATIENCE + 10))
    return answers[0] if answers else None


def broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another process or the network, and not because of what it was given."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    # gloo has no errors of its own; some of its texts name it, others only what befell a pair of processes.
    words = ("gloo", "connection closed", "connection reset", "connection refused", "timed out waiting", "pair closure",
             "socket", "nccl", "broken pipe")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _meeting_store(accelerator: Accelerator) -> dist.TCPStore | None:
    """A store on the main process that is there for beats alone. Collective."""
    address, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=20)
    store, port = None, [0]
    if accelerator.is_main_process:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = [store.port]
    port = broadcast_object_list(port)
    if store is None:
        store = dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=patience)
    store.add(_beats(accelerator.process_index), 1)
    return store


def _beats(rank: int) -> str:
    return f"beats/{rank}"


def _failed(rank: int) -> str:
    return f"failed/{rank}"
