"""A batch's way to the device: nothing but when it is done changes, and on a GPU it lies beside the step before."""

from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from training_runs import assert_same_state, metrics, train

import ldm.train
import ldm.training.run
from ldm.data.batch import Batch
from ldm.data.dataset import DataConfig
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.conditioning import Conditioning
from ldm.training.arrival import Arrival, completed, tensors_of


def batch_of(**given: object) -> Batch:
    """Two samples with 4x4 latents."""
    zeros = torch.zeros(2, 4, 4, 4)
    names = {"keys": ["a", "b"], "captions": ["red", "blue"], "images": None, "moments": torch.ones(2, 8, 4, 4),
             "text_states": torch.ones(2, 3, 5), "text_pooled": None, "offset": None}  # fmt: skip
    tensors = {"positions": torch.arange(2), "dropped": torch.tensor([True, False]), "sizes": torch.zeros(2, 6),
               "u": torch.zeros(2), "posterior_noise": zeros, "noise": zeros.clone()}  # fmt: skip
    return Batch(**(names | tensors | given))


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(AutoencoderConfig(**blocks, block_out_channels=[8, 16], norm_num_groups=8)).eval()


class Text:
    """An encoder of captions by their lengths."""

    def encode(self, captions):
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return Conditioning(lengths[:, None, None].expand(-1, 3, 5), lengths[:, None])


def test_what_the_shards_lack_is_encoded_and_what_they_have_is_kept() -> None:
    encoder, pictures = autoencoder(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    raw = batch_of(moments=None, images=pictures, text_states=None)
    full = completed(raw, Text(), encoder)
    with torch.no_grad():
        assert torch.equal(full.moments, encoder.encode(pictures))
    assert full.text_states[:, 0, 0].tolist() == [3.0, 4.0]
    assert full.text_pooled.tolist() == [[3.0], [4.0]]
    assert full.images is None
    assert not full.moments.requires_grad
    assert raw.moments is None
    stored = batch_of()
    same = completed(stored, Text(), encoder)
    assert same.moments is stored.moments
    assert same.text_states is stored.text_states
    assert same.text_pooled is None
    assert same.quarantined is stored.quarantined


def test_a_run_is_byte_by_byte_that_of_batches_encoded_within_the_step(raw_shards, tmp_path, monkeypatch):
    options = ("--training.steps=6", "--training.max_micro_batch=8")
    lines = train(tmp_path / "ours", raw_shards, *options)
    seen = []

    class InTheStep(Arrival):
        def __call__(self, batch: Batch) -> Batch:
            seen.append(batch)
            return batch.to(self._device)

    monkeypatch.setattr(ldm.training.run, "Arrival", InTheStep)
    within = train(tmp_path / "within", raw_shards, *options)
    assert len(seen) == 6 * 2
    assert [line["loss"] for line in lines] == [line["loss"] for line in within]
    assert metrics(tmp_path / "ours")[-1]["grad_norm"] == within[-1]["grad_norm"]
    assert_same_state(tmp_path / "ours/checkpoints/latest", tmp_path / "within/checkpoints/latest")


def test_no_batch_is_read_before_the_step_that_takes_it(encoded_shards, tmp_path, monkeypatch):
    # A checkpoint, a signal or the ledger would see what belongs to a later step.
    order, step_of = [], ldm.train.train_step

    def told(run, step, batches, clock):
        def reading():
            for batch in batches:
                order.append(("read", int(batch.positions[0]) // 16))
                yield batch

        order.append(("begin", step))
        latents = step_of(run, step, reading(), clock)
        order.append(("end", step))
        return latents

    monkeypatch.setattr(ldm.train, "train_step", told)
    train(
        tmp_path / "run",
        encoded_shards,
        "--training.steps=3",
        "--training.max_micro_batch=8",
        "--optimizer.warmup_steps=1",
    )
    assert order == [(what, step) for step in range(3) for what in ("begin", "read", "read", "end")]


class StandIn:
    """torch.cuda's streams, which only note what is asked of them, and in which of them things are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.noted = "step", []
        queues = {"step": self._queue("step"), "beside": self._queue("beside")}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: queues["beside"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queues[self.now])
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.noted.append(("recorded", t, s.name)))
        monkeypatch.setattr(Batch, "to", lambda batch, device, non_blocking=False: self._moved(batch, non_blocking))

    def _queue(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.noted.append((name, "waits for", other.name)))

    @contextmanager
    def _within(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def _moved(self, batch: Batch, non_blocking: bool) -> Batch:
        self.noted.append(("moved", self.now, non_blocking))
        copies = {one.name: getattr(batch, one.name) for one in fields(batch)}
        return Batch(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in copies.items()})


def test_on_a_gpu_copies_and_encoders_are_queued_beside_and_the_step_waits_for_them(monkeypatch) -> None:
    streams = StandIn(monkeypatch)

    def encode(batch: Batch) -> Batch:
        streams.noted.append(("encoded", streams.now, None))
        return replace(batch, text_states=torch.ones(2, 3, 5))

    arrived = Arrival(torch.device("cuda"), encode)(batch_of(text_states=None))
    recorded = [one for one in streams.noted if one[0] == "recorded"]
    assert streams.noted[: -len(recorded)] == [
        ("moved", "beside", True),
        ("encoded", "beside", None),
        ("step", "waits for", "beside"),
    ]
    assert {id(tensor) for _, tensor, _ in recorded} == {id(tensor) for tensor in tensors_of(arrived)}
    assert len(recorded) == 8
    assert {name for _, _, name in recorded} == {"step"}
    assert streams.now == "step"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_on_this_gpu_results_are_equal_and_copies_overlap_computing() -> None:
    device = torch.device("cuda")
    encoder = autoencoder().to(device)
    pictures = torch.rand(2, 3, 512, 512)
    raw = replace(batch_of(moments=None, images=pictures, noise=torch.rand(64, 4, 512, 512)), text_pooled=None)
    arrival = Arrival(device, partial(completed, text_encoder=Text(), autoencoder=encoder))
    matrix = torch.rand(8192, 8192, device=device)
    expected = completed(raw.to(device), Text(), encoder)
    overlapped = 0
    for _ in range(5):
        pinned = raw.pin_memory()
        torch.cuda.synchronize()
        for _ in range(20):  # about half a second of the step before
            matrix = (matrix @ matrix).clamp(0, 1)
        computed, copied = torch.cuda.Event(), torch.cuda.Event()
        computed.record()
        arrived = arrival(pinned)
        copied.record(arrival._beside)
        copied.synchronize()
        overlapped += not computed.query()  # the copies are done, the step before is not
        for ours, theirs in zip(tensors_of(arrived), tensors_of(expected), strict=True):
            assert torch.equal(ours, theirs)
    assert overlapped >= 3


def test_the_loader_pins_batches_where_there_is_a_gpu(monkeypatch, encoded_shards) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    positions = Positions(rank=0, world=1, micro_batch=4, accumulation=1, start_step=0, stop_step=1)
    config = DataConfig(shards=str(encoded_shards), resolution=64, workers=0)
    loader = make_loader(config, Manifest.load(encoded_shards), 3, positions, latent_shape=(4, 16, 16))
    assert loader.pin_memory
