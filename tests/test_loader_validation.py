"""The validation loader: each held-out sample once, as many batches for each process, draws that never change."""

import pytest
import torch
from tiny_shards import (
    COUNTS,
    LATENT,
    config,
    loader_of,
    write,
)

from ldm.data.loader import make_validation_loader
from ldm.data.manifest import Manifest


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("encoded"))


@pytest.mark.parametrize(
    ("samples", "world", "micro_batch"), [(None, 1, 8), (53, 2, 8), (20, 4, 3), (5, 4, 1), (7, 2, 100)]
)
def test_validation_covers_each_sample_once_and_gives_all_processes_as_many_batches(
    encoded: Manifest, samples: int | None, world: int, micro_batch: int
) -> None:
    settings = config(encoded.folder, caption_dropout=1.0, flip=1.0)
    lengths, positions, keys = set(), [], []
    for rank in range(world):
        loader = make_validation_loader(
            settings, encoded, 3, latent_shape=LATENT, rank=rank, world=world, micro_batch=micro_batch, samples=samples
        )
        batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert 1 <= len(batch.keys) <= micro_batch + 1
            assert not batch.dropped.any()
            positions += batch.positions.tolist()
            keys += batch.keys
    assert len(lengths) == 1
    assert positions == list(range(samples or 53))
    in_file_order = [f"s-{shard}.tar/k{number:03d}" for shard, count in enumerate(COUNTS) for number in range(count)]
    assert keys == in_file_order[: samples or 53]


def test_validation_draws_are_fixed_do_not_depend_on_the_split_and_are_not_those_of_training(encoded: Manifest) -> None:
    def noise(world: int, workers: int = 0) -> torch.Tensor:
        settings = config(encoded.folder, workers=workers)
        loaders = [
            make_validation_loader(
                settings, encoded, 3, latent_shape=LATENT, rank=rank, world=world, micro_batch=7, samples=40
            )
            for rank in range(world)
        ]
        once = torch.cat([batch.noise for loader in loaders for batch in loader])
        assert torch.equal(once, torch.cat([batch.noise for loader in loaders for batch in loader]))  # iterated again
        return once

    expected = noise(1)
    assert torch.equal(noise(2), expected)
    assert torch.equal(noise(1, workers=1), expected)
    training = torch.cat([batch.noise for batch in loader_of(encoded, config(encoded.folder))]).flatten(1)
    both = torch.cat([training, expected.flatten(1)])
    assert len(torch.unique(both, dim=0)) == len(both)


def test_more_processes_than_validation_samples_are_an_error(encoded: Manifest) -> None:
    with pytest.raises(ValueError, match="gives 3 validation samples to 4 processes"):
        make_validation_loader(
            config(encoded.folder), encoded, 0, latent_shape=LATENT, rank=0, world=4, micro_batch=1, samples=3
        )
