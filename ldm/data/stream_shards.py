"""Tars read as they come, without an index: their bytes, the samples that webdataset groups, and their endless mix.

In: paths, URLs or commands that give tars, in the order of webdataset's ResampledShards, and a reader's own address.
Out: samples (shard, key, members); what was lost on the way, each with its reason, for the run's ledger.
"""

import os
import random
import shlex
import signal
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar, cast

from webdataset import ResampledShards, shuffle
from webdataset.gopen import Pipe
from webdataset.tariterators import group_by_keys

from ldm.data.indexing import META_MEMBER, ForwardPass, Stream, bad_end
from ldm.data.shard_index import BLOCK, leaves_folder, split_name
from ldm.data.shards import DamagedSample
from ldm.data.storage import (
    Retries,
    ShortBodyError,
    StorageError,
    expand,
    is_http,
    is_url,
    open_stream,
    retried,
    split,
    within,
)

T = TypeVar("T")

PIPE = "pipe:"
CHUNK = 1 << 18  # bytes asked for at once: over HTTP a request to the driver costs 0.1 ms, and a header has 512 bytes
SHARDS_IN_A_ROW = 16
"""Shards without a sample after which a stream ends: then the URLs, or what serves them, are at fault."""
SAMPLES_IN_A_ROW = 1000
"""Samples that cannot be used after which a stream ends: a shard of such may come, but not a run's whole data."""
Lose = Callable[[DamagedSample], None]


class StreamError(RuntimeError):
    """A stream out of which nothing comes; the message tells the last causes."""


