"""The program's scores of latents: on a UNet that is exact for unit normal latents, on raw and on encoded shards."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_clip, make_pipeline

from ldm.data.encoding import EncodingConfig, RawSamples, Wanted, encode_batch, encoder_identity
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.shards import write_shards
from ldm.evaluate import main
from ldm.evaluation.latent_samples import latent_batches
from ldm.pipeline.pipeline import Pipeline, save_pipeline

COUNT = 24


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Its UNet puts out v = 0, which is the best of latents that are unit normal, whatever the caption."""
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    made = make_pipeline(str(folder), size=2, parameterization="v")
    with torch.no_grad():
        for parameter in made.unet.conv_out.parameters():
            parameter.zero_()
    return made


def write_unit_normal(folder: Path, pipeline: Pipeline) -> None:
    """Encoded shards: latents, scaled by 0.7, of unit variance, of which the posterior makes a part; one is damaged."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(COUNT, 4, 2, 2)) * math.sqrt(1 / 0.49 - 0.25)
    moments = np.concatenate([means, np.full_like(means, 2 * math.log(0.5))], axis=1).astype(np.float32)
    samples: list[dict[str, Any]] = [
        {"__key__": f"{i:02d}", "moments.npy": moments[i], "txt": f"number {i}"} for i in range(COUNT)
    ]
    samples[3]["txt"] = " "
    identity = encoder_identity(pipeline.autoencoder, pipeline.text_encoder, 4, EncodingConfig(), text_states=False)
    write_shards(samples, folder, prefix="normal", samples_per_shard=10, encoder=identity)


def test_elbo_and_ode_of_a_network_that_is_exact_are_the_exact_log_density_of_each_sample(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    write_unit_normal(tmp_path / "shards", pipeline)
    words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path / "shards", "--out", tmp_path / "out"]
    options = ["--scores", "elbo", "ode", "--device=cpu", "--seed=4", "--samples=24", "--probes=2", "--tolerance=1e-4"]
    assert main([*map(str, words), *options, "--batch_size=10", "--timesteps=48"]) == 0
    shown = capsys.readouterr()
    assert "passed over: normal-000000.tar/03: the caption is empty" in shown.err
    reports = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("elbo", "ode")}
    batches = latent_batches(
        pipeline, tmp_path / "shards", samples=24, seed=4, batch_size=24, passed_over=lambda line: None
    )
    bits = {}
    for batch in batches:
        nats = (batch.latents.double().square() + math.log(2 * math.pi)).flatten(1).mean(1) / 2
        bits |= dict(zip(batch.keys, (nats / math.log(2)).tolist(), strict=True))
    assert len(bits) == 23
    for name, tolerated in (("ode", 0.002), ("elbo", 0.2)):
        report = reports[name]
        rows = {row["key"]: row for row in report["samples"]}
        errors = [rows[key]["bits_per_dimension"] - exact for key, exact in bits.items()]
        assert max(map(abs, errors)) < tolerated, name
        assert abs(np.mean(errors)) < 1e-3 + 4 * np.std(errors) / math.sqrt(23), name
        mean = np.mean([row["bits_per_dimension"] for row in rows.values()])
        assert report["bits_per_dimension"] == pytest.approx(mean)
        assert report["nats_per_dimension"] == pytest.approx(mean * math.log(2))
        deviation = np.std([row["bits_per_dimension"] for row in rows.values()], ddof=1)
        assert report["standard_error"] == pytest.approx(deviation / math.sqrt(23))
        assert report["unscaled_bits_per_dimension"] == pytest.approx(mean + math.log2(1 / 0.7))
        settings = report["settings"]
        assert [settings[one] for one in ("checkpoint", "seed", "passed_over", "shards")] == ["model", 4, 1, "shards"]
        assert all(row["caption"] == f"number {int(key.split('/')[1])}" for key, row in rows.items())
        assert f"{report['bits_per_dimension']:.4f} +-" in shown.out
    with Image.open(tmp_path / "out" / "elbo.png") as figure:
        assert figure.size == (1000, 620)
        assert figure.text["L_0"] == f"{reports['elbo']['L_0']:.4f}"  # type: ignore[attr-defined]
        # Where levels lose what unit normal latents would, the line runs along the dashed one.
        colours = {colour for _, colour in figure.convert("RGB").getcolors(1 << 20) or []}
        assert {(0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28), (0xCF, 0xE0, 0xF1)} <= colours


def test_raw_shards_give_what_their_encoded_ones_give(pipeline: Pipeline, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    rng = np.random.default_rng(1)
    samples = [
        {"__key__": f"{i}", "png": png(rng.integers(0, 256, (6, 4 + i, 3), dtype=np.uint8)), "txt": f"number {i}"}
        for i in range(6)
    ]
    samples[2]["png"] = samples[2]["png"][:50]  # type: ignore[index]
    write_shards(samples, tmp_path / "raw", prefix="x", samples_per_shard=6)
    raw = RawSamples(Manifest.load(tmp_path / "raw"))
    decoded = [raw[Wanted(0, i, (4, 4))] for i in range(6)]
    config = EncodingConfig(dtype="float32")
    good = [one for i, one in enumerate(decoded) if i != 2]
    encoded = encode_batch(good, pipeline.autoencoder, None, config, torch.device("cpu"))  # type: ignore[arg-type]
    broken = {"__key__": "2", "moments.npy": np.zeros((8, 3, 2), dtype=np.float64), "txt": "broken"}
    write_shards([*encoded[:2], broken, *encoded[2:]], tmp_path / "encoded", prefix="x", samples_per_shard=6)
    identity = encoder_identity(pipeline.autoencoder, pipeline.text_encoder, 4, config, text_states=False)
    build_manifest(tmp_path / "encoded", identity, progress=False)
    rows = {}
    for kind in ("raw", "encoded"):
        words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path / kind, "--out", tmp_path / f"out-{kind}"]
        assert main([*map(str, words), "--scores", "elbo", "--device=cpu", "--timesteps=8", "--batch_size=4"]) == 0
        report = json.loads((tmp_path / f"out-{kind}" / "elbo.json").read_text())
        assert report["settings"]["passed_over"] == 1
        rows[kind] = {row["key"]: row["bits_per_dimension"] for row in report["samples"]}
    assert len(rows["raw"]) == 5
    assert rows["raw"] == pytest.approx(rows["encoded"], rel=1e-4)


def png(pixels: np.ndarray) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def test_wrong_words_are_errors(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    write_unit_normal(tmp_path / "shards", pipeline)
    words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path / "shards", "--out", tmp_path / "out"]
    for options, said in (
        (["--scores", "likelihood"], "invalid choice: 'likelihood'"),
        (["--scores", "ode", "--tolerance=0"], "found '0', expected a number above 0"),
        (["--scores", "ode", "--dtype=bfloat16"], "dtype: found torch.bfloat16, expected float32"),
        (["--scores", "retrieval"], "shards holds latents, expected the raw shards"),
        (["--scores", "variances", "--timesteps=1"], "timesteps: found 1, expected 2 or more"),
        (["--scores", "elbo", "--timesteps=-1"], "expected a whole number, 0 or more"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, words), "--device=cpu", "--samples=2", *options])
        assert exit_.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split()), options
    assert not (tmp_path / "out").exists()
