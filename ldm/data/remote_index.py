"""Finds and indexes shards at URLs, each read once, as a stream.

In: the URL of a folder, of a shard, or a pattern with braces for several.
Out: the folder and the shards' names; each one's `ShardIndex`, or its comparison with the one that it has.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ldm.data.indexing import Comparison, Stream, compare_stream, index_stream
from ldm.data.shard_index import ShardIndex
from ldm.data.storage import Retries, ShortBodyError, expand, list_files, open_stream, retried, size, split

A = TypeVar("A")
T = TypeVar("T")

THREADS = 8  # shards at URLs that are read at a time


def find_shards(where: str, retries: Retries) -> tuple[str, dict[str, int | None]]:
    """Folder of the shards at a URL, and their names, sorted, each with its size where a listing told it.

    Args:
        where: "s3://bucket/folder", which is listed; or "https://host/folder/{00000..00099}.tar", which is not.

    Raises:
        FileNotFoundError: no shard there.
        ValueError: the pattern's shards lie in several folders, or a name does not end in .tar.
        StorageError: the folder cannot be listed.
    """
    urls = expand(where)
    if len(urls) == 1 and not where.endswith(".tar"):
        there = list_files(where, retries)
        shards = {name: there[name] for name in there if name.endswith(".tar") and not name.startswith(".")}
        if not shards:
            raise FileNotFoundError(
                f"{where} lists no .tar: expected a folder of WebDataset shards, or a pattern such as "
                f"{where.rstrip('/')}/{{00000..00099}}.tar where the server lists no folders"
            )
        return where.rstrip("/"), shards
    if wrong := [url for url in urls if not url.endswith(".tar")]:
        raise ValueError(f"{wrong[0]} is not the URL of a shard: expected a name that ends in .tar")
    folders = sorted({split(url)[0] for url in urls})
    if len(folders) > 1:
        raise ValueError(f"{where} names shards in {len(folders)} folders ({', '.join(folders[:3])}); expected one")
    return folders[0], dict.fromkeys(sorted(split(url)[1] for url in urls))


def index_url(url: str, retries: Retries, expected_bytes: int | None = None) -> ShardIndex:
    """Index of a shard at a URL, read as a stream.

    A shard in which damage is found, or whose server announces no size, is read again until two readings agree, so
    that what a transfer did is not taken for the shard's. Bits that flip inside a member on their way leave no trace
    here: `compare_url` finds them.

    Args:
        expected_bytes: what the server says of its size; None where it does not tell.

    Raises:
        FileNotFoundError, PermissionError, StorageError: it cannot be read.
    """
    seen: set[str] = set()

    def once(stream: Stream) -> ShardIndex:
        index = index_stream(stream)
        if expected_bytes is not None and index.tar_bytes != expected_bytes:
            raise ShortBodyError(f"{index.tar_bytes:,} of {expected_bytes:,} bytes came")
        if (index.damage or expected_bytes is None) and index.xxh3 not in seen and retries.attempts > 1:
            seen.add(index.xxh3)
            reason = index.damage[0].reason if index.damage else f"{index.tar_bytes:,} bytes, none were announced"
            raise ShortBodyError(f"{reason}; read again to make sure")
        return index

    return _streamed(url, once, retries)


def compare_url(url: str, index: ShardIndex, retries: Retries) -> Comparison:
    """A shard at a URL against its index; one that differs is read again, until two readings agree.

    Raises:
        FileNotFoundError, PermissionError, StorageError: it cannot be read.
    """
    seen: set[str] = set()

    def once(stream: Stream) -> Comparison:
        comparison = compare_stream(stream, index)
        if comparison.xxh3 != index.xxh3 and comparison.xxh3 not in seen and retries.attempts > 1:
            seen.add(comparison.xxh3)
            raise ShortBodyError("the shard differs from its index; read again to make sure")
        return comparison

    return _streamed(url, once, retries)


def _streamed(url: str, once: Callable[[Stream], T], retries: Retries) -> T:
    def attempt() -> T:
        with open_stream(url, retries.timeout) as stream:
            return once(stream)

    return retried(url, attempt, retries)


def announced_size(url: str, listed: int | None, retries: Retries) -> int | None:
    """Size of a shard as its storage says, or None where it does not."""
    return size(url, retries) if listed is None else listed


def in_threads(call: Callable[[A], T], arguments: Iterable[A]) -> Iterator[T]:
    """Results of a call for each argument, in order, several at a time; few arguments are taken ahead of the results.

    At an error, or Ctrl-C, those that have begun are finished and the others left.
    """
    pool, running = ThreadPoolExecutor(THREADS), deque[Future[T]]()
    try:
        for argument in arguments:
            running.append(pool.submit(call, argument))
            if len(running) == 2 * THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
