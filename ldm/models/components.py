"""Opens UNets and autoencoders, wherever released ones lie and whatever their tensors are called.

Enters: a source (component or pipeline folder, single file, `package:`, hub name) and the kind of model that is wanted.
Leaves: its config and its weights, found but not read; or an error that says what is there instead.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldm.models import compvis, inferred_config
from ldm.models.autoencoder import AutoencoderConfig, current_name
from ldm.models.inferred_config import Shapes
from ldm.models.pretrained import CONFIG_NAME, read_config, resolve_source
from ldm.models.single_file import CLASS_NAMES, LABELS, SingleFile, contents
from ldm.models.unet_config import UNetConfig
from ldm.models.weight_files import Weights

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=UNetConfig | AutoencoderConfig)

# Settings that shapes do not tell, or that do not change them.
_UNTOLD = {"norm_num_groups", "attention_head_dim", "addition_time_embed_dim"}


@dataclass(frozen=True)
class Kind(Generic[C]):
    """What is the same for all models of a kind."""

    component: str
    """Its folder in a pipeline."""
    settings: Callable[[dict[str, Any]], C]
    """Its config, of a config.json."""
    inferred: Callable[[Shapes], dict[str, Any]]
    """Settings from shapes in diffusers' names."""
    names: Callable[[Any], compvis.NameMap]
    """Map of CompVis' names for a config."""
    current: Callable[[str], str]
    """Today's name for any that diffusers has used."""
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    """The module's shape, by its name, for that in a file."""


UNET: Kind[UNetConfig] = Kind(
    "unet", UNetConfig.from_dict, inferred_config.unet_values, compvis.unet_names, str, lambda name, shape: shape
)
VAE: Kind[AutoencoderConfig] = Kind(
    "vae", AutoencoderConfig.from_dict, inferred_config.vae_values, compvis.vae_names, current_name, compvis.vae_shape
)


def open_component(kind: Kind[C], source: str | Path) -> tuple[C, Weights]:
    """Config and weights of a model, the latter not read yet.

    Raises:
        FileNotFoundError: as `resolve_source`, or a folder without config.json or safetensors.
        ValueError: a config.json that cannot be used, weights that are damaged or pickles, or another model.
    """
    path = resolve_source(source, kind.component)
    what = f"{'autoencoder' if kind.component == 'vae' else kind.component} {source}"
    return _open_folder(kind, path, what) if path.is_dir() else _open_file(kind, path, what)


def _open_folder(kind: Kind[C], folder: Path, what: str) -> tuple[C, Weights]:
    values = read_config(folder, class_name=CLASS_NAMES[kind.component])
    config = _config(kind, values, folder / CONFIG_NAME)
    weights = Weights(folder, what, kind.current, kind.shape)
    weights.note = _reason(kind, config, values, weights.shapes)
    return config, weights


def _open_file(kind: Kind[C], path: Path, what: str) -> tuple[C, Weights]:
    single = SingleFile(path, what)
    part = single.part(kind.component)
    values = single.values(kind.component)
    config = _config(kind, values, single.config_beside(kind.component) or path)
    logger.warning("%s: %s", what, single.origin(kind.component))
    to_diffusers = kind.names(config).to_diffusers if part.layout == "compvis" else kind.current
    own = single.own_shapes(kind.component)

    def rename(stored: str) -> str | None:
        bare = stored.removeprefix(part.prefix)
        if not stored.startswith(part.prefix) or bare not in own:
            return None
        # A name that the map does not know stays, to be listed as unexpected: nothing is left out in silence.
        return to_diffusers(bare) or bare

    weights = Weights(path, what, rename, kind.shape)
    weights.note = _reason(kind, config, values, weights.shapes)
    return config, weights


def _config(kind: Kind[C], values: Mapping[str, Any], path: Path) -> C:
    try:
        return kind.settings(dict(values))
    except (ValueError, TypeError) as error:
        absent = [name for name in _shaping(kind) if name not in values]
        taken = f" (not in the file, so taken by default: {', '.join(absent)})" if absent else ""
        raise ValueError(f"{path}: {error}{taken}") from error


def _shaping(kind: Kind[Any]) -> tuple[str, ...]:
    names = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups")
    return names if kind.component == "vae" else (*names, "attention_head_dim", "cross_attention_dim")


def _reason(kind: Kind[C], config: C, values: Mapping[str, Any], shapes: Shapes) -> str:
    """What would explain that config and weights do not fit; nothing where they seem to."""
    found = contents(shapes)
    if kind.component not in found.parts:
        return f"they are those of {found}, not of {LABELS[kind.component]}"
    try:
        told = kind.inferred(shapes)
    except ValueError:
        return ""
    differing = []
    for name, value in told.items():
        ours = getattr(config, name)
        if name in _UNTOLD or _plain(ours, config) == _plain(value, config):
            continue
        origin = "" if name in values else " by default, as the config does not name it,"
        differing.append(f"{name} is {ours!r}{origin} where the weights have {value!r}")
    return "; ".join(differing)


def _plain(value: Any, config: UNetConfig | AutoencoderConfig) -> Any:
    """One number for all levels and the same number for each are the same."""
    listed = isinstance(value, list | tuple)
    return list(value) if listed else [value] * len(config.block_out_channels) if isinstance(value, int) else value
