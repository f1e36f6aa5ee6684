"""Samples that cannot be used: one record each, a reserve that is always the same, nothing lost in silence."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import (
    ENCODER,
    LATENT,
    config,
    encoded_sample,
    flat,
    loader_of,
    raw_sample,
    write,
)

from ldm.data.dataset import SampleDataset
from ldm.data.manifest import Manifest, build_manifest

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
