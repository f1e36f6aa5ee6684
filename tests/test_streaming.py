"""Streams of tars without a manifest: positions and draws are exact, no silent loss, no command unasked."""

import contextlib
import io
import itertools
import json
import os
import random
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from faulty_server import FaultyServer
from PIL import Image

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.draws import Purpose, generator
from ldm.data.loader import rank_positions
from ldm.data.shards import DamagedSample
from ldm.data.storage import Retries
from ldm.data.stream_shards import CHUNK, SAMPLES_IN_A_ROW, StreamError, read_shard, shard_names
from ldm.data.streaming import StreamConfig, make_stream_loader, stream_lines

LATENT = (2, 4, 4)
SHARDS, SAMPLES = 6, 30


def npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def pixels_of(shard: int, number: int) -> np.ndarray:
    """8 high and 12 wide: at a resolution of 8 nothing is resized."""
    return np.random.default_rng([shard, number]).integers(0, 255, (8, 12, 3), dtype=np.uint8)


def raw_sample(shard: int, number: int) -> dict[str, bytes]:
    png = io.BytesIO()
    Image.fromarray(pixels_of(shard, number)).save(png, "PNG")
    captions = [f"{word} {shard} {number}" for word in ("one", "two", "three")]
    return {"png": png.getvalue(), "txt": captions[0].encode(), "json": json.dumps({"captions": captions}).encode()}


def encoded_sample(shard: int, number: int) -> dict[str, bytes]:
    rng = np.random.default_rng([shard, number])
    return {
        "moments.npy": npy(rng.standard_normal((4, 4, 4)).astype(np.float16)),
        "flipped.npy": npy(rng.standard_normal((4, 4, 4)).astype(np.float16)),
        "text.npy": npy(rng.standard_normal((3, 5)).astype(np.float32)),
        "txt": f"caption {shard} {number}".encode(),
        "json": json.dumps({"size": [100 + shard, 200 + number], "crop": [shard, number]}).encode(),
    }


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar as Python's own module writes it; returns its path."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(
    folder: Path, make: Callable[[int, int], dict[str, bytes]], shards: int = SHARDS, samples: int = SAMPLES
) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"s-{shard}.tar", {f"k{number:02d}": make(shard, number) for number in range(samples)})
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("raw"), raw_sample)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("encoded"), encoded_sample)


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"shards": "unused", "resolution": 8, "workers": 0} | changes)


def stream(*urls: str | Path, **changes: Any) -> StreamConfig:
    return StreamConfig(**{"urls": list(map(str, urls)), "shuffle_buffer": 20} | changes)


def all_of(folder: Path | str) -> str:
    return f"{folder}/s-{{0..{SHARDS - 1}}}.tar"


def loader_of(
    source: StreamConfig, settings: DataConfig | None = None, seed: int = 3, **changes: Any
) -> torch.utils.data.DataLoader[Batch]:
    split = {"rank": 0, "world": 1, "micro_batch": 8, "accumulation": 1, "start_step": 0, "stop_step": 6} | changes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "data.stream: the samples are encoded")
        return make_stream_loader(settings or config(), source, seed, latent_shape=LATENT, **split)


def keys_of(batches: Any) -> list[str]:
    return list(itertools.chain(*(batch.keys for batch in batches)))


def values(batches: list[Batch]) -> list[dict[str, Any]]:
    """Batches as what can be compared."""
    return [
        {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in vars(batch).items()}
        for batch in batches
    ]


def number_of(name: str) -> tuple[int, int]:
    """Shard and number out of "s-3.tar/k07"."""
    return int(name[2]), int(name[-2:])


