"""Pooled text of a pair of encoders: encoded beside the states, carried into batches, and never lost in silence."""

import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEBUG, ROOT, run_tool
from tiny_models import LENGTH, make_sdxl_pair
from tiny_shards import (
    ENCODER,
    LATENT,
    config,
    encoded_sample,
    flat,
    global_batches,
    loader_of,
    raw_sample,
    write,
)
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from ldm.data.batch import Batch
from ldm.data.data_config import SourceConfig
from ldm.data.dataset import SampleDataset
from ldm.data.encoding import EncodingConfig, encode_shards, encoder_identity
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.members import decode_floats
from ldm.data.quarantine import Ledger
from ldm.data.samples import decode_sample, draw
from ldm.data.shards import ShardReader, write_shards
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.train import conditioning_of

POOLED = 7
PAIR = {"text_encoder": {"weights": "one"}, "text_encoder_2": {"weights": "two"}}


def pooled_sample(shard: int, number: int) -> dict:
    """An encoded sample of a pair: text states of the tiny shards, and pooled text."""
    values = np.random.default_rng([shard, number, 1]).standard_normal(POOLED)
    return encoded_sample(shard, number) | {"pooled.npy": values.astype(np.float16)}


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("pooled"), pooled_sample)


# From the encoders to the shards, and from there to training


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_sdxl_pair(folder)
    return folder


def conditioner(pair: Path) -> TextConditioner:
    one = TextEncoderConfig(str(pair), layer="penultimate_without_norm", max_length=LENGTH)
    return TextConditioner.load([one, one])


CAPTIONS = [f"red ape {number}" for number in range(12)]


