"""From the number of a micro-batch to positions in the run: the same global batches for any number of processes.

In: one process's rank, how the global batch is split, and the steps. Out: positions of each of its micro-batches, in
order; indexed shards and streams take their batches by them.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Positions of one process's micro-batches from `start_step` up to but without `stop_step`.

    The global batch B = world * accumulation * micro_batch at step k is positions kB .. (k + 1)B - 1; rank r takes its
    r-th part, and micro-batch m the m-th part of that, so that any split of B gives the same global batches.

    Raises:
        ValueError: a value out of its range; names it, what was found and what is allowed.
    """

    rank: int
    """Number of the process, 0 .. world - 1"""
    world: int
    """Processes"""
    micro_batch: int
    """Samples of a micro-batch"""
    accumulation: int
    """Micro-batches of an optimizer step on each process"""
    start_step: int
    """The first optimizer step, counted from 0 over the whole run"""
    stop_step: int
    """The step before which it ends; `start_step` gives no micro-batch"""

    def __post_init__(self) -> None:
        for name, least in (
            ("world", 1),
            ("micro_batch", 1),
            ("accumulation", 1),
            ("start_step", 0),
            ("stop_step", self.start_step),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"positions: {name} is {getattr(self, name)}; allowed are integers from {least}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"positions: rank is {self.rank}; allowed are 0 to world - 1, which is {self.world - 1}")

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, over all processes."""
        return self.world * self.accumulation * self.micro_batch

    def __len__(self) -> int:
        """Micro-batches of all steps."""
        return (self.stop_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Each micro-batch's positions, in order, the same at each iteration."""
        return map(self.of, range(len(self)))

    def of(self, number: int) -> list[int]:
        """Positions of a micro-batch, which is counted from 0 at `start_step`."""
        step, part = divmod(number, self.accumulation)
        share = (self.start_step + step) * self.world + self.rank  # a step's part of one process, counted over the run
        first = (share * self.accumulation + part) * self.micro_batch
        return list(range(first, first + self.micro_batch))
