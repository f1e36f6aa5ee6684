"""What a stream cannot use: a ledger line each, whole samples only, an end where nothing comes any more."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from tiny_streams import (
    check_row,
    config,
    keys_of,
    loader_of,
    raw_sample,
    stream,
    write_tar,
    write_tars,
)

from ldm.data.stream_shards import SAMPLES_IN_A_ROW, StreamError


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("raw"), raw_sample)


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
