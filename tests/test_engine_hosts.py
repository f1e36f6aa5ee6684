"""Training on two hosts that share nothing but a cable and a disk, by launch/node.sh (root needed).

One or two processes a host against one process alone; and workers and hosts killed and the cable cut at random, so many
times in one run. Two hosts with DDP run in test_launch.py, too; these here take half a minute each on two cores:
    LDM_ENGINES=all LDM_HOST_KILLS=20 LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_engine_hosts.py
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import trials
from conftest import ROOT
from forked_runs import ForkServer
from two_hosts import Host, two_hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
ALL = os.environ.get("LDM_ENGINES") == "all"
KILLS = trials.number("LDM_HOST_KILLS", 0)
ENGINE = os.environ.get("LDM_HOST_KILLS_ENGINE", "ddp")
TIMEOUT = 30.0
"""Seconds of distributed.timeout_minutes where something is lost."""
TABLE = [("ddp", 1), ("fsdp2", 1), ("zero2", 1), ("zero3", 1), ("ddp", 2), ("fsdp2", 2)]
"""Engine, and processes of each host."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = tiny_runs.make(tmp_path_factory.mktemp("hosts") / "material")
    return [*config, "--training.max_micro_batch=6"]  # accumulation: 2 with two processes


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run in `folder`; one that is cut short, being written, is left out."""
    found = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
            found.append(json.loads(line))
    return found


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "status.json").read_text()))


class Launched:
    """launch/node.sh on both hosts, each with its output in a file; `folder` is where a user would have the repository.

    Args:
        each: processes of each host.
    """

    def __init__(self, hosts: Sequence[Host], folder: Path, options: Sequence[str], each: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("launch", "ldm"):
            (folder / name).symlink_to(ROOT / name)
        self.folder, self.hosts, self.options, self.each = folder, hosts, options, each
        self.logs = [folder / f"{host.name}.log" for host in hosts]
        self.processes = [self.start(number) for number in range(len(hosts))]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """Starts a host's part, as whoever starts it on a cluster does."""
        host = self.hosts[number]
        given = {
            "NODES": str(len(self.hosts)),
            "NODE_RANK": str(number),
            "HEAD": self.hosts[0].name,
            "PORT": "29500",  # a host's own: nothing outside of it can hold it
            "PROCESSES_PER_NODE": str(self.each),
            "MAX_RESTARTS": "1000",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with self.logs[number].open("a") as log:
            return subprocess.Popen(
                host.command("bash", self.folder / "launch" / "node.sh", *self.options),
                env=os.environ | host.environment | given,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs)

    def wait_for(self, what: str, ready: Callable[[], bool], seconds: float = 300) -> float:
        """Seconds until `ready()`; fails past the time, or when a script has ended before."""
        began = time.monotonic()
        while not ready():
            assert time.monotonic() < began + seconds, f"{what} after {seconds} s:\n{self.output()[-8000:]}"
            ended = [process.poll() for process in self.processes]
            assert not any(ended), f"{what}: {ended}\n{self.output()[-8000:]}"
            time.sleep(0.02)
        return time.monotonic() - began

    def finish(self) -> None:
        self.wait_for("not finished", lambda: all(process.poll() == 0 for process in self.processes))

    def step(self) -> int:
        return max((line["step"] for line in lines(self.folder)), default=0)

    def workers(self, number: int) -> list[int]:
        """The training processes of a host."""
        found = [(pid, words_of(pid)) for pid in self.hosts[number].processes()]
        return [pid for pid, words in found if "ldm/train.py" in words and not {"launch", "bash"} & set(words)]


def words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


@pytest.mark.skipif(not ALL, reason="LDM_ENGINES=all runs it; half a minute each")
@pytest.mark.parametrize(("engine", "each"), TABLE)
def test_two_hosts_train_as_one_process_does(hosts, words, tmp_path, engine, each):
    options = [*words, "--training.steps=20", "--training.checkpoint_every=10", "--optimizer.max_grad_norm=0.3"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    with ForkServer() as server:
        server.start(alone, options).finish(seconds=300)
    launched = Launched(hosts, together, [*options, f"--distributed.engine={engine}"], each)
    launched.finish()
    ours, theirs = lines(together), lines(alone)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5)
    assert f"hosts: {hosts[0].name} ({each}), {hosts[1].name} ({each})" in launched.output()


class Disturber:
    """Kills and cuts in a run on two hosts, and sees that each is told of and got over.

    Reports go by the launches' own marks in status.json, so that nothing of before a loss is taken for what came after.
    """

    WHAT = ("worker", "host", "cable")

    def __init__(self, launched: Launched, draw: random.Random) -> None:
        self.launched, self.draw = launched, draw

    def disturb(self, what: str, number: int) -> dict[str, Any]:
        """One loss; how long until it was told, and until the run was further than before."""
        run, hosts = self.launched, self.launched.hosts
        step, launch, said = run.step(), status(run.folder)["launch"], [len(log.read_bytes()) for log in run.logs]
        began = time.monotonic()
        if what == "worker":
            os.kill(self.draw.choice(run.workers(number)), signal.SIGKILL)
        elif what == "host":
            hosts[number].kill()
            run.processes[number].wait()
        else:
            hosts[number].cut()

        def told(by: int) -> bool:
            new = run.logs[by].read_bytes()[said[by] :].decode(errors="replace")
            other = rf"process {1 - by} on host {hosts[1 - by].name} \(pid \d+\).* is gone, or out of reach"
            this = rf"process {by} on host {hosts[by].name} .* lost the connection "
            return re.search(rf"{this}.*{other}", new) is not None

        # Of a lost process the other tells; of a lost cable both.
        for by in (0, 1) if what == "cable" else (1 - number,):
            survivor = run.processes[by]
            while not told(by):
                assert survivor.poll() is None, run.output()[-8000:]
                assert time.monotonic() < began + TIMEOUT + 120, f"{what} {number}: not told\n{run.output()[-8000:]}"
                time.sleep(0.02)
        noticed = time.monotonic() - began
        time.sleep(self.draw.uniform(0, 5))
        if what == "host":
            run.processes[number] = run.start(number)
        elif what == "cable":
            hosts[number].mend()
        run.wait_for("not recovered", lambda: status(run.folder)["launch"] != launch and run.step() > step)
        return {"step": step, "noticed": round(noticed, 1), "recovered": round(time.monotonic() - began, 1)}


@pytest.mark.skipif(KILLS == 0, reason="LDM_HOST_KILLS says how many; half a minute each")
def test_lost_workers_hosts_and_cables_are_named_and_the_run_ends_as_if_undisturbed(hosts, words, tmp_path):
    draw, room = random.Random(trials.SEED), 16  # steps for each, so that the run does not end before the last of them
    options = [*words, f"--distributed.engine={ENGINE}", f"--distributed.timeout_minutes={TIMEOUT / 60}",
               f"--training.steps={room * (KILLS + 1)}", "--training.checkpoint_every=2"]  # fmt: skip
    print(f"\nLDM_HOST_KILLS={KILLS} LDM_TRIAL_SEED={trials.SEED} LDM_HOST_KILLS_ENGINE={ENGINE}")
    launched = Launched(hosts, tmp_path / "disturbed", options)
    disturber = Disturber(launched, draw)
    launched.wait_for("no step", lambda: launched.step() >= 3)
    for kill in range(KILLS):
        what, number, after = draw.choice(Disturber.WHAT), draw.randrange(2), launched.step() + draw.randrange(1, 8)
        launched.wait_for("no step", lambda after=after: launched.step() >= after)
        found = disturber.disturb(what, number)
        trials.report("lost", number=kill + 1, of=KILLS, what=what, of_host=number, engine=ENGINE, **found)
    launched.finish()
    whole = Launched(hosts, tmp_path / "whole", options)
    whole.finish()
    ours, theirs = (tiny_runs.left_by(run.folder / "run") for run in (launched, whole))
    assert tiny_runs.differences(ours, theirs) == []
