"""The slowest process of a run: seconds that each spends for itself, compared on steps that are logged.

Enters: the wait for data and the forward passes of each step, by the host's clock or the GPU's. Leaves: the slowest
rank and its seconds a step beyond the others' median. Backward passes are left out: in them all wait for the slowest.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.training.distributed import Agreement


class OwnTime:
    """Seconds since the last reading that this process spent in forward passes; on a GPU by its clock.

    Args:
        alone: forward passes wait for no other process. Else (FSDP2, ZeRO-3) they are not counted: all would look as
            slow as the slowest.
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        self._cuda = device.type == "cuda"
        self._alone = alone
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Counts the block."""
        if not self._alone:
            yield
        elif self._cuda:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def step(self) -> None:
        """Ends a step."""
        self._steps += 1

    def read(self, waited: float) -> float:
        """Seconds a step since the last reading, `waited` seconds for data included; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        on_device = sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        seconds = (self._seconds + on_device + waited) / max(1, self._steps)
        self._seconds, self._steps, self._events = 0.0, 0, []
        return seconds


def straggler(agreement: Agreement, seconds: float) -> dict[str, float]:
    """`straggler_rank` and `straggler_seconds` for the metrics; nothing where one process runs. Collective."""
    each = agreement.each(seconds)
    if len(each) < 2:
        return {}
    slowest = max(range(len(each)), key=each.__getitem__)
    others = each[:slowest] + each[slowest + 1 :]
    return {"straggler_rank": slowest, "straggler_seconds": each[slowest] - statistics.median(others)}
