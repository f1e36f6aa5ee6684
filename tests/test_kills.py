"""Processes killed at random instants, many inside a checkpoint write: the same command again gives the same run.

Four run here; all: LDM_KILLS=200 LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_kills.py
"""

import itertools
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tiny_runs
import trials
from forked_runs import ForkServer, Processes

KILLS = trials.number("LDM_KILLS", 4)
SHARE_INSIDE = 0.3
"""Of the kills, those that have to hit a checkpoint that is being written."""
WORLDS = (1, 2, 4)
WORKERS = {1: 1, 2: 0, 4: 0}
"""Loader workers of each process, by the number of processes: with them a killed process leaves others behind."""


@dataclass
class Undisturbed:
    """What the run left that nobody killed, and how long it took."""

    left: dict
    seconds: float


@dataclass
class Counts:
    """What the trials add up to."""

    kills: int = 0
    inside: int = 0
    chains: int = 0
    how: Counter = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    orphans: list[int] = field(default_factory=list)
    """Process groups whose first process was killed without its workers."""


def words_for(words: list[str], world: int) -> list[str]:
    return [*words, f"--data.workers={WORKERS[world]}", f"--distributed.processes={world}"]


def undisturbed_run(server: ForkServer, folder: Path, words: list[str], world: int) -> Undisturbed:
    folder.mkdir()
    began = time.monotonic()
    server.start(folder, words_for(words, world), world).finish()
    return Undisturbed(tiny_runs.left_by(folder / "run"), time.monotonic() - began)


def being_written(checkpoints: Path, since_ns: int) -> str | None:
    """Temporary folder of a checkpoint that was touched after `since_ns`: one of an earlier kill does not count."""
    try:
        for entry in os.scandir(checkpoints):
            partial = entry.name.startswith(".step-") and entry.name.endswith(".partial")
            if partial and entry.stat().st_mtime_ns > since_ns:
                return entry.name
    except FileNotFoundError:
        pass
    return None


def wait_for_instant(processes: Processes, checkpoints: Path, kind: str, rng: random.Random, seconds: float) -> None:
    """Returns at a random instant of a kind: anywhere, inside of a checkpoint's write, or just after one."""
    since_ns, began = time.time_ns(), time.monotonic()
    if kind == "anywhere":
        end = began + rng.uniform(0, seconds)
        while time.monotonic() < end and processes.running():
            time.sleep(0.002)
        return
    wanted, name = rng.choice((1, 1, 2, 3, 5)), None
    for round_number in itertools.count():
        found = being_written(checkpoints, since_ns)
        if found is not None and found != name:
            wanted, name = wanted - 1, found
        if wanted == 0 and (kind == "write" or found != name):
            break
        if round_number % 64 == 63 and not processes.running():
            return
        time.sleep(0.0003)
    time.sleep(rng.uniform(0, 0.04 if kind == "write" else 0.004))


def kill(processes: Processes, rng: random.Random) -> str:
    """SIGKILL to all processes at once, as a node dies, or to one and a little later to the others."""
    world = len(processes.pids)
    if world == 1 and rng.random() < 0.3:  # as the kernel does it to whoever takes the memory
        processes.kill(workers=False)
        return "without its workers"
    if world == 1 or rng.random() < 0.5:
        processes.kill()
        return "all at once"
    first = rng.randrange(world)
    others = [rank for rank in range(world) if rank != first]
    processes.kill(first)
    asked = rng.random() < 0.5
    if asked:  # as torchrun does when it sees that a process is gone
        processes.kill(*others, sign=signal.SIGTERM)
    time.sleep(rng.uniform(0, 0.3))
    processes.kill(*others)
    return "one first, the others told by SIGTERM" if asked else "one first"


def still_there(groups: list[int], seconds: float) -> list[int]:
    """Process groups that have not ended after a while; they are ended here."""
    deadline = time.monotonic() + seconds
    left = list(groups)
    while left and time.monotonic() < deadline:
        left = [group for group in left if group_exists(group)]
        time.sleep(0.1)
    for group in left:
        os.killpg(group, signal.SIGKILL)
    return left


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest checkpoint under its final name."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")), default=None)


