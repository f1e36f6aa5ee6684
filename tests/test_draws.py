"""The random draws against an independent Philox, published vectors and closed-form distributions."""

import random

import numpy as np
import pytest
import torch

from ldm.data.draws import Purpose, generator, normal, uniform, uniforms

WORD = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 written from the paper (Salmon et al. 2011, section 4.3), for comparison."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & WORD, (first >> 64) ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
    return c


def test_the_independent_philox_gives_the_published_vectors() -> None:
    # kat_vectors of Random123 1.14
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox4x64([WORD] * 4, [WORD] * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("address", [(), (5,), (5, 6), (5, 6, 7), (WORD, WORD, WORD)])
@pytest.mark.parametrize("seed", [0, 1, 12345, WORD])
def test_a_draw_is_philox_of_seed_purpose_and_address(seed: int, address: tuple[int, ...]) -> None:
    # NumPy counts before each block, so that a stream's first block has counter 1.
    block = philox4x64([1, *address, *[0] * (3 - len(address))], [seed, Purpose.NOISE])
    raw = generator(seed, Purpose.NOISE, *address).bit_generator.random_raw(4)
    assert raw.tolist() == block
    assert uniform(seed, Purpose.NOISE, *address) == (block[0] >> 11) / 2**53


def test_normal_draws_are_those_of_the_generator_and_of_every_version_of_numpy() -> None:
    shape = (4, 16, 16)
    drawn = normal(7, Purpose.NOISE, 123456789, shape=shape)
    expected = generator(7, Purpose.NOISE, 123456789).standard_normal(shape, dtype=np.float32)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, expected)
    # Stored values (NumPy 2.4): a run computed again years later needs the same noise.
    np.testing.assert_array_equal(
        drawn.ravel()[:4],
        np.array([-1.2199729681015015, 1.0426987409591675, 0.9872878789901733, -0.10019610822200775], dtype=np.float32),
    )
    out = np.zeros(shape, dtype=np.float32)
    normal(7, Purpose.NOISE, 123456789, shape=shape, out=out)
    np.testing.assert_array_equal(out, drawn)


def test_300_uniforms_at_once_are_those_of_numpys_generator() -> None:
    print("seed 0, 300 positions, 4 purposes, 4 seeds of the run")
    drawn = np.random.default_rng(0).integers(0, 2**63 - 1, 250, dtype=np.int64)
    positions = np.concatenate([np.arange(40), 2**32 + np.arange(-5, 4), drawn, [2**63 - 1]])
    purposes = [Purpose.TIMESTEP, Purpose.FLIP, Purpose.DROPOUT, Purpose.VALIDATION]
    for seed in (0, 1, 12345, WORD):
        expected = [[generator(seed, one, position).random() for position in positions.tolist()] for one in purposes]
        np.testing.assert_array_equal(uniforms(seed, purposes, positions), expected)
    assert uniforms(0, purposes, np.arange(0)).shape == (4, 0)
    for seed, position in ((-1, 0), (2**64, 0), (0, -1)):
        with pytest.raises(ValueError, match="allowed are"):
            uniforms(seed, purposes, np.array([3, position]))


def test_draws_depend_on_the_address_and_not_on_what_was_drawn_before() -> None:
    first = [uniform(3, Purpose.TIMESTEP, position) for position in range(50)]
    rng = random.Random(0)
    order = rng.sample(range(50), 50)
    second = {}
    for position in order:
        normal(3, Purpose.NOISE, position, shape=(rng.randrange(1, 100),))
        second[position] = uniform(3, Purpose.TIMESTEP, position)
    assert [second[position] for position in range(50)] == first


def test_streams_of_neighbouring_addresses_purposes_and_seeds_share_no_number() -> None:
    addresses = [(seed, purpose, position) for seed in (0, 1) for purpose in Purpose for position in range(4)]
    raw = [generator(seed, purpose, position).bit_generator.random_raw(4096) for seed, purpose, position in addresses]
    assert len(np.unique(np.concatenate(raw))) == 4096 * len(addresses)


def test_the_integers_of_purposes_never_change() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ORDER": 1,
        "RESERVE": 2,
        "CROP": 3,
        "FLIP": 4,
        "CAPTION": 5,
        "DROPOUT": 6,
        "POSTERIOR": 7,
        "TIMESTEP": 8,
        "NOISE": 9,
        "SAMPLE_NOISE": 10,
        "SAMPLER_NOISE": 11,
        "VALIDATION": 12,
        "OFFSET": 13,
        "LIKELIHOOD": 14,
    }


def test_uniform_draws_of_20000_positions_are_uniform_and_uncorrelated() -> None:
    count, bins = 20000, 64
    drawn = np.array([uniform(11, Purpose.TIMESTEP, position) for position in range(count)])
    observed = np.bincount((drawn * bins).astype(int), minlength=bins)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 4 * np.sqrt(2 * (bins - 1))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(count)
    other = np.array([uniform(11, Purpose.DROPOUT, position) for position in range(count)])
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 4 / np.sqrt(count)


def test_noise_of_2000_positions_is_standard_normal_and_uncorrelated_between_positions() -> None:
    noise = np.stack([normal(5, Purpose.NOISE, position, shape=(64,)) for position in range(2000)])
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs((noise.astype(np.float64) ** 2).mean() - 1) < 4 * np.sqrt(2 / noise.size)
    assert abs((noise[:-1] * noise[1:]).mean()) < 4 / np.sqrt(noise.size)
    assert len(np.unique(noise[:, 0])) > 1990


def test_no_global_generator_takes_part() -> None:
    def draw() -> list:
        return [uniform(1, Purpose.FLIP, 2), normal(1, Purpose.NOISE, 2, shape=(3,)).tolist()]

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = draw()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert draw() == before
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert draw() == before


@pytest.mark.parametrize(("seed", "address"), [(-1, (0,)), (2**64, (0,)), (0, (-1,)), (0, (2**64,)), (0, (0, 0, 0, 0))])
def test_a_seed_or_address_out_of_range_is_an_error(seed: int, address: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        uniform(seed, Purpose.NOISE, *address)
    with pytest.raises(ValueError, match="allowed are"):
        generator(seed, Purpose.NOISE, *address)
