"""Shards and manifests at URLs: a thin layer over fsspec that reads forward, notices what stalls, and tries again.

In: URLs (`https://`, `s3://`, `gs://`, `memory://`, ... whatever fsspec has a driver for), with braces where several.
Out: bytes, names and sizes; errors that name the URL, the number of attempts and the last cause.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import fsspec
import xxhash
from braceexpand import braceexpand
from fsspec.asyn import sync

from ldm.data.indexing import Stream

log = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_WAIT = 30.0  # seconds between two attempts
BLOCK = 1 << 23  # bytes of a request to an object store
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""Packages that fsspec needs for a protocol; for others its own message tells."""
HEADERS = {"Accept-Encoding": "identity"}  # of a body packed on its way, no size tells whether it is whole
TRANSIENT_STATUS = (408, 425, 429)  # and 500 and above


class StorageError(OSError):
    """A URL that could not be read; the message names it, the attempts and the last cause."""


class ShortBodyError(OSError):
    """A body with fewer or more bytes than were announced: tried again."""


@dataclass(frozen=True)
class Retries:
    """How long a URL is tried."""

    attempts: int = 5
    timeout: float = 60.0
    """Seconds without a byte after which an attempt is given up."""
    first_wait: float = 0.5
    """Seconds before the second attempt; doubled before each further one."""


DEFAULT_RETRIES = Retries()


def is_url(where: object) -> bool:
    """Whether this is a URL and not a local path."""
    return "://" in str(where)


def is_http(url: str) -> bool:
    """Whether the URL is one of HTTP, whose names are percent-encoded."""
    return url.startswith(("http://", "https://"))


def expand(pattern: str) -> list[str]:
    """URLs or paths of a pattern with braces: "shard-{000..099}.tar", "{a,b}.tar"; itself where it has none."""
    return list(braceexpand(pattern))


