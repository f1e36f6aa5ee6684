"""Splitting of the global batch, what launchers were asked for, and that signals end in one agreed step."""

import os
import signal
from contextlib import suppress
from types import SimpleNamespace

import pytest

from ldm.training.distributed import (
    Agreement,
    check_processes,
    split_global_batch,
)
from ldm.training.launched import DistributedConfig, EngineError, processes_in_command
from ldm.training.signals import StopRequest


def test_every_split_multiplies_to_the_global_batch_and_respects_the_limit():
    trials = 0
    for global_batch in range(1, 65):
        for processes in range(1, 9):
            for limit in (None, 1, 3, 8):
                if global_batch % processes:
                    continue
                split = split_global_batch(global_batch, processes, limit)
                assert split.processes * split.accumulation * split.micro_batch == global_batch
                assert split.micro_batch <= (limit or global_batch)
                # No larger micro-batch within the limit would divide the share.
                share = global_batch // processes
                assert not any(share % m == 0 for m in range(split.micro_batch + 1, min(limit or share, share) + 1))
                trials += 1
    print(f"{trials} of {trials} splits")


def test_a_batch_that_cannot_be_split_names_what_would_fit():
    with pytest.raises(ValueError, match=r"global_batch 32 cannot be split over 3 processes.*\(1, 2, 4\)"):
        split_global_batch(32, 3, None)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python accelerate launch --cpu --num_processes 2 ldm/train.py --config x.yaml", 2),
        ("python accelerate launch --num-processes=4 --multi_gpu ldm/train.py", 4),
        ("python accelerate launch ldm/train.py --num_processes 7", None),
        ("python torchrun --nproc_per_node 2 --nnodes 3 ldm/train.py", 6),
        ("python torchrun --nproc-per-node=8 ldm/train.py", 8),
        ("python torchrun --nproc_per_node gpu ldm/train.py", None),
    ],
)
def test_number_of_processes_is_read_from_the_launchers_own_words(command, expected):
    assert processes_in_command(command.split()) == expected


def test_number_of_processes_is_read_from_the_launchers_config_file(tmp_path):
    (tmp_path / "a.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    words = ["python", "accelerate", "launch", "--config_file", str(tmp_path / "a.yaml"), "ldm/train.py"]
    assert processes_in_command(words) == 2


def test_a_world_that_is_not_the_one_asked_for_is_refused(monkeypatch):
    from accelerate.utils import DistributedType

    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO, process_index=0)
    check_processes(alone, None, "auto")
    with pytest.raises(EngineError, match="2 processes were asked for"):
        check_processes(alone, 2, "auto")
    with pytest.raises(EngineError, match=r"distributed\.engine is ddp, but the launcher started single"):
        check_processes(alone, 1, "ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="started 2 processes, but accelerate joined 1: they would each train alone"):
        check_processes(alone, 2, "auto")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_asks_for_a_stop_once_and_is_ignored_once_the_run_has_ended_as_asked(name, capfd):
    number = getattr(signal, name)
    agreement = Agreement(SimpleNamespace(num_processes=1), 10.0)
    with StopRequest() as stop:
        assert not stop.agreed(agreement)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.agreed(agreement)
        assert stop.received == name
    os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_IGN
    assert capfd.readouterr().err.count("finishing the step") == 1


def test_without_a_signal_or_after_an_error_the_old_handlers_come_back():
    def mine(number: int, frame: object) -> None:
        raise AssertionError("not to be called")

    for number in StopRequest.SIGNALS:
        signal.signal(number, mine)
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == [mine] * 3
    with suppress(RuntimeError), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError
    assert stop.received == "SIGTERM"
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == [mine] * 3


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"distributed\.processes: found 0"):
        DistributedConfig(processes=0)
    with pytest.raises(ValueError, match=r"engine is single, but distributed\.processes is 2"):
        DistributedConfig(engine="single", processes=2)
    with pytest.raises(ValueError, match=r"distributed\.timeout_minutes"):
        DistributedConfig(timeout_minutes=0)
