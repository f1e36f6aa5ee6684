"""Makes the index of a shard, or compares a shard with the index that it has, in one pass over its bytes.

In: a WebDataset tar, whoever wrote it, as a file or a stream that is read once, forward, from end to end.
Out: its `ShardIndex`, with what could not be used recorded as damage; or the samples that differ from the index.
"""

import re
import tarfile
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import xxhash

from ldm.data.shapes import SHAPED, UNKNOWN, member_shape
from ldm.data.shard_index import BLOCK, Damage, ShardIndex, compact, leaves_folder, split_name

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes; its reader skips them too
# A member is hashed in such parts, so that a damaged header asks for no memory; no picture's header is longer.
PART = 1 << 24


class Stream(Protocol):
    """What is read: bytes in order; fewer than asked for do not mean the end, none do."""

    def read(self, size: int, /) -> bytes: ...


class ForwardPass:
    """A stream as tarfile reads it, never backward: hashes all that passes and keeps what was read last."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.position = 0
        self.hash = xxhash.xxh3_64()
        self.last = (0, b"")  # position and bytes

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        start, parts = self.position, []
        while (left := size - (self.position - start)) > 0 and (part := self.stream.read(min(left, PART))):
            self.hash.update(part)
            self.position += len(part)
            parts.append(part)
        self.last = (start, parts[0] if len(parts) == 1 else b"".join(parts))
        return self.last[1]

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        """Reads up to `position`, or to the end where that comes before.

        Raises:
            tarfile.ReadError: the position is behind, as only a damaged header asks for.
        """
        if position < self.position:
            raise tarfile.ReadError("a header that points back into the data before it")
        while self.position < position and self.read(min(position - self.position, 1 << 20)):
            pass

    def data_until_end(self) -> bool:
        """Reads to the end; whether any byte on the way is not zero."""
        found = False
        while rest := self.read(1 << 20):
            found = found or rest.count(0) < len(rest)
        return found


class _Members:
    """The growing lists behind a ShardIndex."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.rows: list[tuple[int, int, int, int]] = []  # offset, size, checksum, extension
        self.shapes: list[tuple[int, int]] = []
        self.shaped_by: list[int] = []  # number in SHAPED of the member that gave the shape
        self.extensions: dict[str, int] = {}
        self.damage: list[Damage] = []

    def add(self, key: str, extension: str, offset: int, size: int, checksum: int, head: bytes) -> None:
        number = self.extensions.setdefault(extension, len(self.extensions))
        if not self.keys or key != self.keys[-1]:
            self.keys.append(key)
            self.starts.append(len(self.rows))
            self.shapes.append(UNKNOWN)
            self.shaped_by.append(len(SHAPED))
        elif any(row[3] == number for row in self.rows[self.starts[-1] :]):
            self.damage.append(Damage(offset, key, f"a second member .{extension} in the same sample, left out"))
            return
        self.rows.append((offset, size, checksum, number))
        if extension in SHAPED and SHAPED.index(extension) < self.shaped_by[-1]:
            self.shaped_by[-1] = SHAPED.index(extension)
            self.shapes[-1] = member_shape(extension, head)

    def drop_last(self, key: str) -> None:
        """Takes back the sample `key` where it is the last one and incomplete."""
        if self.keys and self.keys[-1] == key:
            self.keys.pop()
            self.shapes.pop()
            self.shaped_by.pop()
            del self.rows[self.starts.pop() :]

    def index(self, tar_bytes: int, xxh3: str) -> ShardIndex:
        keys = [key.encode("utf-8", "surrogateescape") for key in self.keys]
        columns = list(zip(*self.rows, strict=True)) if self.rows else [(), (), (), ()]
        return ShardIndex(
            extensions=tuple(self.extensions),
            starts=np.array([*self.starts, len(self.rows)], dtype=np.int64),
            offsets=np.array(columns[0], dtype=np.int64),
            sizes=compact(np.array(columns[1], dtype=np.int64)),
            checksums=np.array(columns[2], dtype=np.uint64),
            extension_ids=np.array(columns[3], dtype=np.uint8 if len(self.extensions) <= 256 else np.uint16),
            shapes=np.array(self.shapes, dtype=np.int32).reshape(-1, 2),
            key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_starts=compact(np.cumsum([0, *map(len, keys)], dtype=np.int64)),
            tar_bytes=tar_bytes,
            xxh3=xxh3,
            damage=tuple(self.damage),
        )


