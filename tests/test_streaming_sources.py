"""Where a stream's bytes come from: servers that fail, object stores, and commands that no shell reads."""

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from faulty_server import FaultyServer
from tiny_streams import (
    SAMPLES,
    SHARDS,
    all_of,
    check_row,
    config,
    keys_of,
    loader_of,
    number_of,
    raw_sample,
    stream,
    values,
    write_tar,
    write_tars,
)

from ldm.data.batch import Batch
from ldm.data.shards import DamagedSample
from ldm.data.storage import Retries
from ldm.data.stream_shards import CHUNK, StreamError, read_shard


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("raw"), raw_sample)


def test_a_stream_over_http_equals_the_local_one_through_drops_refusals_and_503(raw: Path) -> None:
    for workers in (0, 2):
        settings = config(workers=workers)
        expected = values(list(loader_of(stream(all_of(raw)), settings)))
        faults = ("drop", "refuse", "503", "longer")
        with FaultyServer(raw, seed=5, rate=0.3, faults=faults, in_a_row=1) as server:
            found = values(list(loader_of(stream(all_of(server.url)), settings)))
            assert sum(server.injected.values()) >= 2
            assert server.requests["/s-0.tar"] >= 1
            print(f"seed 5, {workers} workers: {dict(server.injected)} in {sum(server.requests.values())} requests")
        assert found == expected


def test_a_stalled_server_is_tried_again_and_a_body_cut_in_silence_is_a_ledger_line(raw: Path) -> None:
    expected = values(list(loader_of(stream(all_of(raw)), stop_step=2)))
    with FaultyServer(raw, seed=2, rate=0.5, faults=("stall",), in_a_row=1) as server:
        found = values(list(loader_of(stream(all_of(server.url), timeout=0.4), stop_step=2)))
        assert server.injected["stall"] >= 1
    assert found == expected
    with FaultyServer(raw, seed=2, rate=0.5, faults=("unannounced", "announced")) as server:
        batches = list(loader_of(stream(all_of(server.url)), stop_step=20))
        assert sum(server.injected.values()) >= 2
    records = [one for batch in batches for one in batch.quarantined]
    assert len(records) >= 2
    assert all("the rest of the shard is lost" in one.reason for one in records)
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            check_row(batch, row, position, 3, config())


def test_a_shard_of_many_parts_comes_whole_through_drops_in_its_middle(tmp_path: Path) -> None:
    rng = random.Random(4)
    samples = {f"k{n:02d}": {"bin": rng.randbytes(rng.randrange(150_000)), "txt": b"x" * n} for n in range(40)}
    tar = write_tar(tmp_path / "s.tar", samples)
    assert tar.stat().st_size > 8 * CHUNK
    lost: list[DamagedSample] = []
    retries = Retries(attempts=20, timeout=0.2, first_wait=0.001)
    assert {one.key: one.members for one in read_shard(str(tar), "s.tar", retries, lost.append)} == samples
    with FaultyServer(tmp_path, seed=9, rate=1.0, faults=("drop", "longer", "stall"), in_a_row=5) as server:
        for _ in range(3):
            found = list(read_shard(f"{server.url}/s.tar", "s.tar", retries, lost.append))
            assert {one.key: one.members for one in found} == samples
        print(f"seed 9, 3 readings: {dict(server.injected)}")
        assert sum(server.injected.values()) >= 9
    assert lost == []


def test_what_a_server_refuses_for_good_is_a_ledger_line_with_status_and_url(raw: Path) -> None:
    with FaultyServer(raw) as server:
        server.always = {"/s-1.tar": 403, "/s-2.tar": 404}
        batches = list(loader_of(stream(all_of(server.url)), stop_step=40))
        assert server.requests["/s-1.tar"] > 0
        assert server.requests["/s-1.tar"] < 20  # tried once each time, not again and again
    reasons = {one.shard: one.reason for batch in batches for one in batch.quarantined}
    assert set(reasons) == {"s-1.tar", "s-2.tar"}
    assert f"{server.url}/s-1.tar cannot be read" in reasons["s-1.tar"]
    assert "403" in reasons["s-1.tar"]
    assert f"{server.url}/s-2.tar is not there" in reasons["s-2.tar"]


def test_object_stores_are_read_through_fsspec(raw: Path) -> None:
    files = fsspec.filesystem("memory")
    for shard in range(SHARDS):
        files.pipe_file(f"/bucket/s-{shard}.tar", (raw / f"s-{shard}.tar").read_bytes())
    expected = values(list(loader_of(stream(all_of(raw)))))
    assert values(list(loader_of(stream(all_of("memory://bucket"))))) == expected


