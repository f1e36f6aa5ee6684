"""Checkpoints: pipeline folders with a `training_state/`, complete or not there at all.

Enters: what resuming needs (TrainingState) and a function that writes the pipeline's files. Leaves: a folder
`step-00001000/` that appears under its name only when it is complete, `latest` pointing to it, and the state back.

Order of a save: temporary folder, files written, flushed, read back and compared, hash list, flush, rename, flush of
the parent, `latest`, and only then are old checkpoints removed. Whatever instant a process dies at, the newest complete
checkpoint is still there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ldm.models.durable import file_hash, write_tensors, write_text

FORMAT = 1
HASHES = "hashes.json"
STATE = "training_state"
RECORD = f"{STATE}/state.json"
AVERAGED = "unet/diffusion_pytorch_model.safetensors"
PARTIAL = ".partial"
FOR_PEOPLE = "README.md"
"""The model card: people go on writing in it, and nothing is read from it; it is in no hash list."""


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

    Call it on the main process only; under DDP nothing in it is collective. `CheckpointWriter` calls it in a thread.

    Args:
        write_pipeline: writes the pipeline's files into a folder that exists, its tensors with `write_tensors`.

    Raises:
        OSError: the storage failed, or keeps other bytes than were written; earlier checkpoints are untouched and
            `latest` points to one of them, or to this one where it was complete before the failure.
        CheckpointError: a file of the pipeline is not what was written.
    """
    final = root / checkpoint_name(state.step)
    if already_there(root, final):
        return final
    with partial_folder(root, state.step) as partial:
        write_pipeline(partial)
        folder = partial / STATE
        written = {
            f"{STATE}/{name}.safetensors": write_tensors(_on_host(tensors), folder / f"{name}.safetensors")
            for name, tensors in (("unet", state.weights), ("optimizer", state.optimizer))
        }
        record = {"step": state.step, "ema_updates": state.ema_updates, **state.scalars}
        written |= write_record(partial, record, config_yaml)
        publish(root, partial, final, written, keep)
    return final


def already_there(root: Path, final: Path) -> bool:
    """Whether a checkpoint is complete under its name, `latest` then pointing to it; makes the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    if not final.exists() or _problem(final) is not None:
        return False
    point_latest(root, final)
    return True


@contextmanager
def partial_folder(root: Path, step: int) -> Iterator[Path]:
    """The temporary folder of a save, with an empty training_state/; what is left of it after an error is removed."""
    for left in root.glob(f".step-*{PARTIAL}"):  # of saves that a kill cut short
        shutil.rmtree(left, ignore_errors=True)
    partial = root / f".{checkpoint_name(step)}{PARTIAL}"
    try:
        (partial / STATE).mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_record(partial: Path, record: Mapping[str, Any], config_yaml: str) -> dict[str, str]:
    """Writes state.json and the run's config into a temporary folder; returns their hashes."""
    text = json.dumps({"format": FORMAT, **record}, indent=2) + "\n"
    files = {RECORD: text, f"{STATE}/config.yaml": config_yaml}
    return {name: write_text(content, partial / name) for name, content in files.items()}


def publish(root: Path, partial: Path, final: Path, written: Mapping[str, str], keep: int) -> None:
    """Flushes a temporary folder, gives it its hash list and its name, points `latest` to it and removes old ones.

    Args:
        written: hashes of files that are flushed already, by their path in the folder.
    """
    files = {str(p.relative_to(partial)): p for p in sorted(partial.rglob("*")) if p.is_file()}
    flush(path for name, path in files.items() if name not in written)
    for name, path in files.items():
        if path.suffix == ".json" and name not in written:  # nobody has compared them; cut short they do not parse
            _check_json(name, path)
    hashes = {
        name: {"bytes": path.stat().st_size, "xxh3": written.get(name) or file_hash(path)}
        for name, path in files.items()
        if name != FOR_PEOPLE
    }
    write_text(json.dumps(hashes, indent=1) + "\n", partial / HASHES)
    flush([*(p for p in partial.rglob("*") if p.is_dir()), partial])
    if final.exists():  # an incomplete folder under the final name, left by other hands
        shutil.rmtree(final)
    os.replace(partial, final)
    flush([root])
    point_latest(root, final)
    if keep:
        _prune(root, keep, final)


