"""One .safetensors file by itself: which models it holds, under which names, and with which settings.

Enters: a file, bare or a whole checkpoint, in CompVis' or diffusers' names. Leaves: for each model within, the settings
of its config.json, and its names and shapes; where shapes do not tell a setting, an error that says what to write.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models import compvis, compvis_text, inferred_config
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.inferred_config import Shapes
from ldm.models.pretrained import CONFIG_NAME, read_config
from ldm.models.unet_config import UNetConfig
from ldm.models.weight_files import Weights, file_shapes, weight_files

CLASS_NAMES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
CONFIGS: dict[str, type[UNetConfig] | type[AutoencoderConfig]] = {"unet": UNetConfig, "vae": AutoencoderConfig}
_OWNERS = {"compvis": "CompVis'", "diffusers": "diffusers'"}
LABELS = {"unet": "a UNet", "vae": "an autoencoder", "text": "a text encoder"}

# Tensors by which a model is known, without the prefix that it has in a whole checkpoint.
_MARKS = {
    ("unet", "compvis"): ("input_blocks.0.0.weight", "time_embed.0.weight"),
    ("unet", "diffusers"): ("down_blocks.0.resnets.0.norm1.weight", "time_embedding.linear_1.weight"),
    ("vae", "compvis"): ("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight"),
    ("vae", "diffusers"): ("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"),
}
_PREFIXES = {"unet": compvis.UNET_PREFIX, "vae": compvis.VAE_PREFIX}

# Prefixes of the first and second text encoder, and whether they are OpenCLIP's.
CLIP_1, OPENCLIP_1 = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_1, SDXL_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_TEXT_MARKS = {
    CLIP_1: "text_model.final_layer_norm.weight",
    OPENCLIP_1: "ln_final.weight",
    SDXL_1: "text_model.final_layer_norm.weight",
    SDXL_2: "ln_final.weight",
}
_BARE_TEXT = (
    "text_model.final_layer_norm.weight",
    "final_layer_norm.weight",
    "encoder.final_layer_norm.weight",
    "embeddings.word_embeddings.weight",
    "ln_final.weight",
)
_OPENCLIP_H_LAYERS = 24

SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_SAMPLE_SIZES = {"sd1": 64, "sdxl": 128}  # of latents; SD 2.x was trained at two sizes

# Names under which one component is released in its folder: config.json there is its own. Beside a file of any other
# name it may be anyone's.
_WEIGHTS_OF_A_FOLDER = re.compile(r"(diffusion_pytorch_model|model)\.")

# What a training script leaves beside the model in the file of an autoencoder or UNet alone.
_AVERAGES = "model_ema.diffusion_model"
_TRAINING = ("loss.", "model_ema.", "discriminator.")


@dataclass(frozen=True)
class Part:
    """A UNet or an autoencoder in a file."""

    layout: str
    """compvis or diffusers."""
    prefix: str
    """Of its tensors' names; empty in the file of one model."""


@dataclass(frozen=True)
class Contents:
    """The models that a file holds."""

    parts: Mapping[str, Part]
    """By component, unet and vae."""
    text: tuple[str, ...]
    """Prefixes of text encoders; empty for one by itself."""

    def __str__(self) -> str:
        found = [f"{LABELS[name]} in {_OWNERS[part.layout]} names" for name, part in self.parts.items()]
        found += [f"{LABELS['text']} ({prefix or 'by itself'})" for prefix in self.text]
        return " and ".join(found) or "no model that is known here"


def contents(names: Mapping[str, Any]) -> Contents:
    """What a file with tensors of these names holds."""
    parts = {}
    for (component, layout), marks in _MARKS.items():
        for prefix in (_PREFIXES[component], "") if layout == "compvis" else ("",):
            if all(prefix + mark in names for mark in marks):
                parts[component] = Part(layout, prefix)
    text = [prefix for prefix, mark in _TEXT_MARKS.items() if prefix + mark in names]
    if not text and not parts and any(mark in names for mark in _BARE_TEXT):
        text = [""]
    return Contents(parts, tuple(text))


