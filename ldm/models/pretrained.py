"""Weights and configs on disk, in the layout of a diffusers component: config.json beside safetensors.

Enters: a source (local path, `package:NAME/sub/folder`, or hub name), or a module to be saved.
Leaves: a local path, a module filled with weights, or a component folder that diffusers opens as it is.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.models.durable import write_tensors, write_text

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

# Looked for in this order; the second pair is what transformers writes.
_WEIGHT_FILES = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(/.+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


def resolve_source(source: str | Path) -> Path:
    """Returns the local path of a model's source.

    Args:
        source: a local folder or file; `package:NAME/sub/folder`, a folder inside an installed Python package, which is
            found without importing it; or a hub name, `owner/model` or `owner/model/sub/folder`, downloaded to the
            cache of huggingface_hub (no pickles among the files taken).

    Raises:
        FileNotFoundError: nothing is there, the package is not installed, or the hub cannot be reached.
    """
    text = str(source)
    if text.startswith("package:"):
        return _in_package(text)
    local = Path(text).expanduser()
    if local.exists():
        return local
    if text.startswith(("/", ".", "~")) or local.suffix in {".safetensors", *_PICKLES} or not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(
            f"model source {text!r}: there is no such file or folder (looked at {local.absolute()})"
        )
    return _from_hub(text, local)


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
            f"it has {_listing(p.name for p in root.iterdir())}"
        )
    return path


def _from_hub(text: str, local: Path) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed for hub names only

    parts = text.split("/")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [f"{inside}/{pattern}" for pattern in _HUB_FILES] if inside else list(_HUB_FILES)
    try:
        path = Path(snapshot_download(repository, allow_patterns=patterns)) / inside
    except Exception as error:  # the client's errors have no common base; each means that there are no files
        raise FileNotFoundError(
            f"model source {text!r}: no such local path ({local.absolute()}), and the hub gave no such model: "
            f"{type(error).__name__}: {error}. Offline, give a local folder that holds the model"
        ) from error
    if not path.exists():
        raise FileNotFoundError(f"model source {text!r}: the hub's {repository!r} has no folder {inside!r}")
    return path


class Weights:
    """Named tensors in safetensors files, found but not read yet.

    Attributes:
        shapes: shape of each tensor, by the name that the module has for it.
        what: the model and where it lies, for error messages.
    """

    def __init__(self, path: Path, what: str, rename: Callable[[str], str] | None = None) -> None:
        """Looks into a .safetensors file, a .safetensors.index.json of a sharded model, or a folder that holds one.

        Args:
            rename: maps a name in the file to the module's name; identity when None.

        Raises:
            FileNotFoundError: no weights at the path.
            ValueError: the file is a pickle or damaged, or a tensor is stored twice.
        """
        self.what = what
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, tuple[Path, str]] = {}  # module's name -> file, name in the file
        for file in _weight_files(Path(path), what):
            with _open(file, what) as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                    name = rename(stored) if rename else stored
                    if name in self._sources:
                        first = self._sources[name][0]
                        raise ValueError(f"{what}: {name!r} is stored twice, in {first} and in {file}")
                    self._sources[name] = (file, stored)
                    self.shapes[name] = tuple(tensors.get_slice(stored).get_shape())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with the module's name for it, as stored; one at a time, file by file."""
        for file in dict.fromkeys(file for file, _ in self._sources.values()):
            with _open(file, self.what) as tensors:
                for name, (holder, stored) in self._sources.items():
                    if holder == file:
                        yield name, tensors.get_tensor(stored)


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Fills every tensor of a module, or changes nothing and says all that is wrong.

    Tensors are read one at a time and copied into place, so that dtype and device stay the module's and no
    second copy of the model is held. The module's parameters must have storage (not the meta device).

    Raises:
        ValueError: names or shapes differ (each is listed).
    """
    wanted = module.state_dict()
    shapes = weights.shapes
    problems = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in shapes]
    problems += [f"unexpected: {name} {shapes[name]}" for name in shapes if name not in wanted]
    problems += [
        f"wrong shape: {name} is {shapes[name]} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(
            f"{weights.what}: the weights in {weights.path} do not fit the model that its config describes "
            f"({len(problems)} differences, {len(wanted)} tensors in the model):\n  {listing}"
        )
    with torch.no_grad():
        for name, tensor in weights.tensors():
            wanted[name].copy_(tensor)


def _open(file: Path, what: str) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{what}: {file} is damaged or no safetensors file ({error}); fetch or copy it again"
        ) from error


def _weight_files(path: Path, what: str) -> list[Path]:
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        others = sorted(path.glob("*.safetensors"))
        if not found and len(others) == 1:
            found = others
        if not found:
            names = [p.name for p in sorted(path.iterdir()) if p.is_file()]
            hint = " (pickles are not read)" if any(Path(n).suffix in _PICKLES for n in names) else ""
            raise FileNotFoundError(
                f"{what}: no safetensors weights in {path}; expected {' or '.join(_WEIGHT_FILES)}, "
                f"found {_listing(names)}{hint}"
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no weights at {path}")
    if path.name.endswith(".index.json"):
        return _shard_files(path, what)
    if path.suffix != ".safetensors":
        reason = "a pickle, which can run code when it is read" if path.suffix in _PICKLES else "no safetensors file"
        raise ValueError(f"{what}: {path} is {reason}; only .safetensors is read: convert it first")
    return [path]


def _shard_files(index: Path, what: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what}: {index} is no index of sharded safetensors ({type(error).__name__}: {error})"
        ) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{what}: {index} names the shard {name!r}, expected a .safetensors file beside the index")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{what}: {index} names {_listing(absent)}, of which there is no file in {index.parent}"
        )
    return [index.parent / name for name in names]


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


def read_config(folder: Path, *, class_name: str) -> dict[str, Any]:
    """Reads the config.json of a component folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not JSON, or describes another class than
            `class_name`.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{class_name}: there is no {CONFIG_NAME} in {folder}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{class_name}: {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{class_name}: {path} holds a {type(values).__name__}, expected an object")
    found = values.get("_class_name", class_name)
    if found != class_name:
        raise ValueError(f"{path}: _class_name is {found!r}, expected {class_name!r}: this folder holds another model")
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


def _listing(names: Iterable[str], limit: int = 12) -> str:
    names = sorted(names)
    shown = ", ".join(names[:limit]) or "nothing"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def weights_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3_128 of names, shapes, dtypes and bytes of tensors, in hexadecimal; independent of their order."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
