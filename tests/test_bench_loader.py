"""The benchmark of the loader runs, compares what it measures, and writes what it shows. How fast is not tested."""

import json
from pathlib import Path

from conftest import ROOT, run_tool


def test_the_benchmark_finds_both_readers_equal_and_writes_its_figures(tmp_path: Path) -> None:
    few = ["--count", "2", "--samples", "30", "--batch", "16", "--rounds", "2", "--seconds", "0", "--resumes", "0"]
    shown = run_tool(ROOT / "tools/bench_loader.py", *few, "--scratch", tmp_path, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["moments"] for one in figures] == [[8, 16, 16]] * 4 + [[8, 32, 32]] * 4
    assert {one["peer_name"] for one in figures} == {"webdataset, decoded", "webdataset, bytes alone"}
    for one in figures:
        assert (one["samples"], one["unit"], one["rounds"]) == (60, "samples/s", 2)
        assert one["ratio"] == one["ours"] / one["peer"] > 0
        assert one["ratio_range"][0] <= one["ratio_range"][1]
        way = "shuffled" if "shuffled" in one["name"] else "file order"
        assert f"| {one['peer_name']} | {one['peer']:,.0f} (" in shown
        assert f"| ldm, decoded, checksums, {way} | {one['ours']:,.0f} (" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
