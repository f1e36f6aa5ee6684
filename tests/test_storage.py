"""The storage layer over a real HTTP server that fails, and over fsspec's memory file system."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import fsspec
import pytest
from faulty_server import FaultyServer
from fsspec.implementations.memory import MemoryFileSystem

from ldm.data.storage import (
    Retries,
    StorageError,
    _wait,
    expand,
    filesystem,
    is_url,
    join,
    list_files,
    open_stream,
    read_bytes,
    retried,
    size,
    split,
)

FAST = Retries(attempts=5, timeout=0.3, first_wait=0.01)
FILES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    rng = random.Random(0)
    for number in range(FILES):
        (folder / f"{number:02d}.bin").write_bytes(rng.randbytes(rng.randrange(1, 300_000)))
    return folder


@pytest.fixture
def memory() -> str:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    files.makedirs("/bucket/sub")
    for name, data in {"b.tar": b"bb", "a.tar": b"a", "sub/c.tar": b"ccc"}.items():
        files.pipe_file(f"/bucket/{name}", data)
    return "memory://bucket"


@pytest.mark.parametrize("fault", ["drop", "stall", "late", "refuse", "503", "429", "longer"])
def test_files_come_whole_through_each_fault_that_shows(folder: Path, fault: str) -> None:
    print(f"seed 1, {FILES} files, half of the requests fail with {fault}")
    with FaultyServer(folder, seed=1, rate=0.5, faults=(fault,)) as server:
        for number in range(FILES):
            name = f"{number:02d}.bin"
            assert read_bytes(f"{server.url}/{name}", FAST) == (folder / name).read_bytes()
    assert server.injected[fault] >= FILES // 4


def test_a_file_of_many_reads_is_no_stall_however_long_it_takes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(1 << 20))
    with FaultyServer(tmp_path) as server, open_stream(f"{server.url}/a.bin", 1.0) as stream:
        count = 0
        while part := stream.read(1 << 17):
            count += len(part)
            time.sleep(0.2)  # 1.6 s in all
        limits = filesystem(server.url).client_kwargs["timeout"]
    assert count == 1 << 20
    assert limits.total is None  # aiohttp's own default ends each download after 5 minutes


@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        (404, FileNotFoundError, 1),
        (403, PermissionError, 1),
        (401, PermissionError, 1),
        (400, StorageError, 1),
        (416, StorageError, 1),
        (408, StorageError, 5),
        (429, StorageError, 5),
        (500, StorageError, 5),
        (503, StorageError, 5),
    ],
)
def test_what_may_pass_is_tried_again_and_what_lasts_is_not(
    folder: Path, status: int, error: type[OSError], requests: int
) -> None:
    with FaultyServer(folder) as server:
        server.always["/00.bin"] = status
        url = f"{server.url}/00.bin"
        with pytest.raises(error) as raised:
            read_bytes(url, FAST)
    assert type(raised.value) is error
    assert url in str(raised.value)
    assert server.requests["/00.bin"] == requests
    if requests > 1:
        assert "in 5 attempts" in str(raised.value)
        assert str(status) in str(raised.value)


def test_a_server_that_is_not_there_is_an_error_with_the_last_cause() -> None:
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/a\.tar was not read in 2 attempts.*Connect"):
        read_bytes("http://127.0.0.1:9/a.tar", Retries(2, 0.3, 0.01))


def test_waits_double_within_half_of_themselves_and_take_no_global_generator() -> None:
    state = random.getstate()
    waits = {url: [_wait(url, attempt, 0.5) for attempt in range(1, 12)] for url in map(str, range(50))}
    assert random.getstate() == state
    for several in waits.values():
        for attempt, wait in enumerate(several, 1):
            middle = min(30.0, 0.5 * 2 ** (attempt - 1))
            assert 0.5 * middle <= wait <= 1.5 * middle
    assert len({several[0] for several in waits.values()}) == 50


def test_an_error_in_the_program_is_not_tried_again() -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise TypeError("wrong argument")

    with pytest.raises(StorageError, match="wrong argument"):
        retried("memory://x", action, FAST)
    assert len(calls) == 1


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_sizes_are_the_servers_and_a_failure_to_tell_is_not_taken_for_a_missing_file(folder: Path, rate: float) -> None:
    with FaultyServer(folder, seed=2, rate=rate, faults=("503", "refuse", "late")) as server:
        for number in range(FILES):
            name = f"{number:02d}.bin"
            assert size(f"{server.url}/{name}", FAST) == (folder / name).stat().st_size
        with pytest.raises(FileNotFoundError, match=r"nowhere\.tar"):
            size(f"{server.url}/nowhere.tar", FAST)
        server.always["HEAD /00.bin"] = 405
        assert size(f"{server.url}/00.bin", FAST) is None


def test_a_folder_is_listed_over_http_and_in_memory(tmp_path: Path, memory: str) -> None:
    for name in ("b.tar", "a b.tar", "ä.tar", "notes.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "inner.tar").mkdir()
    with FaultyServer(tmp_path, seed=3, rate=0.5, faults=("503", "drop", "late")) as server:
        assert list(list_files(server.url, FAST)) == ["a b.tar", "b.tar", "notes.json", "ä.tar"]
        for name in ("a b.tar", "ä.tar"):
            assert read_bytes(join(server.url, name), FAST) == b"x"
            assert split(join(server.url, name)) == (server.url, name)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            list_files(server.url + "/nowhere", FAST)
    assert list_files(memory, FAST) == {"a.tar": 1, "b.tar": 2}
    with pytest.raises(FileNotFoundError, match="memory://elsewhere"):
        list_files("memory://elsewhere", FAST)


def test_memory_files_are_read_and_measured(memory: str) -> None:
    assert read_bytes(f"{memory}/sub/c.tar", FAST) == b"ccc"
    assert size(f"{memory}/b.tar", FAST) == 2
    with pytest.raises(FileNotFoundError, match="memory://bucket/none"):
        read_bytes(f"{memory}/none", FAST)
    with pytest.raises(FileNotFoundError, match="memory://bucket/none"):
        size(f"{memory}/none", FAST)


class _Stalls(MemoryFileSystem):
    """A store whose first two reads hang, behind a driver without timeouts."""

    protocol = "stalls"
    reads: list[float] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("stalls://", "memory://"))

    def _open(self, path: str, *arguments: object, **options: object):  # type: ignore[no-untyped-def]
        file = super()._open(path, *arguments, **options)
        read = file.read

        def slow(*sizes: int) -> bytes:
            _Stalls.reads.append(time.monotonic())
            if len(_Stalls.reads) <= 2:
                time.sleep(60)
                raise ConnectionError("too late for anyone to hear")
            return read(*sizes)

        file.read = slow
        return file


def test_a_driver_without_timeouts_is_given_up_and_tried_again(memory: str) -> None:
    fsspec.register_implementation("stalls", _Stalls, clobber=True)
    start = time.monotonic()
    assert read_bytes("stalls://bucket/sub/c.tar", FAST) == b"ccc"
    assert len(_Stalls.reads) >= 4  # two that hang, then the content and the end
    assert time.monotonic() - start < 60  # given up, and not waited for
    _Stalls.reads.clear()
    with pytest.raises(StorageError, match=r"in 2 attempts.*nothing came in 0\.3 s"):
        read_bytes("stalls://bucket/sub/c.tar", Retries(2, 0.3, 0.01))


@pytest.mark.parametrize(("url", "package"), [("s3://b/a.tar", "s3fs"), ("gs://b/a.tar", "gcsfs")])
def test_a_missing_driver_is_an_error_that_names_its_package(url: str, package: str) -> None:
    try:
        __import__(package)
        pytest.skip(f"{package} is installed")
    except ImportError:
        pass
    with pytest.raises(StorageError, match=f"pip install {package}"):
        read_bytes(url, FAST)


def test_an_unknown_protocol_is_an_error_that_names_it() -> None:
    with pytest.raises(StorageError, match="no protocol nosuch://"):
        read_bytes("nosuch://b/a.tar", FAST)


def _read_and_compare(url: str, expected: bytes) -> None:
    assert read_bytes(url, Retries(3, 5.0, 0.01)) == expected


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_reads_after_its_parent_has(folder: Path, method: str) -> None:
    """fsspec's event loop is a thread, which a fork does not have: a reader that kept it would hang here."""
    context = multiprocessing.get_context(method)
    with FaultyServer(folder) as server:
        url, expected = f"{server.url}/01.bin", (folder / "01.bin").read_bytes()
        with open_stream(url) as stream:  # a connection is open while the child starts
            head = stream.read(10)
            children = [context.Process(target=_read_and_compare, args=(url, expected)) for _ in range(3)]
            for child in children:
                child.start()
            for child in children:
                child.join(30)
                assert child.exitcode == 0
            parts = [head]
            while part := stream.read(1 << 20):
                parts.append(part)
        assert b"".join(parts) == expected
        _read_and_compare(url, expected)


def test_braces_name_several_and_urls_are_told_from_paths() -> None:
    assert expand("https://h/s-{08..11}.tar") == [f"https://h/s-{number}.tar" for number in ("08", "09", "10", "11")]
    assert expand("s3://b/{x,y}/a.tar") == ["s3://b/x/a.tar", "s3://b/y/a.tar"]
    assert expand("/data/plain") == ["/data/plain"]
    assert is_url("memory://a")
    assert not is_url("data/a")
    assert not is_url(Path("/data"))
    assert os.path.basename(join("s3://b/f/", "a b.tar")) == "a b.tar"
