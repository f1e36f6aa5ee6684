"""The benchmarks of the step run, find equal results before they time them, and write what they show."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_tool


def test_the_benchmark_finds_equal_weights_and_averages_and_writes_its_records(tmp_path: Path) -> None:
    shown = run_tool(
        ROOT / "tools/bench_optimizer.py", "--widths", "32", "--rounds", "1", "--json", tmp_path / "records.json"
    )
    records = json.loads((tmp_path / "records.json").read_text())
    assert [(one["name"].split(",")[0], one["peer_name"]) for one in records] == [
        ("clip", "diffusers, as its script"),
        ("average alone", "diffusers, as its script: EMAModel"),
        ("what the average adds to a step", "diffusers, as its script: EMAModel"),
        ("clip", "diffusers, foreach"),
        ("average alone", "diffusers, foreach: EMAModel"),
        ("what the average adds to a step", "diffusers, foreach: EMAModel"),
    ]
    for one in records:
        assert one["unit"] == "ms"
        if one["name"].startswith("what"):
            continue
        assert one["difference"] <= 1e-6
        assert one["ratio"] == pytest.approx(one["peer"] / one["ours"])
        assert f"ratio {one['ratio']:.2f}" in shown


def test_the_benchmark_refuses_to_time_what_comes_out_differently(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("bench_optimizer", ROOT / "tools/bench_optimizer.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_optimizer", bench)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "DECAY", 0.9)
    peer = bench.Diffusers(bench.network(32, torch.device("cpu")), None)
    monkeypatch.setattr(bench, "DECAY", 0.91)
    ours = bench.Ours(bench.network(32, torch.device("cpu")), bench.Accelerator(cpu=True))
    with pytest.raises(ValueError, match="weights or averages differ by"):
        bench.check_same(ours, peer)


def test_the_loop_around_an_empty_network_is_told_against_the_runs_own_step(encoded_shards, tmp_path: Path) -> None:
    shown = run_tool(
        ROOT / "tools/bench_loop.py",
        *("--config", ROOT / "configs/debug.yaml", "--rounds", "1", "--steps", "2", "--empty-steps", "3"),
        *("--json", tmp_path / "records.json", f"data.shards={encoded_shards}"),
    )
    (record,) = json.loads((tmp_path / "records.json").read_text())
    assert record["unit"] == "ms"
    assert record["forward_ms"] > 0
    assert record["backward_ms"] < record["ours"]
    assert "the empty loop's parts" in shown
