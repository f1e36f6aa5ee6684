"""What a stream's samples are: told by the first that can be read, refused where they do not fit the run."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import positions_of
from tiny_streams import (
    LATENT,
    all_of,
    check_row,
    config,
    encoded_sample,
    loader_of,
    npy,
    number_of,
    raw_sample,
    stream,
    write_tar,
    write_tars,
)

from ldm.data.stream_shards import StreamError
from ldm.data.streaming import make_stream_loader


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("raw"), raw_sample)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("encoded"), encoded_sample)


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
        make_stream_loader(config(), source, 3, positions_of(stop_step=1), latent_shape=(4, 2, 2))
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
    for folder, rank, expected in ((encoded, 0, 1), (encoded, 1, 0), (raw, 0, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            positions = positions_of(rank=rank, world=2, micro_batch=1, stop_step=1)
            make_stream_loader(config(), stream(all_of(folder)), 3, positions, latent_shape=LATENT)
        assert sum("nothing tells what encoded them" in str(one.message) for one in caught) == expected


def pooled_sample(shard: int, number: int) -> dict[str, bytes]:
    """As a pair of text encoders makes it: pooled text of width 7 beside the states."""
    values = np.random.default_rng([shard, number, 1]).standard_normal(7)
    return encoded_sample(shard, number) | {"pooled.npy": npy(values.astype(np.float16))}


def test_pooled_text_comes_with_its_sample_and_in_the_type_stored(tmp_path: Path) -> None:
    source = stream(all_of(write_tars(tmp_path, pooled_sample)))
    for workers in (0, 2):
        batches = list(loader_of(source, config(workers=workers, flip=0.5), text_shape=(3, 5), pooled_size=7))
        assert len(batches) == 6
        for batch in batches:
            assert batch.quarantined == []
            assert batch.text_pooled is not None
            assert (batch.text_pooled.shape, batch.text_pooled.dtype) == ((8, 7), torch.float16)
            for row, (key, position) in enumerate(zip(batch.keys, batch.positions.tolist(), strict=True)):
                stored = np.load(io.BytesIO(pooled_sample(*number_of(key))["pooled.npy"]))
                np.testing.assert_array_equal(batch.text_pooled[row], stored)
                check_row(batch, row, position, 3, config(flip=0.5))


def test_streams_without_pooled_text_give_none(encoded: Path, raw: Path) -> None:
    for folder in (encoded, raw):
        assert all(batch.text_pooled is None for batch in loader_of(stream(all_of(folder)), pooled_size=0))


def test_a_sample_without_its_pooled_text_is_a_ledger_line(tmp_path: Path) -> None:
    samples = {f"k{number:02d}": pooled_sample(0, number) for number in range(12)}
    del samples["k03"]["pooled.npy"]
    samples["k05"]["pooled.npy"] = npy(np.zeros(8, np.float16))
    samples["k06"]["pooled.npy"] = npy(np.zeros(7, np.float32))
    source = stream(write_tar(tmp_path / "s-0.tar", samples), shuffle_buffer=1)
    (batch,) = loader_of(source, stop_step=1, pooled_size=7)
    reasons = {one.key: one.reason for one in batch.quarantined}
    assert sorted(reasons) == ["k03", "k05", "k06"]
    assert "no member .pooled.npy" in reasons["k03"]
    assert reasons["k05"] == "member .pooled.npy has shape (8,), expected (7,)"
    assert reasons["k06"] == "member .pooled.npy is float32, the first sample's is torch.float16"


def test_pooled_text_that_does_not_fit_the_run_is_an_error_that_names_found_and_expected(
    encoded: Path, tmp_path: Path
) -> None:
    pooled = stream(all_of(write_tars(tmp_path, pooled_sample)))
    for source, size, message in (
        (pooled, 9, r"found shape \(7,\) of \.pooled\.npy, expected \(9,\)"),
        (pooled, 0, r"found shape \(7,\) of \.pooled\.npy, expected none"),
        (stream(all_of(encoded)), 7, r"found no \.pooled\.npy, expected \(7,\)"),
    ):
        with pytest.raises(ValueError, match=rf"data\.stream: .*{message}: another second text encoder"):
            loader_of(source, pooled_size=size)
    for source in (pooled, stream(all_of(encoded))):
        loader_of(source)  # nothing is known of the run's encoders
