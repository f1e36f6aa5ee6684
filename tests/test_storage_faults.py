"""Storage that fails while a checkpoint is written, or afterwards: no bad load, and always a good checkpoint to load.

LDM_STORAGE_FAULTS gives the number of faults; each is drawn from LDM_TRIAL_SEED and its number, in its own process.
"""

import errno
import json
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trials
from storage_shim import Fault, Shim, file_limit, small_disk
from tiny_models import make_clip, make_pipeline
from torch import Tensor

from ldm.pipeline.folder import FROZEN
from ldm.pipeline.pipeline import Pipeline, save_pipeline
from ldm.training.checkpoint import CheckpointError, TrainingState, intact, load_training_state, newest_complete
from ldm.training.checkpoint_writer import CheckpointWriter

FAULTS = trials.number("LDM_STORAGE_FAULTS", 18)
KINDS = (
    "disk full",
    "file too large",
    "no space at a write",
    "bytes dropped",
    "failed flush",
    "failed rename",
    "failed call",
    "bit flipped afterwards",
    "killed between steps",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder)
    return make_pipeline(str(folder))


def state(pipeline: Pipeline, step: int) -> TrainingState:
    weights = {name: tensor + step for name, tensor in pipeline.unet.state_dict().items()}
    optimizer = {f"{name}/exp_avg": tensor * step for name, tensor in weights.items()}
    return TrainingState(step, weights, optimizer, ema_updates=step, scalars={"loss_window": [0.5, step]})


def averaged(pipeline: Pipeline, step: int) -> dict[str, Tensor]:
    return {name: tensor - step for name, tensor in pipeline.unet.state_dict().items()}


def save(writer: CheckpointWriter, pipeline: Pipeline, step: int) -> Exception | None:
    """A save in the background, to its end; the error that it ended with."""

    def write(folder: Path, average: Mapping[str, Tensor], earlier: Path | None) -> None:
        if earlier is not None and not intact(earlier, FROZEN):
            earlier = None
        save_pipeline(folder, pipeline, unet_state=average, frozen_from=earlier)

    writer.save(state(pipeline, step), averaged(pipeline, step), write, config_yaml=f"steps: {step}\n")
    try:
        writer.wait()
    except (OSError, CheckpointError) as error:
        return error
    return None


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def frozen_bytes(checkpoint: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for name in FROZEN
        for path in sorted((checkpoint / name).rglob("*"))
        if path.is_file()
    }


def judge(root: Path, pipeline: Pipeline, frozen: dict[str, bytes]) -> dict[str, list[str]]:
    """Loads all: each is refused by CheckpointError or has exactly the values of its step, and at least one has."""
    good, refused = [], []
    for checkpoint in sorted(root.glob("step-*")):
        try:
            loaded, average = load_training_state(checkpoint)
        except CheckpointError:
            refused.append(checkpoint.name)
            continue
        step = int(checkpoint.name.removeprefix("step-"))
        truth = state(pipeline, step)
        assert loaded.step == loaded.ema_updates == step, checkpoint
        assert loaded.scalars == truth.scalars, checkpoint
        assert same(loaded.weights, truth.weights), f"bad load: {checkpoint}"
        assert same(loaded.optimizer, truth.optimizer), f"bad load: {checkpoint}"
        assert same(average, averaged(pipeline, step)), f"bad load: {checkpoint}"
        assert frozen_bytes(checkpoint) == frozen, f"bad load: {checkpoint}"
        good.append(checkpoint.name)
    assert good, f"no good checkpoint is left; refused {refused}"
    said: list[str] = []
    newest = newest_complete(root, said.append)
    assert newest is not None
    assert newest.name == good[-1]
    assert [line.split()[3].rstrip(":") for line in said] == [name for name in reversed(refused) if name > good[-1]]
    assert (root / "latest" / "model_index.json").is_file()
    return {"good": good, "refused": refused}


