"""Several sources, buckets, streams and shards at URLs through the training program itself."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import DEBUG
from faulty_server import FaultyServer
from PIL import Image
from training_runs import assert_same_state, metrics, train

from ldm.config import load_config, parse_config, to_yaml
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.shards import write_shard

SHORT = ("--training.steps=8", "--training.checkpoint_every=4", "--optimizer.schedule=constant")
BUCKETS = ("--data.buckets.step=16", "--data.buckets.max_aspect=2.0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three raw shards of 40 pictures of many shapes each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for shard in range(3):
        samples = []
        for number in range(40):
            height, width = rng.integers(40, 120, 2)
            stored = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stored, "PNG")
            samples.append({"__key__": f"{number:03}", "png": stored.getvalue(), "txt": f"noise {shard} {number}"})
        write_shard(folder / f"{shard:05}.tar", samples)
    build_manifest(folder, progress=False)
    return folder


def source_file(tmp_path: Path, *sources: dict) -> Path:
    """configs/debug.yaml with a list of sources."""
    settings = yaml.safe_load(DEBUG.read_text())
    settings["data"]["shards"] = list(sources)
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_a_list_of_sources_is_read_from_yaml_and_written_back(tmp_path):
    path = source_file(tmp_path, {"shards": "a", "weight": 3}, {"shards": "s3://b/c", "weight": 0.5})
    config = parse_config([f"--config={path}"], prog="test", description="")
    assert [(one.shards, one.weight) for one in config.data.sources] == [("a", 3.0), ("s3://b/c", 0.5)]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"shards": "a", "wieght": 3}, "wieght"),
        ({"shards": "a", "weight": -1.0}, "numbers above 0"),
        ({"weight": 1.0}, "shards"),
    ],
)
def test_what_a_source_does_not_have_is_an_error_that_names_it(tmp_path, capsys, source, message):
    path = source_file(tmp_path, {"shards": "b", "weight": 1.0}, source)
    with pytest.raises(SystemExit):
        parse_config([f"--config={path}"], prog="test", description="")
    assert message in capsys.readouterr().err


def test_two_weighted_sources_train_resume_and_split_as_one(raw_shards, pictures, tmp_path, capfd):
    sources = source_file(tmp_path, {"shards": str(raw_shards), "weight": 1}, {"shards": str(pictures), "weight": 3})
    run = tmp_path / "run"
    train(run, sources, *SHORT, config=sources)
    said = capfd.readouterr().err
    assert f"120 raw samples in 3 shards of {pictures}, weight 3" in said
    whole = losses(run)
    (run / "checkpoints/step-00000008").rename(tmp_path / "whole")
    (run / "checkpoints/latest").unlink()
    train(run, sources, *SHORT, config=sources)
    assert_same_state(run / "checkpoints/latest", tmp_path / "whole")
    split = train(tmp_path / "split", sources, *SHORT, "--training.max_micro_batch=4", config=sources)
    assert [line["loss"] for line in split] == pytest.approx(whole, rel=1e-5)
    other = source_file(tmp_path, {"shards": str(raw_shards), "weight": 2}, {"shards": str(pictures), "weight": 3})
    with pytest.raises(ValueError, match=r"data\.shards: other samples, sources or weights"):
        train(run, sources, "--training.steps=9", *SHORT[1:], config=other)


def test_buckets_train_at_several_shapes_and_resume_byte_by_byte(pictures, tmp_path, monkeypatch):
    shapes = []
    latents_of = ldm_train().latents_of

    def seen(run, batch):
        latents = latents_of(run, batch)
        shapes.append(tuple(latents.shape[2:]))
        return latents

    monkeypatch.setattr(ldm_train(), "latents_of", seen)
    run = tmp_path / "run"
    train(run, pictures, *SHORT, *BUCKETS)
    assert len(set(shapes)) >= 3
    assert all(h * w <= 16 * 16 for h, w in shapes)
    (run / "checkpoints/step-00000008").rename(tmp_path / "whole")
    (run / "checkpoints/latest").unlink()
    train(run, pictures, *SHORT, *BUCKETS)
    assert_same_state(run / "checkpoints/latest", tmp_path / "whole")
    split = train(tmp_path / "split", pictures, *SHORT, *BUCKETS, "--training.max_micro_batch=4")
    assert [line["loss"] for line in split] == pytest.approx(losses(run), rel=1e-5)


def ldm_train():
    import ldm.train

    return ldm.train


def test_a_bucket_step_that_the_network_cannot_halve_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"data\.buckets\.step is 4.*a multiple of that"):
        train(tmp_path / "run", pictures, "--data.buckets.step=4")


def test_a_stream_says_that_it_is_not_exact_trains_and_resumes(raw_shards, tmp_path, capfd):
    [tar] = raw_shards.glob("*.tar")
    settings = yaml.safe_load(DEBUG.read_text())
    settings["data"]["shards"] = None
    settings["data"]["stream"] = {"urls": [str(tar)]}
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    train(run, "", "--training.steps=6", *SHORT[1:], config=path)
    said = capfd.readouterr().err
    assert "NOT exact" in said.split("UNet with")[0]
    train(run, "", *SHORT, config=path)
    assert "resuming after step 6" in capfd.readouterr().err
    assert len(losses(run)) == 8
    exact = train(tmp_path / "indexed", raw_shards, *SHORT)
    for name in ("captions_dropped", "loss_quarter_1"):  # which are dropped, and timesteps, are the positions'
        assert [line[name] is None for line in metrics(run)] == [line[name] is None for line in exact]
    assert [line["captions_dropped"] for line in metrics(run)] == [line["captions_dropped"] for line in exact]


def test_training_over_a_server_that_fails_gives_the_run_over_local_shards(pictures, tmp_path):
    local = train(tmp_path / "local", pictures, *SHORT)
    with FaultyServer(pictures, seed=3, rate=0.9, stall=3.0) as server:
        cache = (f"--data.cache.folder={tmp_path / 'cache'}", "--data.cache.timeout=1.0", "--data.cache.attempts=12")
        remote = train(tmp_path / "remote", server.url, *SHORT, *cache, "--data.workers=1")
        injected = sum(server.injected.values())
    print(f"seed 3, {injected} faults injected")
    assert injected > 3
    assert [line["loss"] for line in remote] == [line["loss"] for line in local]
    assert_same_state(tmp_path / "remote/checkpoints/latest", tmp_path / "local/checkpoints/latest")
    assert (
        Manifest.load(pictures).digest()
        in (json.loads((tmp_path / "remote/checkpoints/latest/training_state/state.json").read_text())["shards"])
    )