def running(words: str) -> list[str]:
    """Command lines of all processes that hold these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_text().replace("\0", " "))
    return [line for line in found if words in line]


@pytest.mark.parametrize("workers", [0, 2])
def test_commands_give_the_same_stream_where_they_are_allowed(raw: Path, workers: int) -> None:
    expected = list(loader_of(stream(all_of(raw)), config(workers=workers)))
    commands = stream(f"pipe:cat {all_of(raw)}", allow_pipe=True)
    batches = list(loader_of(commands, config(workers=workers)))
    assert [key.rpartition("/s-")[2] for key in keys_of(batches)] == [key[2:] for key in keys_of(expected)]
    assert keys_of(batches)[0].startswith(f"pipe:cat {raw}/s-")
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)  # type: ignore[arg-type]
        assert batch.quarantined == []


@pytest.mark.parametrize("url", ["pipe:touch {mark}", "{{pipe:touch {mark},a.tar}}"])
def test_a_command_is_an_error_that_names_setting_and_command_and_does_not_run(tmp_path: Path, url: str) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"pipe:touch .*data\.stream\.allow_pipe is false"):
        stream(tmp_path / "a.tar", url.format(mark=mark))
    assert not mark.exists()


def test_no_shell_reads_a_command(tmp_path: Path, raw: Path) -> None:
    mark = tmp_path / "ran"
    for words in ("true; touch", "cat $(touch", "true | touch", "true >"):
        with pytest.raises(StreamError):
            loader_of(stream(f"pipe:{words} {mark}", allow_pipe=True, attempts=1, timeout=2.0))
    assert not mark.exists()


@pytest.mark.parametrize(("url", "message"), [("pipe:cat 'a", "No closing quotation"), ("pipe:", "names no program")])
def test_a_command_that_cannot_be_read_is_an_error_at_start(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.stream\.urls: .*{message}"):
        stream(tmp_path / "a.tar", url, allow_pipe=True)


def test_nothing_but_a_pipe_url_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for url in (
        f"| touch {mark}",
        f"$(touch {mark}).tar",
        f"PIPE:touch {mark}",
        f"; touch {mark}",
        f"http://;touch {mark}",
    ):
        with pytest.raises(StreamError):
            loader_of(stream(url, allow_pipe=True, attempts=1, timeout=0.5))
    assert not mark.exists()


def test_a_command_that_fails_stalls_or_gives_too_little_is_a_ledger_line(raw: Path) -> None:
    tar = raw / "s-0.tar"
    commands = {
        f"pipe:sh -c 'cat {tar}; exit 3'": "after its end-of-archive mark",
        "pipe:sh -c 'exit 4'": "ended with status 4",
        f"pipe:head -c 20000 {tar}": "the file ends",
        f"pipe:sh -c 'head -c 20000 {tar}; sleep 602'": "TimeoutError",
        "pipe:no-such-program {tar}": "'no-such-program' cannot be run",
        "pipe:true": "empty file",
    }
    source = stream(tar, *commands, allow_pipe=True, attempts=1, timeout=0.5, shuffle_buffer=1)
    batches = list(loader_of(source, stop_step=60))
    reasons: dict[str, set[str]] = {}
    for one in (one for batch in batches for one in batch.quarantined):
        reasons.setdefault(one.shard, set()).add(one.reason)
    assert set(reasons) == set(commands)
    for command, reason in commands.items():
        (found,) = reasons[command]
        assert reason in found
    assert "status 3" in next(iter(reasons[f"pipe:sh -c 'cat {tar}; exit 3'"]))
    # The first command gives its 30 samples whole, the two cut ones none that is not.
    given = Counter(key.rpartition("/")[0] for key in keys_of(batches))
    assert given[f"pipe:sh -c 'cat {tar}; exit 3'"] >= SAMPLES
    for batch in batches:
        for row, key in enumerate(batch.keys):
            number = number_of("s-0" + key[-4:])[1]
            assert batch.captions[row].endswith(f" 0 {number}")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("command", ["cat {tar}; sleep {length}", "(cat {tar}; exec sleep {length}) | cat"])
def test_commands_do_not_outlive_their_stream(raw: Path, workers: int, command: str) -> None:
    length = f"601.{os.getpid()}{workers}"
    url = f"pipe:sh -c '{command.format(tar=raw / 's-0.tar', length=length)}'"
    source = stream(url, allow_pipe=True, shuffle_buffer=1)
    batches: Iterator[Batch] = iter(loader_of(source, config(workers=workers, prefetch=1), micro_batch=4))
    next(batches)
    assert running(f"sleep {length}")
    del batches
    end = time.monotonic() + 10
    while running(f"sleep {length}") and time.monotonic() < end:
        time.sleep(0.05)
    assert running(f"sleep {length}") == []