class SingleFile:
    """A file's names and shapes, and what they say.

    Attributes:
        path: the file (or the index of its shards).
        what: the model and where it lies, for error messages.
        shapes: of all tensors, by their names in the file.
        contents: the models among them.
    """

    def __init__(self, path: Path, what: str, known_as: Path | None = None) -> None:
        """Reads the header; raises what `Weights` raises. `known_as`: where config files are looked for."""
        self.path = path
        self.known_as = known_as or path
        self.what = what
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(path, what):
            self.shapes |= file_shapes(file, what)
        self.contents = contents(self.shapes)

    def part(self, component: str) -> Part:
        """Where a component is in the file.

        Raises:
            ValueError: it is not there; says what is.
        """
        found = self.contents.parts.get(component)
        if found is None:
            raise ValueError(
                f"{self.what}: {self.path} holds {self.contents}, expected {LABELS[component]} "
                f"(under {_PREFIXES[component]}* or by itself, in CompVis' or diffusers' names)"
            )
        return found

    def values(self, component: str) -> dict[str, Any]:
        """Settings of a component: those of a config file beside the file, or else what the file tells.

        Raises:
            ValueError: the file leaves a setting open; says which, and what to write beside it.
        """
        self.part(component)
        beside = self.config_beside(component)
        if beside is not None:
            return read_config(beside, class_name=CLASS_NAMES[component])
        try:
            return self.told(component)
        except ValueError as error:
            raise ValueError(
                f"{self.what}: {self.path} does not tell {error}. Write the model's config.json (the settings of "
                f"diffusers' {CLASS_NAMES[component]}) to {self.known_as.with_suffix(f'.{component}.json')}"
            ) from error

    def config_beside(self, component: str) -> Path | None:
        """The file of a component's settings: FILE.unet.json (or .vae.json), or FILE.json of that class.

        config.json too, but only beside a model by itself that is called as one in its folder.
        """
        own = self.known_as.with_suffix(f".{component}.json")
        if own.is_file():
            return own
        places = [self.known_as.with_suffix(".json")]
        if not self.part(component).prefix and _WEIGHTS_OF_A_FOLDER.match(self.known_as.name):
            places.append(self.known_as.parent / CONFIG_NAME)
        for place in places:
            if place.is_file() and place != self.known_as and not _of_another(place, component):
                return place
        return None

    def origin(self, component: str, averaged: bool = False) -> str:
        """Where the settings and weights of a component come from, as far as that is a choice or a guess.

        Args:
            averaged: the averaged weights are taken, where there are any.
        """
        beside = self.config_beside(component)
        if beside is not None:
            found = f"settings of {LABELS[component]} from {beside}"
        else:
            assumed = ", ".join(
                f"{name} {value}"
                for name, value in self.told(component).items()
                if name in inferred_config.CONVENTIONS[component]
            )
            found = f"settings of {LABELS[component]} from its shapes; no shape tells {assumed}, taken as published"
        averages = component == "unet" and not averaged and any(name.startswith(_AVERAGES) for name in self.shapes)
        return f"{found}. The raw weights are taken, not the averaged ones (model_ema.*)" if averages else found

    def own_shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a component's tensors, by their names in the file without the prefix."""
        part = self.part(component)
        own = {name.removeprefix(part.prefix): s for name, s in self.shapes.items() if name.startswith(part.prefix)}
        return {name: s for name, s in own.items() if part.prefix or not name.startswith(_TRAINING)}

    def told(self, component: str) -> dict[str, Any]:
        """Settings of a component that the file by itself tells; raises ValueError that names one left open."""
        part = self.part(component)
        if component == "vae":
            return self._vae_values(part)
        values = inferred_config.unet_values(self._diffusers_shapes("unet", part))
        family = self._family_of("addition_embed_type" in values, values["use_linear_projection"])
        return {"sample_size": _SAMPLE_SIZES.get(family), **values}

    def _diffusers_shapes(self, component: str, part: Part) -> dict[str, tuple[int, ...]]:
        own = self.own_shapes(component)
        if part.layout == "diffusers":
            return own
        if component == "unet":
            names = compvis.unet_names_of(*inferred_config.compvis_unet_blocks(own))
        else:
            levels = inferred_config.count(own, r"encoder\.down\.(\d+)\.")
            names = compvis.vae_names_of(levels, inferred_config.count(own, r"encoder\.down\.0\.block\.(\d+)\."))
        return {new: s for name, s in own.items() if (new := names.to_diffusers(name)) is not None}

    def _vae_values(self, part: Part) -> dict[str, Any]:
        values = inferred_config.vae_values(self._diffusers_shapes("vae", part))
        scale = self._scale()
        if scale is None:
            draft = {"_class_name": CLASS_NAMES["vae"], **values, "scaling_factor": "NUMBER", "shift_factor": None}
            raise ValueError(
                "scaling_factor, by which its latents are multiplied: an autoencoder of one and the same shape has "
                "0.18215 in SD 1.x and 2.x (sd-vae-ft-mse too) and 0.13025 in SDXL; one of 16 channels has also a "
                f"shift_factor. With the NUMBER filled in:\n{json.dumps(draft)}\nwill do"
            )
        size = 2 ** (len(values["block_out_channels"]) - 1) * _SAMPLE_SIZES.get(self.family() or "", 64)
        return {**values, "scaling_factor": scale, "sample_size": size}

    def _scale(self) -> float | None:
        if "scale_factor" in self.shapes:
            scale = Weights(self.path, self.what, lambda name: name if name == "scale_factor" else None)
            return float(next(scale.tensors())[1].double())
        if "edm_mean" in self.shapes:
            raise ValueError("scaling_factor: its latents are whitened by edm_mean and edm_std, which is not supported")
        family = self.family()
        return SCALING[family] if family else None

    def family(self) -> str | None:
        """sd1, sd2 or sdxl of a whole checkpoint; None for a model by itself."""
        if "unet" not in self.contents.parts or len(self.contents.parts) + len(self.contents.text) < 2:
            return None
        # Of two shapes and not of all settings: one of these may be open, and told by a config file.
        shapes = self._diffusers_shapes("unet", self.part("unet"))
        linear = len(shapes.get("mid_block.attentions.0.proj_in.weight", ())) == 2
        return self._family_of("add_embedding.linear_1.weight" in shapes, linear)

    @staticmethod
    def _family_of(added: bool, linear: bool) -> str:
        return "sdxl" if added else "sd2" if linear else "sd1"


