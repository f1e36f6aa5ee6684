"""Checkpoints of engines that shard the network: every process writes its part, and all agree that all is well.

Enters: a sharded network (FSDP2's DTensors) with optimizer and average, on every process. Leaves: a checkpoint folder
by the rules of `ldm/training/checkpoint.py`, with one safetensors file of shards for each process in training_state/
(torch.distributed.checkpoint) and the whole average in unet/; the state back on any number of processes.

Every function here is collective: each process calls it at the same point, and an error on one is an error on all.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ldm.models.durable import drop_from_memory, file_hash
from ldm.training.checkpoint import (
    AVERAGED,
    STATE,
    CheckpointError,
    already_there,
    checkpoint_name,
    flush,
    partial_folder,
    publish,
    read_record,
    write_record,
)
from ldm.training.checkpoint_writer import WritePipeline
from ldm.training.optimizer import load_optimizer_tensors, optimizer_tensors

_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"


def save_sharded(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    write_pipeline: WritePipeline,
    config_yaml: str,
    keep: int,
    *,
    earlier: Path | None = None,
) -> Path:
    """Writes `root/step-XXXXXXXX` by the rules of `save_checkpoint`; training waits. Without a process group: alone.

    Args:
        model: trained weights by their plain names; fully sharded, or not.
        optimizer: AdamW over the model's named parameters, after its first step.
        averaged: weights for unet/, sharded like the model; they are put together one tensor at a time on the main
            process, which holds them all on its host.
        scalars: small JSON values that `load_sharded` gives back.
        write_pipeline: called on the main process only.
        earlier: checkpoint whose frozen parts may be linked.

    Raises:
        CheckpointError: on every process, when anything failed on one; names process and cause. Earlier checkpoints
            are untouched, and nothing is left of this one unless it was complete before the failure.
    """
    final, partial, there = root / checkpoint_name(step), Path(), False
    with ExitStack() as stack:
        with _all_agree(f"checkpoint {final.name} could not be begun"):
            if _rank() == 0:
                there = already_there(root, final)
                partial = partial if there else stack.enter_context(partial_folder(root, step))
        partial, there = _from_main((partial, there))
        if there:
            return final
        state = _state_tensors(model, optimizer_tensors(optimizer))
        written: dict[str, str] = {}
        with _all_agree(f"checkpoint {final.name} was not written"):
            written = _write_shards(partial, state)
        written = {name: digest for one in _gathered(written) for name, digest in one.items()}
        whole = _put_together(averaged)
        with _all_agree(f"checkpoint {final.name} was not written"):
            if _rank() == 0:
                write_pipeline(partial, whole, earlier)
                record = {"step": step, "sharded": _world(), **scalars}
                written |= write_record(partial, record, config_yaml)
                publish(root, partial, final, written, keep)
    return final


def load_sharded(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Fills network, optimizer and average in place, whatever number of processes saved them; returns the scalars.

    Args:
        optimizer: AdamW over the model's named parameters; it needs no state yet.
        averaged: tensors to be filled with the average, sharded like the model.

    Returns:
        What was given to `save_sharded` as scalars, and `step`.

    Raises:
        CheckpointError: on every process: incomplete, altered, not sharded, or of another network; names the file or
            the tensors.
    """
    record: dict[str, Any] = {}
    with _all_agree(f"{checkpoint} was not loaded"):
        if _rank() == 0:
            record = read_record(checkpoint)
            if "sharded" not in record:
                raise CheckpointError("it holds the state of an engine that does not shard: resume with that engine")
    record = _from_main(record)
    fresh = {
        f"{name}/{key}": torch.zeros_like(parameter, dtype=torch.float32) if key != "step" else torch.zeros(())
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    _fill(_state_tensors(model, fresh), checkpoint / STATE)
    _fill(dict(averaged), (checkpoint / AVERAGED).parent)
    load_optimizer_tensors(optimizer, fresh)
    del record["sharded"]
    return record


def _state_tensors(model: nn.Module, optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {_WEIGHTS + name: tensor for name, tensor in model.state_dict().items()}
    return weights | {_OPTIMIZER + name: tensor for name, tensor in optimizer.items()}


def _write_shards(partial: Path, state: dict[str, Tensor]) -> dict[str, str]:
    """Writes, flushes and reads back this process's file of shards; its path in the folder and its hash."""
    folder = partial / STATE
    # It writes no metadata (those would be a pickle): the header of each file tells where its shards belong.
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.sync_files = False  # its flush comes before Python's own buffer is written: the file's end would be left out
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    path = folder / f"shard-{_rank() + 1:05d}-model-00001-of-00001.safetensors"
    if not path.is_file():
        return {}  # another process holds all that this one has
    flush([path])
    drop_from_memory(path)
    try:
        with safe_open(path, framework="pt") as file:
            same = all(_same_bytes(file.get_tensor(name), _local(state[name])) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the storage holds other bytes than were written ({error})", str(path)) from error
    if not same:
        raise OSError(errno.EIO, "the storage holds other bytes than were written", str(path))
    return {str(path.relative_to(partial)): file_hash(path)}


def _fill(tensors: dict[str, Tensor], folder: Path) -> None:
    """Each process reads what its shards have of the stored ones, and nothing else."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with _all_agree(f"{folder} was not loaded"):
        stored = {name: tuple(one.size) for name, one in _tensor_metadata(reader).items()}
        problems = [f"{name} is missing" for name in tensors.keys() - stored.keys()]
        problems += [f"{name} is not in this network" for name in stored.keys() - tensors.keys()]
        for name in tensors.keys() & stored.keys():
            if stored[name] != tuple(tensors[name].shape):
                problems.append(f"{name} has shape {stored[name]}, expected {tuple(tensors[name].shape)}")
        if problems:
            raise CheckpointError(f"it does not fit this network: {'; '.join(sorted(problems))}")
    with _all_agree(f"{folder} was not loaded"):
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _tensor_metadata(reader: dcp.HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    stored = reader.read_metadata().state_dict_metadata
    return {name: one for name, one in stored.items() if isinstance(one, TensorStorageMetadata)}


def _put_together(averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole averaged weights on the main process's host; empty on the others."""
    whole = {}
    for name, tensor in averaged.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if _rank() == 0:
            whole[name] = full.detach().to("cpu")
    return whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same_bytes(stored: Tensor, tensor: Tensor) -> bool:
    # As bytes: a NaN is equal to itself, and -0.0 is not 0.0.
    ours = tensor.detach().to("cpu").contiguous()
    same_kind = stored.shape == ours.shape and stored.dtype == ours.dtype
    return same_kind and torch.equal(stored.reshape(-1).view(torch.uint8), ours.reshape(-1).view(torch.uint8))


@contextmanager
def _all_agree(what: str) -> Iterator[None]:
    """Ends with CheckpointError on every process when the block failed on one of them."""
    failure: str | None = None
    cause: BaseException | None = None
    try:
        yield
    except CheckpointException as error:  # torch has told all processes what failed on which; it is no Exception
        told = [f"process {rank}: {type(one).__name__}: {one}" for rank, (one, _) in error.failures.items()]
        failure, cause = "; ".join(told), error
    except Exception as error:
        failure, cause = f"process {_rank()}: {type(error).__name__}: {error}", error
    failures = [one for one in _gathered(failure) if one is not None]
    if failures:
        raise CheckpointError(f"{what}: {'; '.join(dict.fromkeys(failures))}") from cause


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def _from_main(value: Any) -> Any:
    return _gathered(value)[0]
