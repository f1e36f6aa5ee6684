"""Encoding shared by processes of one host and of many: whoever is killed, the folder ends as one process makes it."""

import ctypes
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import tiny_shards
import trials
import two_hosts
from conftest import ROOT
from forked_runs import ForkServer, Processes
from PIL import Image

from ldm.data import encoding
from ldm.data.encoding_folder import IDENTITY_NAME, LEDGER_NAME, WORK, EncodingFolder
from ldm.data.manifest import MANIFEST_NAME, Manifest
from ldm.training.launched import EngineError
from tools import encode_latents

KILLS = trials.number("LDM_ENCODE_KILLS", 2)
WORLD = 3
COUNTS = [13, 0, 20, 1, 17, 24, 9, 20, 16, 20, 11, 20]
PROGRAM = "tools.encode_latents:main"
CLONE_NEWUTS = 0x04000000


def sample(shard: int, number: int) -> dict[str, Any]:
    """A picture of noise; a few are cut short, and some captions are longer than the encoder takes."""
    rng = np.random.default_rng([shard, number])
    stored = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (9, 8 + number % 3, 3), dtype=np.uint8)).save(stored, "PNG")
    cut = (shard, number) in ((0, 3), (5, 0), (5, 23))
    data = stored.getvalue()[: 60 if cut else None]
    return {"__key__": f"k{number:03d}", "png": data, "txt": f"{'red ape ' * (number % 4)}{shard} {number}"}


