"""Streams of tars without a manifest: positions and draws are exact, samples mixed, no global generator used."""

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_shards import positions_of
from tiny_streams import (
    LATENT,
    SAMPLES,
    SHARDS,
    all_of,
    check_row,
    config,
    encoded_sample,
    keys_of,
    loader_of,
    number_of,
    raw_sample,
    stream,
    values,
    write_tars,
)

from ldm.data.stream_shards import shard_names
from ldm.data.streaming import StreamConfig, stream_lines


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("raw"), raw_sample)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("encoded"), encoded_sample)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_positions_and_draws_are_those_of_indexed_shards_for_0_to_3_workers_on_two_ranks(
    kind: str, workers: int, request: pytest.FixtureRequest
) -> None:
    seed, source = 3, stream(all_of(request.getfixturevalue(kind)))
    crop = "random" if kind == "raw" else "center"
    settings = config(workers=workers, flip=0.5, caption_dropout=0.5, crop=crop)
    split = {"world": 2, "micro_batch": 3, "accumulation": 2, "start_step": 5, "stop_step": 9}
    every = []
    for rank in range(2):
        loader = loader_of(source, settings, seed, rank=rank, **split)
        batches = list(loader)
        assert len(batches) == len(loader) == 8  # not a multiple of 3 workers
        expected = list(positions_of(rank=rank, **split))
        assert [batch.positions.tolist() for batch in batches] == expected
        for batch in batches:
            assert batch.quarantined == []
            for row, position in enumerate(batch.positions.tolist()):
                check_row(batch, row, position, seed, settings)
        every += itertools.chain(*expected)
    assert sorted(every) == list(range(5 * 12, 9 * 12))


def test_the_type_of_a_batch_is_that_of_indexed_shards(raw: Path, encoded: Path) -> None:
    (batch,) = loader_of(stream(all_of(raw)), stop_step=1)
    assert batch.images is not None
    assert (batch.images.shape, batch.images.dtype, batch.moments) == ((8, 3, 8, 8), torch.float32, None)
    (batch,) = loader_of(stream(all_of(encoded)), stop_step=1)
    assert batch.moments is not None
    assert batch.text_states is not None
    assert (batch.moments.shape, batch.moments.dtype, batch.images) == ((8, 4, 4, 4), torch.float32, None)
    assert (batch.text_states.shape, batch.text_states.dtype) == ((8, 3, 5), torch.float32)
    assert batch.noise.shape == (8, *LATENT)


