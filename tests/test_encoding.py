"""Encoded shards hold raw moments of the right pictures and say what made them; interrupted encoding goes on."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from conftest import DEBUG, ROOT, run_tool
from diffusers import AutoencoderKL as DiffusersAutoencoder

from ldm.config import load_config
from ldm.data.encoding import identity_problems
from ldm.data.manifest import Manifest
from ldm.data.members import decode_floats
from ldm.data.shards import ShardReader
from ldm.models.pretrained import resolve_source
from ldm.models.text_encoder import TextEncoder


def stock(folder):
    """The first shard as webdataset itself reads it."""
    return webdataset.WebDataset(str(folder / "emoji-000000.tar"), shardshuffle=False)


def encode(raw, out, *options):
    words = [f"--config={DEBUG}", f"--encoding.shards={raw}", f"--data.shards={out}", "--encoding.workers=0", *options]
    return run_tool(ROOT / "tools/encode_latents.py", *words)


def test_moments_are_those_of_diffusers_on_pictures_in_minus_one_to_one_raw_and_unscaled(raw_shards, encoded_shards):
    config = load_config(DEBUG)
    reference = DiffusersAutoencoder.from_pretrained(resolve_source(config.autoencoder), torch_dtype=torch.float32)
    encoded = {sample["__key__"]: sample for sample in stock(encoded_shards)}
    raw = stock(raw_shards).decode("torchrgb")
    compared = 0
    for sample in raw:
        if compared == 8:
            break
        with torch.no_grad():
            moments = reference.encode(sample["png"][None] * 2 - 1).latent_dist.parameters[0]
        ours = decode_floats(encoded[sample["__key__"]], "moments.npy", tuple(moments.shape))
        np.testing.assert_allclose(ours, moments.numpy(), rtol=2e-3, atol=2e-3)  # stored in float16
        assert encoded[sample["__key__"]]["txt"].decode() == sample["txt"]
        compared += 1
    assert compared == 8


def test_text_states_are_those_of_the_text_encoder(encoded_shards):
    manifest = Manifest.load(encoded_shards)
    members = ShardReader(manifest).members(0, 5)
    states = TextEncoder(load_config(DEBUG).text_encoder).encode([members["txt"].decode()])[0]
    stored = decode_floats(members, "text.npy", tuple(states.shape))
    np.testing.assert_allclose(stored, states.numpy(), atol=2e-3)


def test_the_manifest_names_the_encoder_and_a_run_with_another_is_told_the_field(encoded_shards):
    identity = Manifest.load(encoded_shards).encoder
    assert identity["resolution"] == 64
    assert identity["pixel_range"] == [-1.0, 1.0]
    assert identity_problems(identity, identity) == []
    other = json.loads(json.dumps(identity))
    other["autoencoder"]["weights"] = "another"
    other["resolution"] = 128
    problems = identity_problems(identity, other)
    assert any("autoencoder.weights" in p for p in problems)
    assert any("resolution 64, but this run has 128" in p for p in problems)


def test_encoding_again_writes_only_what_is_missing_and_gives_the_same_bytes(raw_shards, tmp_path):
    raw = tmp_path / "raw"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for sample in islice(stock(raw_shards), 59):
        (pictures / f"{sample['__key__']}.png").write_bytes(sample["png"])
        (pictures / f"{sample['__key__']}.txt").write_bytes(sample["txt"])
    run_tool(ROOT / "tools/make_shards.py", pictures, raw, "--samples_per_shard", "20")
    out = tmp_path / "out"
    encode(raw, out)
    names = sorted(p.name for p in out.glob("*.tar"))
    assert len(names) == 3
    whole = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / names[1]).unlink()
    untouched = (out / names[0]).stat().st_mtime_ns
    encode(raw, out)
    assert (out / names[0]).stat().st_mtime_ns == untouched
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole


def test_going_on_with_another_encoding_is_refused(raw_shards, encoded_shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(encoded_shards, out)
    with pytest.raises(AssertionError, match=r"was begun with another encoding.*\n.*dtype was float16, now float32"):
        encode(raw_shards, out, "--encoding.dtype=float32")


def test_raw_shards_that_were_made_again_are_not_taken_for_encoded(raw_shards, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(raw_shards, raw)
    encode(raw, out)
    samples = list(stock(raw_shards))[:5]
    with webdataset.TarWriter(str(raw / "emoji-000000.tar")) as writer:
        for sample in samples:
            writer.write({"__key__": sample["__key__"], "png": sample["png"], "txt": sample["txt"]})
    run_tool(ROOT / "tools/index_shards.py", raw)
    with pytest.raises(AssertionError, match=r"raw_shards was"):
        encode(raw, out)


def test_too_many_lost_samples_end_the_encoding_without_a_manifest(raw_shards, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    with webdataset.TarWriter(str(raw / "shard-000000.tar")) as writer:
        for i, sample in enumerate(stock(raw_shards)):
            writer.write({"__key__": f"k{i}", "png": sample["png"][: 200 if i % 3 else None], "txt": sample["txt"]})
    run_tool(ROOT / "tools/index_shards.py", raw)
    with pytest.raises(AssertionError, match=r"could not be used"):
        encode(raw, out)
    assert not (out / "manifest.json").exists()


def test_a_truncated_picture_is_a_ledger_line_and_missing_from_the_encoded_shard(raw_shards, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    samples = list(stock(raw_shards))[:6]
    with webdataset.ShardWriter(str(tmp_path / "shard-%06d.tar"), verbose=0) as writer:
        for i, sample in enumerate(samples):
            cut = sample["png"][: len(sample["png"]) // 2] if i == 2 else sample["png"]
            writer.write({"__key__": f"k{i}", "png": cut, "txt": sample["txt"]})
    run_tool(ROOT / "tools/index_shards.py", tmp_path)
    out = tmp_path / "encoded"
    said = encode(tmp_path, out)
    assert "1 could not be used" in said
    (line,) = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"]) == ("shard-000000.tar", "k2")
    assert "does not decode" in line["reason"]
    assert Manifest.load(out).counts == [5]
