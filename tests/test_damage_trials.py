"""Shards cut short or with a flipped bit, at random places, after indexing: the ledger names exactly what is damaged.

60 of each here; all of them:
    LDM_TRUNCATIONS=1000 LDM_FLIPS=1000 LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_damage_trials.py
"""

import io
import json
import os
import random
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials
import webdataset
from PIL import Image

from ldm.data.batch import Batch
from ldm.data.loader import DataConfig, make_loader
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.positions import Positions
from ldm.data.quarantine import Ledger

TRUNCATIONS = trials.number("LDM_TRUNCATIONS", 60)
FLIPS = trials.number("LDM_FLIPS", 60)
SAMPLES, SHARDS, MICRO_BATCH = 40, 4, 8
KINDS = ("encoded", "raw")


def sample(kind: str, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([11, number])
    made: dict[str, Any] = {"txt": f"caption {number}".encode(), "json": b'{"size": [9, 8], "crop": [0, 1]}'}
    if kind == "encoded":
        for name, shape in (("moments.npy", (8, 16, 16)), ("text.npy", (8, 64))):
            stored = io.BytesIO()
            np.save(stored, rng.standard_normal(shape).astype(np.float16))
            made[name] = stored.getvalue()
    else:
        stored = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(stored, "PNG")
        made["png"] = stored.getvalue()
        if number % 2:  # a name too long for one header: the tar has headers that belong to headers
            return {"__key__": f"{'long' * 30}/größe{number:04d}", **made}
    return {"__key__": f"{number:04d}", **made}


@dataclass
class Shards:
    """A folder of undamaged shards that webdataset wrote and the project indexed, and what comes out of them."""

    kind: str
    folder: Path
    whole: list[bytes]
    """Each shard's bytes."""
    batches: list[Batch]
    content: dict[str, bytes] = field(default_factory=dict)
    """What training gets of each sample, by "shard/key"."""

    def tar(self, shard: int) -> Path:
        return self.folder / f"s-{shard:06d}.tar"

    def restore(self, shard: int) -> None:
        """A new file in the place of the damaged one: an open map of the old one stays what it is."""
        temporary = self.folder / "whole"
        temporary.write_bytes(self.whole[shard])
        os.replace(temporary, self.tar(shard))


def content_of(batch: Batch) -> Iterator[tuple[str, bytes]]:
    pixels = batch.moments if batch.images is None else batch.images
    for row, key in enumerate(batch.keys):
        states = b"" if batch.text_states is None else batch.text_states[row].numpy().tobytes()
        yield key, pixels[row].numpy().tobytes() + states + batch.captions[row].encode()


def epoch(shards: Shards) -> Iterator[Batch]:
    """One epoch in this process; the order comes from the seed."""
    resolution = 64 if shards.kind == "encoded" else 40
    config = DataConfig(shards=str(shards.folder), resolution=resolution, workers=0, shards_per_block=2)
    steps = {"start_step": 0, "stop_step": SAMPLES // MICRO_BATCH}
    positions = Positions(rank=0, world=1, micro_batch=MICRO_BATCH, accumulation=1, **steps)
    return iter(make_loader(config, Manifest.load(shards.folder), 5, positions, latent_shape=(4, 16, 16)))


@pytest.fixture(scope="module", params=KINDS)
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp(request.param)
    with webdataset.ShardWriter(str(folder / "s-%06d.tar"), maxcount=SAMPLES // SHARDS, verbose=0) as writer:
        for number in range(SAMPLES):
            writer.write(sample(request.param, number))
    manifest = build_manifest(folder, {"weights": "test"} if request.param == "encoded" else None, progress=False)
    assert list(manifest.counts) == [SAMPLES // SHARDS] * SHARDS
    made = Shards(request.param, folder, [], [])
    made.whole = [made.tar(shard).read_bytes() for shard in range(SHARDS)]
    made.batches = list(epoch(made))
    made.content = {key: content for batch in made.batches for key, content in content_of(batch)}
    assert len(made.content) == SAMPLES
    return made


@dataclass
class Damage:
    """One trial's damage, and what the tar's own layout says that it costs."""

    shard: int
    place: int
    """First byte that is missing, or the byte with the flipped bit."""
    flipped: int | None
    """Bit, or None for a cut."""
    samples: set[str]

    def apply(self, tar: Path) -> None:
        """In place, as a failing disk or another program does it."""
        if self.flipped is None:
            os.truncate(tar, self.place)
            return
        with tar.open("r+b") as file:
            value = file.read()[self.place]
            file.seek(self.place)
            file.write(bytes([value ^ 1 << self.flipped]))


def draw_damage(shards: Shards, flip: bool, rng: random.Random) -> Damage:
    shard = rng.randrange(SHARDS)
    whole, tar = shards.whole[shard], shards.tar(shard)
    place = rng.randrange(len(whole))
    if not flip and rng.random() < 0.3:  # at the edges of blocks readers go wrong in their own ways
        place -= place % 512
    found = set()
    with tarfile.open(fileobj=io.BytesIO(whole)) as layout:
        members = layout.getmembers()
    if flip and rng.random() < 0.5:  # else captions, of ten bytes, would hardly be hit
        member = rng.choice(members)
        place = member.offset_data + rng.randrange(member.size)
    for member in members:
        first, behind = member.offset_data, member.offset_data + member.size
        if (first <= place < behind) if flip else behind > place:
            folder, slash, base = member.name.rpartition("/")
            found.add(f"{tar.name}/{folder}{slash}{base.split('.')[0]}")
    return Damage(shard, place, rng.randrange(8) if flip else None, found)


def our_problems(shards: Shards, damage: Damage, batches_before: int, folder: Path, counts: Counter) -> list[str]:
    """Reads an epoch with the damage done after `batches_before` batches; what is not as it has to be."""
    problems: list[str] = []
    tar, delivered = shards.tar(damage.shard), []
    ledger = Ledger(folder / f"{sum(counts.values())}.jsonl", limit=1.0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if batches_before == 0:
            damage.apply(tar)
        stream = epoch(shards)
        for number in range(SAMPLES // MICRO_BATCH):
            if batches_before and number == batches_before:
                damage.apply(tar)
            batch = next(stream)
            delivered.append(batch)
            ledger.append(batch.quarantined, len(batch.positions))
    if batches_before == 0 and damage.flipped is None and not any(tar.name in str(one.message) for one in warned):
        problems.append("nobody was warned of the file's size")
    to_come = {key for batch in shards.batches[batches_before:] for key in batch.keys}
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()] if ledger.path.exists() else []
    listed = [f"{line['shard']}/{line['key']}" for line in lines]
    # Reserves that are damaged too are listed as well, also those whose own position was before the damage.
    must, may = damage.samples & to_come, damage.samples
    if len(set(listed)) != len(listed):
        problems.append(f"listed twice: {sorted(listed)}")
    if not must <= set(listed) <= may or (batches_before == 0 and set(listed) != must):
        problems.append(f"the ledger has {sorted(set(listed))}, damaged are {sorted(must)}")
    if ledger.replaced != len(must):
        problems.append(f"{ledger.replaced} counted as replaced, expected {len(must)}")
    for number, (ours, theirs) in enumerate(zip(delivered, shards.batches, strict=True)):
        damaged = damage.samples if number >= batches_before else set()
        for (key, content), (expected, _) in zip(content_of(ours), content_of(theirs), strict=True):
            if content != shards.content.get(key):
                problems.append(f"{key} was delivered with other bytes")
            if (key != expected) != (expected in damaged) or key in damaged:
                problems.append(f"{key} was delivered where {expected} stood")
    counts["trials that damage no sample"] += not damage.samples
    counts["damaged samples"] += len(damage.samples)
    counts["of them still to be read"] += len(must)
    counts["of these in the ledger"] += len(must & set(listed))
    counts["in the ledger and not damaged"] += len(set(listed) - may)
    return problems


def stock(shards: Shards) -> tuple[dict[str, Any], bool]:
    """Decoded samples that stock webdataset gives of all shards, by "shard/key", and whether it ended by an error."""
    found: dict[str, Any] = {}
    paths = [str(shards.tar(number)) for number in range(SHARDS)]
    stream = webdataset.WebDataset(paths, shardshuffle=False, handler=webdataset.warn_and_continue)
    stream = stream.decode("rgb8", handler=webdataset.warn_and_continue)
    try:
        for one in stream:
            name = f"{Path(one['__url__']).name}/{one['__key__']}"
            found[name] = {key: value for key, value in one.items() if not key.startswith("__")}
    except Exception:
        return found, True
    return found, False


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def count_stock(shards: Shards, whole: dict[str, Any], counts: Counter) -> None:
    """What stock webdataset makes of the damage that is in the files at the moment."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found, aborted = stock(shards)
    told = aborted or any(issubclass(one.category, UserWarning) for one in warned)
    lost = len(whole.keys() - found.keys())
    wrong = sum(name not in whole or not equal(found[name], whole[name]) for name in found)
    counts["webdataset: lost, with a warning or an error in the trial"] += lost if told else 0
    counts["webdataset: lost without any"] += 0 if told else lost
    counts["webdataset: delivered with wrong or missing members"] += wrong
    counts["webdataset: trials with something lost or wrong and no word"] += bool(lost or wrong) and not told
    counts["webdataset: trials that ended by an error"] += aborted


def run_trials(shards: Shards, flip: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, list[str]]:
    rng, counts, problems = random.Random(f"{trials.SEED} {shards.kind} {flip}"), Counter(), []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # its warning handler sleeps half a second each time
    whole, _ = stock(shards)
    assert len(whole) == SAMPLES
    for number in range((FLIPS if flip else TRUNCATIONS) // len(KINDS)):
        damage = draw_damage(shards, flip, rng)
        before = rng.choice((0, 0, rng.randrange(1, SAMPLES // MICRO_BATCH)))
        counts["trials"] += 1
        try:
            found = our_problems(shards, damage, before, folder, counts)
        except Exception as error:
            found = [f"the loader ended with {type(error).__name__}: {error}"]
        count_stock(shards, whole, counts)
        shards.restore(damage.shard)
        if found:
            problems.append(f"trial {number}, after {before} batches, {damage}: {'; '.join(found)}")
    return counts, problems


@pytest.mark.parametrize("flip", [False, True], ids=["truncations", "flipped bits"])
def test_exactly_the_damaged_samples_are_in_the_ledger_and_all_others_are_delivered(
    shards: Shards, flip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 truncations (LDM_TRUNCATIONS) and 60 flipped bits (LDM_FLIPS), a third of them under a loader that reads."""
    counts, problems = run_trials(shards, flip, tmp_path, monkeypatch)
    what = "flipped bits" if flip else "truncations"
    table = "\n".join(f"{count:7,}  {name}" for name, count in counts.items())
    print(f"\n{what} of {shards.kind} shards, seed {trials.SEED}:\n{table}")
    trials.report(f"{what}, {shards.kind} shards", **counts, trials_gone_wrong=len(problems))
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize("flip", [False, True], ids=["truncations", "flipped bits"])
def test_damage_done_before_indexing_never_costs_a_sample_without_a_word(
    shards: Shards, flip: bool, tmp_path: Path
) -> None:
    """As many trials: where the index lacks a sample or a member, it says that there is damage.

    Tars have checksums of headers and none of the names that are too long for one: those are left out here.
    """
    rng, problems, counts = random.Random(f"{trials.SEED} {shards.kind} {flip} before"), [], Counter()
    for number in range((FLIPS if flip else TRUNCATIONS) // len(KINDS)):
        damage = draw_damage(shards, flip, rng)
        while flip and in_long_name(shards.whole[damage.shard], damage.place):
            damage = draw_damage(shards, flip, rng)
        folder = tmp_path / str(number)
        folder.mkdir()
        tar = folder / shards.tar(damage.shard).name
        tar.write_bytes(shards.whole[damage.shard])
        damage.apply(tar)
        manifest = build_manifest(folder, progress=False)
        index = manifest.index(0)
        found = {f"{tar.name}/{index.key(one)}": index.starts[one + 1] - index.starts[one] for one in range(len(index))}
        expected = {name for name in shards.content if name.startswith(f"{tar.name}/")}
        lacking = {name for name in expected if found.get(name) != len(sample(shards.kind, 0)) - 1}
        counts["trials"] += 1
        counts["samples lacking or without a member"] += len(lacking)
        counts["trials with damage recorded"] += bool(manifest.damaged())
        if (lacking or found.keys() - expected) and not manifest.damaged():
            problems.append(f"trial {number}, {damage}: {sorted(lacking)} are not whole and nothing is said")
        if not flip and lacking - damage.samples:
            problems.append(f"trial {number}, {damage}: {sorted(lacking - damage.samples)} were whole and are lost")
    trials.report(f"{'flipped bits' if flip else 'truncations'} before indexing, {shards.kind} shards", **counts)
    assert not problems, "\n".join(problems[:20])


def in_long_name(tar: bytes, place: int) -> bool:
    """Whether a byte lies in the headers of a member whose name does not fit into one."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as layout:
        return any(member.offset <= place < member.offset_data and len(member.name) > 100 for member in layout)
