"""Several sources through the real loader: exact for any processes and resumes, as the order says, refused if unfit."""

import itertools
import multiprocessing
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_mixtures import KINDS, Case, bucket_sample, make_cases, other_sample, reference, several
from tiny_shards import (
    COUNTS,
    ENCODER,
    LATENT,
    config,
    encoded_sample,
    global_batches,
    loader_of,
    write,
)

from ldm.config import load_config, to_yaml
from ldm.data.buckets import BucketConfig
from ldm.data.cache import CacheConfig
from ldm.data.data_config import DataConfig, SourceConfig
from ldm.data.dataset import SampleDataset, damage_of_indexing
from ldm.data.draws import Purpose, uniform
from ldm.data.interleaving import Mix
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.order import Order


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0), (4, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:buckets with fewer samples")
def test_global_batches_are_equal_for_1_2_4_processes_0_1_2_workers_and_resumes(
    cases: dict[str, Case], kind: str, world: int, workers: int
) -> None:
    """A run of sixteen steps that is interrupted twice, at steps that differ from case to case."""
    case = cases[kind]
    settings = config(Path(), **vars(case.settings) | {"workers": workers})
    first, second = 1 + (world + 2 * workers) % 6, 8 + (3 * world + workers) % 7
    found = []
    for start, stop in ((0, first), (first, second), (second, 16)):
        # What a process keeps in memory, such as the order of the epoch it is in, must not matter.
        fresh = [Manifest.load(one.folder) for one in several(case.manifests)]
        found += global_batches(fresh, settings, world, start, stop, **case.changes)
    assert found == reference(kind, case)


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.filterwarnings("ignore:buckets with fewer samples")
def test_spawned_workers_give_the_same_batches(cases: dict[str, Case], kind: str) -> None:
    case = cases[kind]
    settings = config(Path(), **vars(case.settings) | {"workers": 1})
    found = global_batches(case.manifests, settings, 1, 0, 2, context="spawn", **case.changes)
    assert found == reference(kind, case)[:2]


def test_two_sources_come_in_the_shares_of_their_weights_each_once_in_its_own_epochs(cases: dict[str, Case]) -> None:
    case, seed = cases["two sources"], 3
    batches = list(loader_of(case.manifests, case.settings, seed, stop_step=30))
    keys = list(itertools.chain(*(batch.keys for batch in batches)))
    captions = list(itertools.chain(*(batch.captions for batch in batches)))
    mix = Mix([1, 2])
    orders = [Order(COUNTS, seed, 2), Order([9, 3], seed, 2, stream=1)]
    for position, (key, caption) in enumerate(zip(keys, captions, strict=True)):
        source, ordinal = mix.place(position)
        _, shard, number = orders[source].locate(ordinal)
        assert key == f"{source}:s-{shard}.tar/k{number:03d}"
        assert caption == f"caption {shard + 100 * source} {number}"
    assert Counter(key[0] for key in keys) == {"0": 80, "1": 160}
    second = [key for key in keys if key[0] == "1"]
    for epoch in range(160 // 12):
        assert len(set(second[12 * epoch : 12 * epoch + 12])) == 12


def test_without_weights_an_epoch_of_two_sources_is_each_sample_once(cases: dict[str, Case]) -> None:
    case = cases["two sources"]
    settings = config(Path(), shards=[SourceConfig(shards="a"), SourceConfig(shards="b")])
    batches = list(loader_of(case.manifests, settings, micro_batch=13, stop_step=10))
    keys = list(itertools.chain(*(batch.keys for batch in batches)))
    assert len(keys) == 2 * (sum(COUNTS) + 12)
    assert set(Counter(keys).values()) == {2}
    assert len(set(keys[:65])) == 65


def test_a_weight_alone_does_not_alter_one_source(cases: dict[str, Case]) -> None:
    case = cases["encoded"]
    settings = config(Path(), flip=0.5, shards=[SourceConfig(shards="a", weight=0.3)])
    assert global_batches([case.manifests], settings, 1, 0, 16) == reference("encoded", case)


@pytest.mark.filterwarnings("ignore:buckets with fewer samples")
@pytest.mark.parametrize("kind", ["two sources", "buckets encoded"])
def test_a_damaged_sample_gives_way_to_the_same_reserve_of_its_bucket(
    cases: dict[str, Case], kind: str, tmp_path: Path
) -> None:
    case = cases[kind]
    copies = []
    for number, manifest in enumerate(several(case.manifests)):
        make = {"two sources": [encoded_sample, other_sample], "buckets encoded": [bucket_sample]}[kind][number]
        copies.append(write(tmp_path / str(number), make, manifest.counts))
    last = copies[-1]
    content = bytearray(last.path(0).read_bytes())
    index = last.index(0)
    for sample in (1, 4):
        content[int(index.offsets[index.starts[sample]])] ^= 1
    last.path(0).write_bytes(content)
    expected = list(loader_of(case.manifests, case.settings, stop_step=16, **case.changes))
    found = list(loader_of(copies, case.settings, stop_step=16, **case.changes))
    label = f"{len(copies) - 1}:" if len(copies) > 1 else ""
    records = [one for batch in found for one in batch.quarantined]
    assert {(one.shard, one.key) for one in records} == {(f"{label}s-0.tar", key) for key in ("k001", "k004")}
    replaced = {one.position: one.replacement for one in records}
    for batch, whole in zip(found, expected, strict=True):
        assert batch.noise.shape == whole.noise.shape
        assert torch.equal(batch.noise, whole.noise)
        assert torch.equal(batch.sizes[:, 4:], whole.sizes[:, 4:])
        for row, position in enumerate(batch.positions.tolist()):
            damaged = whole.keys[row] in (f"{label}s-0.tar/k001", f"{label}s-0.tar/k004")
            assert damaged == (position in replaced)
            assert batch.keys[row] == replaced.get(position, whole.keys[row])
            if damaged and kind == "two sources":
                ranks = [
                    f"{source}:s-{shard}.tar/k{number:03d}"
                    for source, counts in enumerate((COUNTS, [9, 3]))
                    for shard, count in enumerate(counts)
                    for number in range(count)
                ]
                drawn = (
                    ranks[int(uniform(3, Purpose.RESERVE, position, attempt) * 65)] for attempt in itertools.count()
                )
                assert batch.keys[row] == next(key for key in drawn if key not in ("1:s-0.tar/k001", "1:s-0.tar/k004"))
                source, shard, number = (int(one) for one in re.findall(r"[0-9]+", batch.keys[row]))
                assert batch.captions[row] == f"caption {shard + 100 * source} {number}"
    again = global_batches([Manifest.load(one.folder) for one in copies], case.settings, 4, 3, 16, **case.changes)
    assert again == global_batches(copies, case.settings, 1, 0, 16, **case.changes)[3:]


def test_damage_that_indexing_found_names_the_source(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        manifest = write(tmp_path / name, encoded_sample, [4, 3])
        content = manifest.path(1).read_bytes()
        manifest.path(1).write_bytes(content[: int(manifest.index(1).offsets[-1]) + 1])
        manifests.append(build_manifest(tmp_path / name, progress=False))
    assert [(one.shard, one.key, one.position) for one in damage_of_indexing(manifests)] == [
        ("0:s-1.tar", "k002", -1),
        ("1:s-1.tar", "k002", -1),
    ]
    assert [one.shard for one in damage_of_indexing(manifests[:1])] == ["s-1.tar"]


def without_text(shard: int, number: int) -> dict:
    return encoded_sample(shard, number, text=False)


def test_sources_that_do_not_fit_each_other_are_an_error_that_names_both(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    encoded, raw = cases["encoded"].manifests, cases["raw"].manifests
    settings = config(Path(), shards=[SourceConfig(shards="a"), SourceConfig(shards="b")])
    plain = write(tmp_path / "plain", without_text, encoder=ENCODER)
    for other, kind in ((raw, "pictures"), (plain, "moments without text states")):
        with pytest.raises(ValueError, match=rf"has moments and torch.float16 text states \(3, 5\), .* has {kind}"):
            loader_of([encoded, other], settings)
    for number in (1, 3):
        with pytest.raises(ValueError, match="2 weights"):
            loader_of([encoded] * number, settings)


def test_text_states_of_a_wider_type_than_the_first_samples_are_refused_and_never_narrowed(tmp_path: Path) -> None:
    def sample(shard: int, number: int) -> dict:
        one = encoded_sample(shard, number)
        if number == 2:
            one["text.npy"] = one["text.npy"].astype(np.float32) + 1e-6
        return one

    manifest = write(tmp_path, sample, [6])
    batch = SampleDataset(config(tmp_path), manifest, 3, latent_shape=LATENT).__getitems__(range(6))
    (reason,) = {(one.key, one.reason) for one in batch.quarantined}
    assert reason == ("k002", "member .text.npy is float32, the first sample's is torch.float16")
    for row, key in enumerate(batch.keys):
        stored = encoded_sample(0, int(key[-3:]))["text.npy"]
        assert batch.text_states is not None
        np.testing.assert_array_equal(batch.text_states[row], stored)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "empty list"),
        ([SourceConfig(shards="a", weight=1.0), SourceConfig(shards="b")], "set all of them or none"),
        ([SourceConfig(shards="a", weight=-1.0)], "numbers above 0"),
        ([SourceConfig(shards="a", weight=0.0), SourceConfig(shards="b", weight=1.0)], "numbers above 0"),
        ([SourceConfig(shards="a", weight=float("inf"))], "numbers above 0"),
    ],
)
def test_sources_that_cannot_be_are_an_error(shards: list[SourceConfig], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.shards.*{message}"):
        DataConfig(shards=shards, resolution=8)


def test_sources_buckets_and_cache_are_read_from_yaml_and_saved_as_they_were(tmp_path: Path) -> None:
    debug = Path(__file__).parent.parent / "configs" / "debug.yaml"
    plain = load_config(debug)
    shards = str(plain.data.shards)
    assert plain.data.sources == [SourceConfig(shards=shards)]
    source = "[{shards: a, weight: 2}, {shards: https://example.org/b, weight: 0.5}]"
    text = debug.read_text().replace(
        f"shards: {shards}\n",
        f"shards: {source}\n  buckets: {{step: 32}}\n  cache: {{folder: /disk, limit_gb: 2}}\n",
        1,
    )
    path = tmp_path / "run.yaml"
    path.write_text(text)
    data = load_config(path).data
    assert data.shards == [
        SourceConfig(shards="a", weight=2.0),
        SourceConfig(shards="https://example.org/b", weight=0.5),
    ]
    assert (data.buckets, data.cache) == (BucketConfig(step=32), CacheConfig(folder="/disk", limit_gb=2.0))
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(load_config(path)))
    assert load_config(saved) == load_config(path)
    for wrong in ("[{shards: a, wieght: 2}]", "[{weight: 2}]", "[a, b]", "[{shards: a, weight: 2}, {shards: b}]", "[]"):
        path.write_text(text.replace(source, wrong))
        with pytest.raises(ValueError, match="shards"):
            load_config(path)


def _batches_within(limit: int, manifest: Manifest, settings: DataConfig, results: object) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    batches = list(loader_of(manifest, settings, stop_step=20))
    results.put(([key for batch in batches for key in batch.keys], sum(len(one.quarantined) for one in batches)))


def test_a_process_with_few_file_descriptors_reads_the_same_samples(tmp_path: Path) -> None:
    manifest = write(tmp_path / "many", counts=[4] * 120)
    settings = config(tmp_path / "many", shards_per_block=120)
    context = multiprocessing.get_context("spawn")
    found = []
    for limit in (1024, 64):
        results = context.Queue()
        process = context.Process(target=_batches_within, args=(limit, manifest, settings, results))
        process.start()
        found.append(results.get(timeout=120))
        process.join()
    assert found[0] == found[1]
    assert found[0][1] == 0
