"""The benchmark of the loader runs, compares what it measures, and writes what it shows. How fast is not tested."""

import json
from pathlib import Path

from conftest import ROOT, run_tool


def test_the_benchmark_finds_both_readers_equal_and_writes_its_figures(tmp_path: Path) -> None:
    few = ["--count", "2", "--samples", "30", "--batch", "16", "--rounds", "2", "--seconds", "0", "--resumes", "0"]
    shown = run_tool(ROOT / "tools/bench_loader.py", *few, "--scratch", tmp_path, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["moments"] for one in figures["reading"]] == [[8, 16, 16], [8, 32, 32]]
    assert all(one["samples"] == 60 for one in figures["reading"])
    for one in figures["reading"]:
        rates, ratio = one["wall"], one["wall"]["shuffled / stock"]
        assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
        assert f"{rates['stock']['median']:,.0f} (" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
