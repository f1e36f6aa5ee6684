"""Exponential moving average of the weights, in float32, one fused update per optimizer step.

Enters: the network's named parameters after each optimizer step. Leaves: averaged weights under the same names, as a
state dict for checkpoints or swapped into the network for sampling and validation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class EMAConfig:
    """The average that sampling, validation and the checkpoint's `unet/` use."""

    decay: float = 0.9999
    """Decay per optimizer step once warm-up is over; 0 keeps the average equal to the weights."""
    warmup: bool = True
    """Take the decay min(decay, (1 + k) / (10 + k)) at update k (CompVis), so that early weights are forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: found {self.decay}, expected 0 <= decay < 1")


class EMA:
    """Float32 average of a module's parameters (buffers are taken as they are).

    The average is of the unwrapped module: names carry neither `module.` nor `_orig_mod.`, and compiling or wrapping
    the network afterwards changes nothing here.
    """

    def __init__(self, module: nn.Module, config: EMAConfig, parts: Callable[[], list[Tensor]] | None = None) -> None:
        """`parts`: where an engine shards the module, this process's part of each parameter; the average is of these.

        `state_dict` and `load_state_dict` then give and take parts, and `applied` does not work.
        """
        self.config = config
        self.updates = 0
        self._module = module
        # Kept: to walk through the modules for it takes as long as to average a small network.
        self._parameters: list[Tensor] = list(module.parameters())
        self._parts = parts or (lambda: self._parameters)
        self.names = [name for name, _ in module.named_parameters()]
        self._float32 = all(p.dtype == torch.float32 for p in self._parts())
        self.averages = [p.detach().to(torch.float32, copy=True) for p in self._parts()]
        """As they stand, float32, in the order of `names`."""

    def decay(self, update: int) -> float:
        """Decay of update k = 0, 1, 2, ...; the configured value is never overwritten."""
        if self.config.warmup:
            return min(self.config.decay, (1 + update) / (10 + update))
        return self.config.decay

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights; once per optimizer step, not per micro-batch."""
        weights = self._parts()
        if not self._float32:
            weights = [p.float() for p in weights]
        torch._foreach_lerp_(self.averages, weights, self.count_update())

    def count_update(self) -> float:
        """1 - decay of the coming update, for one who does it himself: from here on it counts as done."""
        weight = 1.0 - self.decay(self.updates)
        self.updates += 1
        return weight

    def by_parameter(self) -> dict[Tensor, Tensor]:
        """The average of each parameter of the module, to be changed in place; where nothing is sharded."""
        return dict(zip(self._parameters, self.averages, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict with averaged parameters, float32, under the module's own names."""
        state = dict(self._module.state_dict())
        state.update(zip(self.names, self.averages, strict=True))
        return state

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Puts back an average and the number of updates it has seen; raises KeyError or ValueError by name."""
        for name, average in zip(self.names, self.averages, strict=True):
            if name not in state:
                raise KeyError(f"the averaged weights lack {name}")
            if state[name].shape != average.shape:
                found, expected = tuple(state[name].shape), tuple(average.shape)
                raise ValueError(f"averaged weight {name} has shape {found}, expected {expected}")
            average.copy_(state[name])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block and its own again after it, also after an error.

        Storage is exchanged, not copied: no extra memory, and the trained weights come back bit by bit.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for i, parameter in enumerate(self._parameters):
            weights = parameter.data
            parameter.data = self.averages[i]
            self.averages[i] = weights
