"""Files that are whole or not there: the bytes of safetensors' own writer, and storage that fails or forgets."""

import errno
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from ldm.models import durable
from ldm.models.durable import file_hash, write_parts, write_tensors, write_text

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]
DTYPES += [torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64]


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of drawn names, dtypes and shapes, empty and 0-dimensional ones among them."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(draw.randrange(12)):
        name = "".join(draw.choice('ab./"\\_é中\u2028\x01\x7f ') for _ in range(draw.randrange(9))) + str(i)
        shape = [draw.randrange(5) for _ in range(draw.randrange(5))]
        tensor = torch.randint(0, 2, shape, generator=generator).to(draw.choice(DTYPES))
        tensors[name] = tensor
    return tensors


def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path):
    seed, trials = 11, 60
    print(f"seed {seed}, {trials} files")
    for trial in range(trials):
        tensors = drawn(seed * 1000 + trial)
        digest = write_tensors(tensors, tmp_path / "ours")
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        content = (tmp_path / "theirs").read_bytes()
        assert (tmp_path / "ours").read_bytes() == content
        assert digest == file_hash(tmp_path / "ours") == xxhash.xxh3_64(content).hexdigest()
        assert load_file(tmp_path / "ours").keys() == tensors.keys()


def test_memory_order_is_not_seen_in_the_file(tmp_path):
    plain = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    write_tensors({"w": plain, "t": plain[0, 0].t().contiguous()}, tmp_path / "a")
    write_tensors({"w": plain.to(memory_format=torch.channels_last), "t": plain.clone()[0, 0].t()}, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_larger_than_one_write_of_the_kernel_comes_whole(tmp_path, monkeypatch):
    # The kernel takes 2 GiB at most at a time, and less when it likes: here 7 bytes.
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    tensors = {"w": torch.arange(50.0)}
    write_tensors(tensors, tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["w"], tensors["w"])


@pytest.mark.parametrize("fault", ["drop", "flip", "write", "fsync", "rename"])
def test_after_a_fault_the_name_has_what_it_had_and_nothing_is_left(tmp_path, monkeypatch, fault):
    path = tmp_path / "weights.safetensors"
    write_tensors({"w": torch.zeros(9)}, path)
    before = path.read_bytes()
    write = os.write

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    if fault == "drop":  # says that it wrote all
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:-1]) + 1)
    elif fault == "flip":
        flipped = [b"\x01"]
        monkeypatch.setattr(
            os, "write", lambda d, data: write(d, bytes(data)[:-1] + flipped.pop() if len(data) == 36 else data)
        )
    elif fault == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(os, fault, fail)
    with pytest.raises(OSError, match=r"other bytes than were written|Input/output error"):
        write_tensors({"w": torch.ones(9)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_the_kernels_own_limit_on_a_file_is_an_error_and_leaves_nothing(tmp_path):
    code = "import sys, torch, pathlib; from ldm.models.durable import write_tensors\n"
    code += "write_tensors({'w': torch.ones(100_000)}, pathlib.Path(sys.argv[1]) / 'w')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_each_file_is_flushed_once_and_before_it_has_its_name(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def watched(descriptor):
        seen.append((os.fstat(descriptor).st_size, os.listdir(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_tensors({"w": torch.ones(9)}, tmp_path / "w")
    assert seen == [((tmp_path / "w").stat().st_size, [f".w.{os.getpid()}"])]


def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"tensor a\.b: found torch\.complex128"):
        write_tensors({"a.b": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"tensor m: found torch\.float32 on meta"):
        write_tensors({"m": torch.zeros(2, device="meta")}, tmp_path / "w")
    tied = torch.zeros(4)
    with pytest.raises(RuntimeError, match="tensors x and y share memory"):
        write_tensors({"x": tied, "y": tied[1:]}, tmp_path / "w")
    write_tensors({"x": tied[:2], "y": tied[2:]}, tmp_path / "w")
    assert os.listdir(tmp_path) == ["w"]


def test_text_comes_back_as_it_was_and_empty_files_are_files(tmp_path):
    digest = write_text("seed: 0 # é\n", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "seed: 0 # é\n"
    assert digest == durable.file_hash(tmp_path / "a")
    write_parts([], tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b""
