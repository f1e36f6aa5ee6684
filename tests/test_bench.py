"""The front of the benchmarks runs each with the options it is given and joins their records."""

import importlib
import json
import re
import sys
from pathlib import Path

import bench
import bench_checkpoint
import pytest
from conftest import ROOT
from test_bench_train import accelerate_forgets  # noqa: F401


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_each_benchmark_exists_and_has_every_option_with_which_the_front_runs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = bench.command(name, True, [], tmp_path, tmp_path / "r.json")
    assert Path(words[1]).is_file()
    monkeypatch.setattr(sys, "argv", [words[1], "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(Path(words[1]).stem).main()
    told = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert [word for word in words if word.startswith("--") and word not in told] == []


def test_a_benchmarks_own_options_come_last_and_so_win(tmp_path: Path) -> None:
    own = ["--steps", "5", "--rounds", "1"]
    words = bench.command("samplers", True, own, tmp_path, tmp_path / "r.json")
    assert words[:2] == [sys.executable, str(ROOT / "tools/bench_samplers.py")]
    assert words[-6:] == [*own, "--json", str(tmp_path / "r.json")]
    sample = bench.command("sample", False, ["--sd15"], tmp_path, tmp_path / "r.json")
    assert "--checkpoint" not in sample
    assert "--checkpoint" in bench.command("sample", False, [], tmp_path, tmp_path / "r.json")


def test_one_that_fails_keeps_the_others_records_and_is_told(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {name: bench.BENCHMARKS[name] for name in ("loader", "samplers")})
    one = bench.BENCHMARKS["loader"]
    monkeypatch.setitem(bench.BENCHMARKS, "loader", bench.Benchmark(one.script, one.about, ("--shards", "nowhere")))
    assert bench.main(["all", "--quick", "--json", str(tmp_path / "all.json")]) == 1
    rows = json.loads((tmp_path / "all.json").read_text())
    assert {row["sampler"] for row in rows} > {"ddim", "dpmpp_2m"}
    assert all({"name", "ours", "peer", "peer_name", "ratio", "unit"} <= row.keys() for row in rows)
    assert "failed: loader" in capfd.readouterr().err


def test_the_pause_for_a_checkpoint_is_a_record_with_all_that_was_measured(tmp_path: Path) -> None:
    few = ["--channels", "32", "--rounds", "1", "--folder", str(tmp_path / "folder")]
    assert bench_checkpoint.main([*few, "--json", str(tmp_path / "r.json")]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert (row["peer_name"], row["unit"]) == ("accelerate's save_state", "s")
    assert row["ratio"] == row["peer"] / row["ours"]
    assert row["measured"]["pause"]["median"] == row["ours"]
    assert row["measured"]["bytes"] > 0


def test_options_of_one_benchmark_are_refused_with_all(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["all", "--rounds", "3"])
    assert "options of one benchmark, with all: --rounds 3" in capsys.readouterr().err
