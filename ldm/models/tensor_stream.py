"""Writes tensors as safetensors that are made only when their turn comes, one at a time.

Enters: for each name a tensor's type and shape, and what makes it; a path. Leaves: the file, whole or not at all, in
the way of durable.py, at the cost in memory of its largest tensor.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.models.durable import write_parts

# In the order in which safetensors lays them out: widest first, so that each tensor is aligned to its own size.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES)}


@dataclass(frozen=True)
class Pending:
    """A tensor that is not made yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Pending":
        """One that is there already (in a mapped file, say)."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_stream(
    tensors: Mapping[str, Pending], path: Path, written: Callable[[int], object] = lambda size: None
) -> str:
    """Writes a .safetensors file; returns its xxh3_64 in hexadecimal.

    Args:
        written: told the bytes of each tensor when they are on their way to the storage.

    Raises:
        ValueError: a dtype that is not stored; names the tensor. OSError: as `durable.write_parts`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise ValueError(f"tensor {name}: found {tensor.dtype}, expected one of {', '.join(map(str, _TYPES))}")
    return write_parts(_parts(tensors, written), path)


def _parts(tensors: Mapping[str, Pending], written: Callable[[int], object]) -> Iterator[memoryview]:
    ordered = sorted(tensors.items(), key=lambda pair: (_ORDER[pair[1].dtype], pair[0]))
    # "format" is the mark by which diffusers and transformers know tensors of torch.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.size
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        if tensor.size:
            yield tensor.make().detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        written(tensor.size)