@pytest.fixture(scope="module")
def shards(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Raw shards, and the same encoded with the pair."""
    folder = tmp_path_factory.mktemp("encoded")
    samples = [
        {"__key__": f"{number:03d}", "png": raw_sample(0, number)["png"], "txt": caption}
        for number, caption in enumerate(CAPTIONS)
    ]
    raw = write_shards(samples, folder / "raw", prefix="s", samples_per_shard=5)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = AutoencoderKL(AutoencoderConfig(**blocks, block_out_channels=[8, 8], norm_num_groups=8)).eval()
    settings, text_encoder, out = EncodingConfig(text_states=True, workers=0), conditioner(pair), folder / "encoded"
    out.mkdir()
    ledger, device = Ledger(out / "quarantine.jsonl", 0.0), torch.device("cpu")
    done = encode_shards(
        raw, range(3), out, autoencoder, text_encoder, ledger, resolution=8, config=settings, device=device
    )
    assert sum(done) == len(CAPTIONS)
    identity = encoder_identity(autoencoder, text_encoder, 8, settings, text_states=True)
    return raw, build_manifest(out, identity, progress=False)


def test_shards_of_a_pair_hold_the_pooled_text_of_the_second_encoder_and_name_both(
    pair: Path, shards: tuple[Manifest, Manifest]
) -> None:
    encoded = shards[1]
    tokenizer = AutoTokenizer.from_pretrained(pair / "tokenizer_2")
    model = CLIPTextModelWithProjection.from_pretrained(pair / "text_encoder_2").eval()
    with torch.no_grad():
        tokens = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")
        expected = model(tokens.input_ids).text_embeds.numpy()
    assert np.abs(np.diff(expected, axis=0)).max() > 0.1
    for number, row in enumerate(expected):
        members = ShardReader(encoded).members(*divmod(number, 5))
        np.testing.assert_allclose(decode_floats(members, "pooled.npy", row.shape), row, rtol=2e-3, atol=2e-3)
        assert decode_floats(members, "text.npy", (LENGTH, 32 + 48)).dtype == np.float16
    assert encoded.encoder is not None
    assert encoded.encoder["text_encoder"]["weights"] != encoded.encoder["text_encoder_2"]["weights"]


def test_the_tool_encodes_with_both_encoders_of_the_config(
    pair: Path, shards: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"source": str(pair), "layer": "penultimate_without_norm", "max_length": LENGTH, "attention_mask": False}
    words = [f"--{name}={json.dumps(settings)}" for name in ("text_encoder", "text_encoder_2")]
    words += [f"--encoding.shards={shards[0].folder}", f"--data.shards={out}", "--encoding.text_states=true"]
    run_tool(ROOT / "tools/encode_latents.py", f"--config={DEBUG}", *words, "--encoding.workers=0")
    found, expected = Manifest.load(out), shards[1]
    assert found.encoder is not None
    assert expected.encoder is not None
    for name in ("text_encoder", "text_encoder_2"):
        assert found.encoder[name] == expected.encoder[name]
    for number in range(len(CAPTIONS)):
        one, other = (ShardReader(manifest).members(*divmod(number, 5)) for manifest in (found, expected))
        for name, shape in (("text.npy", (LENGTH, 80)), ("pooled.npy", (40,))):
            values = decode_floats(other, name, shape)
            np.testing.assert_allclose(decode_floats(one, name, shape), values, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("empty_caption", ["encoded", "zeros"])
def test_training_is_told_the_same_text_by_raw_and_encoded_shards_whatever_stands_for_no_caption(
    pair: Path, shards: tuple[Manifest, Manifest], empty_caption: str
) -> None:
    text_encoder = conditioner(pair)
    text_encoder.empty_caption = empty_caption
    run = SimpleNamespace(pipeline=SimpleNamespace(text_encoder=text_encoder))
    settings, found = config(Path(), caption_dropout=0.5), []
    for manifest in shards:
        (batch,) = loader_of(manifest, settings, micro_batch=12, stop_step=1, latent_shape=(4, 4, 4))
        assert (batch.text_pooled is None) == (manifest is shards[0])
        assert 0 < batch.dropped.sum() < 12
        found.append(conditioning_of(run, batch))
    for name in ("text", "pooled"):
        one, other = (getattr(conditioning, name) for conditioning in found)
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
        assert (one[batch.dropped] == 0).all() == (empty_caption == "zeros")


# Through the loader


def test_batches_hold_the_stored_pooled_text_for_1_2_4_processes_and_0_1_2_workers(pooled: Manifest) -> None:
    settings = config(pooled.folder, flip=0.5)
    expected = global_batches(pooled, settings, 1, 0, 8)
    for world, workers in ((1, 1), (1, 2), (2, 0), (4, 2)):
        assert global_batches(pooled, dataclasses.replace(settings, workers=workers), world, 0, 8) == expected
    for batch in loader_of(pooled, settings, stop_step=7):
        assert batch.text_pooled is not None
        assert (batch.text_pooled.shape, batch.text_pooled.dtype) == ((8, POOLED), torch.float16)
        for row, key in enumerate(batch.keys):
            sample = pooled_sample(int(key[2]), int(key[-3:]))
            np.testing.assert_array_equal(batch.text_pooled[row], sample["pooled.npy"])
            assert batch.text_states is not None
            np.testing.assert_array_equal(batch.text_states[row], sample["text.npy"])


def test_a_batch_with_pooled_text_moves_as_a_whole_and_pickles(pooled: Manifest) -> None:
    batch = next(iter(loader_of(pooled, config(pooled.folder))))
    assert batch.to("meta").text_pooled.device.type == "meta"
    assert flat([pickle.loads(pickle.dumps(batch))]) == flat([batch])


def without_text(shard: int, number: int) -> dict:
    return encoded_sample(shard, number, text=False)


@pytest.mark.parametrize("make", [encoded_sample, without_text, raw_sample])
def test_shards_without_pooled_text_give_none(tmp_path: Path, make: Callable[[int, int], dict]) -> None:
    manifest = write(tmp_path, make)
    assert all(batch.text_pooled is None for batch in loader_of(manifest, config(tmp_path)))


def test_shards_written_before_pairs_were_known_still_train(tmp_path: Path) -> None:
    manifest = write(tmp_path, encoder={"text_encoder": {"weights": "one"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = loader_of(manifest, config(tmp_path), stop_step=1)
    assert batch.text_states is not None
    assert batch.text_pooled is None
    assert batch.quarantined == []


# What is done to sample k003 of shard s-2, and the reason that the ledger gives.
DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda sample: sample.pop("pooled.npy"), "no member .pooled.npy"),
    "another width": (
        lambda sample: sample.update({"pooled.npy": np.zeros(POOLED + 1, np.float16)}),
        "member .pooled.npy has shape (8,), expected (7,)",
    ),
    "of states": (
        lambda sample: sample.update({"pooled.npy": sample["text.npy"]}),
        "member .pooled.npy has shape (3, 5), expected (7,)",
    ),
    "another type": (
        lambda sample: sample.update({"pooled.npy": np.zeros(POOLED, np.int16)}),
        "member .pooled.npy is int16, expected float16 or float32",
    ),
    "wider": (
        lambda sample: sample.update({"pooled.npy": sample["pooled.npy"].astype(np.float32) + 1e-6}),
        "member .pooled.npy is float32, the first sample's is torch.float16",
    ),
    "not a number": (lambda sample: sample["pooled.npy"].__setitem__(3, np.nan), "NaN or infinity"),
    "cut short": (lambda sample: sample.update({"pooled.npy": b"\x93NUMPY\x01\x00\x10"}), "npy"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_sample_whose_pooled_text_cannot_be_used_is_one_record_and_gives_way_to_a_reserve(
    pooled: Manifest, tmp_path: Path, name: str
) -> None:
    change, reason = DAMAGE[name]

    def damaged(shard: int, number: int) -> dict:
        sample = pooled_sample(shard, number)
        if (shard, number) == (2, 3):
            change(sample)
        return sample

    def batch_of(manifest: Manifest) -> Batch:
        return SampleDataset(config(manifest.folder), manifest, 3, latent_shape=LATENT).__getitems__(range(53))

    expected, batch = batch_of(pooled), batch_of(write(tmp_path, damaged))
    (record,) = batch.quarantined
    assert (record.shard, record.key) == ("s-2.tar", "k003")
    assert reason in record.reason
    row = expected.keys.index("s-2.tar/k003")
    assert (record.position, record.replacement) == (row, batch.keys[row])
    assert batch.keys[:row] + batch.keys[row + 1 :] == expected.keys[:row] + expected.keys[row + 1 :]
    assert batch.text_pooled is not None
    for key, values in zip(batch.keys, batch.text_pooled, strict=True):  # of the reserve too
        np.testing.assert_array_equal(values, pooled_sample(int(key[2]), int(key[-3:]))["pooled.npy"])


def test_one_sample_decoded_by_itself_is_its_row_of_a_batch(pooled: Manifest) -> None:
    settings = config(pooled.folder)
    dataset = SampleDataset(settings, pooled, 3, latent_shape=LATENT)
    batch = dataset.__getitems__(range(20))
    assert batch.text_pooled is not None
    for row, (key, own) in enumerate(zip(batch.keys, draw(settings, 3, range(20), encoded=True), strict=True)):
        members = dataset.readers[0].members(int(key[2]), int(key[-3:]))
        sample = decode_sample(key, members, own, dataset.forms[0])
        assert sample.text_pooled is not None
        np.testing.assert_array_equal(batch.text_pooled[row], sample.text_pooled)


def test_pooled_text_stored_wider_than_the_states_keeps_its_type(tmp_path: Path) -> None:
    def sample(shard: int, number: int) -> dict:
        one = pooled_sample(shard, number)
        return one | {"pooled.npy": one["pooled.npy"].astype(np.float32) + 1e-6}

    (batch,) = loader_of(write(tmp_path, sample), config(tmp_path), stop_step=1)
    assert batch.text_states is not None
    assert batch.text_pooled is not None
    assert (batch.text_states.dtype, batch.text_pooled.dtype) == (torch.float16, torch.float32)
    np.testing.assert_array_equal(
        batch.text_pooled[0], sample(int(batch.keys[0][2]), int(batch.keys[0][-3:]))["pooled.npy"]
    )


# What does not belong together


def test_a_manifest_of_a_pair_over_shards_without_pooled_text_is_an_error_and_the_reverse(tmp_path: Path) -> None:
    lacking = write(tmp_path / "lacking", encoder=PAIR)
    with pytest.raises(ValueError, match=r"lacking: .*names a second text encoder, .* \.pooled\.npy: encode"):
        loader_of(lacking, config(tmp_path))
    for encoder in ({"text_encoder": {"weights": "one"}}, PAIR | {"text_encoder_2": None}):
        having = write(tmp_path / "having", pooled_sample, encoder=encoder)
        with pytest.raises(ValueError, match=r"having: .*pooled\.npy.*names no second text encoder"):
            loader_of(having, config(tmp_path))
    loader_of(write(tmp_path / "both", pooled_sample, encoder=PAIR), config(tmp_path))


def test_sources_of_which_one_lacks_pooled_text_are_an_error_that_names_both(pooled: Manifest, tmp_path: Path) -> None:
    settings = config(Path(), shards=[SourceConfig(shards="a"), SourceConfig(shards="b")])
    other = write(tmp_path / "other", encoded_sample, [4], ENCODER)
    message = r"states \(3, 5\) with torch.float16 pooled text \(7,\), .*other has .* states \(3, 5\): the sources"
    with pytest.raises(ValueError, match=message):
        loader_of([pooled, other], settings)


def test_pooled_text_of_which_none_can_be_read_is_an_error(tmp_path: Path) -> None:
    def sample(shard: int, number: int) -> dict:
        return pooled_sample(shard, number) | {"pooled.npy": b"no array"}

    with pytest.raises(ValueError, match=r"none of the members \.pooled\.npy is readable"):
        loader_of(write(tmp_path, sample, [3]), config(tmp_path))
