"""Whole checkpoints in CompVis' layout and in the folders of a diffusers pipeline: the same tensors, both ways.

Enters: the tensors of a single file, or of a pipeline's folders with their configs. Leaves: those of the other layout,
not made yet. Nothing is lost: what diffusers has no place for goes to a file beside its folders, and back from there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.models import compvis, inferred_config
from ldm.models.autoencoder import AutoencoderConfig, current_name
from ldm.models.compvis_text import PROJECTION, Entry, clip_entries, openclip_entries
from ldm.models.single_file import CLIP_1, OPENCLIP_1, SDXL_1, SDXL_2, Contents, text_entries
from ldm.models.tensor_stream import Pending
from ldm.models.unet_config import UNetConfig

EXTRA_NAME = "compvis_extra.safetensors"
_TEXT = "text_model."
TEXT_FOLDERS = {CLIP_1: "text_encoder", OPENCLIP_1: "text_encoder", SDXL_1: "text_encoder", SDXL_2: "text_encoder_2"}


@dataclass
class Folders:
    """Tensors by the folder of a pipeline that holds them, in diffusers' and transformers' names."""

    parts: dict[str, dict[str, Pending]] = field(default_factory=dict)
    extra: dict[str, Pending] = field(default_factory=dict)
    """What no folder has a place for, under the names that it had."""


def to_folders(
    tensors: Mapping[str, Tensor],
    holding: Contents,
    unet: UNetConfig | None,
    vae: AutoencoderConfig | None,
    *,
    averaged: bool = False,
) -> Folders:
    """Shares the tensors of a CompVis file among the folders of a pipeline.

    Args:
        unet: config of the file's UNet, None where it has none; the same for `vae`.
        averaged: put the averaged weights (`model_ema.*`) into unet/, and keep the others apart.

    Raises:
        ValueError: averaged weights are asked for and not all there, or a shape could not be restored.
    """
    found = Folders()
    left = dict(tensors)
    if unet is not None:
        found.parts["unet"] = {}
        prefix, names = holding.parts["unet"].prefix, compvis.unet_names(unet)
        own = [
            (stored, names.to_diffusers(stored.removeprefix(prefix))) for stored in left if stored.startswith(prefix)
        ]
        for stored, name in own:
            source = compvis.ema_name(stored) if averaged else stored
            if name is None:
                continue
            if source not in left:
                raise ValueError(f"averaged weights: there is no {source} in the file; leave out --ema")
            found.parts["unet"][name] = Pending.of(left.pop(source))
    if vae is not None:
        found.parts["vae"] = {}
        prefix, names = holding.parts["vae"].prefix, compvis.vae_names(vae)
        for stored in [name for name in left if name.startswith(prefix)]:
            name = names.to_diffusers(stored.removeprefix(prefix))
            if name is not None:
                found.parts["vae"][name] = Pending.of(_flat(stored, name, left.pop(stored)))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for prefix in holding.text:
        part = found.parts.setdefault(TEXT_FOLDERS[prefix], {})
        for entry in text_entries(shapes, prefix):
            if prefix + entry.stored not in left:
                raise ValueError(f"{prefix + entry.stored} is missing in the file")
            pieces = entry.split(left.pop(prefix + entry.stored))
            part |= {name: Pending.of(piece) for name, piece in zip(entry.names, pieces, strict=True)}
    found.extra = {name: Pending.of(tensor) for name, tensor in left.items()}
    return found


def _flat(stored: str, name: str, tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if compvis.is_vae_projection(name) and (len(shape) != 4 or shape[2:] != (1, 1)):
        raise ValueError(f"{stored} has shape {shape}, expected (C, C, 1, 1): it could not be restored")
    return tensor.reshape(compvis.vae_shape(name, shape))


def to_single_file(folders: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Any]) -> dict[str, Pending]:
    """The tensors of a CompVis file from those of a pipeline's folders and of the file beside them.

    Args:
        folders: by folder; "" for the tensors of `compvis_extra.safetensors`.
        configs: UNetConfig of unet, AutoencoderConfig of vae, settings (config.json) of text encoders.

    Raises:
        ValueError: a tensor or a text encoder that CompVis' layout has no place for; names it.
    """
    extra = folders.get("", {})
    made = {name: Pending.of(tensor) for name, tensor in extra.items()}
    whole = len(configs) > 1
    for folder, config in configs.items():
        for stored, pending in _stored(folder, folders[folder], config, whole, "text_encoder_2" in configs):
            # Where the extra file has the UNet's raw weights, the folder has the averaged ones.
            name = compvis.ema_name(stored) if folder == "unet" and stored in extra else stored
            if name in made:
                raise ValueError(f"{name} would be stored twice: it is in {folder}/ and in {EXTRA_NAME}")
            made[name] = pending
    return made


def _stored(
    folder: str, tensors: Mapping[str, Tensor], config: Any, whole: bool, pair: bool
) -> Iterator[tuple[str, Pending]]:
    if folder.startswith("text_encoder"):
        yield from _text(folder, tensors, config, pair)
        return
    if folder == "unet":
        prefix, names = compvis.UNET_PREFIX, compvis.unet_names(config)
    else:
        prefix, names = compvis.VAE_PREFIX, compvis.vae_names(config)
    for name, tensor in tensors.items():
        stored = names.to_compvis(current_name(name) if folder == "vae" else name)
        if stored is None:
            raise ValueError(f"{folder}/ has a tensor {name}, for which CompVis' layout has no name")
        if folder == "vae" and compvis.is_vae_projection(current_name(name)):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        yield (prefix if whole else "") + stored, Pending.of(tensor)


def _text(
    folder: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], pair: bool
) -> Iterator[tuple[str, Pending]]:
    clip = config.get("hidden_act") == "quick_gelu"
    prefix = (SDXL_2 if folder == "text_encoder_2" else SDXL_1) if pair else CLIP_1 if clip else OPENCLIP_1
    if config.get("model_type") != "clip_text_model" or clip != (prefix in (CLIP_1, SDXL_1)):
        raise ValueError(
            f"{folder}/ is a {config.get('model_type')} with hidden_act {config.get('hidden_act')!r}: CompVis' layout "
            "has CLIP (quick_gelu) or OpenCLIP (gelu) as the only text encoder, or CLIP and then OpenCLIP as a pair"
        )
    if not any(name.startswith(_TEXT) for name in tensors):  # as some releases of transformers save a text model
        tensors = {name if name == PROJECTION[1] else _TEXT + name: tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    told = inferred_config.clip_values(shapes, activation=config["hidden_act"])
    for name in ("num_attention_heads", "num_hidden_layers"):
        if config.get(name) != told[name]:
            raise ValueError(
                f"{folder}/config.json: {name} is {config.get(name)}, but a single file has no config, and its readers "
                f"take {told[name]} for weights of these shapes"
            )
    left = dict(tensors)
    for entry in _entries(prefix, shapes):
        missing = [name for name in entry.names if name not in left]
        if missing:
            raise ValueError(f"{folder}/ lacks {', '.join(missing)}")
        parts = {name: left.pop(name) for name in entry.names}
        if len({tensor.dtype for tensor in parts.values()}) > 1:
            raise ValueError(
                f"{folder}/: {', '.join(parts)} are one tensor in a single file, and of several types here"
            )
        shape = entry.shape({name: tuple(tensor.shape) for name, tensor in parts.items()})
        yield prefix + entry.stored, Pending(parts[entry.names[0]].dtype, shape, _join(entry, parts))
    for name, tensor in left.items():
        if prefix not in (CLIP_1, SDXL_1):
            raise ValueError(f"{folder}/ has a tensor {name}, for which CompVis' layout has no name")
        yield prefix + name, Pending.of(tensor)


def _entries(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    layers = inferred_config.count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    if prefix in (CLIP_1, SDXL_1):
        return clip_entries(layers)
    return openclip_entries(layers, PROJECTION[1] in shapes)


def _join(entry: Entry, parts: Mapping[str, Tensor]) -> Any:
    return lambda: entry.join(parts)
