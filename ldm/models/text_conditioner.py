"""What captions become for the network: the states of one frozen text encoder, or of SDXL's two side by side.

Enters: captions as strings. Leaves: a Conditioning of text states (B, L, D), with pooled text (B, P) of a pair; the
folders from which diffusers computes the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextEncoder, TextEncoderConfig

FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
"""Of each encoder in a pipeline's folder: the model's, the tokenizer's."""

EmptyCaption = Literal["encoded", "zeros"]


class TextConditioner:
    """One text encoder, or a pair whose states are joined along D and whose second gives the pooled text.

    Attributes:
        encoders: one, or two.
        empty_caption: what stands for no caption, in dropped captions and in guidance: the encoders' own states of the
            empty caption, or zeros, as SDXL was trained with.
    """

    def __init__(self, encoders: Sequence[TextEncoder], empty_caption: EmptyCaption = "encoded") -> None:
        self.encoders = list(encoders)
        self.empty_caption = empty_caption
        self._empty: Conditioning | None = None

    @classmethod
    def load(
        cls,
        configs: Sequence[TextEncoderConfig | None],
        device: torch.device | str = "cpu",
        empty_caption: EmptyCaption = "encoded",
    ) -> Self:
        """The encoders that the configs name, without those that are None; raises what `TextEncoder` raises."""
        return cls([TextEncoder(config, device) for config in configs if config is not None], empty_caption)

    @classmethod
    def from_pipeline(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """The encoder or encoders of a pipeline's folder, as they were saved in it."""
        return cls([TextEncoder.from_pipeline(folder, device)])

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def max_length(self) -> int:
        """Tokens L of each caption's states."""
        return self.encoders[0].max_length

    @property
    def hidden_size(self) -> int:
        """Width D of the states: of both encoders together."""
        return sum(encoder.hidden_size for encoder in self.encoders)

    @property
    def pooled_size(self) -> int:
        """Width P of the pooled text; zero where there is none."""
        return 0

    @property
    def truncated(self) -> int:
        """Captions so far that were longer than `max_length` tokens."""
        return max(encoder.truncated for encoder in self.encoders)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Text (B, L, D), and pooled (B, P) of a pair, of B captions; without sizes."""
        (encoder,) = self.encoders
        return Conditioning(encoder.encode(captions))

    def empty(self) -> Conditioning:
        """Of the empty caption, one row: what dropped captions and unguided sampling see."""
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def identity(self) -> dict[str, Any]:
        """What the states are a function of: `text_encoder`, and `text_encoder_2`, which is None for one encoder."""
        found = [encoder.identity() for encoder in self.encoders]
        return {folder: found[i] if i < len(found) else None for i, (folder, _) in enumerate(FOLDERS)}

    def save(self, folder: Path) -> None:
        """Writes the encoders' and tokenizers' folders of a pipeline; diffusers computes the same states from them."""
        for encoder, (model, tokenizer) in zip(self.encoders, FOLDERS, strict=False):
            encoder.save(folder / model, folder / tokenizer)
