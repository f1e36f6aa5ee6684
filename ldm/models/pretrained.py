"""Weights and configs on disk, in the layout of a diffusers component: config.json beside safetensors.

Enters: a source (local path, `package:NAME/sub/folder`, or hub name), or a module to be saved.
Leaves: a local path, a module filled with weights, or a component folder that diffusers opens as it is.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor, nn

from ldm.models.durable import write_tensors, write_text
from ldm.models.weight_files import PICKLES, WEIGHTS_NAME, Weights, listing

CONFIG_NAME = "config.json"
INDEX_NAME = "model_index.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(/.+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
# A second copy of the weights in another precision, or for another use; taken only where there is no other.
_HUB_VARIANTS = ("*.fp16*", "*.bf16*", "*.ema*", "*.non_ema*")

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


def resolve_source(source: str | Path, component: str | None = None) -> Path:
    """Returns the local path of a model's source.

    Args:
        source: a local folder or file; `package:NAME/sub/folder`, a folder inside an installed Python package, which is
            found without importing it; or a hub name, `owner/model` or `owner/model/sub/folder`, downloaded to the
            cache of huggingface_hub (no pickles among the files taken).
        component: a folder of a pipeline, unet or vae say: of a pipeline's folder the component's is returned, and from
            the hub only its files are taken (a text encoder's with those of its tokenizer).

    Raises:
        FileNotFoundError: nothing is there, the package is not installed, the hub cannot be reached, or the pipeline
            lacks the component.
    """
    text = str(source)
    if text.startswith("package:"):
        return _component_of(_in_package(text), component, text)
    local = Path(text).expanduser()
    if local.exists():
        return _component_of(local, component, text)
    if text.startswith(("/", ".", "~")) or local.suffix in {".safetensors", *PICKLES} or not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(
            f"model source {text!r}: there is no such file or folder (looked at {local.absolute()})"
        )
    return _component_of(_from_hub(text, local, component), component, text)


def _component_of(path: Path, component: str | None, text: str) -> Path:
    if component is None or not path.is_dir():
        return path
    if (path / component).is_dir():
        return path / component
    if (path / INDEX_NAME).is_file():
        folders = listing(p.name for p in path.iterdir() if p.is_dir())
        raise FileNotFoundError(f"model source {text!r}: the pipeline in {path} has no {component}/; it has {folders}")
    return path


def _in_package(text: str) -> Path:
    name, _, inside = text.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name.replace("-", "_")) if name else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"model source {text!r}: the Python package {name!r} is not installed; "
            f"`pip install {name.replace('_', '-')}`"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / inside
    if not path.exists():
        raise FileNotFoundError(
            f"model source {text!r}: the package is installed in {root}, but has no {inside!r}; "
            f"it has {listing(p.name for p in root.iterdir())}"
        )
    return path


def _from_hub(text: str, local: Path, component: str | None) -> Path:
    parts = text.split("/")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    within = f"{inside}/" if inside else ""
    try:
        if component is None:
            folder = _download(repository, [within + pattern for pattern in _HUB_FILES])
        else:
            folder = _download_component(repository, within, component)
    except Exception as error:  # the client's errors have no common base; each means that there are no files
        raise FileNotFoundError(
            f"model source {text!r}: no such local path ({local.absolute()}), and the hub gave no such model: "
            f"{type(error).__name__}: {error}. Offline, give a local folder that holds the model"
        ) from error
    path = folder / inside
    if not path.exists():
        raise FileNotFoundError(f"model source {text!r}: the hub's {repository!r} has no folder {inside!r}")
    return path


def _download_component(repository: str, within: str, component: str) -> Path:
    """Downloads one component: of a pipeline from its own folder, otherwise from the folder that is named."""
    folders = [component]
    if component.startswith("text_encoder"):
        folders.append(component.replace("text_encoder", "tokenizer"))
    # model_index.json tells a pipeline that lacks the component from a model by itself.
    own = [f"{within}{INDEX_NAME}", *(f"{within}{folder}/{pattern}" for folder in folders for pattern in _HUB_FILES)]
    if component == "scheduler":
        # What the network was trained on: noise of the schedule, in latents of the autoencoder's scale.
        own.append(f"{within}vae/{CONFIG_NAME}")
    root = _download_once(repository, within + component, own, [])
    if (root / within / component).is_dir() or (root / within / INDEX_NAME).is_file():
        return root
    # The client's * takes slashes too: without what is ignored, all folders below would come.
    return _download_once(repository, within, [within + pattern for pattern in _HUB_FILES], [f"{within}*/*"])


def _download_once(repository: str, inside: str, patterns: list[str], ignored: list[str]) -> Path:
    """Downloads without variants of the weights; with them where there is nothing else."""
    root = _download(repository, patterns, [*ignored, *_HUB_VARIANTS])
    folder = root / inside
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        root = _download(repository, patterns, ignored)
    return root


def _download(repository: str, patterns: list[str], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed for hub names only

    return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ignored))


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Fills every tensor of a module, or changes nothing and says all that is wrong.

    Tensors are read one at a time and copied into place, so that dtype and device stay the module's and no
    second copy of the model is held. The module's parameters must have storage (not the meta device).

    Raises:
        ValueError: names or shapes differ (each is listed).
    """
    wanted = module.state_dict()
    problems = misfits(wanted, weights.shapes)
    if problems:
        reason = f"; {weights.note}" if weights.note else ""
        raise ValueError(
            f"{weights.what}: the weights in {weights.path} do not fit the model that its config describes "
            f"({len(problems)} differences, {len(wanted)} tensors in the model){reason}:\n  " + "\n  ".join(problems)
        )
    with torch.no_grad():
        for name, tensor in weights.tensors():
            wanted[name].copy_(tensor)


def misfits(wanted: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each tensor of a model that is missing, unexpected or of another shape in a file."""
    problems = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in shapes]
    problems += [f"unexpected: {name} {shapes[name]}" for name in shapes if name not in wanted]
    problems += [
        f"wrong shape: {name} is {shapes[name]} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    return problems


def build_from_weights(build: Callable[[], M], weights: Weights, dtype: torch.dtype) -> M:
    """Builds a module on the CPU and fills it with weights, without drawing weights that are replaced.

    Every tensor of the module must be in its state dict: a buffer that is not persistent would stay unset.
    """
    with torch.device("meta"):
        module = build()
    module.to(dtype).to_empty(device="cpu")
    load_weights(module, weights)
    return module


def save_component(
    module: nn.Module | Mapping[str, Tensor],
    config_dict: Mapping[str, Any],
    folder: Path,
    *,
    class_name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, each under its name only when complete.

    Args:
        module: a module, or its state dict (averaged weights, say). Floating-point tensors are saved as
            `dtype`, in standard memory order whatever theirs is (channels_last).
        class_name: the diffusers class that opens the folder, config.json's `_class_name`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict() if isinstance(module, nn.Module) else module
    tensors = {name: _stored(tensor, dtype) for name, tensor in state.items()}
    text = json.dumps({"_class_name": class_name, **config_dict}, indent=2) + "\n"
    write_tensors(tensors, folder / WEIGHTS_NAME)
    write_text(text, folder / CONFIG_NAME)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    return tensor.to("cpu", dtype if tensor.is_floating_point() else None)


def read_config(path: Path, *, class_name: str) -> dict[str, Any]:
    """Reads the config.json of a component: the file, or the folder that holds it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or describes another class than `class_name`.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{class_name}: there is no {CONFIG_NAME} in {path}; take it from where the weights come from"
            )
        path = path / CONFIG_NAME
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{class_name}: {error}") from None
    found = values.get("_class_name", class_name)
    if found != class_name:
        raise ValueError(f"{path}: _class_name is {found!r}, expected {class_name!r}: this is another model")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no object; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: there is no {path.name} here")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def config_from_dict(config_class: type[C], values: Mapping[str, Any], fixed: Mapping[str, Any]) -> C:
    """Makes a config dataclass of a diffusers config.json; a setting that is not supported is an error, by name.

    Args:
        values: names that start with an underscore are diffusers' notes (class, version, path) and carry no
            settings.
        fixed: settings that diffusers has and this project does not: name -> the one value that is supported.
    """
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    settings = {name: value for name, value in values.items() if not name.startswith("_")}
    problems = [
        f"{name}: {value!r} is not a known setting"
        for name, value in settings.items()
        if name not in names | set(fixed)
    ]
    problems += [
        f"{name}: found {value!r}, supported is {fixed[name]!r}"
        for name, value in settings.items()
        if name in fixed and value != fixed[name]
    ]
    if problems:
        raise ValueError(f"{config_class.__name__}: not supported:\n  " + "\n  ".join(problems))
    return config_class(**{name: value for name, value in settings.items() if name in names})


def weights_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3_128 of names, shapes, dtypes and bytes of tensors, in hexadecimal; independent of their order."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