def load_training_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State of a verified checkpoint and its averaged weights (the tensors of `unet/`).

    Raises:
        CheckpointError: the checkpoint is incomplete, altered, sharded, or of another format; names the file.
    """
    record = read_record(checkpoint)
    if "sharded" in record:
        raise CheckpointError(f"{checkpoint} holds the state of a sharded engine: resume with that engine")
    folder = checkpoint / STATE
    state = TrainingState(
        step=record.pop("step"),
        weights=load_file(folder / "unet.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        ema_updates=record.pop("ema_updates"),
        scalars=record,
    )
    return state, load_file(checkpoint / AVERAGED)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Content of a verified checkpoint's state.json, without its format; raises CheckpointError like verifying."""
    verify_checkpoint(checkpoint)
    record: dict[str, Any] = json.loads((checkpoint / RECORD).read_text())
    del record["format"]
    return record


def verify_checkpoint(checkpoint: Path, folders: Iterable[str] | None = None) -> None:
    """Raises CheckpointError, naming the file, unless each file of the hash list is there with its size and hash.

    Args:
        folders: look only at these of its folders and files, as whoever loads a part of it needs.
    """
    problem = _problem(checkpoint, None if folders is None else tuple(folders))
    if problem is not None:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {problem}")
    if folders is None:
        _check_format(checkpoint)


def intact(checkpoint: Path, folders: Iterable[str]) -> bool:
    """Whether all listed files in these folders of a checkpoint are there, with their hashes."""
    return (checkpoint / HASHES).is_file() and _problem(checkpoint, tuple(folders)) is None


def newest_complete(root: Path, report: Callable[[str], None]) -> Path | None:
    """Newest checkpoint whose hash list holds; says through `report` what it passed over and why.

    Raises:
        CheckpointError: there are checkpoints and none is complete, or the newest complete one is of another format:
            going on from an older one would throw its steps away.
    """
    if not root.is_dir():
        return None
    found = sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)
    for checkpoint in found:
        problem = _problem(checkpoint)
        if problem is None:
            _check_format(checkpoint)
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


def _problem(checkpoint: Path, folders: tuple[str, ...] | None = None) -> str | None:
    """Why a checkpoint (or some folders of it) cannot be trusted, or None."""
    listing = checkpoint / HASHES
    if not listing.is_file():
        return f"{HASHES} is missing (the checkpoint was not finished)"
    try:
        hashes = json.loads(listing.read_text())
        expected = {name: (entry["bytes"], entry["xxh3"]) for name, entry in hashes.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{HASHES} is not readable as a list of sizes and hashes ({type(error).__name__}: {error})"
    if RECORD not in expected:
        return f"{HASHES} does not list {RECORD}"
    for name, (size, digest) in expected.items():
        if folders is not None and name.split("/")[0] not in folders:
            continue
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if file_hash(path) != digest:
                return f"{name} was altered: its xxh3 is not the one of {HASHES}"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def _check_format(checkpoint: Path) -> None:
    found = json.loads((checkpoint / RECORD).read_text()).get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{checkpoint / RECORD}: checkpoint format {found}, this program reads format {FORMAT}; use the version of "
            "the program that wrote it, or move this checkpoint away"
        )


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}


def _check_json(name: str, path: Path) -> None:
    try:
        json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{name} is not readable as JSON after writing ({error}): the storage is at fault"
        ) from error


def flush(paths: Iterable[Path]) -> None:
    """Waits until the content of files, and the entries of folders, are on the storage."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def point_latest(root: Path, checkpoint: Path) -> None:
    """Points `root/latest` to a complete checkpoint, at once."""
    temporary = root / f".latest{PARTIAL}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, root / "latest")
    flush([root])


def _prune(root: Path, keep: int, newest: Path) -> None:
    """Removes checkpoints beyond `keep`, never the one just written: those of later steps first, then the oldest.

    One of a later step was passed over when the run was resumed; it must not cost a good one its place.
    """
    others = (p for p in root.glob("step-*") if p.is_dir() and p != newest)
    order = sorted(others, key=lambda p: (p.name < newest.name, p.name))
    for checkpoint in order[: max(0, len(order) + 1 - keep)]:
        # The hash list goes first: a removal that is interrupted leaves a folder that nothing takes for complete.
        (checkpoint / HASHES).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