def in_a_process(work: Callable[[], Any], answer: Path) -> Any:
    """Runs `work` in a forked process; its answer (JSON), or None when it was killed. Its error is raised here."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
            result = {"value": work()}
        except BaseException:
            result = {"error": traceback.format_exc()}
        answer.write_text(json.dumps(result))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    result = json.loads(answer.read_text())
    assert "error" not in result, result["error"]
    return result["value"]


def flip(root: Path, draw: random.Random) -> str:
    """One bit of one byte of one file of a checkpoint."""
    path = draw.choice(sorted(path for path in root.glob("step-*/**/*") if path.is_file()))
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    with path.open("r+b") as file:  # in place: all links to the file see it
        file.write(content)
    return f"{path.relative_to(root)} byte {at}"


def trial(root: Path, kind: str, draw: random.Random, pipeline: Pipeline, frozen: dict[str, bytes]) -> dict[str, Any]:
    """One fault in the save that follows one or two good ones; then judged, saved again without a fault, and judged."""
    root.mkdir()
    resize = small_disk(root, 1 << 30) if kind == "disk full" else None
    if kind == "disk full" and resize is None:  # no namespaces for this user
        kind = "no space at a write"
    keep, before = draw.choice([1, 2, 3]), draw.choice([1, 2])
    if kind == "bit flipped afterwards":
        keep, before = draw.choice([2, 3]), 2
    said: list[str] = []
    writer = CheckpointWriter(root, keep=keep, report=said.append)
    for step in range(1, before + 1):
        assert save(writer, pipeline, 10 * step) is None
    step = 10 * (before + 1)
    number = draw.randrange(2**30)  # taken modulo the calls that a save makes
    what, error = kind, None
    if resize is not None:
        disk = os.statvfs(root)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        free = draw.randrange(used // before)
        what = f"{kind}: {free} bytes free"
        resize(used + free)
        error = save(writer, pipeline, step)
        resize(1 << 30)
    elif kind == "file too large":
        largest = max(path.stat().st_size for path in root.glob("step-*/**/*"))
        limit = draw.randrange(largest)
        what = f"{kind}: {limit} of {largest} bytes"
        with file_limit(limit):
            error = save(writer, pipeline, step)
    elif kind == "bit flipped afterwards":
        error = save(writer, pipeline, step)
        assert error is None
        what = f"{kind}: {flip(root, draw)}"
    else:
        fault = {
            "no space at a write": Fault("write", action=draw.choice(["full", "error"]), code=errno.ENOSPC),
            "bytes dropped": Fault("write", action="drop"),
            "failed flush": Fault("fsync"),
            "failed rename": Fault("replace", code=draw.choice([errno.EIO, errno.ENOSPC])),
            "failed call": Fault(
                draw.choice(["mkdir", "link", "symlink"]), code=draw.choice([errno.EIO, errno.ENOSPC])
            ),
            "killed between steps": Fault("", action="kill"),
        }[kind]
        fault.share = draw.random()
        calls = calls_of_a_save(root, keep, before, pipeline)
        fault.number = number % max(1, calls[fault.call] if fault.call else calls.total())
        what = f"{kind}: {fault.call or 'any call'} {fault.number} of {calls}"
        with Shim(fault):
            error = save(writer, pipeline, step)
    found = judge(root, pipeline, frozen)
    if kind != "bit flipped afterwards":
        assert not found["refused"], f"under its final name and not complete: {found['refused']}"
        assert not list(root.glob(".step-*")), "leftovers"
        assert (error is None) == (writer.failures == 0) == (not said)
        if error is None:
            assert found["good"][-1].endswith(str(step)), "no failure was told, and the checkpoint is not there"
    result = {"what": what, "error": str(error), **found}
    go_on(root, writer if draw.random() < 0.5 and kind != "bit flipped afterwards" else None, keep, pipeline, frozen)
    return result


def go_on(root: Path, writer: CheckpointWriter | None, keep: int, pipeline: Pipeline, frozen: dict[str, bytes]) -> None:
    """The next save, by the same writer or by that of a resumed run (None), without a fault."""
    newest = newest_complete(root, lambda line: None)
    assert newest is not None
    if writer is None:
        writer = CheckpointWriter(root, keep=keep)
        writer.last = newest
    step = int(newest.name.removeprefix("step-")) + 10
    assert save(writer, pipeline, step) is None
    found = judge(root, pipeline, frozen)
    assert found["good"][-1].endswith(str(step))
    assert (root / "latest").resolve().name == found["good"][-1]
    assert not list(root.glob(".step-*")), "leftovers"


def calls_of_a_save(root: Path, keep: int, before: int, pipeline: Pipeline) -> Counter[str]:
    """The system calls that the save after `before` others makes, counted on one without a fault."""
    counted = root.with_name(f"{root.name}-counted")
    writer = CheckpointWriter(counted, keep=keep)
    for step in range(1, before + 1):
        save(writer, pipeline, 10 * step)
    with Shim(Fault("none")) as shim:
        assert save(writer, pipeline, 10 * (before + 1)) is None
    shutil.rmtree(counted)
    return shim.counts


def test_no_storage_fault_gives_a_bad_load_or_leaves_no_good_checkpoint(tmp_path, pipeline):
    writer = CheckpointWriter(tmp_path / "reference", keep=0)
    assert save(writer, pipeline, 10) is None
    frozen = frozen_bytes(tmp_path / "reference" / "step-00000010")
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= frozen.keys()
    kinds: Counter[str] = Counter()
    failed = 0
    for number in range(FAULTS):
        kind = KINDS[number % len(KINDS)]
        draw = random.Random(trials.SEED * 1_000_003 + number)
        root = tmp_path / f"{number:04d}"
        result = in_a_process(lambda: trial(root, kind, draw, pipeline, frozen), tmp_path / "answer.json")  # noqa: B023
        if result is None:
            assert kind == "killed between steps"
            found = judge(root, pipeline, frozen)
            result = {"what": kind, "error": "killed", **found}
            go_on(root, None, draw.choice([1, 2, 3]), pipeline, frozen)
        print(f"{number}: {result['what']}: {result['error']}; good {result['good']}, refused {result['refused']}")
        kinds[result["what"].split(":")[0]] += 1
        failed += result["error"] != "None"
        shutil.rmtree(root, ignore_errors=True)
    trials.report(
        "storage faults in checkpoint writing", count=FAULTS, kinds=dict(kinds), failed_saves=failed, bad_loads=0
    )