@dataclass(kw_only=True)
class StreamConfig:
    """Tars that are trained on as they come, where nobody can index them first. The run is then not exact."""

    urls: list[str]
    """Tars: local paths or URLs that fsspec opens (https://, s3://, gs://, ...), with braces for several, such as
    "s3://bucket/{00000..01023}.tar"; "pipe:PROGRAM ARGUMENTS", which writes a tar, only with `allow_pipe`."""
    allow_pipe: bool = False
    """Run the programs of "pipe:" URLs: whoever writes the config then runs programs as the user who trains. No shell
    reads them: |, ; and $ are arguments like others."""
    shuffle_buffer: int = 1000
    """Samples that each reading process holds and mixes; 1 keeps the order of each tar."""
    attempts: int = 5
    """How often a tar is tried, with doubling waits, before the stream goes on with another one."""
    timeout: float = 60.0
    """Seconds without a byte after which an attempt is given up."""

    def __post_init__(self) -> None:
        if not self.urls or not all(self.urls):
            raise ValueError(f"data.stream.urls is {self.urls}; expected paths or URLs of tars")
        for name in ("shuffle_buffer", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.stream.{name} is {getattr(self, name)}; allowed are integers from 1")
        if self.timeout <= 0:
            raise ValueError(f"data.stream.timeout is {self.timeout}; allowed are numbers above 0")
        for url in self.tars if not self.allow_pipe else ():
            if is_pipe(url):
                raise ValueError(
                    f"data.stream.urls has {url!r}, a program to run, but data.stream.allow_pipe is false: set it if "
                    "you trust whoever wrote this config, or give a path or URL"
                )
        for url in filter(is_pipe, self.tars):
            try:
                command(url)
            except ValueError as error:
                raise ValueError(f"data.stream.urls: {error}") from error

    @property
    def tars(self) -> list[str]:
        """Paths, URLs and commands with their braces expanded, in order; raises ValueError where braces do not pair."""
        try:
            return [url for pattern in self.urls for url in expand(pattern)]
        except ValueError as error:
            raise ValueError(f"data.stream.urls: {error}") from error

    @property
    def retries(self) -> Retries:
        """How long a tar is tried."""
        return Retries(self.attempts, self.timeout)


class Streamed(NamedTuple):
    """A sample as it lies in its tar."""

    shard: str
    key: str
    members: dict[str, bytes]
    """By extension."""

    @property
    def name(self) -> str:
        """ "shard/key", as in a batch."""
        return f"{self.shard}/{self.key}"


def is_pipe(url: str) -> bool:
    """Whether this is a command that writes a tar."""
    return url.startswith(PIPE)


def command(url: str) -> list[str]:
    """Program and arguments of a "pipe:" URL, by a shell's rules for quotes alone: no shell reads it.

    Raises:
        ValueError: a quote is not closed, or there is no program.
    """
    try:
        words = shlex.split(url.removeprefix(PIPE))
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from error
    if not words:
        raise ValueError(f"{url!r} names no program")
    return words


def shard_names(tars: list[str]) -> dict[str, str]:
    """What each tar is called in keys and ledger: its file name where no other has it, else path or URL.

    Queries of HTTP URLs, which may hold signatures, are left out where that leaves different names.
    """
    tars = list(dict.fromkeys(tars))
    plain = {url: url.partition("?")[0] if is_http(url) else url for url in tars}
    bases = {url: _base(url, plain[url]) for url in tars}
    shared, alike = Counter(bases.values()), Counter(plain.values())
    return {
        url: bases[url] if shared[bases[url]] == 1 else plain[url] if alike[plain[url]] == 1 else url for url in tars
    }


def _base(url: str, plain: str) -> str:
    if is_pipe(url):
        return url
    return (split(plain)[1] if is_url(url) else PurePath(url).name) or url


class StreamReader:
    """One reading process's endless stream: shards drawn with replacement, their samples mixed in a buffer.

    Shards are drawn by webdataset's ResampledShards, and samples by its `shuffle`, from generators of their own, seeded
    by (seed, start_step, rank, worker): each reader draws other shards, and a run that goes on at another step does not
    begin with the same samples again. The same address over the same tars gives the same stream.

    Args:
        seed: the run's.
        start_step: the step that the run begins or goes on with.
        worker, workers: number of this reader within its training process, and how many there are.
    """

    def __init__(
        self, stream: StreamConfig, seed: int, *, start_step: int, rank: int, worker: int, workers: int
    ) -> None:
        self.retries = stream.retries
        self.names = shard_names(stream.tars)
        self.lost: list[DamagedSample] = []
        # ResampledShards reduces its seed modulo 2^31: counted up from one start, no two readers of a run draw alike.
        number = random.Random(f"shards {seed} {start_step}").getrandbits(31) + rank * workers + worker
        self.shards = ResampledShards(stream.tars, deterministic=True, worker_seed=lambda: number)
        mixing = random.Random(f"samples {seed} {start_step} {rank} {worker}")
        self.samples: Generator[Streamed, None, None] = shuffle(stream.shuffle_buffer, rng=mixing)(self._endless())

    def take(self, decode: Callable[[Streamed], T]) -> tuple[T, list[DamagedSample]]:
        """The next sample that `decode` takes without ValueError, and what was lost since the last call.

        Raises:
            StreamError: nothing comes that can be used.
        """
        unusable = 0
        for sample in self.samples:
            try:
                decoded = decode(sample)
            except ValueError as error:
                self.lost.append(DamagedSample(sample.shard, sample.key, str(error)))
                unusable += 1
                if unusable == SAMPLES_IN_A_ROW:
                    raise StreamError(
                        f"data.stream: {unusable:,} samples in a row cannot be used; the last ones:\n"
                        + listed(self.lost[-5:])
                    ) from error
            else:
                lost, self.lost = self.lost, []
                return decoded, lost
        raise AssertionError("the stream has no end")

    def close(self) -> None:
        """Ends connections and commands at once; left alone they would last until Python's collector finds them."""
        self.samples.close()

    def _endless(self) -> Iterator[Streamed]:
        causes: deque[DamagedSample] = deque(maxlen=5)
        without = 0
        for source in self.shards:
            name, known = self.names[source["url"]], len(self.lost)
            without += 1
            for sample in read_shard(source["url"], name, self.retries, self._lose):
                without = 0
                yield sample
            if not without:
                continue
            causes += self.lost[known:] or [DamagedSample(name, "", "it holds no sample")]
            if without == SHARDS_IN_A_ROW:
                raise StreamError(
                    f"data.stream: {without} shards in a row gave no sample; the last causes:\n" + listed(causes)
                )

    def _lose(self, lost: DamagedSample) -> None:
        self.lost.append(lost)


def listed(lost: Sequence[DamagedSample]) -> str:
    """Lines of a message that tell what was lost, and why."""
    return "\n".join(f"  {one.shard}{'/' if one.key else ''}{one.key}: {one.reason}" for one in lost)


def read_shard(url: str, name: str, retries: Retries, lose: Lose) -> Generator[Streamed, None, None]:
    """The samples of one tar, grouped by webdataset, in order; what is lost goes to `lose`.

    A shard that breaks off costs the sample in which it does, since nobody can tell whether that is complete, and the
    rest. webdataset's own reader of tars is not used: it does not tell a tar's end from where it breaks off.

    Args:
        name: what the shard is called.
    """

    def second(error: Exception) -> bool:
        lose(DamagedSample(name, "", f"{str(error.args[0]).partition(' in tar file')[0]}, left out"))
        return True

    with closing(_Bytes(url, retries)) as stream:
        try:
            for sample in group_by_keys(_files(stream, name, lose), keys=split_name, handler=second):
                members = {extension: data for extension, data in sample.items() if not extension.startswith("__")}
                yield Streamed(name, sample["__key__"], members)
        except DamagedSample as broken:
            lose(broken)


def _files(stream: Stream, name: str, lose: Lose) -> Iterator[dict[str, Any]]:
    """The tar's members as webdataset groups them, {} where a sample is complete; a DamagedSample where it breaks."""
    file, key, complete, odd = ForwardPass(stream), "", False, []
    try:
        with tarfile.open(fileobj=cast("tarfile._Fileobj", file), mode="r:", errorlevel=2) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if info.isdir() or META_MEMBER.match(info.name):
                    pass
                elif (found := _key(info)) is None:
                    odd.append(info.name)
                else:
                    if key != found:
                        yield {}  # the sample before is complete, whatever comes of this one
                    key, data = found, file.read(info.size)
                    if len(data) < info.size:
                        raise _broken(name, key, f"the file ends inside {info.name!r}")
                    yield {"fname": info.name, "data": data, "__url__": name}
                file.seek(tar.offset)
                if file.position < tar.offset:
                    break
            end = min(tar.offset, file.position)
        block = file.last[1] if file.last[0] == end else file.read(BLOCK)
        if complete := len(block) == BLOCK == block.count(0):
            key = ""
            yield {}
        if reason := bad_end(block, file.data_until_end(), file.position - end):
            raise _broken(name, key, reason)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _broken(name, key, f"not readable as a tar at byte {file.position:,}{_hint(file)}: {error}") from error
    except OSError as error:
        if not complete:
            raise _broken(name, key, f"not readable at byte {file.position:,}: {error}") from error
        lose(DamagedSample(name, "", f"after its end-of-archive mark: {error}"))
    finally:
        if odd:
            what = "members are links, or have no key and extension, or lie outside of the folder: left out"
            lose(DamagedSample(name, "", f"{len(odd):,} {what}; the first is {odd[0]!r}"))


def _key(info: tarfile.TarInfo) -> str | None:
    """Key of the sample that a member belongs to; None for what is no file, or has a name that no sample's file has."""
    parts = split_name(info.name)
    if parts is None or parts[1].startswith("__") or leaves_folder(info.name) or not info.isreg() or info.issparse():
        return None
    return parts[0]


def _broken(name: str, key: str, reason: str) -> DamagedSample:
    last = "this sample, which may lack members, and " if key else ""
    return DamagedSample(name, key, f"{reason}; {last}the rest of the shard is lost")


def _hint(file: ForwardPass) -> str:
    compressed = file.last[0] == 0 and file.last[1].startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return " (it is compressed: only plain tars are read)" if compressed else ""


class _Bytes:
    """A tar's bytes; where reading fails it is opened again, and read up to where it was."""

    def __init__(self, url: str, retries: Retries) -> None:
        self.url = url
        self.retries = retries
        self._received = 0
        self._part = memoryview(b"")
        self._ended = False
        self._open = ExitStack()
        self._stream: Stream | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end; raises OSError when all attempts have failed."""
        if not self._part and not self._ended:
            received = retried(self.url, self._attempt, self.retries)
            self._part, self._ended = memoryview(received), not received
            self._received += len(received)
        part, self._part = self._part[:size], self._part[size:]
        return bytes(part)

    def _attempt(self) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._open.enter_context(_opened(self.url, self.retries.timeout))
                left = self._received
                while left and (part := self._stream.read(min(left, CHUNK))):
                    left -= len(part)
                if left:
                    raise ShortBodyError(f"it ends at byte {self._received - left:,}, and had more before")
            return self._stream.read(CHUNK)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends connection or command."""
        self._stream = None
        self._open.close()


@contextmanager
def _opened(url: str, timeout: float) -> Iterator[Stream]:
    if is_pipe(url):
        with _output(url, timeout) as stream:
            yield stream
    elif is_url(url):
        with open_stream(url, timeout) as stream:
            yield stream
    else:
        with open(url, "rb", buffering=0) as file:
            yield cast(Stream, file)


@contextmanager
def _output(url: str, timeout: float) -> Iterator[Stream]:
    words = command(url)
    try:
        # webdataset's pipe, in a process group of its own: a command that does not notice that nobody reads is ended.
        pipe = Pipe(words, mode="rb", bufsize=-1, start_new_session=True)
    except OSError as error:
        raise StorageError(f"the program {words[0]!r} cannot be run: {error}") from error
    try:
        yield _Output(pipe, timeout)
    finally:
        if pipe.proc.returncode is None:
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        pipe.ignore_errors = True
        pipe.close()


class _Output:
    """What a command writes; raises OSError at the end where it failed, TimeoutError where nothing comes."""

    def __init__(self, pipe: Any, timeout: float) -> None:
        self.pipe = pipe
        self.timeout = timeout

    def read(self, size: int) -> bytes:
        part = within(self.timeout, os.read, self.pipe.stream.fileno(), size)
        if not part and (status := self.pipe.proc.wait(self.timeout)):
            raise OSError(f"the command ended with status {status}")
        return part
