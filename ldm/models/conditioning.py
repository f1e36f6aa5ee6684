"""What the network is told beside the noisy latent and the timestep.

Enters: text states, and for SDXL-like networks a pooled text vector and sizes, one row a sample.
Leaves: the same rows moved, selected or joined, as one value that every network, objective and guidance
passes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass
class Conditioning:
    """Conditioning of a batch; optional parts are given for all of its samples or for none."""

    text: Tensor
    """States of the text encoder, (B, L, D)."""
    pooled: Tensor | None = None
    """Pooled text vector, (B, P); used by networks with addition_embed_type "text_time"."""
    sizes: Tensor | None = None
    """Original height and width, crop top and left, target height and width in pixels, (B, 6): SDXL's order."""
    keys_values: KeysValues | None = None
    """Keys and values (B, L, C) of each cross-attention of one network, in its order, all projected from `text`: what
    UNet.with_keys_values adds for texts that stay the same over many evaluations. Whoever changes the text drops it."""

    def __len__(self) -> int:
        return self.text.shape[0]

    def check(self, count: int, text_channels: int, pooled_channels: int = 0) -> None:
        """Checks the shapes for a batch of `count`; `pooled_channels` is 0 for a network without pooled text and sizes.

        Raises:
            ValueError: names the part that does not fit, what was found and what is expected.
        """
        parts: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("text", self.text, (count, self.text.shape[1], text_channels))
        ]
        if pooled_channels:
            parts += [("pooled", self.pooled, (count, pooled_channels)), ("sizes", self.sizes, (count, 6))]
        for name, tensor, expected in parts:
            found = None if tensor is None else tuple(tensor.shape)
            if found != expected:
                raise ValueError(f"conditioning.{name}: found shape {found}, the network expects {expected}")

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "Conditioning":
        """Moves all parts; `dtype` is that of text and pooled: sizes are numbers of pixels and keep theirs.

        Keys and values stay with the text as it was, and are dropped where its dtype is to change.
        """
        sizes, kept = self.sizes, self.keys_values if dtype in (None, self.text.dtype) else None
        return Conditioning(
            self.text.to(device=device, dtype=dtype, non_blocking=non_blocking),
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype, non_blocking=non_blocking),
            None if sizes is None else sizes.to(device=device, non_blocking=non_blocking),
            _each(kept, lambda part: part.to(device=device, non_blocking=non_blocking)),
        )

    def select(self, rows: Tensor | slice) -> "Conditioning":
        """The given samples: a slice (views), a boolean mask or indices."""
        return self._map(lambda part: part[rows])

    def where(self, replaced: Tensor, other: "Conditioning") -> "Conditioning":
        """The one row of `other` for the samples that are `replaced`, (B,) bool; text and pooled only, in float32.

        Keys and values are dropped: they are those of other texts.

        Raises:
            ValueError: pooled text is there in one and missing in the other.
        """
        if (self.pooled is None) != (other.pooled is None):
            raise ValueError("conditioning.pooled is given on one side only of what is to be replaced")
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.where(replaced[:, None], other.pooled.float(), self.pooled.float())
        text = torch.where(replaced[:, None, None], other.text.float(), self.text.float())
        return Conditioning(text, pooled, self.sizes)

    def expand(self, count: int) -> "Conditioning":
        """One sample's conditioning as that of `count` samples, without copying."""
        return self._map(lambda part: part.expand(count, *part.shape[1:]))

    @staticmethod
    def cat(conditionings: "Sequence[Conditioning]") -> "Conditioning":
        """Joins batches.

        Raises:
            ValueError: an optional part is there in some and missing in others, which would lose it in
                silence; or keys and values are those of different networks.
        """
        parts: list[Tensor | None] = []
        for name in ("text", "pooled", "sizes"):
            given = [value for c in conditionings if (value := getattr(c, name)) is not None]
            if given and len(given) < len(conditionings):
                raise ValueError(
                    f"conditioning.{name} is given in {len(given)} of {len(conditionings)} batches to join"
                )
            parts.append(torch.cat(given) if given else None)
        text, pooled, sizes = parts
        if text is None:
            raise ValueError("there is no conditioning to join")
        return Conditioning(text, pooled, sizes, _joined([c.keys_values for c in conditionings]))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        pooled, sizes = self.pooled, self.sizes
        return Conditioning(
            change(self.text),
            None if pooled is None else change(pooled),
            None if sizes is None else change(sizes),
            _each(self.keys_values, change),
        )


def _each(keys_values: KeysValues | None, change: Callable[[Tensor], Tensor]) -> KeysValues | None:
    return None if keys_values is None else tuple((change(k), change(v)) for k, v in keys_values)


def _joined(parts: Sequence[KeysValues | None]) -> KeysValues | None:
    given = [part for part in parts if part is not None]
    if not given:
        return None
    if len(given) < len(parts):
        raise ValueError(f"conditioning.keys_values is given in {len(given)} of {len(parts)} batches to join")
    shapes = {tuple(tensor.shape[1:] for tensor in chain(*part)) for part in given}
    if len(shapes) > 1:
        raise ValueError(
            "conditioning.keys_values: found batches of different numbers or shapes of keys and values, expected those "
            "of one network and one length of text"
        )
    return tuple(
        (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*given, strict=True)
    )
