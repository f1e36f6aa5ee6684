"""Checkpoints: pipeline folders with a `training_state/`, complete or not there at all.

Enters: what resuming needs (TrainingState) and a function that writes the pipeline's files. Leaves: a folder
`step-00001000/` that appears under its name only when it is complete, `latest` pointing to it, and the state back.

Order of a save: temporary folder, flush, tensors read back and compared, hash list, rename, `latest`, and only then are
old checkpoints removed. Whatever instant a process dies at, the newest complete checkpoint is still there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm.models.pretrained import write_tensors

FORMAT = 1
HASHES = "hashes.json"
STATE = "training_state"
PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or altered; the message names the file."""


@dataclass
class TrainingState:
    """What resuming needs besides the averaged weights in `unet/`; the data order needs nothing but `step`."""

    step: int
    """Optimizer steps done; the next global batch starts at position step * global_batch."""
    weights: dict[str, Tensor]
    """Trained (not averaged) weights of the network, float32."""
    optimizer: dict[str, Tensor]
    """Optimizer state as named tensors."""
    ema_updates: int
    """Updates that the average has seen."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """Small JSON values: loss window, loss scaler, quarantine counts, seed, global batch."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, state: TrainingState, write_pipeline: Callable[[Path], None], *, config_yaml: str, keep: int
) -> Path:
    """Writes `root/step-XXXXXXXX`, points `root/latest` to it and removes the oldest beyond `keep` (0 keeps all).

    Call it on the main process only; under DDP nothing in it is collective.

    Raises:
        OSError: the storage failed; earlier checkpoints are untouched and `latest` still points to one of them.
        CheckpointError: what was read back differs from what was written.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / checkpoint_name(state.step)
    if final.exists() and _problem(final) is None:
        _point_latest(root, final)
        return final
    partial = root / f".{final.name}{PARTIAL}"
    for left in root.glob(f".step-*{PARTIAL}"):  # of saves that a kill cut short
        shutil.rmtree(left, ignore_errors=True)
    try:
        folder = partial / STATE
        folder.mkdir(parents=True)
        write_pipeline(partial)
        _save_tensors(state.weights, folder / "unet.safetensors")
        _save_tensors(state.optimizer, folder / "optimizer.safetensors")
        record = {"format": FORMAT, "step": state.step, "ema_updates": state.ema_updates, **state.scalars}
        (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "config.yaml").write_text(config_yaml)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        _flush(files)
        hashes = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "xxh3": file_hash(p)} for p in files}
        (partial / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")
        _flush([partial / HASHES, *(p for p in partial.rglob("*") if p.is_dir()), partial])
        if final.exists():  # an incomplete folder under the final name, left by other hands
            shutil.rmtree(final)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush([root])
    _point_latest(root, final)
    if keep:
        _prune(root, keep, final)
    return final


def load_training_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State of a verified checkpoint and its averaged weights (the tensors of `unet/`).

    Raises:
        CheckpointError: the checkpoint is incomplete, altered, or of another format; names the file.
    """
    verify_checkpoint(checkpoint)
    folder = checkpoint / STATE
    record = json.loads((folder / "state.json").read_text())
    if record.pop("format") != FORMAT:
        raise CheckpointError(f"{folder / 'state.json'}: written in another format; expected {FORMAT}")
    state = TrainingState(
        step=record.pop("step"),
        weights=load_file(folder / "unet.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        ema_updates=record.pop("ema_updates"),
        scalars=record,
    )
    return state, load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


def verify_checkpoint(checkpoint: Path) -> None:
    """Raises CheckpointError, naming the file, unless each file of the hash list is there with its size and hash."""
    problem = _problem(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {problem}")


def intact(checkpoint: Path, folders: Iterable[str]) -> bool:
    """Whether all listed files in these folders of a checkpoint are there, with their hashes."""
    return (checkpoint / HASHES).is_file() and _problem(checkpoint, tuple(folders)) is None


def newest_complete(root: Path, report: Callable[[str], None]) -> Path | None:
    """Newest checkpoint whose hash list holds; says through `report` what it passed over and why."""
    if not root.is_dir():
        return None
    found = sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)
    for checkpoint in found:
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint
        report(f"passing over checkpoint {checkpoint.name}: {problem}")
    if found:
        raise CheckpointError(
            f"{root} holds {len(found)} checkpoints and none is complete; restore one, or move the folder away to start"
            " anew"
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, a run's folder or its `checkpoints/` (then the latest)."""
    for folder in (path, path / "latest", path / "checkpoints" / "latest"):
        if (folder / "model_index.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} holds no checkpoint: expected model_index.json in it, or in checkpoints/latest of a run's folder"
    )


def file_hash(path: Path) -> str:
    """xxh3_64 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _problem(checkpoint: Path, folders: tuple[str, ...] | None = None) -> str | None:
    """Why a checkpoint (or some folders of it) cannot be trusted, or None."""
    listing = checkpoint / HASHES
    if not listing.is_file():
        return f"{HASHES} is missing (the checkpoint was not finished)"
    try:
        hashes = json.loads(listing.read_text())
    except ValueError as error:
        return f"{HASHES} is not readable as JSON ({error})"
    for name, expected in hashes.items():
        if folders is not None and name.split("/")[0] not in folders:
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, expected {expected['bytes']}"
        if file_hash(path) != expected["xxh3"]:
            return f"{name} was altered: its xxh3 is not the one of {HASHES}"
    return None


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes and reads back: storage that drops bytes without an error is found here, not at the resume."""
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_tensors(on_host, path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            same = names == set(on_host) and all(_same_bytes(file.get_tensor(n), on_host[n]) for n in names)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read back after writing: {error}") from error
    if not same:
        raise CheckpointError(f"{path} holds other values than were written: the storage is at fault")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    # As bytes: a NaN is equal to itself, and -0.0 is not 0.0.
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _point_latest(root: Path, checkpoint: Path) -> None:
    temporary = root / f".latest{PARTIAL}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, root / "latest")
    _flush([root])


def _prune(root: Path, keep: int, newest: Path) -> None:
    """Removes the oldest checkpoints beyond `keep`, never the one just written."""
    older = sorted(p for p in root.glob("step-*") if p.is_dir() and p != newest)
    for checkpoint in older[: max(0, len(older) + 1 - keep)]:
        # The hash list goes first: a removal that is interrupted leaves a folder that nothing takes for complete.
        (checkpoint / HASHES).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