def _of_another(config: Path, component: str) -> bool:
    try:
        values = json.loads(config.read_text())
    except ValueError:
        return False  # read_config says what is wrong with it
    if not isinstance(values, dict) or "model_type" in values:  # transformers' files have it, and no class
        return True
    if "_class_name" in values:
        return bool(values["_class_name"] != CLASS_NAMES[component])
    # Programs write notes of their own beside a file, under its name.
    return not values.keys() & {field.name for field in fields(CONFIGS[component])}


def text_entries(shapes: Shapes, prefix: str) -> list[compvis_text.Entry]:
    """The tensors of the text encoder under `prefix` that its model in transformers has.

    SD 2.x takes the states of the last layer but one: of an OpenCLIP model under `cond_stage_model.` the last layer and
    the projection are left out. A file that was made of a diffusers folder has lost both already.
    """
    start = re.escape(prefix)
    if prefix in (CLIP_1, SDXL_1):
        return compvis_text.clip_entries(inferred_config.count(shapes, rf"{start}text_model\.encoder\.layers\.(\d+)\."))
    layers = inferred_config.count(shapes, rf"{start}transformer\.resblocks\.(\d+)\.")
    projects = prefix + compvis_text.PROJECTION[0] in shapes
    if prefix == SDXL_2:
        return compvis_text.openclip_entries(layers, projects)
    return compvis_text.openclip_entries(layers - (projects or layers == _OPENCLIP_H_LAYERS), projection=False)


def text_encoder_weights(file: Path, number: int) -> tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]:
    """Config and weights of a text encoder in a single file, the latter not read yet.

    Args:
        number: 1, or 2 for the second of SDXL's pair.

    Returns:
        Settings of transformers' CLIPTextConfig, with the class in `architectures`; and what reads the tensors, as
        stored, in transformers' names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, a pickle, has no such text encoder, or lacks tensors of it (each is named).
    """
    single = SingleFile(file, f"text encoder {number} of {file}")
    prefix = next((p for p in ((CLIP_1, OPENCLIP_1, SDXL_1), (SDXL_2,))[number - 1] if p in single.contents.text), None)
    if prefix is None:
        raise ValueError(
            f"{single.what}: the file holds {single.contents}, expected a text encoder number {number} of a whole "
            f"checkpoint ({', '.join(_TEXT_MARKS)}); one by itself is opened from its folder, with its config.json"
        )
    entries = text_entries(single.shapes, prefix)
    missing = [prefix + entry.stored for entry in entries if prefix + entry.stored not in single.shapes]
    if missing:
        raise ValueError(f"{single.what}: {len(missing)} tensors are missing:\n  " + "\n  ".join(missing))
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        pieces = entry.split(torch.empty(single.shapes[prefix + entry.stored], device="meta"))
        shapes |= {name: tuple(piece.shape) for name, piece in zip(entry.names, pieces, strict=True)}
    activation = "quick_gelu" if prefix in (CLIP_1, SDXL_1) else "gelu"
    try:
        values = inferred_config.clip_values(shapes, activation=activation)
    except ValueError as error:
        raise ValueError(f"{single.what}: {error}") from error

    def read() -> dict[str, Tensor]:
        by_name = {prefix + entry.stored: entry for entry in entries}
        weights = Weights(file, single.what, lambda name: name if name in by_name else None)
        tensors: dict[str, Tensor] = {}
        for name, tensor in weights.tensors():
            entry = by_name[name]
            tensors |= dict(zip(entry.names, entry.split(tensor), strict=True))
        return tensors

    return values, read
