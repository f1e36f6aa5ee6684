"""A batch on its way from a worker: the same tensors arrive, the large ones as parts of one."""

import pickle
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # teaches the pickler to share tensors

from ldm.data.batch import SMALL_BYTES, Batch


def batch(size: int) -> Batch:
    """`size` samples, of several types, with numbers of bytes that are no multiples of anything."""
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    return Batch(
        positions=torch.arange(size),
        keys=[str(i) for i in range(size)],
        captions=["red"] * size,
        dropped=normal() > 0,
        images=None,
        moments=normal(8, 5, 7).half(),
        text_states=normal(3, 11).to(torch.float16),
        text_pooled=None,
        sizes=normal(6),
        u=normal().double(),
        posterior_noise=normal(4, 5, 7),
        noise=normal(4, 7, 5).transpose(2, 3),  # in another order in memory
        offset=normal(4),
    )


@pytest.mark.parametrize("size", [1, 3, 501])
def test_what_arrives_is_what_was_sent(size) -> None:
    sent = batch(size)
    arrived = pickle.loads(pickle.dumps(sent))
    for one in fields(Batch):
        ours, theirs = getattr(arrived, one.name), getattr(sent, one.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
    assert vars(arrived).keys() == vars(sent).keys()
    assert sent.moments is not None  # sending leaves it as it was


def test_large_tensors_pass_one_file_descriptor_and_small_ones_none(monkeypatch) -> None:
    passed = []
    share = torch.UntypedStorage._share_fd_cpu_
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda s, *given: (passed.append(s), share(s))[1])
    sent = batch(501)
    assert sum(getattr(sent, one.name).nbytes > SMALL_BYTES for one in fields(Batch) if one.name in vars(sent)
               and isinstance(getattr(sent, one.name), torch.Tensor)) >= 3  # fmt: skip
    ForkingPickler.dumps(sent)
    assert len(passed) == 1
