"""Files that are whole, on the storage and read back equal, or not there: tensors as safetensors, and text.

Enters: named tensors on the host, or text, and a path. Leaves: the file under its name, and its hash. Buffers go to the
kernel as they lie in memory, without the interpreter's lock, so that training in another thread is not held up.
"""

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
import xxhash
from torch import Tensor

# In the order in which safetensors lays them out: widest first, so that each tensor is aligned to its own size.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
_BLOCK = 1 << 22


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Writes tensors on the host as safetensors, in the way of `write_parts`.

    The bytes are those of safetensors' `save_file(tensors, path, metadata={"format": "pt"})`, at about three times its
    rate. A tensor that is not contiguous is laid out in standard order.

    Returns:
        xxh3_64 of the file, in hexadecimal.

    Raises:
        OSError: as `write_parts`.
        ValueError: a tensor that is not on the host, or of a dtype that is not stored; names it.
        RuntimeError: two tensors share memory: read back, they would be two; names them.
    """
    return write_parts(_parts(tensors), path)


def write_text(text: str, path: Path) -> str:
    """Writes text as UTF-8, in the way of `write_parts`; returns the file's xxh3_64 in hexadecimal."""
    return write_parts([memoryview(text.encode())], path)


def write_parts(parts: Iterable[memoryview], path: Path) -> str:
    """Writes bytes under a temporary name, flushes them to the storage, reads them back, and only then renames.

    Returns:
        xxh3_64 of the file, in hexadecimal.

    Raises:
        OSError: the storage failed, or keeps other bytes than were written; what was under the name is still there.
    """
    digest = xxhash.xxh3_64()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for part in parts:
                digest.update(part)
                left = part
                while left:
                    left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        drop_from_memory(temporary)
        if file_hash(temporary) != digest.hexdigest():
            raise OSError(errno.EIO, "the storage holds other bytes than were written", str(path))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def drop_from_memory(path: Path) -> None:
    """Asks the kernel to forget a flushed file: what is read from it next comes from the storage."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def file_hash(path: Path) -> str:
    """xxh3_64 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1)))
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The file's bytes: length of the header, header padded to 8 bytes, tensors in its order."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.device.type != "cpu":
            kinds = ", ".join(_NAMES.values())
            raise ValueError(f"tensor {name}: found {tensor.dtype} on {tensor.device}, expected one of {kinds} on cpu")
    spans = sorted((t.data_ptr(), t.numel() * t.element_size(), name) for name, t in tensors.items() if t.numel())
    for (start, size, first), (following, _, second) in pairwise(spans):
        if start + size > following:
            raise RuntimeError(f"tensors {first} and {second} share memory: read back, they would be two; store one")
    ordered = sorted(tensors.items(), key=lambda pair: (_ORDER[pair[1].dtype], pair[0]))
    # "format" is the mark by which diffusers and transformers know tensors of torch.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        if tensor.numel():
            # One tensor at a time: a network in channels_last costs its largest tensor, not a copy of itself.
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
