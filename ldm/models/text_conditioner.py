"""What captions become for the network: the states of one frozen text encoder, or of SDXL's two side by side.

Enters: captions as strings. Leaves: a Conditioning of text states (B, L, D), with pooled text (B, P) of a pair; the
folders from which diffusers computes the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import INDEX_NAME, read_json
from ldm.models.text_encoder import TextEncoder, TextEncoderConfig
from ldm.models.text_loading import FOLDERS

EmptyCaption = Literal["encoded", "zeros"]


class TextConditioner:
    """One text encoder, or a pair whose states are joined along D and whose second gives the pooled text.

    Attributes:
        encoders: one, or two.
        empty_caption: what stands for no caption, in dropped captions and in guidance: the encoders' own states of the
            empty caption, or zeros, as SDXL was trained with.
    """

    def __init__(self, encoders: Sequence[TextEncoder], empty_caption: EmptyCaption = "encoded") -> None:
        """Joins the encoders.

        Raises:
            ValueError: settings under which diffusers' pipelines would compute other states; names the field.
        """
        check_text_configs([encoder.config for encoder in encoders], empty_caption)
        self.encoders = list(encoders)
        self.empty_caption = empty_caption
        self._empty: Conditioning | None = None
        lengths = [encoder.max_length for encoder in encoders]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"text_encoder_2.max_length: captions have {lengths[1]} tokens there and {lengths[0]} in the first, "
                "expected the same: set text_encoder.max_length and text_encoder_2.max_length to one number"
            )

    @classmethod
    def load(
        cls,
        configs: Sequence[TextEncoderConfig | None],
        device: torch.device | str = "cpu",
        empty_caption: EmptyCaption = "encoded",
    ) -> Self:
        """The encoders that the configs name, without those that are None; the second in the list is that of a pair.

        Raises:
            ValueError, FileNotFoundError: as `TextEncoder` and `check_text_configs` raise.
        """
        named = [config for config in configs if config is not None]
        check_text_configs(named, empty_caption)  # before gigabytes are read
        return cls([TextEncoder(config, device, number) for number, config in enumerate(named, 1)], empty_caption)

    @classmethod
    def from_pipeline(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """The encoder or encoders of a pipeline's folder, as diffusers calls them there; in float32."""
        source, index = str(folder), read_json(folder / INDEX_NAME)
        if not any(index.get(FOLDERS[1][0]) or ()):
            mask = bool(read_json(folder / FOLDERS[0][0] / "config.json").get("use_attention_mask"))
            return cls.load([TextEncoderConfig(source, attention_mask=mask)], device)
        pair = [TextEncoderConfig(source, layer="penultimate_without_norm") for _ in FOLDERS]
        # Where it is not said, StableDiffusionXLPipeline takes zeros.
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return cls.load(pair, device, "zeros" if zeros else "encoded")

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def max_length(self) -> int:
        """Tokens L of each caption's states, of both encoders."""
        return self.encoders[0].max_length

    @property
    def hidden_size(self) -> int:
        """Width D of the states: of both encoders together."""
        return sum(encoder.hidden_size for encoder in self.encoders)

    @property
    def pooled_size(self) -> int:
        """Width P of the pooled text; zero where there is none."""
        return self.encoders[-1].pooled_size

    @property
    def truncated(self) -> int:
        """Captions so far that were longer than `max_length` tokens."""
        return max(encoder.truncated for encoder in self.encoders)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Text (B, L, D), and pooled (B, P) of a pair, of B captions; without sizes."""
        parts = [encoder.encode(captions) for encoder in self.encoders]
        return Conditioning(torch.cat([part.text for part in parts], dim=-1), parts[-1].pooled)

    def empty(self) -> Conditioning:
        """Of the empty caption, one row: what dropped captions and unguided sampling see."""
        if self._empty is None:
            empty = self.encode([""])
            if self.empty_caption == "zeros":
                pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
                empty = Conditioning(torch.zeros_like(empty.text), pooled)
            self._empty = empty
        return self._empty

    def identity(self) -> dict[str, Any]:
        """What the states are a function of: `text_encoder`, and `text_encoder_2`, which is None for one encoder.

        What stands for no caption is not among it: encoded shards hold the states of captions only.
        """
        found = [encoder.identity() for encoder in self.encoders]
        return {folder: found[i] if i < len(found) else None for i, (folder, _) in enumerate(FOLDERS)}

    def save(self, folder: Path) -> None:
        """Writes the encoders' and tokenizers' folders of a pipeline; diffusers computes the same states from them."""
        for encoder, (model, tokenizer) in zip(self.encoders, FOLDERS, strict=False):
            encoder.save(folder / model, folder / tokenizer)


def check_text_configs(configs: Sequence[TextEncoderConfig], empty_caption: EmptyCaption = "encoded") -> None:
    """Checks that one encoder, or a pair, is called as a pipeline of diffusers calls it.

    Otherwise a checkpoint's pictures elsewhere would be others than here.

    Raises:
        ValueError: names the field, what was found and what is expected.
    """
    if len(configs) not in (1, 2):
        raise ValueError(f"text_encoder: found {len(configs)} text encoders, expected one, or SDXL's pair")
    inner, problems = "penultimate_without_norm", []
    if len(configs) == 1:
        if configs[0].layer == inner:
            problems.append(
                f"text_encoder.layer: found {inner}, expected last or penultimate for one encoder: "
                "StableDiffusionPipeline takes states after the final norm (set text_encoder_2 for SDXL's pair)"
            )
        if empty_caption == "zeros":
            problems.append(
                "empty_caption: found zeros, expected encoded for one encoder: StableDiffusionPipeline encodes the "
                "empty caption, and would give other pictures"
            )
    else:
        for config, (name, _) in zip(configs, FOLDERS, strict=True):
            if config.layer != inner:
                problems.append(
                    f"{name}.layer: found {config.layer}, expected {inner} for both of a pair, as "
                    "StableDiffusionXLPipeline takes them"
                )
            if config.attention_mask:
                problems.append(
                    f"{name}.attention_mask: found true, expected false for a pair: StableDiffusionXLPipeline "
                    "passes none"
                )
        if configs[0].dtype != configs[1].dtype:
            problems.append(
                f"text_encoder_2.dtype: found {configs[1].dtype}, expected {configs[0].dtype}, that of text_encoder: "
                "their states are joined"
            )
    if problems:
        raise ValueError("text conditioning:\n  " + "\n  ".join(problems))
