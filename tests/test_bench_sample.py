"""The benchmark of sampling compares pictures with diffusers' first, and says so when they are others."""

import json
from pathlib import Path

import bench_sample
import pytest

from ldm.pipeline.pipeline import Pipeline, save_pipeline


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "pipeline"
    save_pipeline(path, pipeline)
    return path


def test_both_draw_the_same_pictures_and_their_times_are_written(folder, tmp_path, capsys) -> None:
    words = ["--steps", "3", "--rounds", "2", "--batches", "1", "2", "--device", "cpu"]
    written = tmp_path / "records.json"
    assert bench_sample.main(["--checkpoint", str(folder), *words, "--json", str(written)]) == 0
    records = json.loads(written.read_text())
    assert [(record["unit"], record["batch"]) for record in records] == [
        (unit, batch) for batch in (1, 2) for unit in ("s", "evaluations/s")
    ]
    for seconds, rate in zip(records[::2], records[1::2], strict=True):
        assert seconds["difference"] <= 2 / 255
        assert rate["ours"] == pytest.approx(3 * rate["batch"] / seconds["ours"], rel=0.5)
        assert seconds["ratio"] == pytest.approx(seconds["peer"] / seconds["ours"])
    assert "evaluations/s" in capsys.readouterr().out


def test_networks_of_random_weights_are_compared_by_their_latents(monkeypatch, tmp_path) -> None:
    small = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "attention_head_dim": 2}
    monkeypatch.setattr(bench_sample, "SD15", bench_sample.SD15 | small)
    written = tmp_path / "records.json"
    words = ["--sd15", "--steps", "2", "--rounds", "1", "--batches", "1", "--device", "cpu", "--json", str(written)]
    assert bench_sample.main(words) == 0
    assert all(record["difference"] < 1e-4 for record in json.loads(written.read_text()))


def test_other_pictures_are_told_and_end_it_with_1(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_sample, "SAMPLER", "heun")
    words = ["--checkpoint", str(folder), "--steps", "3", "--rounds", "1", "--batches", "1", "--device", "cpu"]
    assert bench_sample.main(words) == 1
    assert "another picture: diffusers' pipeline, float32, batch 1" in capsys.readouterr().err
