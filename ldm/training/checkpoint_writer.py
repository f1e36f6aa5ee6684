"""Checkpoints in the background: a thread copies weights and state to the host, and writes the copy.

Enters: a TrainingState and averaged weights, which training changes again at its next optimizer step; until then, while
it computes a forward and a backward pass, they are copied. Leaves: the same checkpoint that `save_checkpoint` writes, a
little later; a write that failed is told, counted, and made up for by the next save.

The thread is not a daemon: a program that ends, by return or by an exception, ends after the write under way. A process
that is killed leaves a temporary folder, which the next save removes.
"""

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.training.checkpoint import CheckpointError, TrainingState, checkpoint_name, save_checkpoint

WritePipeline = Callable[[Path, Mapping[str, Tensor], Path | None], None]
"""Writes a pipeline's files: into this folder, with these averaged weights, linking frozen parts of this checkpoint
where they are intact there."""

_ALIGNMENT = 64
_SLAB = 256 << 20
_JOB = 16 << 20


class CheckpointWriter:
    """Writes checkpoints of one run in a thread, one at a time. On the main process only; nothing here is collective.

    Args:
        root: the folder of the checkpoints.
        keep: how many checkpoints stay; 0 keeps all.
        failures_allowed: failed writes in a row that only cost a line; one more stops the run.
        report: takes a line for each failed write; called in the thread.
    """

    def __init__(
        self, root: Path, *, keep: int, failures_allowed: int = 2, report: Callable[[str], None] = print
    ) -> None:
        self.root = root
        self.last: Path | None = None
        """Newest checkpoint that is complete: written here, or set to the one that the run resumed from."""
        self.failures = 0
        """Failed writes in a row, up to the last one."""
        self._before: Path | None = None  # the complete one before `last`
        self._keep = keep
        self._allowed = failures_allowed
        self._report = report
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: Exception | None = None

    def save(
        self,
        state: TrainingState,
        averaged: Mapping[str, Tensor],
        write_pipeline: WritePipeline,
        *,
        config_yaml: str,
    ) -> None:
        """Returns while a thread copies all tensors to the host and writes them; waits for the write before it first.

        The tensors may be read, but not changed, until `wait_copied` returns.

        Args:
            averaged: weights for unet/, by the network's names.
            write_pipeline: runs in the thread with the averaged weights on the host and an earlier complete checkpoint
                of this run, if there is one; it must touch no tensor that training changes.

        Raises:
            CheckpointError: more writes in a row have failed than are allowed.
        """
        self._join()
        if self.failures > self._allowed:
            self._raise()
        state = replace(state, scalars=copy.deepcopy(state.scalars))
        groups = [state.weights, state.optimizer, averaged]
        devices = {tensor.device for group in groups for tensor in group.values() if tensor.is_cuda}
        ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        arguments = (state, averaged, ready, write_pipeline, config_yaml)
        self._copied.clear()
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer", daemon=False)
        self._thread.start()

    def wait_copied(self) -> None:
        """Returns when the tensors of the last `save` are copied: to be called before anything changes them."""
        self._copied.wait()

    def wait(self) -> None:
        """Returns when nothing is under way.

        Raises:
            CheckpointError or OSError: the last write failed; it says so again until a later one succeeds.
        """
        self._join()
        if self._error is not None:
            self._raise()

    def poll(self) -> bool:
        """True when nothing is under way; does not wait and does not raise."""
        return self._thread is None or not self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        error = self._error
        assert error is not None, "a failed write has an error"
        if self.failures > self._allowed:
            raise CheckpointError(
                f"{self.failures} writes of checkpoints in a row have failed, {self._allowed} are allowed; the newest "
                f"complete checkpoint is {self.last or 'none'}. The last failure was {_told(error)}"
            ) from error
        if isinstance(error, OSError | CheckpointError):
            raise error
        raise CheckpointError(f"the last checkpoint was not written: {_told(error)}") from error

    def _write(
        self,
        state: TrainingState,
        averaged: Mapping[str, Tensor],
        ready: Mapping[torch.device, torch.cuda.Event],
        write: WritePipeline,
        config_yaml: str,
    ) -> None:
        # Frozen parts are linked from the checkpoint before the last one: so there are two copies of them on the
        # storage, in turns, and one flipped bit does not cost all checkpoints at once.
        earlier = self._before if self._keep != 1 else self.last
        final = self.root / checkpoint_name(state.step)
        before = final.exists()
        try:
            try:
                weights, optimizer, average = self._host.take([state.weights, state.optimizer, averaged], ready)
            finally:
                self._copied.set()
            written = save_checkpoint(
                self.root,
                replace(state, weights=weights, optimizer=optimizer),
                lambda folder: write(folder, average, earlier),
                config_yaml=config_yaml,
                keep=self._keep,
            )
            self._completed(written)
            self._error, self.failures = None, 0
        # Whatever it is: tokenizers, for one, turns a full disk into a plain Exception.
        except Exception as error:
            self._error, self.failures = error, self.failures + 1
            if final.exists() and not before:
                self._completed(final)
                what = f"checkpoint {final.name} is complete, but `latest` or the removal of old ones failed"
            else:
                kept = f"the earlier one, {self.last.name}, is untouched" if self.last else "there is none before it"
                what = f"checkpoint {final.name} was not written, {kept}"
            self._report(f"{what}: {_told(error)}. Tried again at the next save; {self.failures} failed in a row")

    def _completed(self, checkpoint: Path) -> None:
        if checkpoint != self.last:
            self._before, self.last = self.last, checkpoint