def check_resumed(said: str, newest: int | None) -> list[str]:
    """What is wrong with where a start went on: it has to be the newest checkpoint that the kill before it left."""
    found = re.search(r"resuming after step (\d+)", said)
    if found is None and "step/s" not in said:
        return []  # killed before it came to that
    resumed = int(found.group(1)) if found else None
    return [] if resumed == newest else [f"resumed after step {resumed}, the newest checkpoint was {newest}"]


def chain(
    server: ForkServer,
    folder: Path,
    words: list[str],
    world: int,
    whole: Undisturbed,
    rng: random.Random,
    counts: Counts,
) -> None:
    """One run that is killed a few times and then left alone, compared with the undisturbed one at its end."""
    folder.mkdir()
    checkpoints = folder / "run" / "checkpoints"
    told, problems = [], []
    for _ in range(rng.randint(2, 6)):
        killed = {int(how.split()[0]) for how in counts.how}
        if counts.kills >= KILLS and counts.inside >= SHARE_INSIDE * KILLS and world in killed:
            break
        behind = counts.inside < (SHARE_INSIDE + 0.05) * (counts.kills + 1)
        kind = "write" if behind else rng.choice(("anywhere", "anywhere", "write", "after"))
        newest, read = newest_step(checkpoints), (folder / "output.log").stat().st_size if told else 0
        since_ns = time.time_ns()
        processes = server.start(folder, words_for(words, world), world)
        wait_for_instant(processes, checkpoints, kind, rng, whole.seconds)
        how = kill(processes, rng)
        counts.orphans += processes.pids if how == "without its workers" else []
        codes = processes.wait()
        problems += check_resumed(processes.output()[read:], newest)
        if -signal.SIGKILL not in codes:
            if codes != [0] * world:
                problems.append(f"exit codes {codes} before a kill:\n{processes.output()[read:]}")
            break  # it was done before the instant came
        inside = being_written(checkpoints, since_ns) is not None
        counts.kills += 1
        counts.inside += inside
        counts.how[f"{world} processes, {how}{', in a write' if inside else ''}"] += 1
        told.append(f"{kind}: {how}, {'inside a write' if inside else 'outside'}, newest {newest_step(checkpoints)}")
    newest = newest_step(checkpoints)
    processes = server.start(folder, words_for(words, world), world)
    processes.finish()
    if newest is not None and newest < tiny_runs.STEPS:
        problems += check_resumed(processes.output()[-4000:].rpartition("engine:")[2], newest)
    problems += tiny_runs.differences(tiny_runs.left_by(folder / "run"), whole.left)
    counts.chains += 1
    if problems:
        counts.different.append(f"{folder.name}, {world} processes, kills {told}: {problems}")


def test_runs_killed_at_random_instants_end_byte_by_byte_as_the_undisturbed_run(tmp_path: Path) -> None:
    """4 SIGKILLs (LDM_KILLS), 30 % or more inside a checkpoint write; weights, average, optimizer, log and ledger."""
    rng, counts = random.Random(trials.SEED), Counts()
    words = tiny_runs.make(tmp_path / "material")
    with ForkServer() as server:
        whole = {world: undisturbed_run(server, tmp_path / f"undisturbed-{world}", words, world) for world in WORLDS}
        for number in range(3 * KILLS):  # about a third is needed
            killed = {int(how.split()[0]) for how in counts.how}
            if counts.kills >= KILLS and counts.inside >= SHARE_INSIDE * KILLS and killed >= set(WORLDS):
                break
            world = WORLDS[number % len(WORLDS)]
            chain(server, tmp_path / f"chain-{number}", words, world, whole[world], rng, counts)
    # A worker asks every few seconds whether its training process is there.
    orphans = still_there(counts.orphans, 15.0)
    trials.report(
        "kills",
        kills=counts.kills,
        inside_a_checkpoint_write=counts.inside,
        runs=counts.chains,
        identical_runs=counts.chains - len(counts.different),
        killed_without_their_workers=len(counts.orphans),
        whose_workers_never_ended=len(orphans),
        how=dict(sorted(counts.how.items())),
    )
    assert not counts.different, "\n".join(counts.different)
    assert not orphans, f"loader workers of {len(orphans)} of {len(counts.orphans)} killed processes never ended"
    assert counts.kills >= KILLS
    assert {int(how.split()[0]) for how in counts.how} == set(WORLDS)
    assert counts.inside >= SHARE_INSIDE * KILLS