def join(base: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{base.rstrip('/')}/{quote(name) if is_http(base) else name}"


def split(url: str) -> tuple[str, str]:
    """Folder and file name of a URL, inverse of `join`."""
    base, _, name = url.rstrip("/").rpartition("/")
    return base, unquote(name) if is_http(url) else name


def filesystem(url: str, timeout: float = 60.0) -> Any:
    """A file system of fsspec for a URL, used in one process and thread only.

    A new one each time: fsspec's event loop and connections do not survive a fork, and a loader's workers are forks.

    Raises:
        StorageError: its driver is not installed, or no such protocol.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if is_http(url):
            import aiohttp

            # aiohttp's default ends each download after five minutes, however fast it is.
            limits = aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
            options = {"client_kwargs": {"timeout": limits}, "headers": HEADERS}
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        package = DRIVERS.get(protocol)
        install = f"`pip install {package}`" if package else str(error)
        raise StorageError(f"{url}: reading {protocol}:// needs a driver that is not installed: {install}") from error
    except ValueError as error:
        raise StorageError(f"{url}: fsspec knows no protocol {protocol}://: {error}") from error


@contextmanager
def open_stream(url: str, timeout: float = 60.0) -> Iterator[Stream]:
    """A URL's bytes from the first to the last, in one request where the protocol can.

    One attempt; what fails is raised as the driver raises it, a read without a byte in `timeout` seconds as
    TimeoutError. Use it within `retried`.
    """
    files = filesystem(url, timeout)
    if not is_http(url):
        with within(timeout, files.open, url, "rb", block_size=BLOCK) as stream:
            yield _Timed(stream, timeout)
        return

    # Not `files.open`: it asks for the size first, and calls any failure to tell it FileNotFoundError.
    async def begin(session: Any) -> Any:
        response = await session.get(files.encode_url(url), headers=HEADERS)
        if response.status == 404:
            response.close()
            raise FileNotFoundError(url)
        response.raise_for_status()
        return response

    with _closing(files) as session:
        response = sync(files.loop, begin, session)
        try:
            yield _Body(files.loop, response)
        finally:
            files.loop.call_soon_threadsafe(response.close)


class _Body:
    """The body of a response, read from outside of fsspec's event loop."""

    def __init__(self, loop: Any, response: Any) -> None:
        self.loop = loop
        self.response = response

    def read(self, size: int) -> bytes:
        return sync(self.loop, self.response.content.read, size)


@contextmanager
def _closing(files: Any) -> Iterator[Any]:
    """The session of a file system of HTTP; its connections would stay open until the garbage collector comes."""
    session = sync(files.loop, files.set_session)
    try:
        yield session
    finally:
        sync(files.loop, session.close)


class _Timed:
    """A stream whose driver may have no timeout, or one of its own."""

    def __init__(self, stream: Any, timeout: float) -> None:
        self.stream = stream
        self.timeout = timeout

    def read(self, size: int) -> bytes:
        return within(self.timeout, self.stream.read, min(size, BLOCK))


def within(seconds: float, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What a call returns or raises, or TimeoutError after `seconds`; the call is then left behind in its thread."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call(*arguments, **options)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"nothing came in {seconds:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def retried(url: str, action: Callable[[], T], retries: Retries) -> T:
    """What `action` returns, tried again after failures that may pass.

    Dropped connections, stalls, bodies cut short, statuses 5xx, 408, 425 and 429 are tried again, after waits that
    double and differ from process to process. What is vanished, forbidden or asked for wrongly is not.

    Raises:
        FileNotFoundError: the URL is not there.
        PermissionError: it may not be read.
        StorageError: all attempts failed, or one in a way that does not pass.
    """
    for attempt in range(1, retries.attempts + 1):
        try:
            return action()
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url} is not there") from error
        except Exception as error:
            if not _may_pass(error):
                kind = PermissionError if _status(error) in (401, 403) else StorageError
                kind = PermissionError if isinstance(error, PermissionError) else kind
                raise kind(f"{url} cannot be read: {_described(error)}") from error
            if attempt == retries.attempts:
                raise StorageError(
                    f"{url} was not read in {attempt} attempts; the last one failed with {_described(error)}"
                ) from error
            wait = _wait(url, attempt, retries.first_wait)
            log.warning("%s: attempt %d failed (%s), again in %.1f s", url, attempt, _described(error), wait)
        time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def _may_pass(error: Exception) -> bool:
    if (status := _status(error)) is not None:
        return status >= 500 or status in TRANSIENT_STATUS
    # Drivers raise types of their own for a lost connection, so that only what is surely lasting is named.
    lasting = (PermissionError, IsADirectoryError, NotADirectoryError, ImportError, TypeError, ValueError)
    return not isinstance(error, (*lasting, NotImplementedError, AttributeError, MemoryError))


def _status(error: Exception) -> int | None:
    """HTTP status of aiohttp's and gcsfs's errors; s3fs raises PermissionError and the like."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) and 400 <= status < 600 else None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _wait(url: str, attempt: int, first_wait: float) -> float:
    """Seconds: doubled at each attempt, times a factor of 0.5 to 1.5 keyed by process, URL and attempt."""
    draw = xxhash.xxh3_64_intdigest(f"{os.getpid()} {url} {attempt}".encode()) / 2**64
    return min(LONGEST_WAIT, first_wait * 2 ** (attempt - 1)) * (0.5 + draw)


def read_bytes(url: str, retries: Retries) -> bytes:
    """All bytes of a small file.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `retried`.
    """

    def read() -> bytes:
        with open_stream(url, retries.timeout) as stream:
            parts = []
            while part := stream.read(1 << 20):
                parts.append(part)
            return b"".join(parts)

    return retried(url, read, retries)


def size(url: str, retries: Retries) -> int | None:
    """Bytes of a file as its server announces them, or None where it does not tell.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `retried`.
    """

    def ask() -> int | None:
        files = filesystem(url, retries.timeout)
        if not is_http(url):
            return within(retries.timeout, files.size, url)

        async def head(session: Any) -> int | None:
            async with session.head(files.encode_url(url), allow_redirects=True, headers=HEADERS) as response:
                if response.status in (405, 501):  # a server that knows no HEAD
                    return None
                if response.status == 404:
                    raise FileNotFoundError(url)
                response.raise_for_status()
                return response.content_length

        with _closing(files) as session:
            return sync(files.loop, head, session)

    return retried(url, ask, retries)


def list_files(url: str, retries: Retries) -> dict[str, int | None]:
    """Names of the files directly in a folder, sorted, with their bytes where the listing tells (HTTP does not).

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `retried`.
    """

    def ask() -> list[dict[str, Any]]:
        files = filesystem(url, retries.timeout)
        if not is_http(url):
            return within(retries.timeout, files.ls, url, detail=True)
        with _closing(files):
            return files.ls(url.rstrip("/") + "/", detail=True)

    entries = [entry for entry in retried(url, ask, retries) if entry["type"] != "directory"]
    names = [entry["name"].rpartition("/")[2] for entry in entries]
    sizes = [entry["size"] for entry in entries]
    return dict(sorted(zip(map(unquote, names) if is_http(url) else names, sizes, strict=True)))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, flushes it to the disk and renames it, so that it is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # process ids repeat from host to host
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
