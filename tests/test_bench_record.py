"""Records say how many times better ours is, in one JSON form; times are taken in rounds that turn around."""

import json
import math
import statistics
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bench_record
import pytest
import torch
from bench_record import Record, about, compared, heading, interleaved, line, write_records


def test_a_ratio_above_one_means_ahead_for_times_and_for_rates() -> None:
    assert Record("step", 2.0, 3.0, "theirs", "s").ratio == 1.5
    assert Record("step", 30.0, 20.0, "theirs", "pictures/s").ratio == 1.5
    assert Record("waiting", 0.25, 0.5, "limit", "%").ratio == 2.0
    assert Record("waiting", 0.0, 0.5, "limit", "%").ratio == math.inf


def test_a_unit_that_says_neither_time_nor_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"record 'step': found unit 'steps', expected s, ms"):
        Record("step", 1.0, 1.0, "theirs", "steps")


def test_what_rounds_gave_becomes_medians_and_ranges() -> None:
    ours, theirs = [1.0, 4.0, 2.0], [3.0, 6.0, 8.0]
    record = compared("step", ours, theirs, "theirs", "s", 1e-7, batch=4)
    assert (record.ours, record.peer) == (statistics.median(ours), statistics.median(theirs))
    assert record.ours_range == (1.0, 4.0)
    assert record.peer_range == (3.0, 8.0)
    assert record.ratio_range == (1.5, 4.0)
    assert record.extra == {"rounds": 3, "batch": 4}
    told = line(record)
    for part in ("step", "ours 2 (1 to 4) s", "theirs 6 (3 to 8)", "ratio 3.00 (1.50 to 4.00)", "|d| 1e-07"):
        assert part in told
    with pytest.raises(ValueError, match="found 3 rounds of ours and 2 of theirs"):
        compared("step", ours, theirs[:2], "theirs", "s")


def test_the_file_is_a_list_of_objects_with_the_names_that_readers_expect(tmp_path: Path) -> None:
    records = [compared("a", [1.0], [2.0], "theirs", "s", batch=4), Record("b", 3.0, 1.0, "limit", "pictures/s")]
    write_records(tmp_path / "records.json", records, about("cpu"))
    rows = json.loads((tmp_path / "records.json").read_text())
    expected = {"ours": 1.0, "peer": 2.0, "peer_name": "theirs", "ratio": 2.0, "unit": "s", "batch": 4}
    assert rows[0].items() >= ({"name": "a"} | expected).items()
    assert rows[1].items() >= {"name": "b", "ratio": 3.0, "ours_range": None}.items()
    write_records(tmp_path / "records.json", [Record("waiting", 0.0, 0.5, "limit", "%")], {})
    assert json.loads((tmp_path / "records.json").read_text(), parse_constant=pytest.fail)[0]["ratio"] is None
    assert all(row["about"]["torch"] == rows[0]["about"]["torch"] for row in rows)


def test_an_extra_that_hides_a_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra names \['ratio'\] are taken"):
        write_records(tmp_path / "r.json", [Record("a", 1.0, 1.0, "p", "s", extra={"ratio": 9.0})], {})


def test_about_tells_machine_versions_and_date() -> None:
    found = about("cpu")
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(minutes=5)
    assert found["device"] in heading(found)
    assert f"diffusers {found['diffusers']}" in heading(found)


def test_rounds_turn_around_after_a_warm_up_and_each_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls = []

    def takes(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds

    monkeypatch.setattr(bench_record.time, "perf_counter", lambda: now)
    ways = {"a": lambda: takes("a", 1.0), "b": lambda: takes("b", 2.0), "c": lambda: takes("c", 4.0)}
    found = interleaved(ways, 3, "cpu", warmups=2)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