class Material:
    """Raw shards, models and a config in one folder; `words` names them, and where to write."""

    def __init__(self, folder: Path) -> None:
        self.config = tiny_runs.make(folder / "material")
        self.raw = folder / "raw"
        tiny_shards.write(self.raw, sample, COUNTS, None)

    def words(self, out: Path, patience: float = 600.0, workers: int = 0) -> list[str]:
        encoding = {"shards": self.raw, "text_states": True, "batch_size": 4, "workers": workers, "patience": patience}
        settings = [f"--encoding.{name}={value}" for name, value in encoding.items()]
        return [*self.config, *settings, f"--data.shards={out}", "--data.quarantine_limit=0.1"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("encoding"))


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(material: Material, server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    server.start(folder, material.words(folder / "out"), program=PROGRAM).finish()
    return content(folder / "out")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def own_host(told: None) -> None:
    """Hook: gives this process a host name of its own, so that nobody can see from its number that it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(f"host-{os.environ['RANK']}")


def write_when_told(told: str) -> None:
    """Hook: a shard is written when a file is there."""
    write = encoding.write_shard

    def later(*arguments: Any) -> Any:
        while not Path(told).exists():
            time.sleep(0.002)
        return write(*arguments)

    encoding.write_shard = later


def wait_until(processes: Processes, condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert processes.running(), f"all have ended:\n{processes.output()}"
        assert time.monotonic() < deadline, processes.output()
        time.sleep(0.002)


def claims_of(out: Path, pid: int, kind: str = "") -> list[str]:
    """Items on which a process works: shards, the manifest, or both."""
    start = {"shard": "s-", "manifest": MANIFEST_NAME, "": ""}[kind]
    found = []
    for path in (out / WORK).glob("[!.]*.[0-9]"):
        try:
            if path.name.startswith(start) and json.loads(path.read_bytes())["pid"] == pid:
                found.append(path.name)
        except OSError:
            continue
    return found


def test_one_process_makes_every_shard_and_lists_what_cannot_be_used(material: Material, undisturbed) -> None:
    tars = sorted(name for name in undisturbed if name.endswith(".tar"))
    assert tars == [f"s-{number}.tar" for number in sorted(range(len(COUNTS)), key=str)]
    lines = [json.loads(line) for line in undisturbed["quarantine.jsonl"].decode().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines] == [
        ("s-0.tar", "k003"),
        ("s-5.tar", "k000"),
        ("s-5.tar", "k023"),
    ]
    kinds = {name.partition(".")[2] for name in undisturbed}
    assert kinds == {"tar", "index.safetensors", "json", "jsonl"}  # and nothing of what was written on the way


@pytest.mark.parametrize("hosts", [False, True], ids=["one host", "hosts"])
def test_a_process_killed_at_any_instant_changes_nothing(
    hosts: bool, material: Material, server: ForkServer, undisturbed, tmp_path: Path
) -> None:
    """Of 3 processes one is killed (LDM_ENCODE_KILLS times, half of them each on a host of its own)."""
    if hosts and os.geteuid() != 0:
        pytest.skip("host names of one's own need root")
    kills = (KILLS + 1 - hosts) // 2
    rng = random.Random(trials.SEED + hosts)
    hook, patience = (f"{Path(__file__).stem}:own_host", 0.6) if hosts else (None, 600.0)
    seconds, counts, wrong = None, {"trials": 0, "kills": 0, "held_a_claim": 0, "held_the_manifest": 0}, []
    for number in range(-1, 5 * kills):
        if counts["kills"] == kills:
            break
        folder = tmp_path / f"trial-{number}"
        folder.mkdir()
        out = folder / "out"
        words = material.words(out, patience, workers=number % 2)
        processes = server.start(folder, words, WORLD, program=PROGRAM, hook=hook)
        wait_until(processes, lambda: list((out / WORK).glob("*.0")) or (out / MANIFEST_NAME).exists())  # noqa: B023
        began = time.monotonic()
        if seconds is None:  # the first one is left alone: how long it takes, and that it makes the same
            processes.finish()
            seconds = time.monotonic() - began
            assert processes.output().count("captions were longer") == 1  # one of the three wrote the manifest
        else:
            victim = rng.randrange(WORLD)
            kind = ("any instant", "shard", "manifest", "shard")[number % 4]
            if kind == "any instant":  # mostly before its first claim
                time.sleep(rng.uniform(0, seconds))
            while kind != "any instant" and processes.running():
                holders = [rank for rank, pid in enumerate(processes.pids) if claims_of(out, pid, kind)]
                if victim in holders or (kind == "manifest" and holders):
                    victim = victim if victim in holders else holders[0]
                    time.sleep(rng.uniform(0, 0.02 if kind == "shard" else 0.002))
                    break
            processes.kill(victim)
            held = claims_of(out, processes.pids[victim])
            codes = processes.wait()
            died = codes[victim] == -signal.SIGKILL
            counts["kills"] += died
            counts["held_a_claim"] += died and bool(held)
            counts["held_the_manifest"] += died and any(name.startswith(MANIFEST_NAME) for name in held)
            if any(code != 0 for rank, code in enumerate(codes) if rank != victim):
                wrong.append(f"trial {number}: exit codes {codes}\n{processes.output()}")
        counts["trials"] += 1
        if content(out) != undisturbed:
            names = content(out).keys() | undisturbed.keys()
            different = sorted(name for name in names if content(out).get(name) != undisturbed.get(name))
            wrong.append(f"trial {number}: {different}")
    trials.report("encoding with a killed process", hosts=hosts, **counts, different=len(wrong))
    assert not wrong, "\n".join(wrong)
    assert counts["kills"] == kills


def test_all_killed_and_started_again_ends_the_same(material, server, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    first = server.start(tmp_path, material.words(out), WORLD, program=PROGRAM)
    wait_until(first, lambda: list(out.glob("*.tar")))
    first.kill()
    first.wait()
    there = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert not (out / MANIFEST_NAME).exists() or len(there) == len(COUNTS)
    server.start(tmp_path, material.words(out), program=PROGRAM).finish()
    assert content(out) == undisturbed
    assert {name: (out / name).stat().st_ino for name in there} == there  # what was there was not encoded again


def test_a_process_that_sleeps_past_its_patience_finds_its_shard_done_and_changes_nothing(
    material, server, undisturbed, tmp_path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("host names of one's own need root")
    out = tmp_path / "out"
    hook = f"{Path(__file__).stem}:own_host"
    processes = server.start(tmp_path, material.words(out, patience=0.6), 2, program=PROGRAM, hook=hook)
    asleep: int | None = None
    while asleep is None:  # whichever has a claim first: the other may be late
        assert processes.running(), f"all have ended:\n{processes.output()}"
        for rank, pid in enumerate(processes.pids):
            if asleep is None and claims_of(out, pid, "shard"):
                processes.kill(rank, sign=signal.SIGSTOP)
                if claims_of(out, pid, "shard"):
                    asleep = rank
                else:  # it was faster: the claim is gone
                    processes.kill(rank, sign=signal.SIGCONT)
        time.sleep(0.002)
    wait_until(processes, lambda: processes.running() and processes.codes[1 - asleep] is not None)
    assert processes.codes[1 - asleep] == 0, processes.output()
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    processes.kill(asleep, sign=signal.SIGCONT)
    processes.finish()
    assert content(out) == undisturbed
    assert {path.name: path.stat().st_ino for path in out.glob("*.tar")} == before


def test_told_to_end_a_process_lets_go_of_its_shard_at_once(material, server, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    first = server.start(tmp_path, material.words(out), program=PROGRAM)
    wait_until(first, lambda: claims_of(out, first.pids[0], "shard"))
    first.kill(sign=signal.SIGTERM)
    assert first.wait() in ([128 + signal.SIGTERM], [0])
    assert not claims_of(out, first.pids[0])
    server.start(tmp_path, material.words(out), program=PROGRAM).finish()
    assert content(out) == undisturbed


def test_a_shard_that_vanishes_takes_the_manifest_along_until_it_is_encoded_again(
    material, server, undisturbed, tmp_path
) -> None:
    out = tmp_path / "out"
    server.start(tmp_path, material.words(out), program=PROGRAM).finish()
    untouched = (out / "s-2.tar").stat().st_mtime_ns
    (out / "s-5.tar").unlink()
    go, hook = tmp_path / "go", f"{Path(__file__).stem}:write_when_told"
    again = server.start(tmp_path, material.words(out), program=PROGRAM, hook=hook, told=str(go))
    wait_until(again, lambda: not (out / MANIFEST_NAME).exists())
    assert claims_of(out, again.pids[0], "shard")
    assert not (out / "s-5.tar").exists()
    go.touch()
    again.finish()
    assert content(out) == undisturbed  # the ledger's lines of the other shards are still there
    assert (out / "s-2.tar").stat().st_mtime_ns == untouched


def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(encode_latents, "processes_asked_of_launcher", lambda: 2)  # as its command line says
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(EngineError, match="2 processes were asked of the launcher, but it started 1"):
        encode_latents.device_of_process()


def test_the_manifest_is_written_by_the_one_who_has_claimed_it(material, server, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    for name, stored in undisturbed.items():
        if name != MANIFEST_NAME:
            (out / name).write_bytes(stored)
    claim = out / WORK / f"{MANIFEST_NAME}.0"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": 0.0, "machine": "elsewhere"}))
    waiting = server.start(tmp_path, material.words(out), program=PROGRAM)
    wait_until(waiting, lambda: waiting.log.exists() and "encoding" in waiting.output())
    time.sleep(1.0)  # that it does nothing can only be watched for a while
    assert waiting.running()
    assert not (out / MANIFEST_NAME).exists()
    claim.unlink()  # the other let go of it without having written it
    waiting.finish()
    assert content(out) == undisturbed


def test_who_was_slow_to_write_the_ledger_leaves_that_of_the_one_who_took_over(
    material, undisturbed, tmp_path, monkeypatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "out" / WORK
    work.mkdir(parents=True)
    for name, stored in undisturbed.items():
        if name not in (MANIFEST_NAME, LEDGER_NAME):
            (out / name).write_bytes(stored)
    lines = [json.loads(line) for line in undisturbed[LEDGER_NAME].splitlines()]
    for name in {line["shard"] for line in lines}:
        report = {"quarantined": [line for line in lines if line["shard"] == name], "truncated": 0}
        (work / f"{name}.json").write_text(json.dumps(report))
    identity = json.loads(undisturbed[IDENTITY_NAME])
    del identity["raw_shards"]
    slow, other = (
        EncodingFolder(Manifest.load(material.raw), out, identity, 0.1, patience) for patience in (600.0, 0.05)
    )

    def report_of(name: str) -> Path:
        if name == "s-5.tar":  # s-0.tar's has been read, this one's is gone after all: the other has finished
            other.finish()
        return work / f"{name}.json"

    monkeypatch.setattr(slow, "_report", report_of)
    assert slow.finish().counts == other.finish().counts
    assert content(out) == undisturbed
    assert not list(out.glob(f"{WORK}*"))


@pytest.mark.skipif(two_hosts.why_not() is not None, reason=str(two_hosts.why_not()))
def test_two_hosts_share_the_shards_and_one_that_dies_is_replaced(material: Material, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, str(ROOT / "tools/encode_latents.py"), *material.words(out, patience=2.0)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with two_hosts.two_hosts() as hosts:
        several = [
            subprocess.Popen(host.command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for host in hosts
        ]
        first: int | None = None
        while first is None:  # whichever has a claim first: the other may be late
            assert None in [one.poll() for one in several], [one.communicate()[0] for one in several]
            first = next((rank for rank, one in enumerate(several) if claims_of(out, one.pid)), None)
            time.sleep(0.002)
        hosts[first].kill()
        said = several[1 - first].communicate(timeout=240)[0].decode()
    assert several[first].wait() == -signal.SIGKILL
    assert several[1 - first].returncode == 0, said
    assert content(out) == undisturbed
    assert Manifest.load(out).counts == [count - {0: 1, 5: 2}.get(shard, 0) for shard, count in in_order()]


def in_order() -> list[tuple[int, int]]:
    """Shards and their counts in the order of their names."""
    return sorted(enumerate(COUNTS), key=lambda pair: str(pair[0]))
