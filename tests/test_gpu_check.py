"""The check on a GPU says what is wrong with its arguments, and what it had no time for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def check(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": sys.executable, "LDM_CHECK_DEVICE": "cpu"} | environment
    command = ["bash", str(ROOT / "tools/gpu_check.sh"), *map(str, words)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], {}, "found 0 arguments, expected one or two"),
        (["a", "b", "c"], {}, "found 3 arguments, expected one or two"),
        (["no such folder"], {}, "WHEELS: found no such folder, which is not a folder"),
        (["."], {"LDM_CHECK_DEVICE": "tpu"}, "LDM_CHECK_DEVICE: found tpu, expected cuda or cpu"),
        (["."], {"LDM_CHECK_SECONDS": "8m"}, "LDM_CHECK_SECONDS: found 8m, expected a whole number"),
        (["."], {"PYTHON": "no-such-python"}, "no-such-python is not Python 3.11 or later"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_done(words, environment, message, tmp_path: Path) -> None:
    done = check(*words, *([] if len(words) != 1 else [tmp_path / "out"]), **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "usage: bash tools/gpu_check.sh WHEELS [OUT]" in done.stderr


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("mine")
    done = check(tmp_path, tmp_path)
    assert done.returncode == 2
    assert "holds other files; give an empty or a new folder" in done.stderr
    assert (tmp_path / "notes.log").read_text() == "mine"


def test_a_python_without_torch_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"import torch"*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = check(tmp_path, tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 2
    assert "has no torch, which has to be on the machine" in done.stderr


def test_a_machine_without_a_gpu_is_told_of_the_rehearsal(tmp_path: Path) -> None:
    done = check(tmp_path, tmp_path / "out", LDM_CHECK_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch finds no NVIDIA GPU; LDM_CHECK_DEVICE=cpu rehearses without one" in done.stderr


def test_parts_without_time_are_left_out_and_told(tmp_path: Path) -> None:
    out = tmp_path / "out of time"
    done = check(tmp_path, out, LDM_CHECK_SECONDS="6")
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert [one["part"] for one in results["parts"]] == ["install", "parity", "train", "demo"]
    assert {one["how"] for one in results["parts"]} == {"left out: no time"}
    assert results["records"] == []
    assert (out / "table.txt").read_text() in done.stdout
