"""Where a training step's time goes: seconds of each of its parts, by the host's clock or the GPU's.

Enters: blocks of the step, marked by their part. Leaves: seconds a step of each part, read as rarely as the reader
likes. Nothing waits for the device before it is read. A run that nobody reads marks with NO_PARTS, which records
nothing: events would pile up between readings.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Part = Literal["data", "copy", "forward", "backward", "optimizer", "average", "log"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Waiting for the loader; to the device, with text and latents encoded there; the network and its loss; backward with
the exchange of gradients; gradient norm, AdamW and zeroing; the average of the weights (on a processor it is part of
`optimizer`, in one walk with AdamW); reading and writing metrics."""
ON_HOST: tuple[Part, ...] = ("data", "log")
"""Parts in which the host works or waits, whatever the device does meanwhile."""


class StepParts:
    """Seconds of each part since the last reading; blocks lie side by side, not within each other.

    Args:
        device: where the step computes. On CUDA the parts that compute are timed by events in its own queue, so that
            copies beside it count as far as the step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, part: Part) -> AbstractContextManager[None]:
        """Around a block that belongs to `part`."""
        return self._on_device(part) if self._cuda and part not in ON_HOST else self._on_host(part)

    @contextmanager
    def _on_host(self, part: Part) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - began

    @contextmanager
    def _on_device(self, part: Part) -> Iterator[None]:
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        yield
        ended.record()
        self._events.append((part, begun, ended))

    def step(self) -> None:
        """Ends a step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Seconds a step of each part since the last reading; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        for part, begun, ended in self._events:
            self._seconds[part] += begun.elapsed_time(ended) / 1000
        read: dict[str, float] = {part: seconds / max(1, self._steps) for part, seconds in self._seconds.items()}
        self._seconds, self._events, self._steps = dict.fromkeys(PARTS, 0.0), [], 0
        return read


class NoParts(StepParts):
    """Records nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._nothing: AbstractContextManager[None] = nullcontext()

    def __call__(self, part: Part) -> AbstractContextManager[None]:
        return self._nothing

    def step(self) -> None:
        pass


NO_PARTS = NoParts()