def check_row(batch: Batch, row: int, position: int, seed: int, settings: DataConfig) -> None:
    """The row's draws are those of the generator at the position, its contents those of the sample it names."""
    assert batch.positions[row] == position
    shard, number = number_of(batch.keys[row])
    flip = generator(seed, Purpose.FLIP, position).random() < settings.flip
    assert batch.u[row] == generator(seed, Purpose.TIMESTEP, position).random()
    assert bool(batch.dropped[row]) == (generator(seed, Purpose.DROPOUT, position).random() < settings.caption_dropout)
    for tensor, purpose in ((batch.noise, Purpose.NOISE), (batch.posterior_noise, Purpose.POSTERIOR)):
        drawn = generator(seed, purpose, position).standard_normal(LATENT, dtype=np.float32)
        np.testing.assert_array_equal(tensor[row], drawn)
    if batch.moments is not None:
        sample = encoded_sample(shard, number)
        stored = np.load(io.BytesIO(sample["flipped.npy" if flip else "moments.npy"]))
        np.testing.assert_array_equal(batch.moments[row], stored)
        assert batch.text_states is not None
        np.testing.assert_array_equal(batch.text_states[row], np.load(io.BytesIO(sample["text.npy"])))
        assert batch.captions[row] == sample["txt"].decode()
        assert batch.sizes[row].tolist() == [100 + shard, 200 + number, shard, number, 8, 8]
        return
    captions = json.loads(raw_sample(shard, number)["json"])["captions"]
    assert batch.captions[row] == captions[int(generator(seed, Purpose.CAPTION, position).random() * 3)]
    left = 2
    if settings.crop == "random":
        left = int(generator(seed, Purpose.CROP, position).random(2)[1] * 5)
    part = pixels_of(shard, number)[:, left : left + 8]
    expected = torch.from_numpy((part[:, ::-1] if flip else part).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert batch.images is not None
    torch.testing.assert_close(batch.images[row], expected, rtol=0, atol=1e-6)
    assert batch.sizes[row].tolist() == [8, 12, 0, left, 8, 8]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_positions_and_draws_are_those_of_indexed_shards_for_0_to_3_workers_on_two_ranks(
    kind: str, workers: int, request: pytest.FixtureRequest
) -> None:
    seed, source = 3, stream(all_of(request.getfixturevalue(kind)))
    crop = "random" if kind == "raw" else "center"
    settings = config(workers=workers, flip=0.5, caption_dropout=0.5, crop=crop)
    split = {"world": 2, "micro_batch": 3, "accumulation": 2, "start_step": 5, "stop_step": 9}
    every = []
    for rank in range(2):
        loader = loader_of(source, settings, seed, rank=rank, **split)
        batches = list(loader)
        assert len(batches) == len(loader) == 8  # not a multiple of 3 workers
        expected = [list(part) for step in range(5, 9) for part in rank_positions(step, rank, 2, 3, 2)]
        assert [batch.positions.tolist() for batch in batches] == expected
        for batch in batches:
            assert batch.quarantined == []
            for row, position in enumerate(batch.positions.tolist()):
                check_row(batch, row, position, seed, settings)
        every += itertools.chain(*expected)
    assert sorted(every) == list(range(5 * 12, 9 * 12))


def test_the_type_of_a_batch_is_that_of_indexed_shards(raw: Path, encoded: Path) -> None:
    (batch,) = loader_of(stream(all_of(raw)), stop_step=1)
    assert batch.images is not None
    assert (batch.images.shape, batch.images.dtype, batch.moments) == ((8, 3, 8, 8), torch.float32, None)
    (batch,) = loader_of(stream(all_of(encoded)), stop_step=1)
    assert batch.moments is not None
    assert batch.text_states is not None
    assert (batch.moments.shape, batch.moments.dtype, batch.images) == ((8, 4, 4, 4), torch.float32, None)
    assert (batch.text_states.shape, batch.text_states.dtype) == ((8, 3, 5), torch.float32)
    assert batch.noise.shape == (8, *LATENT)


def test_ranks_workers_starts_and_seeds_draw_different_samples_and_one_address_the_same(raw: Path) -> None:
    source = stream(all_of(raw))

    def first(seed: int = 3, **changes: Any) -> list[str]:
        return keys_of(itertools.islice(loader_of(source, seed=seed, world=2, stop_step=1004, **changes), 3))

    streams = [first(), first(rank=1), first(start_step=1), first(start_step=1000), first(seed=4)]
    two = list(itertools.islice(loader_of(source, config(workers=2), world=2, stop_step=8), 8))
    streams += [keys_of(two[0::2])[:24], keys_of(two[1::2])[:24]]
    assert streams[5] != streams[6]
    del streams[5]  # worker 0 of 2 begins as the only reader does
    for one, other in itertools.combinations(streams, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8  # of 24; by chance about one
    assert first(rank=1, start_step=1000) == first(rank=1, start_step=1000)


def test_each_rank_draws_shards_with_replacement_and_equal_chances(raw: Path) -> None:
    source = stream(all_of(raw), shuffle_buffer=1)
    orders = []
    for rank in range(2):
        keys = keys_of(loader_of(source, rank=rank, world=2, micro_batch=30, stop_step=120))
        # Without mixing, a shard's samples come in its own order, one shard after the other: 120 shards.
        assert [number_of(key)[1] for key in keys] == list(range(SAMPLES)) * 120
        orders.append([number_of(key)[0] for key in keys[::SAMPLES]])
        shares = np.array([Counter(orders[-1])[shard] for shard in range(SHARDS)]) / 120
        assert np.abs(shares - 1 / SHARDS).max() <= 4 * np.sqrt(5 / 36 / 120)
    two = list(loader_of(source, config(workers=2), micro_batch=30, stop_step=80))
    orders += [[number_of(batch.keys[0])[0] for batch in two[worker::2]] for worker in range(2)]
    assert abs(np.mean(np.array(orders[2]) == np.array(orders[3])) - 1 / SHARDS) < 0.24  # 40 shards each
    assert abs(np.mean(np.array(orders[0]) == np.array(orders[1])) - 1 / SHARDS) < 0.14  # 4 standard deviations


def test_the_buffer_mixes_samples_of_several_shards(raw: Path) -> None:
    source = stream(all_of(raw), shuffle_buffer=SHARDS * SAMPLES)
    keys = keys_of(loader_of(source, micro_batch=30, stop_step=10))
    numbers = [number_of(key)[1] for key in keys]
    assert np.mean(np.diff(numbers) == 1) < 0.15  # 1/30 by chance, 0.97 in the tars' order
    assert len({number_of(key)[0] for key in keys[150:180]}) >= 3


def test_no_global_generator_moves(raw: Path) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    list(loader_of(stream(all_of(raw)), config(flip=0.5)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    first = keys_of(loader_of(stream(all_of(raw))))
    random.seed(2)
    assert keys_of(loader_of(stream(all_of(raw)))) == first


def test_spawned_workers_give_the_same_batches(raw: Path) -> None:
    expected = values(list(loader_of(stream(all_of(raw)), stop_step=2)))
    assert values(list(loader_of(stream(all_of(raw)), config(workers=1), stop_step=2, context="spawn"))) == expected


# What cannot be used


def test_a_bad_sample_is_a_ledger_line_and_the_next_one_takes_its_position_with_its_draws(tmp_path: Path) -> None:
    samples = {f"k{number:02d}": raw_sample(0, number) for number in range(20)}
    samples["k03"]["png"] = samples["k03"]["png"][:-30]
    del samples["k10"]["txt"], samples["k10"]["json"]
    samples["k11"]["txt"] = b"\xff"
    samples["k11"]["json"] = b"{}"
    source = stream(write_tar(tmp_path / "s-0.tar", samples), shuffle_buffer=1)
    settings = config(flip=0.5)
    batches = list(loader_of(source, settings, micro_batch=6, stop_step=2))
    good = [f"s-0.tar/k{number:02d}" for number in range(20) if number not in (3, 10, 11)]
    assert keys_of(batches) == good[:12]
    records = [record for batch in batches for record in batch.quarantined]
    assert [(one.shard, one.key, one.position, one.replacement) for one in records] == [
        ("s-0.tar", "k03", 3, "s-0.tar/k04"),
        ("s-0.tar", "k10", 9, "s-0.tar/k12"),
        ("s-0.tar", "k11", 9, "s-0.tar/k12"),
    ]
    assert "does not decode" in records[0].reason
    assert "no caption" in records[1].reason
    assert "UTF-8" in records[2].reason
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            check_row(batch, row, position, 3, settings)


def stock_webdataset(path: Path) -> list[str]:
    """Keys that webdataset gives by itself; raises what it raises."""
    return [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)]


def cuts(path: Path) -> dict[str, tuple[int, str, int]]:
    """Where to cut the tar of samples k00 ..: byte, key of the sample that is lost, and samples left."""
    with tarfile.open(path) as tar:
        members = {info.name: info for info in tar.getmembers()}
    return {
        "inside a member": (members["k05.png"].offset_data + 40, "k05", 5),
        "inside a header": (members["k05.png"].offset + 100, "k04", 4),
        "between two samples": (members["k05.png"].offset, "k04", 4),
        "within a sample": (members["k05.json"].offset, "k05", 5),
        "in the padding": (members["k05.txt"].offset_data + 20, "k05", 5),
        "before the end mark": (members["k29.json"].offset_data + 512, "k29", 29),
    }


@pytest.mark.parametrize(
    "where",
    [
        "inside a member",
        "inside a header",
        "between two samples",
        "within a sample",
        "in the padding",
        "before the end mark",
    ],
)
def test_a_tar_cut_short_is_a_ledger_line_and_gives_whole_samples_only(raw: Path, tmp_path: Path, where: str) -> None:
    byte, lost, left = cuts(raw / "s-1.tar")[where]
    (tmp_path / "cut.tar").write_bytes((raw / "s-1.tar").read_bytes()[:byte])
    whole = write_tar(tmp_path / "whole.tar", {"k00": raw_sample(0, 0)})
    if where not in ("inside a member", "in the padding"):
        assert len(stock_webdataset(tmp_path / "cut.tar")) >= left  # in silence: what this test is about
    batches = list(loader_of(stream(tmp_path / "cut.tar", whole, shuffle_buffer=1), stop_step=30))
    keys = keys_of(batches)
    of_cut = [key for key in keys if key.startswith("cut")]
    assert set(of_cut) == {f"cut.tar/k{number:02d}" for number in range(left)}
    records = [record for batch in batches for record in batch.quarantined]
    assert {(one.shard, one.key) for one in records} == {("cut.tar", lost)}
    (reason,) = {one.reason for one in records}
    assert ("the file ends inside 'k05." if where == "inside a member" else "cut short") in reason
    assert "the rest of the shard is lost" in reason
    # One record each time that the shard broke off, at the position of the row that took the next sample.
    for one in records:
        assert keys[one.position] == one.replacement
        assert keys[one.position - 1] == f"cut.tar/k{left - 1:02d}"
    breaks = sum(a == f"cut.tar/k{left - 1:02d}" for a in keys[:-1])
    assert len(records) == breaks > 3


def test_a_damaged_header_in_mid_tar_is_a_ledger_line_where_webdataset_stops_in_silence(
    raw: Path, tmp_path: Path
) -> None:
    data = bytearray((raw / "s-1.tar").read_bytes())
    with tarfile.open(raw / "s-1.tar") as tar:
        data[tar.getmember("k07.png").offset + 20] ^= 4
    (tmp_path / "bad.tar").write_bytes(data)
    assert stock_webdataset(tmp_path / "bad.tar") == [f"k{number:02d}" for number in range(7)]
    batches = list(loader_of(stream(tmp_path / "bad.tar", shuffle_buffer=1), stop_step=4))
    assert set(keys_of(batches)) == {f"bad.tar/k{number:02d}" for number in range(6)}
    records = [record for batch in batches for record in batch.quarantined]
    assert {(one.shard, one.key) for one in records} == {("bad.tar", "k06")}
    assert "a corrupt header: the remaining" in records[0].reason


def test_data_after_the_end_mark_and_odd_members_are_told_and_cost_no_sample(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", {"k00": raw_sample(0, 0)}).read_bytes()
    (tmp_path / "two.tar").write_bytes(one * 2)
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name in ("README", "__meta__", "k00.png", "k00.txt", "k00.txt", "../k01.png", "k00.json"):
            data = raw_sample(0, 0).get(name.rpartition(".")[2], b"{}")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("k02.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for name, reasons in (
        ("two.tar", ["data after the end-of-archive mark"]),
        ("odd.tar", ["k00.txt: duplicate", "3 members are links"]),
    ):
        batches = list(loader_of(stream(tmp_path / name, shuffle_buffer=1), stop_step=1))
        assert set(keys_of(batches)) == {f"{name}/k00"}
        assert [line for line in batches[0].captions if not line.endswith(" 0 0")] == []
        told = [record.reason for record in batches[0].quarantined]
        for reason in reasons:
            assert sum(reason in line for line in told) >= 7  # each time that the shard was read to its end
        assert len(told) >= 7 * len(reasons)
        assert len(set(told)) == len(reasons)


def test_a_tar_that_is_not_there_is_a_ledger_line_and_the_stream_goes_on(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"not a tar" * 1000)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(raw / "s-0.tar", "k00.png")
    missing = tmp_path / "gone.tar"
    batches = list(
        loader_of(stream(missing, tmp_path / "text.tar", tmp_path / "packed.tar", raw / "s-0.tar"), stop_step=40)
    )
    assert {key.partition("/")[0] for key in keys_of(batches)} == {"s-0.tar"}
    reasons = {one.shard: one.reason for batch in batches for one in batch.quarantined}
    assert set(reasons) == {"gone.tar", "text.tar", "packed.tar"}
    assert f"{missing} is not there" in reasons["gone.tar"] or "No such file" in reasons["gone.tar"]
    assert "not readable as a tar" in reasons["text.tar"]
    assert "it is compressed" in reasons["packed.tar"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_out_of_which_nothing_comes_any_more_ends_with_the_last_causes(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "a.tar", {"k00": raw_sample(0, 0)})
    loader = loader_of(stream(tmp_path / "a.tar"), config(workers=workers))
    os.remove(tmp_path / "a.tar")
    with pytest.raises(StreamError, match=r"16 shards in a row gave no sample; the last causes:\n  a\.tar: .*there"):
        list(loader)
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(StreamError, match=r"a\.tar: it holds no sample"):
        list(loader)
    write_tar(tmp_path / "a.tar", {f"k{number}": {"png": b"", "txt": b"x"} for number in range(50)})
    with pytest.raises(StreamError, match=f"{SAMPLES_IN_A_ROW:,} samples in a row cannot be used.*\n.*does not decode"):
        list(loader)


def test_a_stream_goes_on_as_long_as_one_shard_in_sixteen_gives_a_sample(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", {f"k{number:02d}": raw_sample(0, number) for number in range(4)})
    empty = [write_tar(tmp_path / f"empty-{number}.tar", {}) for number in range(2)]
    assert len(keys_of(loader_of(stream(good, *empty), stop_step=20))) == 160


# What the samples are


def test_what_is_neither_raw_nor_encoded_is_an_error_with_the_members_found(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"k00": {"mp3": b"", "txt": b"x"}, "k01": {"wav": b""}})
    with pytest.raises(ValueError, match=r"a\.tar have members mp3, txt, wav; expected pictures \(png, .*moments\.npy"):
        loader_of(stream(tar))


def test_a_first_sample_without_picture_or_with_damage_does_not_decide(tmp_path: Path) -> None:
    damaged = encoded_sample(0, 1) | {"moments.npy": b"\x93NUMPY"}
    samples = {"k00": {"txt": b"x"}, "k01": damaged, **{f"k{n:02d}": encoded_sample(0, n) for n in range(2, 12)}}
    (batch,) = loader_of(stream(write_tar(tmp_path / "s-0.tar", samples), shuffle_buffer=1), stop_step=1)
    assert [one.key for one in batch.quarantined] == ["k00", "k01"]
    check_row(batch, 0, 0, 3, config())
    gone = stream(tmp_path / "gone.tar", tmp_path / "s-0.tar")
    assert loader_of(gone).dataset.form.encoded  # type: ignore[attr-defined]
    with pytest.raises(StreamError, match=r"gives a sample that can be used:\n  gone\.tar: .*there"):
        loader_of(stream(tmp_path / "gone.tar"))


def test_encoded_samples_that_do_not_fit_are_an_error_that_names_found_and_expected(encoded: Path) -> None:
    source = stream(all_of(encoded))
    with pytest.raises(ValueError, match=r"moments.npy has shape \(4, 4, 4\), expected \(8, 2, 2\)"):
        make_stream_loader(
            config(), source, 3, latent_shape=(4, 2, 2), rank=0, world=1, micro_batch=1, accumulation=1, start_step=0,
            stop_step=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"text.npy has shape \(3, 5\), expected \(3, 6\)"):
        loader_of(source, text_shape=(3, 6))
    loader_of(source, text_shape=(3, 5))
    with pytest.raises(ValueError, match=r"data.crop is 'random'"):
        loader_of(source, config(crop="random"))


def test_flips_that_encoded_samples_lack_are_an_error(tmp_path: Path) -> None:
    sample = encoded_sample(0, 0)
    del sample["flipped.npy"]
    tar = write_tar(tmp_path / "a.tar", {"k00": sample})
    with pytest.raises(ValueError, match=r"data.flip is 0.5, but .* no \.flipped\.npy"):
        loader_of(stream(tar), config(flip=0.5))
    loader_of(stream(tar))


def test_encoded_samples_are_warned_of_once_raw_ones_are_not(encoded: Path, raw: Path) -> None:
    split = {"world": 2, "micro_batch": 1, "accumulation": 1, "start_step": 0, "stop_step": 1}
    for folder, rank, expected in ((encoded, 0, 1), (encoded, 1, 0), (raw, 0, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_stream_loader(config(), stream(all_of(folder)), 3, latent_shape=LATENT, rank=rank, **split)
        assert sum("nothing tells what encoded them" in str(one.message) for one in caught) == expected


# Where the bytes come from


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


# Names, settings and first lines


def test_shards_are_called_by_file_name_and_by_url_where_two_have_the_same() -> None:
    urls = ["/a/x.tar", "/b/x.tar", "/a/y.tar", "https://h/p/z%20z.tar?key=1", "s3://b/w.tar", "pipe:cat /a/y.tar"]
    assert list(shard_names(urls).values()) == [
        "/a/x.tar",
        "/b/x.tar",
        "y.tar",
        "z z.tar",
        "w.tar",
        "pipe:cat /a/y.tar",
    ]
    same = ["https://h/x.tar?part=1", "https://h/x.tar?part=2", "https://i/x.tar?part=1", "/a/y.tar", "/a/y.tar"]
    assert list(shard_names(same).values()) == [*same[:2], "https://i/x.tar", "y.tar"]


def test_a_shard_named_twice_is_one_shard_with_twice_the_chance(raw: Path) -> None:
    names = shard_names([str(raw / "s-0.tar")] * 2)
    assert list(names.values()) == ["s-0.tar"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": []}, r"data\.stream\.urls is \[\]"),
        ({"urls": [""]}, r"data\.stream\.urls is \[''\]"),
        ({"urls": ["a{b.tar"]}, r"data\.stream\.urls: Unbalanced braces"),
        ({"shuffle_buffer": 0}, r"data\.stream\.shuffle_buffer is 0; allowed are integers from 1"),
        ({"attempts": 0}, r"data\.stream\.attempts is 0; allowed are integers from 1"),
        ({"timeout": 0.0}, r"data\.stream\.timeout is 0.0; allowed are numbers above 0"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**{"urls": ["a.tar"]} | changes)


def test_the_first_lines_say_what_is_not_exact_and_what_is() -> None:
    text = " ".join(stream_lines(StreamConfig(urls=["s3://b/{000..099}.tar"])))
    for part in (
        "100 tars",
        "NOT exact",
        "twice",
        "never",
        "resumed",
        "processes or workers",
        "checksum",
        "by position",
    ):
        assert part in text
    assert "shell" not in text
    text = " ".join(stream_lines(StreamConfig(urls=["pipe:cat {a,b}.tar", "c.tar"], allow_pipe=True)))
    assert "2 of the tars are programs that run here" in text
