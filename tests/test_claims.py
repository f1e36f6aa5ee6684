"""One holder an item while it lives, whoever asks; and files that appear once."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ldm.data.claims import Claims, appear_once, write_once

LONG = 600.0
ITEMS = [f"item-{number}" for number in range(60)]


def take_all(folder: Path, patience: float, start: Barrier, told: multiprocessing.Queue) -> None:
    """Asks for each item once, all processes at the same time; tells what it got. First it watches what is there."""
    claims = Claims(folder, patience)
    watched = [claims.take(name) for name in ITEMS if (folder / f"{name}.0").exists()]
    time.sleep(1.5 * patience if watched else 0)
    start.wait()
    told.put([name for name in ITEMS if claims.take(name) is not None])
    start.wait()  # nobody ends before all have asked


@pytest.mark.parametrize("given_up", [False, True], ids=["free", "given up"])
def test_of_many_processes_that_ask_at_once_each_item_goes_to_one(given_up: bool, tmp_path: Path) -> None:
    for name in ITEMS if given_up else []:
        foreign(tmp_path, f"{name}.0")
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(6), context.Queue()
    arguments = (tmp_path, 0.1 if given_up else LONG, start, told)
    processes = [context.Process(target=take_all, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    got = [told.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(name for names in got for name in names) == sorted(ITEMS)


def test_a_file_appears_for_one_of_several_and_whole(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{number}" for number in range(3)]
    for number, part in enumerate(parts):
        part.write_text(f"{number}" * 100)
    assert [appear_once(part, tmp_path / "whole") for part in parts] == [True, False, False]
    assert (tmp_path / "whole").read_text() == "0" * 100
    assert not write_once(tmp_path / "whole", b"another")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match=f"{tmp_path} is on a file system without hard links"):
        write_once(tmp_path / "whole", b"content")
    assert list(tmp_path.iterdir()) == []


def holder_of(folder: Path, *, then: str) -> int:
    """Process id of a process that has taken "item" and does `then`."""
    code = (
        "import sys, time, os, signal; from pathlib import Path; from ldm.data.claims import Claims\n"
        f"claims = Claims(Path({str(folder)!r}), {LONG}); claims.__enter__(); claims.take('item')\n"
        f"print('taken', flush=True); {then}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process.pid


@pytest.mark.parametrize("collected", [False, True], ids=["zombie", "gone"])
def test_a_killed_holder_of_this_machine_is_followed_at_once(collected: bool, tmp_path: Path) -> None:
    pid = holder_of(tmp_path, then="time.sleep(600)")
    with Claims(tmp_path, LONG) as claims:
        assert claims.take("item") is None
        assert claims.holder("item").startswith(f"process {pid} on ")
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | (0 if collected else os.WNOWAIT))
        claim = claims.take("item")
        assert claim is not None
        assert claim.path.name == "item.1"
        claim.finish()
    assert list(tmp_path.iterdir()) == []
    if not collected:
        os.waitpid(pid, 0)


def foreign(folder: Path, name: str = "item.0") -> Path:
    """A claim of a process of another machine, which has this process's number."""
    about = {"host": "elsewhere", "pid": os.getpid(), "began": 0.0, "machine": "elsewhere"}
    write_once(folder / name, json.dumps(about).encode())
    return folder / name


def test_another_machines_claim_is_given_up_when_it_is_left_untouched_and_not_before(tmp_path: Path) -> None:
    claim = foreign(tmp_path)
    # Years old or of tomorrow by the clock of its host: only that it does not change counts.
    for when in (0, time.time() + 86_400):
        os.utime(claim, (when, when))
        patient = Claims(tmp_path, LONG)
        assert patient.take("item") is None
        assert patient.take("item") is None
    hasty = Claims(tmp_path, 0.2)
    began = time.monotonic()
    assert hasty.take("item") is None
    for number in range(4):  # touched, it is not given up however long that takes
        time.sleep(0.15)
        os.utime(claim, (number, number))
        assert hasty.take("item") is None
    assert time.monotonic() - began > 0.2
    while (taken := hasty.take("item")) is None:
        time.sleep(0.01)
    assert taken.path.name == "item.1"
    assert Claims(tmp_path, LONG).take("item") is None  # this process's now, and alive


def test_claims_are_touched_while_they_are_held_and_gone_after_the_block(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.3) as claims:
        claim = claims.take("item")
        assert claim is not None
        os.utime(claim.path, (1, 1))
        deadline = time.monotonic() + 60
        while claim.path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_there_until_it_goes_or_is_anothers(tmp_path: Path) -> None:
    claim = Claims(tmp_path, LONG).take("item")
    assert claim is not None
    assert claim.is_there()
    claim.path.unlink()
    assert not claim.is_there()
    foreign(tmp_path)
    assert not claim.is_there()


def test_a_folder_that_is_gone_has_nothing_to_take(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "gone", LONG)
    assert claims.take("item") is None
    assert claims.holder("item") == ""
