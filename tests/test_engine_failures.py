"""Processes that are lost, fail, hang, lag behind or were started for another run: each is named, by rank and host.

Here one process of two with DDP; with LDM_ENGINES=all under the other engines, too.
"""

import json
import os
import platform
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml
from forked_runs import ForkServer, Processes

from ldm.data.manifest import Manifest
from ldm.data.shards import write_shards
from ldm.training.watch import broken_connection

HOST = re.escape(platform.node())
LOST = [("ddp", 1)]
"""Engine, and the rank that is lost."""
if os.environ.get("LDM_ENGINES") == "all":
    LOST += [("ddp", 0), ("fsdp2", 0), ("fsdp2", 1), ("zero1", 0), ("zero2", 1), ("zero3", 0), ("zero3", 1)]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_runs.make(tmp_path_factory.mktemp("disturbed") / "material")


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(processes: Processes, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 240
    while processes.running() and len(lines(folder)) < steps:
        assert time.monotonic() < deadline, processes.output()
        time.sleep(0.01)
    assert None in processes.codes, processes.output()


@pytest.mark.parametrize(("engine", "lost"), LOST)
def test_a_lost_process_is_named_and_the_same_command_brings_the_run_back(server, words, tmp_path, engine, lost):
    options = [*words, f"--distributed.engine={engine}", "--training.steps=6", "--training.checkpoint_every=2"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    server.start(whole, options, 2).finish(seconds=300)
    processes = server.start(folder, options, 2)
    wait_for_steps(processes, folder, 3)
    processes.kill(lost)
    codes = processes.wait(seconds=240)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] not in (0, None)
    found = (
        rf"process {1 - lost} on host {HOST} \(pid {processes.pids[1 - lost]}\) lost the connection after step \d+: "
    )
    gone = rf"process {lost} on host {HOST} \(pid {processes.pids[lost]}\).* is gone, or out of reach"
    assert re.search(found + gone, processes.output()), processes.output()[-3000:]
    if lost == 1:  # the main process writes the status
        assert re.search(gone, json.loads((folder / "run" / "status.json").read_text())["reason"])
    server.start(folder, options, 2).finish(seconds=300)
    assert tiny_runs.differences(tiny_runs.left_by(folder / "run"), tiny_runs.left_by(whole / "run")) == []


@pytest.mark.parametrize(
    "text",
    [
        "[transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:19647. This is typically caused by a remote",
        "[transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Gloo connectFullMesh failed with [transport/tcp/pair.cc:152] timed out connecting: Connection refused",
        "Read error [10.77.0.2]:19647: Connection reset by peer",
    ],
)
def test_what_gloo_says_of_a_lost_process_is_known_as_such(text):
    assert broken_connection(RuntimeError(text))
    assert not broken_connection(ValueError(text))
    assert not broken_connection(RuntimeError("The size of tensor a (4) must match the size of tensor b (3)"))


def test_a_process_that_fails_is_named_with_its_own_error(server, words, tmp_path):
    told = {"rank": 1, "how": "fail", "step": 3}
    processes = server.start(tmp_path, words, 2, hook="disturbed_runs:disturb", told=told)
    assert 0 not in processes.wait(seconds=240)
    expected = (
        rf"process 1 on host {HOST} \(pid {processes.pids[1]}\) failed: ValueError: this process was told to fail"
    )
    assert re.search(expected, processes.output())


def test_a_silence_is_told_with_the_stacks_of_all_processes_and_the_run_goes_on(server, words, tmp_path):
    silent = "process 1 on host"
    told = {"rank": 1, "how": "stand still", "step": 3}  # until its stacks are told
    options = [*words, "--training.steps=4", "--distributed.hang_minutes=0.05"]
    processes = server.start(tmp_path, options, 2, hook="disturbed_runs:disturb", told=told)
    processes.finish(seconds=240)
    output = processes.output()
    assert re.search(
        rf"{silent} {HOST} \(pid {processes.pids[1]}\) has shown no sign of life for \d+ s, after step 2", output
    )
    assert re.search(r'File ".*disturbed_runs.py", line \d+ in disturbed', output)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_slowest_process_is_named_with_its_seconds_a_step(server, words, tmp_path):
    told = {"rank": 1, "how": "sleep", "seconds": 2.0, "step": None}
    options = [*words, "--training.steps=3"]
    server.start(tmp_path, options, 2, hook="disturbed_runs:disturb", told=told).finish(seconds=240)
    for line in lines(tmp_path)[1:]:  # in the first forward pass DDP lays out its buckets, and waits
        assert line["straggler_rank"] == 1
        assert 0.5 < line["straggler_seconds"] < 60


def rewrite_first_shard(folder: Path) -> None:
    """Shards with the first one's samples alone, as of an encoding that was not finished."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(folder / "s-000000.tar") as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            samples.setdefault(key, {"__key__": key})[name] = tar.extractfile(member).read()
    encoder = Manifest.load(folder).encoder
    shutil.rmtree(folder)
    write_shards(samples.values(), folder, prefix="s", samples_per_shard=16, encoder=encoder)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("config", r"optimizer\.lr: 0\.001 for process 0 on host HOST .*, 0\.5 for process 1 on host HOST"),
        ("shards", r"data\.shards, by their content: '[0-9a-f]+' for process 0 .*, '[0-9a-f]+' for process 1 on"),
    ],
)
def test_hosts_with_a_config_or_shards_of_their_own_are_refused_by_name(server, words, tmp_path, other, expected):
    """Two hosts with a disk each: the same command line, and under the same relative names not the same files."""
    material = Path(words[0].partition("=")[2]).parent
    config = yaml.safe_load((material / "config.yaml").read_text())
    disks = [tmp_path / "first", tmp_path / "second"]
    for disk in disks:
        shutil.copytree(material / "shards", disk / "shards")
        told = config | {"data": config["data"] | {"shards": "shards"}}
        if other == "config" and disk == disks[1]:
            told["optimizer"] = config["optimizer"] | {"lr": 0.5}
        (disk / "config.yaml").write_text(yaml.safe_dump(told))
    if other == "shards":
        rewrite_first_shard(disks[1] / "shards")
    processes = server.start(tmp_path, ["--config=config.yaml"], 2, folders=disks)
    assert 0 not in processes.wait(seconds=240)
    assert len(re.findall(expected.replace("HOST", HOST), processes.output())) >= 2  # each of both says it
    assert not list(tmp_path.rglob("metrics.jsonl"))
