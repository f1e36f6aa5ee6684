"""Schedules of changing processes and workers: the same samples, draws and losses as one undisturbed process.

Six run here, and one with training; all of them:
    LDM_SCHEDULES=100 LDM_TRAINED_SCHEDULES=10 LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_elastic.py
"""

import dataclasses
import io
import json
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import trials
from forked_runs import ForkServer
from PIL import Image

from ldm.data.batch import Batch
from ldm.data.loader import DataConfig, make_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.data.shards import write_shards
from ldm.train import INTERRUPTED

SCHEDULES = trials.number("LDM_SCHEDULES", 3)
TRAINED_SCHEDULES = trials.number("LDM_TRAINED_SCHEDULES", 1)
WORLDS = (1, 2, 3, 4, 6, 8)
WORKERS = (0, 1, 2, 4)
GLOBAL_BATCH = 24
STEPS = 12
CHANGES = 3
"""Fewest changes of a schedule."""
LATENT = (2, 4, 4)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a run between two changes."""

    stop: int
    world: int
    workers: int
    micro_batch: int


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def schedule(rng: random.Random) -> list[Segment]:
    """Four to six segments of 12 steps in all, each with other processes or workers than the one before."""
    cuts = sorted(rng.sample(range(1, STEPS), rng.randint(CHANGES, CHANGES + 2)))
    segments: list[Segment] = []
    for stop in [*cuts, STEPS]:
        world, workers = rng.choice(WORLDS), rng.choice(WORKERS)
        while segments and (world, workers) == (segments[-1].world, segments[-1].workers):
            world, workers = rng.choice(WORLDS), rng.choice(WORKERS)
        segments.append(Segment(stop, world, workers, rng.choice(divisors(GLOBAL_BATCH // world))))
    return segments


def samples(kind: str, count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(7)
    for i in range(count):
        sample: dict[str, Any] = {"__key__": f"{i:04d}", "txt": f"caption {i}"}
        if kind == "encoded":
            for name in ("moments.npy", "flipped.npy"):
                sample[name] = rng.standard_normal((4, 4, 4)).astype(np.float16)
            sample["text.npy"] = rng.standard_normal((3, 5)).astype(np.float16)
            sample["json"] = {"size": [9 + i, 8], "crop": [i % 3, 0]}
        else:
            stored = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (9 + i % 4, 9, 3), dtype=np.uint8)).save(stored, "PNG")
            sample["png"] = stored.getvalue()
            sample["json"] = {"captions": [f"first of {i}", f"second of {i}"]}
        yield sample


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """57 samples in 5 shards of either kind, two of them damaged after indexing: reserves take part."""
    made = {}
    for kind, encoder in (("encoded", {"weights": "test"}), ("raw", None)):
        folder = tmp_path_factory.mktemp("shards") / kind
        manifest = write_shards(samples(kind, 57), folder, prefix="s", samples_per_shard=13, encoder=encoder)
        for shard in (0, 3):
            index = manifest.index(shard)
            tiny_runs.flip_bit(folder / f"s-{shard:06d}.tar", int(index.offsets[4] + index.sizes[4] // 2))
        made[kind] = Manifest.load(folder)
    return made


def settings(manifest: Manifest, kind: str, rng: random.Random) -> dict[str, Any]:
    """What a run's data depend on: drawn once for a schedule and its reference."""
    return {
        "shards": str(manifest.folder),
        "resolution": 8,
        "caption_dropout": rng.choice((0.1, 0.5)),
        "flip": rng.choice((0.0, 0.5)),
        "crop": "center" if kind == "encoded" else "random",
        "shards_per_block": rng.randint(1, 6),
    }


def global_batches(
    manifest: Manifest, values: dict[str, Any], seed: int, segments: list[Segment], prefetch: int = 2
) -> list[dict[str, Any]]:
    """Each step's global batch under a schedule, put together from the loaders of all ranks."""
    steps, start = [], 0
    for segment in segments:
        config = DataConfig(**values, workers=segment.workers, prefetch=prefetch)
        accumulation = GLOBAL_BATCH // segment.world // segment.micro_batch
        ranks = []
        for rank in range(segment.world):
            loader = make_loader(
                config,
                Manifest.load(manifest.folder),
                seed,
                Positions(
                    rank=rank,
                    world=segment.world,
                    micro_batch=segment.micro_batch,
                    accumulation=accumulation,
                    start_step=start,
                    stop_step=segment.stop,
                ),
                latent_shape=LATENT,
            )
            ranks.append(list(loader))
        for step in range(segment.stop - start):
            part = slice(step * accumulation, (step + 1) * accumulation)
            steps.append(joined([batch for batches in ranks for batch in batches[part]]))
        start = segment.stop
    return steps


