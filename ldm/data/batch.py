"""The batch: what training receives, whole, with all its random draws.

In: built by dataset.SampleDataset in a loader's worker. Out: moved to pinned memory by the DataLoader and to the device
by training; raw and encoded shards give the same type.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.quarantine import Quarantined

# From a worker, a tensor in shared memory costs 0.4 ms for passing its file descriptor: the large ones of a batch go as
# parts of one, and small ones are cheaper copied.
SMALL_BYTES = 1 << 15
ALIGNED_BYTES = 64


def _packed(tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, tuple[torch.dtype, torch.Size, int]]]:
    """Tensors on the host in one of bytes; and their types, shapes and places in it."""
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = (tensor.dtype, tensor.shape, size)
        size += -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
    packed = torch.empty(size, dtype=torch.uint8)
    for name, part in _unpacked(packed, places).items():
        part.copy_(tensors[name])
    return packed, places


def _unpacked(packed: Tensor, places: dict[str, tuple[torch.dtype, torch.Size, int]]) -> dict[str, Tensor]:
    """The parts of what `_packed` made; they share its memory."""
    return {
        name: packed[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, (dtype, shape, start) in places.items()
    }


@dataclass
class Batch:
    """A micro-batch with all its random draws. B samples, C latent channels of h x w, R pixels a side."""

    positions: Tensor
    """(B,) int64, positions in the run"""
    keys: list[str]
    """"shard/key" of each sample"""
    captions: list[str]
    """As they stand in the shard, also where `dropped`"""
    dropped: Tensor
    """(B,) bool: to be replaced by the empty caption"""
    images: Tensor | None
    """(B, 3, R, R) float32 in [-1, 1]; None for encoded shards"""
    moments: Tensor | None
    """(B, 2C, h, w) float16 or float32, as stored: mean and log-variance, unscaled; None for raw shards"""
    text_states: Tensor | None
    """(B, L, D) in the type stored; None where the shards have none"""
    text_pooled: Tensor | None
    """(B, P) in the type stored; None where the shards have none"""
    sizes: Tensor
    """(B, 6) float32: original height and width, crop top and left, target height and width, in pixels"""
    u: Tensor
    """(B,) float64 in [0, 1), for the timestep"""
    posterior_noise: Tensor
    """(B, C, h, w) float32, standard normal, for the latent out of its moments"""
    noise: Tensor
    """(B, C, h, w) float32, standard normal; with a channel more where the run's corruption takes one"""
    offset: Tensor | None
    """(B, C) float32, standard normal, for the offset of each channel's noise; None where the run has none"""
    quarantined: list[Quarantined] = field(default_factory=list)
    """Samples that could not be used and were replaced in this batch"""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        on_host = {name: one for name, one in state.items() if isinstance(one, Tensor) and one.device.type == "cpu"}
        large = {name: one for name, one in on_host.items() if one.nbytes > SMALL_BYTES}
        state |= {name: one.numpy() for name, one in on_host.items() if name not in large}
        state |= dict.fromkeys(large)
        return state | {"packed": _packed(large)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        large = _unpacked(*state.pop("packed"))
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        self.__dict__.update(state | arrays | large)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        values |= {name: function(one) for name, one in values.items() if isinstance(one, Tensor)}
        return Batch(**values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)
