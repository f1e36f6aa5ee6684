"""A frozen text encoder: a CLIP text model, T5 encoder or BERT, called as diffusers calls it.

Enters: a TextEncoderConfig, then captions as strings. Leaves: states (B, max_length, D) of the configured layer, padded
as diffusers' `encode_prompt` pads, with pooled text of the second of a pair; and two folders from which diffusers
computes the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import weights_hash, write_tensors
from ldm.models.text_loading import (
    FOLDERS,
    LEGACY_END,
    PROJECTING,
    check_tokenizer,
    load_model,
    load_tokenizer,
    locate,
)

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Layer = Literal["last", "penultimate", "penultimate_without_norm"]
LAYERS: tuple[Layer, ...] = ("last", "penultimate", "penultimate_without_norm")

# CLIP text weights have it in released files and in transformers 4, and lack it in memory under transformers 5.
CLIP_PREFIX = "text_model."

# What the states depend on besides the weights. The whole config would not do: each release of transformers adds
# fields, and shards encoded under one release would be refused under the next.
CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "d_ff",
    "d_kv",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "hidden_act",
    "feed_forward_proj",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)

PROBES = ("", "A red Apple, 2 hearts!", "ÉCOLE naïve 緑のリンゴ 🍏", "antidisestablishmentarianism " * 4)


@dataclass
class TextEncoderConfig:
    """Which frozen text encoder, and how its states are taken."""

    source: str
    """Folder with config, safetensors and tokenizer; a diffusers pipeline folder (its text_encoder/ and tokenizer/, or
    text_encoder_2/ and tokenizer_2/ for the second of a pair); a single .safetensors checkpoint of Stable Diffusion;
    `package:NAME/folder` inside an installed Python package; or a name on the Hugging Face hub."""
    tokenizer: str | None = None
    """Folder of the tokenizer, where `source` holds none: a single checkpoint does not."""
    max_length: int | None = None
    """Tokens that each caption is padded or cut to; unset: what the tokenizer says. Memory and time of the
    cross-attention grow with it."""
    layer: Layer = "last"
    """Layer whose states are taken: last (SD 1.x; SD 2.x in its released files, which end with the 23rd of 24) or
    penultimate (SD 2.x from the whole model), both followed by the final norm; penultimate_without_norm (both of
    SDXL's)."""
    attention_mask: bool = False
    """Hide padding from the encoder's own attention. CLIP was trained without it; BERT and T5 want it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of weights, computation and states. float16 overflows in T5."""

    def __post_init__(self) -> None:
        for name, value in (("source", self.source), ("tokenizer", self.tokenizer)):
            if value == "":
                raise ValueError(f"text_encoder.{name}: empty, expected a folder, package:NAME/folder or a hub name")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"text_encoder.max_length: found {self.max_length}, expected 2 or more: special tokens need places"
            )
        for name, value, allowed in (("layer", self.layer, LAYERS), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in allowed:
                raise ValueError(f"text_encoder.{name}: found {value!r}, expected one of {', '.join(allowed)}")


class TextEncoder:
    """Tokenizer and frozen transformers model; `encode` turns captions into states.

    Attributes:
        name: text_encoder, or text_encoder_2 of the second of a pair: the field of the config, the folder.
        model: CLIPTextModel, T5EncoderModel or BertModel, CLIPTextModelWithProjection for the second of a pair; in eval
            mode, without gradients.
        tokenizer: its tokenizer, with `model_max_length` set to `max_length`.
        max_length: tokens of each caption's states.
        hidden_size: width D of the states.
        pooled_size: width P of the pooled text; zero where there is none.
        truncated: captions so far that were longer than `max_length` tokens.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu", number: int = 1) -> None:
        """Loads the encoder that `config` names.

        Args:
            number: 1, or 2 for the second of a pair, which gives pooled text besides its states.

        Raises:
            FileNotFoundError: a file is missing; names it and where it was looked for.
            ValueError: a model of another type, weights that do not fit or are pickles, a tokenizer of another model,
                or a length it cannot take.
        """
        source, tokenizer_folder = locate(config.source, config.tokenizer, number)
        self.config = config
        self.name = FOLDERS[number - 1][0]
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.model = load_model(source, number, cut_last=config.layer == "penultimate", dtype=DTYPES[config.dtype]).to(
            device
        )
        self.model.config.use_attention_mask = config.attention_mask
        check_tokenizer(self.model, self.tokenizer, tokenizer_folder)
        self.max_length = self._find_max_length(tokenizer_folder)
        self.tokenizer.model_max_length = self.max_length
        self.hidden_size: int = self.model.config.hidden_size
        self.pooled_size: int = self.model.config.projection_dim if self._projects else 0
        self.truncated = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _projects(self) -> bool:
        return type(self.model).__name__ == PROJECTING

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Conditioning:
        """States (B, max_length, D) of B captions, and pooled text (B, P) of the second of a pair, from one forward.

        In the configured dtype, on the model's device. A caption longer than the encoder takes is cut at its end, and
        counted in `truncated`; the first one is reported with its text.
        """
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        self._count_truncated(captions, tokens.attention_mask.sum(dim=1).tolist())
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        inner = self.config.layer == "penultimate_without_norm"
        # The states are those of the configured dtype, whatever autocast region the caller is in.
        with torch.autocast(self.device.type, enabled=False):
            output = self.model(
                ids, attention_mask=mask if self.config.attention_mask else None, output_hidden_states=inner
            )
        states = output.hidden_states[-2] if inner else output.last_hidden_state  # (B, max_length, D)
        return Conditioning(states, output.text_embeds if self._projects else None)

    def identity(self) -> dict[str, str | int | bool]:
        """What the states are a function of: equal identities give equal states, up to rounding.

        Keys: `class`, `weights`, `config`, `tokenizer` (xxh3_128 each), `layers` (those that are left after
        "penultimate" has cut one), `max_length`, `attention_mask`, `dtype`; `layer` where it is
        "penultimate_without_norm", and `pooled_at` where there is pooled text: its token.
        """
        fields = {name: getattr(self.model.config, name, None) for name in CONFIG_FIELDS}
        identity: dict[str, str | int | bool] = {
            "class": type(self.model).__name__,
            "weights": weights_hash(_used_weights(self.model).items()),
            "config": xxhash.xxh3_128_hexdigest(repr(sorted(fields.items())).encode()),
            "tokenizer": _hash_tokenizer(self.tokenizer),
            "layers": int(self.model.config.num_hidden_layers),
            "max_length": self.max_length,
            "attention_mask": self.config.attention_mask,
            "dtype": self.config.dtype,
        }
        if self.config.layer == "penultimate_without_norm":
            identity["layer"] = self.config.layer
        if self._projects:
            # The two ways of transformers differ only where ids above that of the end can stand in a caption.
            last = self.tokenizer.eos_token_id == max(self.tokenizer.get_vocab().values())
            identity["pooled_at"] = "end" if last or self.model.config.eos_token_id != LEGACY_END else "highest id"
        return identity

    def save(self, text_encoder: Path, tokenizer: Path) -> None:
        """Writes the two folders of a diffusers pipeline; diffusers computes the same states from them.

        diffusers pads to the tokenizer's `model_max_length` and passes a mask only when the encoder's config has
        `use_attention_mask`: both are saved as they are used here. The bytes depend on nothing but the encoder.
        """
        # Each call leaves its padding and truncation in the tokenizer, and they would be saved with it.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.save_pretrained(tokenizer)
        self.model.config.save_pretrained(text_encoder)
        prefix = CLIP_PREFIX if type(self.model).__name__ == "CLIPTextModel" else ""
        # named_parameters() gives tensors that the model uses twice (T5's embedding) once, as safetensors wants them.
        tensors = {
            prefix + name.removeprefix(prefix): tensor.detach().cpu().contiguous()
            for name, tensor in self.model.named_parameters()
        }
        write_tensors(tensors, text_encoder / "model.safetensors")

    def _find_max_length(self, tokenizer_folder: Path) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None)  # T5's are relative: no limit
        length = self.config.max_length
        if length is None:
            length = min([self.tokenizer.model_max_length, *([positions] if positions else [])])
            if length > 1_000_000:  # transformers' mark for "not said"
                raise ValueError(
                    f"{self.name}.max_length: not set, and the tokenizer in {tokenizer_folder} names no length"
                )
        elif positions and length > positions:
            raise ValueError(f"{self.name}.max_length: found {length}, but the encoder has only {positions} positions")
        return int(length)

    def _count_truncated(self, captions: Sequence[str], lengths: list[int]) -> None:
        # Only captions that fill their row can have been cut; the others are not tokenized a second time.
        full = [caption for caption, length in zip(captions, lengths, strict=True) if length == self.max_length]
        if not full:
            return
        wholes = self.tokenizer(full, padding=False, truncation=False, verbose=False).input_ids
        cut = [(caption, len(ids)) for caption, ids in zip(full, wholes, strict=True) if len(ids) > self.max_length]
        if cut and self.truncated == 0:
            caption, length = cut[0]
            logger.warning(
                "caption of %d tokens cut to the %d that %s takes (further ones are counted, not reported): %r",
                length,
                self.max_length,
                self.name,
                caption,
            )
        self.truncated += len(cut)


def _used_weights(model: Any) -> dict[str, Tensor]:
    """Parameters that what leaves depends on, without the prefix that only some releases of transformers have."""
    named = {name.removeprefix(CLIP_PREFIX): tensor for name, tensor in model.named_parameters()}
    return {name: tensor for name, tensor in named.items() if not name.startswith("pooler.")}


def _hash_tokenizer(tokenizer: Any) -> str:
    # By what it does, not by its files: their format changes between releases, the ids must not.
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    digest = xxhash.xxh3_128(repr(vocabulary).encode())
    for probe in PROBES:
        ids = tokenizer(probe, padding="max_length", max_length=128, truncation=True).input_ids
        digest.update(repr(ids).encode())
    return digest.hexdigest()
