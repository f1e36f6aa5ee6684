"""Tensors written one at a time: the bytes of safetensors' own file, one tensor in memory, and all or nothing."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.models.tensor_stream import Pending, write_stream

TENSORS = {
    "b.weight": torch.randn(3, 5),
    "a": torch.randn(7).half(),
    "c": torch.arange(4),
    "d": torch.randn(2, 2).bfloat16(),
    "e": torch.tensor([True, False, True]),
    "f": torch.randn(4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "ü": torch.zeros(1, dtype=torch.uint8),
}


def test_the_file_reads_back_equal_and_is_laid_out_as_safetensors_lays_it_out(tmp_path: Path) -> None:
    sizes: list[int] = []
    write_stream({name: Pending.of(t) for name, t in TENSORS.items()}, tmp_path / "ours", sizes.append)
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert sum(sizes) == sum(t.numel() * t.element_size() for t in TENSORS.values())
    found, expected = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), TENSORS[name].reshape(-1).view(torch.uint8))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_is_made_when_its_turn_comes_and_let_go_after_it(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = torch.ones(20)[::2]
        alive.append(weakref.ref(tensor))
        return tensor

    write_stream({str(i): Pending(torch.float32, (10,), make) for i in range(20)}, tmp_path / "x")
    assert len(alive) == 20


def test_a_tensor_that_cannot_be_made_or_stored_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_stream({"a": Pending.of(torch.ones(3)), "b": Pending(torch.int8, (2,), broken)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"tensor c: found torch.complex64, expected one of torch.int64"):
        write_stream({"c": Pending.of(torch.ones(3, dtype=torch.complex64))}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
