"""The quarantine ledger: lines once, the rate, and what a resumed run finds."""

import json
import warnings
from pathlib import Path

import pytest
from accelerate import Accelerator

from ldm.data.quarantine import Ledger, Quarantined, QuarantineLimitError


def record(number: int, position: int | None = None, reason: str = "cut short") -> Quarantined:
    return Quarantined("s-000001.tar", f"k{number}", reason, number if position is None else position, "s-0.tar/r")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_shard_key_and_reason_is_one_line_also_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, 0.5)
    assert not path.exists()
    ledger.append([record(1), record(2)], seen=32)
    ledger.append([record(1, position=700)], seen=32)
    ledger = Ledger(path, 0.5)
    ledger.append([record(2, position=900), record(2, position=901, reason="no caption")], seen=32)
    assert lines(path) == [
        {"shard": "s-000001.tar", "key": "k1", "reason": "cut short", "position": 1, "replacement": "s-0.tar/r"},
        {"shard": "s-000001.tar", "key": "k2", "reason": "cut short", "position": 2, "replacement": "s-0.tar/r"},
        {"shard": "s-000001.tar", "key": "k2", "reason": "no caption", "position": 901, "replacement": "s-0.tar/r"},
    ]


def test_samples_are_counted_by_position_and_not_by_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "q.jsonl", 1.0)
    ledger.append([record(1, position=-1)])  # found by indexing; nobody asked for it
    assert (ledger.seen, ledger.replaced) == (0, 0)
    ledger.append([record(1, position=5), record(2, position=5), record(3, position=6)], seen=10)
    assert (ledger.seen, ledger.replaced) == (10, 2)  # a bad reserve of position 5 is a line, no other position
    ledger.append([record(1, position=105)], seen=10)  # the same sample in the next epoch
    assert (ledger.seen, ledger.replaced) == (20, 3)
    ledger.append([record(1, position=-1), record(2, position=-1)], seen=10)  # encoding a shard
    assert (ledger.seen, ledger.replaced) == (30, 5)


def test_the_run_stops_past_the_rate_and_not_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "q.jsonl", 0.01)
    for step in range(100):
        ledger.append([record(step)] if step % 4 == 3 else [], seen=25)  # 1 %
        ledger.check()
    assert (ledger.seen, ledger.replaced) == (2500, 25)
    ledger.append([record(1000, reason="the caption is empty")], seen=1)
    with pytest.raises(QuarantineLimitError) as caught:
        ledger.check()
    message = str(caught.value)
    assert "26 of 2,501 samples" in message
    assert "(1.04%)" in message
    assert "data.quarantine_limit allows 1.00%" in message
    assert "s-000001.tar/k1000: the caption is empty" in message
    assert str(tmp_path / "q.jsonl") in message


def test_one_bad_sample_in_the_first_batch_is_no_rate_unless_none_is_allowed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", 0.01)
    ledger.append([record(1)], seen=8)
    ledger.check()
    strict = Ledger(tmp_path / "b.jsonl", 0.0)
    strict.append([], seen=8)
    strict.check()
    strict.append([record(1)], seen=8)
    with pytest.raises(QuarantineLimitError):
        strict.check()


def test_counts_go_through_a_checkpoint(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "q.jsonl", 0.01)
    ledger.append([record(number) for number in range(11)], seen=2000)
    state = json.loads(json.dumps(ledger.state()))
    resumed = Ledger(tmp_path / "q.jsonl", 0.001)
    resumed.check()
    resumed.restore(state)
    assert resumed.state() == state
    with pytest.raises(QuarantineLimitError):
        resumed.check()


def test_a_line_cut_short_by_a_kill_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Ledger(path, 0.1).append([record(1), record(2)], seen=2)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="the last line is cut short"):
        ledger = Ledger(path, 0.1)
    assert path.read_bytes()[-1:] != b"\n"  # reading changes nothing: other processes read it too
    ledger.append([record(2)], seen=1)
    ledger.append([record(3)], seen=1)
    assert [line["key"] for line in lines(path)] == ["k1", "k2", "k3"]


def test_after_a_kill_and_a_resume_the_file_is_that_of_the_undisturbed_run(tmp_path: Path) -> None:
    work = [[record(3 * step), record(3 * step + 1, reason="no caption")] if step % 2 else [] for step in range(8)]
    undisturbed = Ledger(tmp_path / "a.jsonl", 1.0)
    for records in work:
        undisturbed.append(records, seen=8)
    for checkpoint in range(8):
        for killed in range(checkpoint, 9):
            for torn in (0, 15):
                path = tmp_path / f"{checkpoint}-{killed}-{torn}.jsonl"
                ledger = Ledger(path, 1.0)
                state = json.loads(json.dumps(ledger.state()))
                for step, records in enumerate(work[:killed]):
                    ledger.append(records, seen=8)
                    if step + 1 == checkpoint:
                        state = json.loads(json.dumps(ledger.state()))
                if path.exists() and path.stat().st_size - torn > state["bytes"]:
                    path.write_bytes(path.read_bytes()[: -torn or None])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the torn line
                    ledger = Ledger(path, 1.0)
                ledger.restore(state)
                for records in work[checkpoint:]:
                    ledger.append(records, seen=8)
                assert path.read_bytes() == (tmp_path / "a.jsonl").read_bytes()
                assert ledger.state() == undisturbed.state()


def test_lines_after_the_checkpoint_go_even_where_the_work_done_again_gives_none(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    ledger = Ledger(path, 1.0)
    ledger.append([record(1)], seen=8)
    state = ledger.state()
    ledger.append([record(2)], seen=8)
    resumed = Ledger(path, 1.0)
    resumed.restore(state)
    assert [line["key"] for line in lines(path)] == ["k1", "k2"]  # other processes only read
    resumed.append([], seen=8)
    assert [line["key"] for line in lines(path)] == ["k1"]
    assert resumed.state() == {"seen": 16, "replaced": 1, "bytes": path.stat().st_size}


def test_a_file_that_does_not_continue_the_checkpoints_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Ledger(path, 1.0).append([record(1), record(2)], seen=8)
    content = path.read_bytes()
    for length in (len(content) + 50, len(content) - 7, len(content)):
        ledger = Ledger(path, 1.0)
        ledger.restore({"seen": 8, "replaced": 2, "bytes": length})
        ledger.append([record(2)], seen=8)
        assert path.read_bytes() == content


def test_a_line_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"shard": "a"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1"):
        Ledger(path, 0.1)


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_a_limit_that_is_no_share_is_an_error(tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match="quarantine_limit"):
        Ledger(tmp_path / "q.jsonl", limit)


def test_collected_records_are_written_and_checked_when_shared(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    path = tmp_path / "q.jsonl"
    ledger = Ledger(path, 0.002)
    ledger.collect([record(1)], 16)
    ledger.collect([], 16)
    assert not path.exists()
    assert ledger.seen == 0
    ledger.share(accelerator)
    ledger.share(accelerator)
    assert (ledger.seen, ledger.replaced, len(lines(path))) == (32, 1, 1)
    ledger.collect([record(2), record(3)], 16)
    with pytest.raises(QuarantineLimitError):
        ledger.share(accelerator)
    assert len(lines(path)) == 3
