"""Random draws that are addressed, not consumed: the same address gives the same draw, in any process, in any order.

In: the run's seed, what the draw is for (`Purpose`), and up to three integers, such as a position in the run.
Out: a NumPy generator at the start of a stream of its own, or one uniform or normal draw from that stream.
"""

import threading
from enum import IntEnum

import numpy as np

WORD = 2**64


class Purpose(IntEnum):
    """What a draw is for; the integers are part of a run's format and never change their meaning."""

    ORDER = 1  # order of shards and samples in an epoch
    RESERVE = 2  # which sample stands in for one that cannot be used
    CROP = 3
    FLIP = 4
    CAPTION = 5  # which caption, where a sample has several
    DROPOUT = 6  # whether the caption is dropped
    POSTERIOR = 7  # the latent out of its posterior
    TIMESTEP = 8
    NOISE = 9
    SAMPLE_NOISE = 10  # initial noise of a generated picture
    SAMPLER_NOISE = 11  # noise added by a stochastic sampler
    VALIDATION = 12  # the seed of the validation draws


class _Readdressed(threading.local):
    """One generator a thread, moved to an address before each draw: 3 us, where building one takes 8 us."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.state = self.bits.state
        self.key = self.state["state"]["key"]
        self.counter = self.state["state"]["counter"]

    def at(self, seed: int, purpose: int, address: tuple[int, ...]) -> np.random.Generator:
        self.counter[:] = _counter(seed, address)
        self.key[:] = seed, purpose
        self.bits.state = self.state
        return self.generator


_readdressed = _Readdressed()


def _counter(seed: int, address: tuple[int, ...]) -> tuple[int, int, int, int]:
    if not 0 <= seed < WORD:
        raise ValueError(f"seed is {seed}; allowed are integers from 0 to 2^64 - 1")
    if len(address) > 3 or min(address, default=0) < 0 or max(address, default=0) >= WORD:
        raise ValueError(f"address is {address}; allowed are up to three integers from 0 to 2^64 - 1")
    first, second, third = (*address, 0, 0, 0)[:3]
    return 0, first, second, third


def generator(seed: int, purpose: Purpose, *address: int) -> np.random.Generator:
    """Generator at the start of the stream that belongs to (seed, purpose, address).

    Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key (seed, purpose) and
    counter (0, *address), low word first: each address owns 2^64 blocks of 256 bits, so streams never overlap.

    Args:
        seed: 0 .. 2^64 - 1.
        address: up to three integers, 0 .. 2^64 - 1; missing ones are 0.

    Raises:
        ValueError: seed or address out of range.
    """
    counter = np.array(_counter(seed, address), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter))


def uniform(seed: int, purpose: Purpose, *address: int) -> float:
    """First draw of `generator(seed, purpose, *address)`, uniform in [0, 1) with 53 bits."""
    return _readdressed.at(seed, purpose, address).random()


def normal(
    seed: int,
    purpose: Purpose,
    *address: int,
    shape: tuple[int, ...],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Standard normal draws of `generator(seed, purpose, *address)`: float32 of the given shape, in `out` if given."""
    return _readdressed.at(seed, purpose, address).standard_normal(shape, dtype=np.float32, out=out)
