"""Safetensors files of a model: which files of a folder they are, what they hold, and their tensors one at a time.

Enters: a .safetensors file, the index of a sharded model, or a folder that holds either; a map of names.
Leaves: shapes by the module's names, then the tensors. Pickles are refused, with the command that converts them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
CONVERTER = "python tools/convert_checkpoint.py"

_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and what transformers write
_VARIANTS = ("fp16", "bf16")  # the one with more digits first

# Looked for in this order: a whole file before shards, full precision before a variant beside it.
_WEIGHT_FILES = tuple(
    name.format(stem=stem, variant=variant)
    for variant in ("", *_VARIANTS)
    for stem in _STEMS
    for name in (
        (
            "{stem}.{variant}.safetensors",
            "{stem}.safetensors.index.{variant}.json",
            "{stem}.{variant}.safetensors.index.json",
        )
        if variant
        else ("{stem}.safetensors", "{stem}.safetensors.index.json")
    )
)
_INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")


class Weights:
    """Named tensors in safetensors files, found but not read yet.

    Attributes:
        shapes: shape of each tensor, by the name that the module has for it.
        what: the model and where it lies, for error messages.
        note: what is known of the reason, should they not fit; `load_weights` adds it to its error.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        rename: Callable[[str], str | None] | None = None,
        reshape: Callable[[str, tuple[int, ...]], tuple[int, ...]] | None = None,
    ) -> None:
        """Looks into a .safetensors file, a .safetensors.index.json of a sharded model, or a folder that holds one.

        Args:
            rename: maps a name in the file to the module's name, or to None where the tensor is another model's;
                identity when None.
            reshape: the module's shape for its name and the shape in the file, of as many numbers.

        Raises:
            FileNotFoundError: no weights at the path.
            ValueError: the file is a pickle or damaged, or a tensor is stored twice.
        """
        self.what = what
        self.path = path
        self.note = ""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._sources: dict[str, tuple[Path, str]] = {}  # module's name -> file, name in the file
        for file in weight_files(Path(path), what):
            for stored, shape in file_shapes(file, what).items():
                name = rename(stored) if rename else stored
                if name is None:
                    continue
                if name in self._sources:
                    first, twin = self._sources[name]
                    raise ValueError(
                        f"{what}: {name!r} is stored twice, as {twin} in {first} and as {stored} in {file}"
                    )
                self._sources[name] = (file, stored)
                self.shapes[name] = reshape(name, shape) if reshape else shape

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with the module's name for it, as stored; one at a time, file by file."""
        for file in dict.fromkeys(file for file, _ in self._sources.values()):
            with open_file(file, self.what) as tensors:
                for name, (holder, stored) in self._sources.items():
                    if holder == file:
                        yield name, tensors.get_tensor(stored).reshape(self.shapes[name])


def file_shapes(file: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in one .safetensors file, by its name there; reads the header alone."""
    with open_file(file, what) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no dict)


def open_file(file: Path, what: str) -> Any:
    """safetensors' handle of a file; raises ValueError where it is damaged or none."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{what}: {file} is damaged or no safetensors file ({error}); fetch or copy it again"
        ) from error


def weight_files(path: Path, what: str) -> list[Path]:
    """The .safetensors files of a model; `Weights` says what is raised."""
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        others = sorted(path.glob("*.safetensors"))
        if not found and len(others) == 1:
            found = others
        if not found:
            files = [p for p in sorted(path.iterdir()) if p.is_file()]
            pickles = [p for p in files if p.suffix in PICKLES]
            hint = f" (pickles are not read: `{conversion(pickles[0], path / WEIGHTS_NAME)}`)" if pickles else ""
            raise FileNotFoundError(
                f"{what}: no safetensors weights in {path}; expected {WEIGHTS_NAME}, model.safetensors, their fp16 or "
                f"bf16 variants, or an index of shards, found {listing(p.name for p in files)}{hint}"
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no weights at {path}")
    if _INDEX.fullmatch(path.name):
        return _shard_files(path, what)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{what}: {path} is a pickle, which can run code when it is read; only .safetensors is read. Convert it "
            f"once: `{conversion(path, path.with_suffix('.safetensors'))}`"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{what}: {path} is no safetensors file; only .safetensors is read")
    return [path]


def conversion(pickle: Path, target: Path) -> str:
    """The command that makes safetensors of a pickle without running it."""
    return f"{CONVERTER} {pickle} {target}"


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
        raise FileNotFoundError(f"{what}: {index} names {listing(absent)}, of which there is no file in {index.parent}")
    return [index.parent / name for name in names]


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Names for an error message: the first few in order, and how many more there are."""
    names = sorted(names)
    shown = ", ".join(names[:limit]) or "nothing"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