class HostCopy:
    """Buffers on the host that take copies of named tensors, again and again.

    Fresh memory costs several times what the copy costs (each page is cleared at its first touch), so that buffers are
    kept while names, shapes and dtypes stay.
    """

    def __init__(self) -> None:
        self._layout: list[object] = []
        self._buffers: list[dict[str, Tensor]] = []
        self._bytes: list[dict[str, np.ndarray]] = []

    def take(
        self, groups: Sequence[Mapping[str, Tensor]], ready: Mapping[torch.device, torch.cuda.Event]
    ) -> list[dict[str, Tensor]]:
        """Copies groups of tensors; the copies are valid until the next call.

        Copies have the memory order of their tensors, so that each is one straight copy. From a GPU they go through
        page-locked memory, all under way at once beside the work that the device is given meanwhile.

        Args:
            ready: an event of each GPU behind which the tensors have their values.
        """
        layout: list[object] = [
            [(name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in group.items()]
            for group in groups
        ]
        if layout != self._layout:
            self._buffers, self._bytes = [], []  # the old ones go before new ones are asked for
            self._buffers, self._layout = _buffers_like(groups), layout
            self._bytes = [{name: _as_bytes(tensor) for name, tensor in group.items()} for group in self._buffers]
        streams = {device: torch.cuda.Stream(device) for device in ready}
        for device, stream in streams.items():
            stream.wait_event(ready[device])
        on_host = []
        for group, buffers, arrays in zip(groups, self._buffers, self._bytes, strict=True):
            for name, tensor in group.items():
                if tensor.device.type == "cpu" and tensor.stride() == buffers[name].stride():
                    on_host.append((arrays[name], _as_bytes(tensor)))
                else:
                    with torch.cuda.stream(streams.get(tensor.device)):
                        buffers[name].copy_(tensor.detach(), non_blocking=True)
        _copy_in_threads(on_host)
        for stream in streams.values():
            stream.synchronize()
        return [dict(buffers) for buffers in self._buffers]


def _copy_in_threads(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copies arrays to arrays with all cores: one core moves half or less of what memory can."""
    jobs: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
    size = 0
    for pair in pairs:
        if size > _JOB:
            jobs.append([])
            size = 0
        jobs[-1].append(pair)
        size += pair[0].nbytes

    def copy_all(job: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for target, source in job:
            np.copyto(target, source)

    left = iter(jobs)
    lock = threading.Lock()

    def take_jobs() -> None:
        while True:
            with lock:
                job = next(left, None)
            if job is None:
                return
            copy_all(job)

    # Plain threads: an executor takes no work once the interpreter has begun to end, which a write under way outlives.
    others = [threading.Thread(target=take_jobs) for _ in range(min(8, os.cpu_count() or 1) - 1)]
    try:
        for thread in others:
            thread.start()
    except RuntimeError:  # no new threads at all from then on
        others = [thread for thread in others if thread.ident is not None]
    take_jobs()
    for thread in others:
        thread.join()


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor without gaps, in whatever order of its dimensions."""
    flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,))
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _buffers_like(groups: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Buffers carved out of a few large slabs: page-locked memory is given out in powers of two."""
    tensors = [tensor for group in groups for tensor in group.values()]
    pinned = any(tensor.device.type == "cuda" for tensor in tensors)
    left = sum(_room(tensor) for tensor in tensors)
    slab, used = torch.empty(0, dtype=torch.uint8), 0
    result = []
    for group in groups:
        buffers = {}
        for name, tensor in group.items():
            size = tensor.numel() * tensor.element_size()
            if used + size > slab.numel():
                slab, used = torch.empty(max(min(_SLAB, left), size), dtype=torch.uint8, pin_memory=pinned), 0
            # The strides that a copy in the tensor's own memory order has, gaps closed.
            strides = torch.empty_like(tensor, device="meta").stride()
            values = slab[used : used + size].view(tensor.dtype)
            buffers[name] = torch.as_strided(values, tensor.shape, strides, values.storage_offset())
            used, left = used + _room(tensor), left - _room(tensor)
        result.append(buffers)
    return result


def _room(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT
