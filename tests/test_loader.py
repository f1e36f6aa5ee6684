"""The real DataLoader: equal batches whatever the processes, workers and resumes; draws; damage; signals."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import (
    COUNTS,
    ENCODER,
    LATENT,
    config,
    encoded_sample,
    flat,
    global_batches,
    loader_of,
    png,
    raw_sample,
    write,
)

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.dataset import SampleDataset
from ldm.data.draws import Purpose, generator
from ldm.data.loader import (
    make_validation_loader,
    rank_positions,
    start_worker,
)
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.order import Order
from ldm.data.samples import draw


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("raw"), raw_sample)


@pytest.fixture(scope="module")
def reference(encoded: Manifest) -> list[dict]:
    """Eight steps of 8: more than one epoch of the 53 samples."""
    return global_batches(encoded, config(encoded.folder, flip=0.5), world=1, start=0, stop=8)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_are_equal_for_1_2_4_processes_and_0_1_2_workers(
    encoded: Manifest, reference: list[dict], world: int, workers: int
) -> None:
    settings = config(encoded.folder, flip=0.5, workers=workers)
    assert global_batches(encoded, settings, world, 0, 8) == reference


@pytest.mark.parametrize("start", range(1, 8))
def test_a_resume_at_any_step_goes_on_with_the_same_batches(
    encoded: Manifest, reference: list[dict], start: int
) -> None:
    settings = config(encoded.folder, flip=0.5)
    assert global_batches(Manifest.load(encoded.folder), settings, (1, 2, 4)[start % 3], start, 8) == reference[start:]


def test_a_resume_with_workers_goes_on_with_the_same_batches(encoded: Manifest, reference: list[dict]) -> None:
    settings = config(encoded.folder, flip=0.5, workers=2, prefetch=1)
    assert global_batches(encoded, settings, 1, 5, 8) == reference[5:]


@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_spawned_workers_give_the_same_batches(kind: str, request: pytest.FixtureRequest) -> None:
    manifest = request.getfixturevalue(kind)
    expected = [flat([batch]) for batch in loader_of(manifest, config(manifest.folder), stop_step=2)]
    spawned = loader_of(manifest, config(manifest.folder, workers=1), stop_step=2, context="spawn")
    assert [flat([batch]) for batch in spawned] == expected


def test_positions_of_ranks_and_micro_batches_are_the_global_batch_in_order() -> None:
    for world, micro_batch, accumulation in [(1, 24, 1), (2, 4, 3), (4, 3, 2), (3, 2, 4), (8, 1, 3)]:
        for step in (0, 1, 1000):
            parts = [
                part for rank in range(world) for part in rank_positions(step, rank, world, micro_batch, accumulation)
            ]
            assert all(len(part) == micro_batch for part in parts)
            assert list(itertools.chain(*parts)) == list(range(24 * step, 24 * (step + 1)))


def test_each_sample_comes_exactly_once_an_epoch_through_the_loader(encoded: Manifest) -> None:
    total = sum(COUNTS)
    every = {f"s-{shard}.tar/k{number:03d}" for shard, count in enumerate(COUNTS) for number in range(count)}
    batches = list(loader_of(encoded, config(encoded.folder, workers=2), micro_batch=5, stop_step=3 * total // 5 + 1))
    keys = list(itertools.chain(*(batch.keys for batch in batches)))
    epochs = [keys[epoch * total : (epoch + 1) * total] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == total
        assert set(epoch) == every
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_holds_the_samples_of_the_order_and_the_draws_of_the_generator(encoded: Manifest) -> None:
    seed, settings = 3, config(encoded.folder, flip=0.5, caption_dropout=0.5)
    order = Order(COUNTS, seed, 2)
    (batch,) = loader_of(encoded, settings, seed, start_step=9, stop_step=10)
    assert batch.positions.tolist() == list(range(72, 80))
    flips = 0
    for row, position in enumerate(range(72, 80)):
        _, shard, number = order.locate(position)
        sample = encoded_sample(shard, number)
        assert batch.keys[row] == f"s-{shard}.tar/{sample['__key__']}"
        assert batch.captions[row] == sample["txt"]
        assert batch.sizes[row].tolist() == [100 + shard, 200 + number, shard, number, 8, 8]
        flip = generator(seed, Purpose.FLIP, position).random() < 0.5
        flips += flip
        assert batch.moments is not None
        assert batch.text_states is not None
        np.testing.assert_array_equal(batch.moments[row], sample["flipped.npy" if flip else "moments.npy"])
        np.testing.assert_array_equal(batch.text_states[row], sample["text.npy"])
        assert batch.u[row] == generator(seed, Purpose.TIMESTEP, position).random()
        assert bool(batch.dropped[row]) == (generator(seed, Purpose.DROPOUT, position).random() < 0.5)
        for tensor, purpose in ((batch.noise, Purpose.NOISE), (batch.posterior_noise, Purpose.POSTERIOR)):
            np.testing.assert_array_equal(
                tensor[row], generator(seed, purpose, position).standard_normal(LATENT, dtype=np.float32)
            )
    assert 0 < flips < 8
    assert batch.images is None
    assert (batch.moments.dtype, batch.text_states.dtype) == (torch.float32, torch.float16)
    assert (batch.u.dtype, batch.noise.dtype, batch.dropped.dtype) == (torch.float64, torch.float32, torch.bool)


def test_noise_and_timesteps_differ_between_samples_ranks_and_steps(encoded: Manifest) -> None:
    settings = config(encoded.folder)
    batches = [
        batch
        for rank in range(2)
        for batch in loader_of(encoded, settings, rank=rank, world=2, micro_batch=4, stop_step=20)
    ]
    noise = torch.cat([batch.noise for batch in batches] + [batch.posterior_noise for batch in batches]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(noise) == 2 * 160
    assert len(torch.unique(torch.cat([batch.u for batch in batches]))) == 160
    # The same sample in the next epoch gets other noise as well.
    correlation = (noise @ noise.T / noise.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9
    other = loader_of(encoded, settings, seed=4, micro_batch=4, stop_step=1)
    assert not torch.equal(next(iter(other)).noise, batches[0].noise)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_configured_rate_over_10000_positions(encoded: Manifest, rate: float) -> None:
    settings = config(encoded.folder, caption_dropout=rate)
    dropped = np.array([one.dropped for one in draw(settings, 0, range(10_000), encoded=True)])
    assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 10_000)


def test_other_captions_are_dropped_in_each_epoch_and_the_text_stays(encoded: Manifest) -> None:
    settings = config(encoded.folder, caption_dropout=0.3)
    total = sum(COUNTS)
    batches = list(loader_of(encoded, settings, micro_batch=total, stop_step=8))
    epochs = []
    for batch in batches:
        assert all(caption.startswith("caption") for caption in batch.captions)
        epochs.append({key for key, dropped in zip(batch.keys, batch.dropped.tolist(), strict=True) if dropped})
    assert len({frozenset(epoch) for epoch in epochs}) == 8
    # Bernoulli(0.3) in 8 epochs: a sample is dropped in none or in all with probability 0.058.
    counts = Counter(key for epoch in epochs for key in epoch)
    assert len(counts) > 0.8 * total
    assert max(counts.values()) < 8


def test_images_are_in_minus_one_to_one(tmp_path: Path) -> None:
    def sample(_: int, number: int) -> dict:
        pixels = np.full((8, 8, 3), (0, 255, 51, 204)[number], dtype=np.uint8)
        return {"__key__": f"k{number}", "png": png(pixels), "txt": "a"}

    manifest = write(tmp_path, sample, [4])
    dataset = SampleDataset(config(tmp_path), manifest, 0, latent_shape=LATENT, shuffle=False)
    batch = dataset.__getitems__([0, 1, 2, 3])
    assert batch.moments is None
    assert batch.images is not None
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    for image, value in zip(batch.images, (-1.0, 1.0, -0.6, 0.6), strict=True):
        torch.testing.assert_close(image, torch.full((3, 8, 8), value))


def test_flip_and_random_crop_of_pictures_follow_their_draws(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 30, 3), dtype=np.uint8)  # shorter side = resolution
    manifest = write(tmp_path, lambda _, number: {"__key__": f"k{number}", "png": png(pixels), "txt": "a"}, [50])
    settings = config(tmp_path, flip=0.5, crop="random")
    batch = SampleDataset(settings, manifest, 1, latent_shape=LATENT).__getitems__(list(range(50)))
    lefts, flips = set(), 0
    assert batch.images is not None
    for position, (image, sizes) in enumerate(zip(batch.images, batch.sizes.tolist(), strict=True)):
        left = int(generator(1, Purpose.CROP, position).random(2)[1] * 23)
        flip = generator(1, Purpose.FLIP, position).random() < 0.5
        wanted = pixels[:, left : left + 8]
        wanted = wanted[:, ::-1] if flip else wanted
        np.testing.assert_allclose(image.permute(1, 2, 0), wanted / 127.5 - 1, atol=1e-6)
        assert sizes == [8, 30, 0, left, 8, 8]
        lefts.add(left)
        flips += flip
    assert 0 in lefts or 1 in lefts
    assert 22 in lefts or 21 in lefts
    assert len(lefts) > 10
    assert 12 < flips < 38


def test_one_of_several_captions_is_drawn_anew_in_each_epoch(tmp_path: Path) -> None:
    captions = ["one", "two", "three"]

    def sample(_: int, number: int) -> dict:
        return raw_sample(0, number) | {"json": {"captions": captions, "original_width": 640, "original_height": 480}}

    manifest = write(tmp_path, sample, [4])
    dataset = SampleDataset(config(tmp_path), manifest, 1, latent_shape=LATENT)
    batch = dataset.__getitems__(list(range(400)))
    drawn = [captions[int(generator(1, Purpose.CAPTION, position).random() * 3)] for position in range(400)]
    assert batch.captions == drawn
    assert min(Counter(drawn).values()) > 100
    assert batch.sizes[0, :2].tolist() == [480, 640]


# What is done to sample k003 of shard s-2, and the reason that the ledger gives.
DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "caption missing": (lambda sample: sample.pop("txt"), "no caption"),
    "caption empty": (lambda sample: sample.update(txt=" \n"), "the caption is empty"),
    "caption not UTF-8": (lambda sample: sample.update(txt=b"caf\xe9"), "not UTF-8"),
    "json broken": (lambda sample: sample.update(json=b"{"), "not JSON"),
    "json no object": (lambda sample: sample.update(json=[1]), "holds a list"),
    "captions no strings": (lambda sample: sample.update(json={"captions": "one"}), "not a list of strings"),
    "moments missing": (lambda sample: sample.pop("moments.npy"), "no member .moments.npy"),
    "moments of wrong shape": (
        lambda sample: sample.update({"moments.npy": np.zeros((4, 4, 5), np.float16)}),
        "shape (4, 4, 5), expected (4, 4, 4)",
    ),
    "moments of wrong type": (
        lambda sample: sample.update({"moments.npy": np.zeros((4, 4, 4), np.int32)}),
        "is int32, expected float16 or float32",
    ),
    "moments NaN": (
        lambda sample: sample["moments.npy"].__setitem__((1, 2, 3), np.nan),
        "NaN or infinity",
    ),
    "moments infinite": (
        lambda sample: sample["moments.npy"].__setitem__((0, 0, 0), -np.inf),
        "NaN or infinity",
    ),
    "moments cut short": (lambda sample: sample.update({"moments.npy": b"\x93NUMPY\x01\x00\x10"}), "npy"),
    "moments no npy": (lambda sample: sample.update({"moments.npy": b"abc"}), "not a npy file"),
    "sizes broken": (lambda sample: sample.update(json={"size": [1, 2, 3]}), '"size" is'),
    "picture truncated": (
        lambda sample: sample.update(png=sample["png"][: len(sample["png"]) // 2]),
        "does not decode",
    ),
    "picture no picture": (lambda sample: sample.update(png=b"GIF89a"), "not a PNG, JPEG or WebP"),
    "picture missing": (lambda sample: sample.pop("png"), "no picture"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_sample_that_cannot_be_used_is_one_record_and_gives_way_to_the_same_reserve(
    tmp_path: Path, name: str
) -> None:
    change, reason = DAMAGE[name]
    make = raw_sample if "picture" in name else lambda shard, number: encoded_sample(shard, number, text=False)

    def damaged(shard: int, number: int) -> dict:
        sample = make(shard, number)
        if (shard, number) == (2, 3):
            change(sample)
        return sample

    encoder = None if "picture" in name else ENCODER
    whole = write(tmp_path / "whole", make, encoder=encoder)
    bad = write(tmp_path / "bad", damaged, encoder=encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raw_sample and lambdas write no encoder identity
        expected = SampleDataset(config(whole.folder), whole, 3, latent_shape=LATENT).__getitems__(list(range(53)))
        dataset = SampleDataset(config(bad.folder), bad, 3, latent_shape=LATENT)
    batch = dataset.__getitems__(list(range(53)))
    (record,) = batch.quarantined
    assert (record.shard, record.key) == ("s-2.tar", "k003")
    assert reason in record.reason
    row = expected.keys.index("s-2.tar/k003")
    assert record.position == row
    assert record.replacement == batch.keys[row] != "s-2.tar/k003"
    # The draws stay those of the position, and no other sample changes.
    assert torch.equal(batch.noise, expected.noise)
    assert torch.equal(batch.u, expected.u)
    assert torch.equal(batch.dropped, expected.dropped)
    assert batch.keys[:row] + batch.keys[row + 1 :] == expected.keys[:row] + expected.keys[row + 1 :]
    # The reserve is the same again, in another process and batch.
    again = SampleDataset(config(bad.folder), Manifest.load(bad.folder), 3, latent_shape=LATENT)[row]
    assert again.quarantined == [record]
    assert again.keys == [record.replacement]


def test_damage_after_indexing_gives_the_same_records_for_any_number_of_workers(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    index = manifest.index(4)
    content = bytearray(manifest.path(4).read_bytes())
    content[int(index.offsets[index.starts[2]])] ^= 4  # one bit of sample 2
    cut = int(index.offsets[index.starts[15]])  # samples 15 to 20 are gone
    manifest.path(4).write_bytes(content[:cut])
    results = []
    for workers in (0, 2):
        with pytest.warns(UserWarning, match=r"s-4\.tar has"):
            loader = loader_of(manifest, config(tmp_path, workers=workers), micro_batch=53, stop_step=2)
        batches = list(loader)
        results.append([flat([batch]) for batch in batches])
        for batch in batches:  # each epoch meets each of them again; the ledger writes a line once
            found = {(one.key, one.reason.split(":")[0]) for one in batch.quarantined}
            assert found == {("k002", "member .flipped.npy differs from its checksum")} | {
                (f"k{number:03d}", "the shard is cut short") for number in range(15, 21)
            }
            assert {one.shard for one in batch.quarantined} == {"s-4.tar"}
            assert all(one.replacement in batch.keys for one in batch.quarantined)
    assert results[0] == results[1]


def test_a_shard_cut_short_before_indexing_is_told_by_the_manifest_and_the_rest_is_read(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    os.truncate(manifest.path(4), int(manifest.index(4).offsets[manifest.index(4).starts[15]]) + 1)
    manifest = build_manifest(tmp_path, progress=False)
    assert manifest.counts == [7, 0, 12, 1, 15, 12]
    (record,) = manifest.damaged()
    assert (record.shard, record.key) == ("s-4.tar", "k015")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = loader_of(manifest, config(tmp_path), micro_batch=47, stop_step=1)
    assert batch.quarantined == []
    assert len(set(batch.keys)) == 47


def test_shards_of_which_nothing_can_be_used_are_an_error_with_the_reasons(tmp_path: Path) -> None:
    def no_caption(shard: int, number: int) -> dict:
        return {"__key__": f"k{number}", "moments.npy": np.zeros((4, 4, 4), np.float16)}

    write(tmp_path, no_caption, [3, 3])
    manifest = build_manifest(tmp_path, ENCODER, progress=False)
    with pytest.raises(RuntimeError, match=r"16 reserves cannot be used[\s\S]*no caption"):
        list(loader_of(manifest, config(tmp_path), stop_step=1))


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(Path(os.environ["LDM_TEST_BOMB"])),)


def test_pickled_objects_in_a_shard_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_TEST_BOMB", str(tmp_path / "exploded"))
    stored = io.BytesIO()
    np.save(stored, np.array([_Bomb()], dtype=object), allow_pickle=True)
    assert b"mkdir" in stored.getvalue()

    def sample(shard: int, number: int) -> dict:
        return encoded_sample(shard, number, False) | ({"moments.npy": stored.getvalue()} if number == 1 else {})

    write(tmp_path, sample, [5])
    manifest = build_manifest(tmp_path, ENCODER, progress=False)
    (batch,) = loader_of(manifest, config(tmp_path), micro_batch=5, stop_step=1)
    (record,) = batch.quarantined
    assert "pickled objects" in record.reason
    assert not (tmp_path / "exploded").exists()


def test_what_the_shards_cannot_give_is_an_error_at_start(tmp_path: Path, encoded: Manifest) -> None:
    def unflipped(shard: int, number: int) -> dict:
        sample = encoded_sample(shard, number)
        del sample["flipped.npy"]
        return sample

    write(tmp_path / "a", unflipped)
    manifest = build_manifest(tmp_path / "a", ENCODER, progress=False)
    with pytest.raises(ValueError, match=r"data\.flip is 0\.5, but .*flipped"):
        loader_of(manifest, config(tmp_path, flip=0.5))
    with pytest.raises(ValueError, match=r"data\.crop is 'random'"):
        loader_of(encoded, config(encoded.folder, crop="random"))
    other = write(tmp_path / "b", lambda _, number: {"__key__": f"k{number}", "gif": b"1"})
    with pytest.raises(ValueError, match=r"members gif; expected pictures"):
        loader_of(other, config(tmp_path))
    manifest.path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"s-2\.tar has vanished"):
        loader_of(manifest, config(tmp_path))


def test_encoded_shards_without_identity_are_warned_of(tmp_path: Path) -> None:
    manifest = write(tmp_path, encoder=None)
    with pytest.warns(UserWarning, match="does not say what encoded them"):
        loader_of(manifest, config(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 0},
        {"workers": -1},
        {"prefetch": 0},
        {"shards_per_block": 0},
        {"caption_dropout": 1.1},
        {"flip": -0.1},
        {"quarantine_limit": 2},
        {"crop": "corner"},
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(change: dict) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(change))} is .*allowed are"):
        DataConfig(**{"shards": "s", "resolution": 8} | change)


@pytest.mark.parametrize(
    ("samples", "world", "micro_batch"), [(None, 1, 8), (53, 2, 8), (20, 4, 3), (5, 4, 1), (7, 2, 100)]
)
def test_validation_covers_each_sample_once_and_gives_all_processes_as_many_batches(
    encoded: Manifest, samples: int | None, world: int, micro_batch: int
) -> None:
    settings = config(encoded.folder, caption_dropout=1.0, flip=1.0)
    lengths, positions, keys = set(), [], []
    for rank in range(world):
        loader = make_validation_loader(
            settings, encoded, 3, latent_shape=LATENT, rank=rank, world=world, micro_batch=micro_batch, samples=samples
        )
        batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert 1 <= len(batch.keys) <= micro_batch + 1
            assert not batch.dropped.any()
            positions += batch.positions.tolist()
            keys += batch.keys
    assert len(lengths) == 1
    assert positions == list(range(samples or 53))
    in_file_order = [f"s-{shard}.tar/k{number:03d}" for shard, count in enumerate(COUNTS) for number in range(count)]
    assert keys == in_file_order[: samples or 53]


def test_validation_draws_are_fixed_do_not_depend_on_the_split_and_are_not_those_of_training(encoded: Manifest) -> None:
    def noise(world: int, workers: int = 0) -> torch.Tensor:
        settings = config(encoded.folder, workers=workers)
        loaders = [
            make_validation_loader(
                settings, encoded, 3, latent_shape=LATENT, rank=rank, world=world, micro_batch=7, samples=40
            )
            for rank in range(world)
        ]
        once = torch.cat([batch.noise for loader in loaders for batch in loader])
        assert torch.equal(once, torch.cat([batch.noise for loader in loaders for batch in loader]))  # iterated again
        return once

    expected = noise(1)
    assert torch.equal(noise(2), expected)
    assert torch.equal(noise(1, workers=1), expected)
    training = torch.cat([batch.noise for batch in loader_of(encoded, config(encoded.folder))]).flatten(1)
    both = torch.cat([training, expected.flatten(1)])
    assert len(torch.unique(both, dim=0)) == len(both)


def test_more_processes_than_validation_samples_are_an_error(encoded: Manifest) -> None:
    with pytest.raises(ValueError, match="gives 3 validation samples to 4 processes"):
        make_validation_loader(
            config(encoded.folder), encoded, 0, latent_shape=LATENT, rank=0, world=4, micro_batch=1, samples=3
        )


def test_no_global_generator_takes_part_in_loading(raw: Manifest) -> None:
    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    settings = config(raw.folder, flip=0.5, crop="random")
    before = states()
    for workers in (0, 1):
        list(loader_of(raw, dataclasses.replace(settings, workers=workers), stop_step=1))
    assert states() == before


def _children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_workers_outlive_the_signals_that_the_whole_group_gets_and_end_with_the_loader(encoded: Manifest) -> None:
    loader = loader_of(encoded, config(encoded.folder, workers=2, prefetch=1), stop_step=40)
    iterator: Iterator[Batch] = iter(loader)
    next(iterator)
    workers = _children()
    assert len(workers) == 2
    sender = os.fork()  # a SIGTERM of the main process itself does end them
    if sender == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for worker in workers:
                os.kill(worker, number)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(iterator)) == 39
    assert _children() == workers
    os.kill(workers[0], signal.SIGTERM)
    deadline = time.monotonic() + 30
    while workers[0] in _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children() == workers[1:]
    started = time.monotonic()
    del iterator, loader
    while _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children() == []
    assert time.monotonic() - started < 30


class _Threads(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> int:
        return torch.get_num_threads()


def test_workers_use_one_torch_thread() -> None:
    loader = torch.utils.data.DataLoader(_Threads(), num_workers=1, worker_init_fn=start_worker)
    assert [int(threads) for threads in loader] == [1, 1]


def test_a_batch_moves_as_a_whole_and_pickles(encoded: Manifest) -> None:
    batch = next(iter(loader_of(encoded, config(encoded.folder))))
    moved = batch.to("meta")
    assert moved.noise.device.type == moved.u.device.type == "meta"
    assert moved.keys == batch.keys
    assert moved.images is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that cannot be written
        copy = pickle.loads(pickle.dumps(batch))
    assert flat([copy]) == flat([batch])
    assert json.dumps([dataclasses.asdict(one) for one in batch.quarantined]) == "[]"
