"""Encoded shards hold raw moments of the right pictures and say what made them; interrupted encoding goes on."""

import io
import json
import re
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from conftest import DEBUG, ROOT, run_tool
from diffusers import AutoencoderKL as DiffusersAutoencoder
from PIL import Image

from ldm.config import load_config
from ldm.data.buckets import BucketConfig, bucket_counts, bucket_shapes
from ldm.data.encoding import EncodingConfig, encode_shards, encoder_identity, identity_problems
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.members import decode_floats
from ldm.data.quarantine import Ledger
from ldm.data.shards import ShardReader
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pretrained import resolve_source
from ldm.models.text_conditioner import TextConditioner
from tools import encode_latents


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
    states = TextConditioner.load([load_config(DEBUG).text_encoder]).encode([members["txt"].decode()]).text[0]
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


SIZES = [(72, 72), (72, 100), (110, 72), (72, 150), (160, 72), (90, 80), (72, 101), (64, 64), (50, 90), (200, 210)]
"""Heights and widths of the pictures with several aspects"""


@pytest.fixture(scope="module")
def sized_shards(raw_shards, tmp_path_factory):
    """Two shards of emoji stretched to the sizes above, one picture of the second cut short; and the pictures."""
    folder = tmp_path_factory.mktemp("sized")
    pictures = {}
    samples = iter(stock(raw_shards))
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"shard-{number:06d}.tar")) as writer:
            for i, (height, width) in enumerate(SIZES):
                sample = next(samples)
                picture = Image.open(io.BytesIO(sample["png"])).convert("RGB").resize((width, height))
                out = io.BytesIO()
                picture.save(out, "PNG")
                key, cut = f"{number}-{i}", (number, i) == (1, 1)
                note = json.dumps({"source": key}).encode()
                data = out.getvalue()[: 300 if cut else None]
                writer.write({"__key__": key, "png": data, "txt": sample["txt"], "json": note})
                if not cut:
                    pictures[key] = (picture, sample["txt"])
    build_manifest(folder, progress=False)
    return folder, pictures


def encode_in_buckets(raw, out, buckets, **options):
    """What the tool does, without its launcher; the manifest of the encoded shards."""
    config, encoding = load_config(DEBUG), EncodingConfig(workers=0, batch_size=3, dtype="float32", **options)
    autoencoder = AutoencoderKL.from_pretrained(resolve_source(config.autoencoder)).eval()
    manifest, text_encoder = Manifest.load(raw), TextConditioner.load([config.text_encoder])
    out.mkdir()
    done = encode_shards(
        manifest,
        range(2),
        out,
        autoencoder,
        None,
        Ledger(out / "quarantine.jsonl", 1.0),
        resolution=64,
        config=encoding,
        device=torch.device("cpu"),
        buckets=buckets,
    )
    assert sum(done) == 2 * len(SIZES)
    assert not any(parameter.is_inference() for parameter in autoencoder.parameters())  # it may still be trained
    identity = encoder_identity(autoencoder, text_encoder, 64, encoding, text_states=False, buckets=buckets)
    return build_manifest(out, identity, progress=False)


def test_each_picture_is_encoded_at_its_buckets_shape_as_diffusers_encodes_it_alone(sized_shards, tmp_path):
    folder, pictures = sized_shards
    buckets = BucketConfig(step=8)
    shapes = bucket_shapes(64, buckets)
    manifest = encode_in_buckets(folder, tmp_path / "out", buckets, flipped=True)
    assert manifest.encoder["buckets"] == [list(one) for one in shapes]
    config = load_config(DEBUG)
    reference = DiffusersAutoencoder.from_pretrained(resolve_source(config.autoencoder), torch_dtype=torch.float32)
    keys, seen = [], set()
    for shard in range(2):
        for number in range(manifest.counts[shard]):
            members, key = ShardReader(manifest).members(shard, number), manifest.index(shard).key(number)
            picture, caption = pictures[key]
            height, width = min(shapes, key=lambda one: abs(np.log(one[1] / one[0] * picture.height / picture.width)))
            scale = max(height / picture.height, width / picture.width)
            resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS)
            top, left = (resized.height - height + 1) // 2, (resized.width - width + 1) // 2
            pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32)
            for name, array in (("moments.npy", pixels), ("flipped.npy", pixels[:, ::-1].copy())):
                image = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
                with torch.no_grad():
                    expected = reference.encode(image).latent_dist.parameters[0].numpy()
                assert expected.shape == (8, height // 4, width // 4)
                np.testing.assert_allclose(decode_floats(members, name, expected.shape), expected, rtol=1e-4, atol=1e-4)
            about = json.loads(bytes(members["json"]))
            assert about == {
                "source": key,
                "size": [picture.height, picture.width],
                "crop": [top, left],
                "target": [height, width],
            }
            assert bytes(members["txt"]) == caption
            keys.append(key)
            seen.add((height, width))
    assert keys == list(pictures)  # the order of the raw shards, without the picture that is cut short
    assert len(seen) >= 5
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["key"] == "1-1"
    # The encoded shards have the buckets of the raw ones, whose cut picture still tells its shape.
    raw_counts = bucket_counts(Manifest.load(folder), shapes, progress=False)
    raw_counts[1, shapes.index((56, 72))] -= 1
    np.testing.assert_array_equal(bucket_counts(manifest, shapes, progress=False), raw_counts)


def test_without_buckets_pictures_are_square_and_the_identity_says_which_it_was(sized_shards, tmp_path):
    plain = encode_in_buckets(sized_shards[0], tmp_path / "plain", None)
    members = ShardReader(plain).members(0, 3)
    decode_floats(members, "moments.npy", (8, 16, 16))
    assert json.loads(bytes(members["json"])).keys() == {"source", "size", "crop"}
    assert plain.encoder["buckets"] is None
    with_buckets = dict(plain.encoder) | {"buckets": [[72, 56], [64, 64], [56, 72]]}
    (problem,) = identity_problems(plain.encoder, with_buckets)
    assert "buckets None, but this run has [[72, 56], [64, 64], [56, 72]]" in problem
    before = {name: value for name, value in plain.encoder.items() if name != "buckets"}
    assert identity_problems(before, plain.encoder) == []


def test_the_tool_encodes_in_the_buckets_of_the_config(sized_shards, tmp_path):
    expected, out = encode_in_buckets(sized_shards[0], tmp_path / "expected", BucketConfig(step=8)), tmp_path / "out"
    options = ["--encoding.dtype=float32", "--encoding.batch_size=3", "--encoding.text_states=false"]
    encode(sized_shards[0], out, '--data.buckets={"step": 8}', *options)
    for shard in range(2):
        assert (out / expected.path(shard).name).read_bytes() == expected.path(shard).read_bytes()
    assert Manifest.load(out).encoder == expected.encoder


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            '--data.shards=[{"shards": "a"}, {"shards": "b"}]',
            "data.shards names several sources: encode each by itself",
        ),
        ("--data.shards=s3://bucket/encoded", "s3://bucket/encoded is a URL: encoding reads and writes local folders"),
    ],
)
def test_what_the_tool_cannot_write_to_is_an_error(option, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        encode_latents.main([f"--config={DEBUG}", "--encoding.shards=raw", option])


def test_a_step_that_the_autoencoder_cannot_take_is_an_error_that_names_the_setting(sized_shards, tmp_path):
    with pytest.raises(ValueError, match=r"data\.buckets\.step is 2; allowed are multiples of 4"):
        encode_in_buckets(sized_shards[0], tmp_path / "out", BucketConfig(step=2))
