"""The benchmark and the figure of the samplers run, compare what they measure, and write what they show."""

import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, run_tool
from PIL import Image


def test_the_benchmark_finds_equal_outputs_and_writes_its_figures(tmp_path: Path) -> None:
    shown = run_tool(
        ROOT / "tools/bench_samplers.py",
        "--steps",
        "4",
        "--batches",
        "1",
        "--rounds",
        "2",
        "--json",
        tmp_path / "f.json",
    )
    figures = json.loads((tmp_path / "f.json").read_text())
    for run in figures:
        assert run["about"]["diffusers"]
        assert run["unit"] == "ms"
        assert run["ratio"] == run["peer"] / run["ours"]
        for whose, who in (("ours", "ours"), ("peer", "theirs")):
            whole, inside = (statistics.median(run["milliseconds"][name]) for name in (who, f"{who}_inside"))
            assert run[whose] == whole - inside
        assert run["difference"] < 1e-4 or run["sampler"] == "dpmpp_3m"
        assert {len(times) for times in run["milliseconds"].values()} == {2}
        assert re.search(rf"{run['sampler']} +batch 1 .* ratio", shown)
    expected = {"ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"}
    assert expected < {run["sampler"] for run in figures}


def test_the_figure_of_convergence_is_a_picture_and_its_numbers_fall(tmp_path: Path) -> None:
    shown = run_tool(ROOT / "tools/plot_convergence.py", "--dims", "2", "--out", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (1100, 720)
    lines = {line.split("  ")[0].strip(): line for line in shown.splitlines() if ": " in line and "e-" in line}
    for name in ("euler, ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "dpm_solver_3", "ode_adaptive"):
        line = next(text for key, text in lines.items() if key.startswith(name))
        errors = [float(error) for error in re.findall(r"\d+: (\S+)", line)]
        assert errors[-1] < errors[0] / 10, line
        assert errors[-1] == pytest.approx(min(errors), rel=3)