def index_shard(path: Path) -> ShardIndex:
    """Index of one tar, as `index_stream` makes it.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=1 << 20) as file:
        return index_stream(file)


def index_stream(stream: Stream) -> ShardIndex:
    """Index of one tar, read once from end to end.

    What cannot be used is recorded as damage with its byte offset: a header that does not parse, a file that ends
    inside a member or without the end-of-archive mark, data after that mark, a member without extension or whose
    name leaves the folder. The samples before it are kept; one whose member is cut is not.

    Raises:
        OSError: the stream cannot be read; whatever else reading it raises is passed on.
    """
    members, file = _Members(), ForwardPass(stream)
    end = None
    try:
        with tarfile.open(fileobj=cast("tarfile._Fileobj", file), mode="r:", errorlevel=2) as tar:
            end = _read_members(tar, file, members)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # tarfile lets int() fail on some damaged headers
        members.damage.append(Damage(file.position, "", f"not readable as a tar from here on: {error}"))
    block = b"" if end is None else file.last[1] if file.last[0] == end else file.read(BLOCK)
    data_follows = file.data_until_end()
    if end is not None and (reason := bad_end(block, data_follows, file.position - end)):
        members.damage.append(Damage(end, "", reason))
    return members.index(file.position, file.hash.hexdigest())


def _read_members(tar: tarfile.TarFile, file: ForwardPass, members: _Members) -> int | None:
    """Adds the tar's members; returns where tarfile stopped, or None where the file ends inside a member."""
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise, 1 KB each
        parts = split_name(info.name)
        if info.isdir() or META_MEMBER.match(info.name):
            pass
        elif not info.isreg() or info.issparse():
            members.damage.append(Damage(info.offset, "", f"{info.name!r} is a link or device, left out"))
        elif leaves_folder(info.name):
            members.damage.append(Damage(info.offset, "", f"the name {info.name!r} leaves the folder, left out"))
        elif parts is None:
            members.damage.append(Damage(info.offset, "", f"{info.name!r} has no key and extension, left out"))
        else:
            head, checksum = _read_member(file, info.size)
            here = file.position - info.offset_data
            if here < info.size:
                reason = f"the file ends inside {info.name!r}: {here:,} of {info.size:,} bytes are there"
                members.damage.append(Damage(info.offset, parts[0], reason))
                members.drop_last(parts[0])
                return None
            members.add(*parts, info.offset_data, info.size, checksum, head)
        file.seek(tar.offset)
        if file.position < tar.offset:  # only the padding is missing: tarfile would raise
            return file.position
    return tar.offset


def _read_member(file: ForwardPass, size: int) -> tuple[bytes, int]:
    """A member's first bytes and the checksum of all."""
    head = file.read(min(size, PART))
    if size <= PART:
        return head, xxhash.xxh3_64_intdigest(head)
    checksum, left = xxhash.xxh3_64(head), size - len(head)
    while left > 0 and (part := file.read(min(left, PART))):
        checksum.update(part)
        left -= len(part)
    return head, checksum.intdigest()


def bad_end(block: bytes, data_follows: bool, remaining: int) -> str | None:
    """What is wrong where tarfile stopped: it stops at damage as quietly as at the end of the archive.

    Args:
        block: the 512 bytes there, fewer where the file ends.
        data_follows: whether any byte after them is not zero.
        remaining: bytes from there to the end of the file.
    """
    if len(block) < BLOCK:
        return "the file ends here without the end-of-archive mark: it is cut short"
    if block.count(0) < BLOCK:
        return f"a corrupt header: the remaining {remaining:,} bytes are not read"
    if data_follows:
        return f"data after the end-of-archive mark: the remaining {remaining:,} bytes are not read"
    return None


class Comparison(NamedTuple):
    """What a shard is, against its index."""

    samples: list[tuple[int, str]]
    """Number and reason of each sample that differs."""
    tar_bytes: int
    xxh3: str


def compare_stream(stream: Stream, index: ShardIndex) -> Comparison:
    """Reads a shard once and compares each member, and the whole, with the index.

    Raises:
        OSError: the stream cannot be read; whatever else reading it raises is passed on.
    """
    file, differing = ForwardPass(stream), []
    for sample in range(len(index)):
        reason = ""
        for row in range(int(index.starts[sample]), int(index.starts[sample + 1])):
            offset, size = int(index.offsets[row]), int(index.sizes[row])
            file.seek(offset)
            _, checksum = _read_member(file, size)
            if not reason and file.position < offset + size:
                reason = (
                    f"the shard is cut short: a member's bytes are {offset:,} to {offset + size:,}, the file ends "
                    f"at {file.position:,}"
                )
            elif not reason and checksum != index.checksums[row]:
                reason = f"member .{index.extensions[index.extension_ids[row]]} differs from its checksum"
        if reason:
            differing.append((sample, reason))
    file.data_until_end()
    return Comparison(differing, file.position, file.hash.hexdigest())