def test_ranks_workers_starts_and_seeds_draw_different_samples_and_one_address_the_same(raw: Path) -> None:
    source = stream(all_of(raw))

    def first(seed: int = 3, **changes: Any) -> list[str]:
        return keys_of(itertools.islice(loader_of(source, seed=seed, world=2, stop_step=1004, **changes), 3))

    streams = [first(), first(rank=1), first(start_step=1), first(start_step=1000), first(seed=4)]
    two = list(itertools.islice(loader_of(source, config(workers=2), world=2, stop_step=8), 8))
    streams += [keys_of(two[0::2])[:24], keys_of(two[1::2])[:24]]
    assert streams[5] != streams[6]
    del streams[5]  # worker 0 of 2 begins as the only reader does
    for one, other in itertools.combinations(streams, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8  # of 24; by chance about one
    assert first(rank=1, start_step=1000) == first(rank=1, start_step=1000)


def test_each_rank_draws_shards_with_replacement_and_equal_chances(raw: Path) -> None:
    source = stream(all_of(raw), shuffle_buffer=1)
    orders = []
    for rank in range(2):
        keys = keys_of(loader_of(source, rank=rank, world=2, micro_batch=30, stop_step=120))
        # Without mixing, a shard's samples come in its own order, one shard after the other: 120 shards.
        assert [number_of(key)[1] for key in keys] == list(range(SAMPLES)) * 120
        orders.append([number_of(key)[0] for key in keys[::SAMPLES]])
        shares = np.array([Counter(orders[-1])[shard] for shard in range(SHARDS)]) / 120
        assert np.abs(shares - 1 / SHARDS).max() <= 4 * np.sqrt(5 / 36 / 120)
    two = list(loader_of(source, config(workers=2), micro_batch=30, stop_step=80))
    orders += [[number_of(batch.keys[0])[0] for batch in two[worker::2]] for worker in range(2)]
    assert abs(np.mean(np.array(orders[2]) == np.array(orders[3])) - 1 / SHARDS) < 0.24  # 40 shards each
    assert abs(np.mean(np.array(orders[0]) == np.array(orders[1])) - 1 / SHARDS) < 0.14  # 4 standard deviations


def test_the_buffer_mixes_samples_of_several_shards(raw: Path) -> None:
    source = stream(all_of(raw), shuffle_buffer=SHARDS * SAMPLES)
    keys = keys_of(loader_of(source, micro_batch=30, stop_step=10))
    numbers = [number_of(key)[1] for key in keys]
    assert np.mean(np.diff(numbers) == 1) < 0.15  # 1/30 by chance, 0.97 in the tars' order
    assert len({number_of(key)[0] for key in keys[150:180]}) >= 3


def test_no_global_generator_moves(raw: Path) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    list(loader_of(stream(all_of(raw)), config(flip=0.5)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    first = keys_of(loader_of(stream(all_of(raw))))
    random.seed(2)
    assert keys_of(loader_of(stream(all_of(raw)))) == first


def test_spawned_workers_give_the_same_batches(raw: Path) -> None:
    expected = values(list(loader_of(stream(all_of(raw)), stop_step=2)))
    assert values(list(loader_of(stream(all_of(raw)), config(workers=1), stop_step=2, context="spawn"))) == expected


# Names, settings and first lines


def test_shards_are_called_by_file_name_and_by_url_where_two_have_the_same() -> None:
    urls = ["/a/x.tar", "/b/x.tar", "/a/y.tar", "https://h/p/z%20z.tar?key=1", "s3://b/w.tar", "pipe:cat /a/y.tar"]
    assert list(shard_names(urls).values()) == [
        "/a/x.tar",
        "/b/x.tar",
        "y.tar",
        "z z.tar",
        "w.tar",
        "pipe:cat /a/y.tar",
    ]
    same = ["https://h/x.tar?part=1", "https://h/x.tar?part=2", "https://i/x.tar?part=1", "/a/y.tar", "/a/y.tar"]
    assert list(shard_names(same).values()) == [*same[:2], "https://i/x.tar", "y.tar"]


def test_a_shard_named_twice_is_one_shard_with_twice_the_chance(raw: Path) -> None:
    names = shard_names([str(raw / "s-0.tar")] * 2)
    assert list(names.values()) == ["s-0.tar"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": []}, r"data\.stream\.urls is \[\]"),
        ({"urls": [""]}, r"data\.stream\.urls is \[''\]"),
        ({"urls": ["a{b.tar"]}, r"data\.stream\.urls: Unbalanced braces"),
        ({"shuffle_buffer": 0}, r"data\.stream\.shuffle_buffer is 0; allowed are integers from 1"),
        ({"attempts": 0}, r"data\.stream\.attempts is 0; allowed are integers from 1"),
        ({"timeout": 0.0}, r"data\.stream\.timeout is 0.0; allowed are numbers above 0"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**{"urls": ["a.tar"]} | changes)


def test_the_first_lines_say_what_is_not_exact_and_what_is() -> None:
    text = " ".join(stream_lines(StreamConfig(urls=["s3://b/{000..099}.tar"])))
    for part in (
        "100 tars",
        "NOT exact",
        "twice",
        "never",
        "resumed",
        "processes or workers",
        "checksum",
        "by position",
    ):
        assert part in text
    assert "shell" not in text
    text = " ".join(stream_lines(StreamConfig(urls=["pipe:cat {a,b}.tar", "c.tar"], allow_pipe=True)))
    assert "2 of the tars are programs that run here" in text
