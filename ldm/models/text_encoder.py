"""Frozen text encoders: CLIP text models, T5 encoders and BERT, as transformers loads them, as diffusers calls them.

Enters: a TextEncoderConfig, then captions as strings. Leaves: states (B, max_length, D), the first output of the model,
padded as `StableDiffusionPipeline.encode_prompt` pads; and two folders from which diffusers computes the same states.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import xxhash
from torch import Tensor

from ldm.models.pretrained import resolve_source, weights_hash, write_tensors

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Class in transformers for each model_type of a config.json. A whole CLIP model carries its text model within.
MODEL_CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "bert": "BertModel",
}

# Weights of whole models (CLIP's vision half, T5's decoder, BERT's heads) that a text encoder has no use for.
OTHER_PARTS = (
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "decoder.",
    "lm_head.",
    "cls.",
)

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
    """Folder with config, safetensors and tokenizer; a diffusers pipeline folder (its text_encoder/ and tokenizer/);
    `package:NAME/folder` inside an installed Python package; or a name on the Hugging Face hub."""
    max_length: int | None = None
    """Tokens that each caption is padded or cut to; unset: what the tokenizer says. Memory and time of the
    cross-attention grow with it."""
    layer: Literal["last", "penultimate"] = "last"
    """Layer whose states are taken, both followed by the final norm: last (SD 1.x) or penultimate (SD 2.x)."""
    attention_mask: bool = False
    """Hide padding from the encoder's own attention. CLIP was trained without it; BERT and T5 want it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of weights, computation and states. float16 overflows in T5."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("text_encoder.source: empty, expected a folder, package:NAME/folder or a hub name")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"text_encoder.max_length: found {self.max_length}, expected 2 or more: special tokens need places"
            )
        for name, value, allowed in (
            ("layer", self.layer, ("last", "penultimate")),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in allowed:
                raise ValueError(f"text_encoder.{name}: found {value!r}, expected one of {', '.join(allowed)}")


class TextEncoder:
    """Tokenizer and frozen transformers model; `encode` turns captions into states.

    Attributes:
        model: CLIPTextModel, T5EncoderModel or BertModel, in eval mode, without gradients.
        tokenizer: its tokenizer, with `model_max_length` set to `max_length`.
        max_length: tokens of each caption's states.
        hidden_size: width D of the states.
        truncated: captions so far that were longer than `max_length` tokens.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        """Loads the encoder that `config` names.

        Raises:
            FileNotFoundError: a file is missing; names it and where it was looked for.
            ValueError: a model of another type, weights that do not fit or are pickles, or a length it cannot take.
        """
        model_folder, tokenizer_folder = locate(resolve_source(config.source))
        self.config = config
        self.model = load_model(model_folder, config).to(device)
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.max_length = _max_length(config, self.tokenizer, self.model, tokenizer_folder)
        self.tokenizer.model_max_length = self.max_length
        self.hidden_size: int = self.model.config.hidden_size
        self.truncated = 0
        self._empty: Tensor | None = None

    @classmethod
    def from_pipeline(cls, folder: Path, device: torch.device | str = "cpu", dtype: str = "float32") -> Self:
        """The encoder of a pipeline folder, with the mask and length that were saved in it; raises as __init__."""
        model_folder, _ = locate(folder)
        saved = _read_config(model_folder)
        mask = bool(getattr(saved, "use_attention_mask", False))
        return cls(TextEncoderConfig(source=str(folder), attention_mask=mask, dtype=dtype), device)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Moves the model; `encode` gives states on `device` from then on."""
        self.model.to(device)
        self._empty = None
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """States of B captions: (B, max_length, D), in the configured dtype, on the model's device.

        A caption longer than the encoder takes is cut at its end, and counted in `truncated`; the first one is
        reported with its text.
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
        # The states are those of the configured dtype, whatever autocast region the caller is in.
        with torch.autocast(self.device.type, enabled=False):
            states: Tensor = self.model(ids, attention_mask=mask if self.config.attention_mask else None)[0]
        return states  # (B, max_length, D)

    def empty(self) -> Tensor:
        """States of the empty caption, (1, max_length, D): what dropped captions and unguided sampling see."""
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def identity(self) -> dict[str, str | int | bool]:
        """What the states are a function of: equal identities give equal states, up to rounding.

        Keys: `class`, `weights`, `config`, `tokenizer` (xxh3_128 each), `layers` (those that are left after
        "penultimate" has cut one), `max_length`, `attention_mask`, `dtype`.
        """
        fields = {name: getattr(self.model.config, name, None) for name in CONFIG_FIELDS}
        return {
            "class": type(self.model).__name__,
            "weights": weights_hash(_used_weights(self.model).items()),
            "config": xxhash.xxh3_128_hexdigest(repr(sorted(fields.items())).encode()),
            "tokenizer": _hash_tokenizer(self.tokenizer),
            "layers": int(self.model.config.num_hidden_layers),
            "max_length": self.max_length,
            "attention_mask": self.config.attention_mask,
            "dtype": self.config.dtype,
        }

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
                "caption of %d tokens cut to the %d that the text encoder takes (further ones are counted, not "
                "reported): %r",
                length,
                self.max_length,
                caption,
            )
        self.truncated += len(cut)


def locate(source: Path) -> tuple[Path, Path]:
    """Folders of model and tokenizer under `source`: one folder for both, or text_encoder/ and tokenizer/.

    Raises:
        FileNotFoundError: no config.json, or no tokenizer, in any of the places.
    """
    model = next((f for f in (source / "text_encoder", source) if (f / "config.json").is_file()), None)
    if model is None:
        raise FileNotFoundError(f"{source}: no text encoder here: expected config.json, or text_encoder/config.json")
    places = (source / "tokenizer", model, model.parent / "tokenizer")
    files = ("tokenizer_config.json", "tokenizer.json")
    tokenizer = next((f for f in places if any((f / name).is_file() for name in files)), None)
    if tokenizer is None:
        looked = ", ".join(dict.fromkeys(str(f) for f in places))
        raise FileNotFoundError(f"{source}: no tokenizer: expected {' or '.join(files)} in one of {looked}")
    return model, tokenizer


def load_model(folder: Path, config: TextEncoderConfig) -> Any:
    """The frozen transformers model in `folder`, one layer shorter when the penultimate layer is asked for.

    Raises:
        ValueError: a model type that is no text encoder, weights that are missing, left over, of other shapes, or
            only there as a pickle.
    """
    import transformers  # 2 to 3 s: not before a model is loaded, so that --help answers at once

    model_config = _read_config(folder)
    if config.layer == "penultimate":
        # As SD 2.x ships it: the last layer is gone, the final norm stays, and the first output is what is wanted.
        model_config.num_hidden_layers -= 1
    model_class = getattr(transformers, MODEL_CLASSES[_model_type(folder)])
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                folder,
                config=model_config,
                dtype=DTYPES[config.dtype],
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise a dozen types here; each means this one thing
        raise ValueError(
            f"{folder}: cannot be loaded as {model_class.__name__} from safetensors (pickles are not read): {error}"
        ) from error
    _check_names(folder, model, info, config)
    model.config.use_attention_mask = config.attention_mask
    model.config.architectures = [model_class.__name__]
    model.config._name_or_path = ""  # older releases save it: a path of this machine
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, without the paths of this machine that it would save again."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    tokenizer.name_or_path = ""
    for name in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    _model_type(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config.text_config if config.model_type == "clip" else config


def _model_type(folder: Path) -> str:
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not readable as JSON: {error}") from error
    if found not in MODEL_CLASSES:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {found!r}, expected one of {', '.join(MODEL_CLASSES)}"
        )
    return str(found)


def _check_names(folder: Path, model: Any, info: dict[str, Any], config: TextEncoderConfig) -> None:
    missing = sorted(info["missing_keys"])
    pooler = [name for name in missing if name.startswith("pooler.")]
    for name in pooler:
        # The pooled output is not used; zeros instead of random numbers keep saved files a function of the source.
        torch.nn.init.zeros_(model.get_parameter(name))
    problems = [f"missing: {name}" for name in missing if name not in pooler]
    layers = model.config.num_hidden_layers
    cut = tuple(f"{stack}.{layers}." for stack in ("layers", "layer", "block")) if config.layer == "penultimate" else ()
    for name in sorted(info["unexpected_keys"]):
        known = name.startswith(OTHER_PARTS) or name.endswith("position_ids") or any(part in name for part in cut)
        if not known:
            problems.append(f"unexpected: {name}")
    if problems:
        raise ValueError(
            f"{folder}: its weights are not those of the {type(model).__name__} that its config.json describes:\n  "
            + "\n  ".join(problems)
        )


def _max_length(config: TextEncoderConfig, tokenizer: Any, model: Any, folder: Path) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)  # T5 has relative positions: no limit
    length = config.max_length
    if length is None:
        limits = [tokenizer.model_max_length, *([positions] if positions else [])]
        length = min(limits)
        if length > 1_000_000:  # transformers' mark for "not said"
            raise ValueError(f"text_encoder.max_length: not set, and the tokenizer in {folder} names no length")
    elif positions and length > positions:
        raise ValueError(f"text_encoder.max_length: found {length}, but the encoder has only {positions} positions")
    return int(length)


def _used_weights(model: Any) -> dict[str, Tensor]:
    """Parameters that the states depend on, without the prefix that only some releases of transformers have."""
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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and reports: what they say is checked here and raised as an error where it matters."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
