"""Pickled checkpoints become safetensors without running what is in them; what would run something is refused."""

import collections
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_convert_checkpoint import convert, folder_tensors, identical, refused, words
from tiny_checkpoints import checkpoint
from tiny_models import make_clip_tokenizer
from torch import Tensor

from ldm.models.unet import UNet


def small_state() -> dict[str, Tensor]:
    shared = torch.arange(6.0).view(2, 3)
    return {
        "conv.weight": torch.randn(3, 4, dtype=torch.float64).T,  # not contiguous
        "shared.a": shared,
        "shared.b": shared,
        "half": torch.randn(5).half(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0),
    }


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_one_model_becomes_safetensors_with_the_same_names_and_numbers(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    state = small_state()
    torch.save(collections.OrderedDict(state), tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / f"a.{suffix}", tmp_path / "a.safetensors")
    identical({name: t.contiguous() for name, t in state.items()}, load_file(tmp_path / "a.safetensors"))


def save_as_lightning(state: dict[str, Tensor], path: Path) -> None:
    """A checkpoint with what pytorch_lightning leaves in it, pickled by classes that go away afterwards."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 0.5

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("the class of a checkpoint's callback was loaded")

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        assert parent not in sys.modules
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[name] = module
    try:
        callbacks = {ModelCheckpoint: {"best": torch.tensor(1.0)}, "monitor": ModelCheckpoint()}
        torch.save({"state_dict": state, "global_step": 7, "callbacks": callbacks}, path)
    finally:
        for gone in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            del sys.modules[gone]


def test_a_lightning_checkpoint_goes_to_a_folder_though_its_callbacks_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = checkpoint("sd1")
    save_as_lightning(tensors, tmp_path / "a.ckpt")
    make_clip_tokenizer(tmp_path / "tokenizer", ["a p"])
    convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert "not tensors, left out: callbacks, global_step" in capsys.readouterr().out
    identical(tensors, load_file(tmp_path / "a.safetensors"))
    for source in ("a.ckpt", "a.safetensors"):
        convert(tmp_path / source, tmp_path / source[2:], *words("sd1", str(tmp_path / "tokenizer")))
    identical(folder_tensors(tmp_path / "ckpt"), folder_tensors(tmp_path / "safetensors"))


class Opens:
    """Runs a function of builtins when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class Runs:
    """Runs a shell when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("attack", [Opens, Runs])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: type, zipped: bool
) -> None:
    proof = tmp_path / "ran"
    payload = {"state_dict": small_state(), "callbacks": attack(proof)}
    torch.save(payload, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    error = refused(capsys, tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert "a.ckpt is not read" in error
    assert "open" in error if attack is Opens else "system" in error
    assert not proof.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)  # that it would have
    assert proof.exists()


class Saves(Opens):
    """Calls a function of numpy when it is unpickled: of a package whose names are on the list."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.save, (str(self.path), 1)


def test_calling_a_name_of_a_known_package_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "ran.npy"
    state = small_state()
    torch.save({"state_dict": state, "callbacks": Saves(proof)}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert not proof.exists()
    identical({name: t.contiguous() for name, t in state.items()}, load_file(tmp_path / "a.safetensors"))
    torch.load(tmp_path / "a.ckpt", weights_only=False)  # that it would have
    assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps([1, 2])])
def test_what_is_no_checkpoint_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert f"{tmp_path / 'a.pt'} " in refused(capsys, tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_junk_is_refused_with_the_kind_of_error_and_not_its_bare_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "j.ckpt").write_bytes(b"\x80\x02j\xde\xad\xbe\x0a.")  # asks for an object that was never stored
    error = refused(capsys, tmp_path / "j.ckpt", tmp_path / "a.safetensors")
    assert "j.ckpt is not read: no checkpoint that torch reads (KeyError: " in error


def test_a_truncated_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    assert "a.pt is not read" in refused(capsys, tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_loading_a_pickle_says_the_command_that_converts_it_and_the_command_does(tmp_path: Path) -> None:
    tensors = {k: v for k, v in checkpoint("sd1").items() if k.startswith("model.diffusion_model.")}
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is a pickle, which can run code") as error:
        UNet.from_pretrained(tmp_path / "a.ckpt")
    command = str(error.value).split("`")[1].split()
    assert command[:2] == ["python", "tools/convert_checkpoint.py"]
    convert(*command[2:])
    assert UNet.from_pretrained(tmp_path / "a.safetensors").config.attention_head_dim == 8