def joined(batches: list[Batch]) -> dict[str, Any]:
    """Micro-batches one after the other: each field as one value, tensors as their bytes."""
    whole: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], torch.Tensor):
            tensor = torch.cat(values)
            whole[field.name] = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        elif isinstance(values[0], list):
            whole[field.name] = [one for value in values for one in value]
        else:
            whole[field.name] = values[0]
    return whole


def test_random_schedules_of_processes_and_workers_give_the_global_batches_of_one_process(
    manifests: dict[str, Manifest],
) -> None:
    """3 schedules (LDM_SCHEDULES) with 3 to 5 changes: ids, draws, dropped captions, tensors and ledger lines."""
    rng = random.Random(trials.SEED)
    different, changes, replaced = [], 0, 0
    for number in range(SCHEDULES):
        kind, seed = rng.choice(sorted(manifests)), rng.randrange(2**32)
        manifest, segments = manifests[kind], schedule(rng)
        values = settings(manifest, kind, rng)
        reference = global_batches(manifest, values, seed, [Segment(STEPS, 1, 0, GLOBAL_BATCH)])
        found = global_batches(manifest, values, seed, segments, prefetch=rng.randint(1, 4))
        changes += len(segments) - 1
        replaced += sum(len(step["quarantined"]) for step in reference)
        for step, (ours, theirs) in enumerate(zip(found, reference, strict=True)):
            fields = sorted(name for name in theirs if ours[name] != theirs[name])
            if fields:
                different.append(f"schedule {number}, {kind}, {segments}: step {step} differs in {fields}")
                break
    trials.report(
        "elastic schedules, loader alone",
        schedules=SCHEDULES,
        identical=SCHEDULES - len(different),
        changes=changes,
        replaced_samples=replaced,
    )
    assert not different, "\n".join(different)
    assert replaced > 0


def logged(run_dir: Path) -> int:
    """Steps in the log of a run that goes on."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def train_elastically(
    server: ForkServer, folder: Path, words: list[str], worlds: Sequence[int], rng: random.Random
) -> list[tuple[int, int, str]]:
    """One run over at least four numbers of processes and workers; (world, workers, end) of each part."""
    folder.mkdir()
    run_dir, parts = folder / "run", []
    while True:
        world, workers = rng.choice(worlds), rng.choice((0, 0, 1, 2))
        if parts and (world, workers) == parts[-1][:2]:
            continue
        micro_batch = rng.choice([one for one in divisors(GLOBAL_BATCH // world) if one >= 3])
        options = [f"--data.workers={workers}", f"--training.max_micro_batch={micro_batch}"]
        enough = logged(run_dir) + rng.randint(1, 3)
        processes = server.start(folder, [*words, *options, f"--distributed.processes={world}"], world)
        if len(parts) >= CHANGES:
            processes.finish()
            return [*parts, (world, workers, "finished")]
        deadline = time.monotonic() + 120
        while processes.running() and logged(run_dir) < enough:
            assert time.monotonic() < deadline, processes.output()
            time.sleep(0.005)
        end = rng.choice(("SIGTERM", "SIGKILL"))
        if end == "SIGTERM":
            processes.kill(rng.randrange(world), sign=signal.SIGTERM)
            processes.finish(INTERRUPTED)
        else:
            processes.kill()
            processes.wait()
        parts.append((world, workers, end))


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_training_under_random_schedules_gives_the_losses_of_one_process_to_1e6(tmp_path: Path) -> None:
    """1 run (LDM_TRAINED_SCHEDULES) with 3 changes, ended by SIGTERM or SIGKILL; losses within 1e-6."""
    rng = random.Random(trials.SEED)
    words = [*tiny_runs.make(tmp_path / "material"), "--training.steps=32"]
    worst, gone_wrong, told = 0.0, [], []
    with ForkServer() as server:
        whole = tmp_path / "undisturbed"
        whole.mkdir()
        server.start(whole, words).finish()
        expected = numbers(whole / "run")
        for number in range(TRAINED_SCHEDULES):
            folder = tmp_path / f"run-{number}"
            worlds = WORLDS if number else WORLDS[:3]  # eight processes on two cores take their time
            parts = train_elastically(server, folder, words, worlds, rng)
            told.append(parts)
            found = numbers(folder / "run")
            deviations = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True)]
            exact = ("step", "lr", "ema_decay", "captions_dropped", "quarantined")
            different = [name for name in exact if [one[name] for one in found] != [one[name] for one in expected]]
            worst = max(worst, *deviations)
            if different or max(deviations) > 1e-6:
                gone_wrong.append(f"run {number}, {parts}: {different}, loss deviates by {max(deviations):.2e}")
    trials.report(
        "elastic schedules with training",
        schedules=TRAINED_SCHEDULES,
        within_1e_6=TRAINED_SCHEDULES - len(gone_wrong),
        changes=sum(len(parts) - 1 for parts in told),
        worst_relative_deviation_of_a_loss=worst,
        parts=told,
    )
    assert not gone_wrong, "\n".join(gone_wrong)
