"""Signals that ask a run to stop: SIGINT, SIGTERM, and SIGUSR1, which Slurm can send before the time limit.

Enters: a signal to any process, at any time from the program's first lines on. Leaves: one answer on all processes at
the end of a step, after which the run writes its checkpoint; further signals change nothing.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

from ldm.training.distributed import Agreement


class StopRequest:
    """Handlers for the signals, in place within a `with` block; a signal waits there to be asked for.

    A second signal changes nothing: the step and the checkpoint under way are finished first. Once a run has ended as
    it was asked to, further ones stay ignored: the process is about to exit, with a status that says it may be resumed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        obeyed = self.received is not None and kind is None
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if obeyed else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            # A pipe's reader may have died of the same Ctrl-C; a file object may be in the middle of a write.
            with suppress(OSError):
                os.write(2, f"\n{self.received} received: finishing the step, then a checkpoint\n".encode())

    def agreed(self, agreement: Agreement) -> bool:
        """True on every process as soon as one process has received a signal. Collective."""
        return bool(agreement.largest(self.received is not None))
