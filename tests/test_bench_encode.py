"""The benchmark of encoding stores what diffusers' autoencoder gives, and refuses other moments."""

import json
from pathlib import Path

import bench_encode
import pytest
import torch
from test_bench_train import accelerate_forgets  # noqa: F401

from ldm.data.manifest import Manifest
from ldm.data.shards import write_shards


def test_the_benchmark_writes_its_records(tmp_path: Path, capsys) -> None:
    few = ["--channels", "32", "--resolution", "16", "--samples", "6", "--batch", "4", "--workers", "0"]
    few += ["--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "r.json")]
    assert bench_encode.main(few) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["peer_name"] for row in rows] == ["diffusers' bare VAE", "our bare VAE"]
    for row in rows:
        assert (row["unit"], row["samples"], row["rounds"]) == ("pictures/s", 6, 2)
        assert row["ratio"] == row["ours"] / row["peer"]
        assert 0 < row["difference"] < bench_encode.STORED_LIMIT
    assert rows[0]["name"] in capsys.readouterr().out


def test_stored_moments_of_something_else_are_refused(tmp_path: Path) -> None:
    moments = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    samples = [{"__key__": str(i), "moments.npy": one.half().numpy(), "txt": ""} for i, one in enumerate(moments)]
    write_shards(iter(samples), tmp_path, prefix="shard", samples_per_shard=2, encoder={"weights": "none"})
    assert len(Manifest.load(tmp_path).shards) == 2
    batches = [torch.zeros(2), torch.zeros(1)]

    def encode_as(values):
        left = iter(values.split([2, 1]))
        return lambda images: next(left)

    assert bench_encode.check_stored(tmp_path, encode_as(moments), batches) < 1e-3
    with pytest.raises(ValueError, match="stored moments differ from those of diffusers' autoencoder by"):
        bench_encode.check_stored(tmp_path, encode_as(moments * 1.01), batches)
    with pytest.raises(ValueError, match="encoded shards hold 3 samples of 2"):
        bench_encode.check_stored(tmp_path, encode_as(moments), batches[:1])
