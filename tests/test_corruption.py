"""Masks and blur against their definitions, cold diffusion's two samplers as the paper compares them, the loss."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.corruption import (
    Blur,
    GrowingMask,
    PixelMasking,
    cold_diffusion,
    corruption_loss,
    denoise_renoise,
    descending_levels,
    drawn_levels,
    gaussian_matrix,
)
from ldm.models.conditioning import Conditioning

SIZE = (6, 8)
NOTHING = Conditioning(torch.zeros(1, 1, 1))


def normals(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def pictures(batch: int = 3, seed: int = 0) -> Tensor:
    return normals(batch, 2, *SIZE, seed=seed)


def at(level: int, batch: int = 3) -> Tensor:
    return torch.full((batch,), level)


def deviations(levels: int) -> list[float]:
    return [0.3 * (i + 1) for i in range(levels)]


CORRUPTIONS = {
    "pixels": PixelMasking(*SIZE, fill=None),
    "five pixels": PixelMasking(*SIZE, pixels_per_level=5, fill=0.0),
    "growing mask": GrowingMask(*SIZE, levels=12, growth=0.4),
    "blur": Blur(*SIZE, deviations(10)),
}


def test_one_pixel_more_is_masked_at_each_level_and_none_twice() -> None:
    corruption, x0, noise = PixelMasking(*SIZE, fill=None), pictures(), normals(3, 3, *SIZE, seed=1)
    assert corruption.levels == 48
    before = torch.zeros(3, 1, *SIZE, dtype=torch.bool)
    for level in range(49):
        mask = corruption.mask(at(level), noise)
        assert mask.flatten(1).sum(1).tolist() == [level] * 3
        assert bool((mask | ~before).all())  # what was masked stays masked
        z = corruption(x0, at(level), noise)
        assert torch.equal(z, torch.where(mask, noise[:, 1:], x0))
        before = mask
    assert torch.equal(z, noise[:, 1:])


def test_a_growing_step_masks_as_many_pixels_and_the_fill_is_given() -> None:
    corruption, x0, noise = PixelMasking(*SIZE, pixels_per_level=5, fill=0.25), pictures(), normals(3, 2, *SIZE, seed=1)
    assert corruption.levels == 10
    for level, count in ((0, 0), (1, 5), (9, 45), (10, 48)):
        z = corruption(x0, torch.tensor([level, 0, level]), noise)
        assert (z == 0.25)[[0, 2]].flatten(1).sum(1).tolist() == [2 * count] * 2
        assert torch.equal(z[1], x0[1])


def test_every_order_of_pixels_is_equally_likely() -> None:
    seed, count = 4, 6000
    noise = normals(count, 1, 1, 3, seed=seed)
    first = PixelMasking(1, 3).mask(torch.ones(count, dtype=torch.int64), noise).flatten(1).double()
    second = PixelMasking(1, 3).mask(torch.full((count,), 2), noise).flatten(1).double()
    orders = (first @ torch.tensor([0.0, 1, 2]).double()) * 3 + ((second - first) @ torch.tensor([0.0, 1, 2]).double())
    counts = torch.bincount(orders.long(), minlength=9)[[1, 2, 3, 5, 6, 7]]
    # 6 orders of 1000: within 4.5 standard deviations of the binomial.
    assert int(counts.sum()) == count
    assert float((counts - 1000).abs().max()) < 4.5 * math.sqrt(count / 6 * 5 / 6), f"seed {seed}: {counts.tolist()}"


def test_what_replaces_a_pixel_does_not_depend_on_its_place_in_the_order() -> None:
    seed, count = 6, 3000
    noise = normals(count, 2, 4, 4, seed=seed)
    x0 = torch.full((count, 1, 4, 4), math.nan, dtype=torch.float64)
    first = PixelMasking(4, 4, fill=None)(x0, torch.full((count,), 4), noise)
    values = first[~first.isnan()]
    assert len(values) == 4 * count
    assert abs(values.mean().item()) < 4.5 / math.sqrt(4 * count), f"seed {seed}"
    assert values.var().item() == pytest.approx(1, abs=4.5 * math.sqrt(2 / (4 * count))), f"seed {seed}"


def test_the_growing_mask_is_the_product_of_its_gaussians() -> None:
    corruption, x0, noise = GrowingMask(*SIZE, levels=5, first=0.7, growth=0.5), pictures(), torch.zeros(3, 2, *SIZE)
    centres = [(0, 0), (3, 4), (5, 7)]
    for b, (row, column) in enumerate(centres):
        noise[b, 0, row, column] = 1.0
    for level in range(6):
        found = corruption(x0, at(level), noise)
        for b, (row, column) in enumerate(centres):
            for i in range(SIZE[0]):
                for j in range(SIZE[1]):
                    r2 = (i - row) ** 2 + (j - column) ** 2
                    kept = math.prod(1 - math.exp(-r2 / (2 * (0.7 + 0.5 * n) ** 2)) for n in range(level))
                    torch.testing.assert_close(found[b, :, i, j], x0[b, :, i, j] * kept, rtol=1e-9, atol=1e-12)


def test_two_blurs_make_one_and_the_mean_stays() -> None:
    x0 = pictures()
    once = Blur(*SIZE, [0.6, 0.8, 1.0])
    twice = once(once(x0, at(1)), at(2))
    torch.testing.assert_close(twice, once(x0, at(3)), rtol=0, atol=1e-12)  # 0.6^2 + 0.8^2 = 1
    torch.testing.assert_close(once(x0, at(3)).mean((2, 3)), x0.mean((2, 3)), rtol=0, atol=1e-12)
    assert torch.equal(once(x0, at(0)), x0)
    mixed = once(x0, torch.tensor([0, 2, 3]))
    for b, level in enumerate((0, 2, 3)):
        assert torch.equal(mixed[b], once(x0, at(level))[b])


def test_the_blur_of_a_point_is_a_gaussian_of_its_deviation() -> None:
    size, s = 101, 3.0
    line = gaussian_matrix(size, s)[:, 50]
    offset = torch.arange(size, dtype=torch.float64) - 50
    torch.testing.assert_close(
        line, (-(offset**2) / (2 * s**2)).exp() / (s * math.sqrt(2 * math.pi)), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(gaussian_matrix(7, 1.3).sum(0), torch.ones(7, dtype=torch.float64))
    # At a border what would leave comes back, mirrored.
    border = gaussian_matrix(size, s)[:, 2]
    centred = [(-((i - c) ** 2) / (2 * s**2)).exp() for i in [torch.arange(size).double()] for c in (2, -3)]
    torch.testing.assert_close(border, sum(centred) / (s * math.sqrt(2 * math.pi)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("step", [1, 3, 7])
@pytest.mark.parametrize("name", [*CORRUPTIONS])
def test_with_a_perfect_predictor_both_samplers_restore_exactly(name: str, step: int) -> None:
    corruption, x0, noise = CORRUPTIONS[name], pictures(), normals(3, 3, *SIZE, seed=2)
    z = corruption(x0, at(corruption.levels), noise)
    levels: list[int] = []

    def restore(z: Tensor, level: Tensor) -> Tensor:
        assert level.shape == (3,)
        levels.append(int(level[0]))
        return x0

    found = cold_diffusion(restore, corruption, z, noise=noise, step=step)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)
    assert levels == [*range(corruption.levels, 0, -step)]
    naive = denoise_renoise(restore, corruption, z, noise=lambda i: normals(3, 3, *SIZE, seed=9 + i), step=step)
    assert torch.equal(naive, x0)


def test_the_improved_sampler_restores_with_any_predictor_where_the_corruption_is_affine_in_the_level() -> None:
    """D(x, s) = x + s e: the predictor cancels (Bansal et al. 2022, section 3.3); the naive sampler keeps its error."""
    direction = normals(3, 2, *SIZE, seed=3)

    class Affine:
        levels = 20

        def __call__(self, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
            return x0 + level.view(-1, 1, 1, 1) * direction

    x0, affine = pictures(), Affine()
    z = affine(x0, at(20), x0)
    wrong = lambda z, level: 0.3 * z.flip(0).tanh() - 1  # noqa: E731
    for step in (1, 4, 20):
        improved = cold_diffusion(wrong, affine, z, noise=x0, step=step)
        torch.testing.assert_close(improved, x0, rtol=0, atol=1e-11)
        naive = denoise_renoise(wrong, affine, z, noise=lambda i: x0, step=step)
        assert float((naive - x0).abs().mean()) > 0.5


@pytest.mark.parametrize("name", ["blur", "growing mask"])
def test_with_an_imperfect_predictor_the_improved_sampler_errs_less(name: str) -> None:
    """The corruptions are linear and fade; the predictor is wrong by the same picture at each level."""
    corruption, noise = CORRUPTIONS[name], normals(3, 3, *SIZE, seed=2)
    for seed in range(5):
        x0, off = pictures(seed=seed), pictures(seed=100 + seed)
        z = corruption(x0, at(corruption.levels), noise)
        restore = lambda z, level, x0=x0, off=off: x0 + 0.25 * off  # noqa: E731
        improved = cold_diffusion(restore, corruption, z, noise=noise)
        naive = denoise_renoise(restore, corruption, z, noise=lambda i: noise)
        # What remains of the predictor's error is what the first level's corruption hides of it.
        hidden = 0.25 * (off - corruption(off, at(corruption.levels), noise))
        torch.testing.assert_close(improved - x0, hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(naive - x0, 0.25 * off, rtol=0, atol=1e-12)
        assert float((improved - x0).square().mean()) < float((naive - x0).square().mean()), f"seed {seed}"


def test_denoise_renoise_draws_a_fresh_order_in_each_step() -> None:
    corruption, x0 = PixelMasking(*SIZE), pictures()
    steps, seen = [], []

    def noise(i: int) -> Tensor:
        steps.append(i)
        return normals(3, 2, *SIZE, seed=20 + i)

    def restore(z: Tensor, level: Tensor) -> Tensor:
        seen.append((z != x0)[:, :1])
        return x0

    denoise_renoise(restore, corruption, normals(3, 2, *SIZE, seed=1), noise=noise, step=12)
    assert steps == [0, 1, 2, 3]
    assert [int(mask[0].sum()) for mask in seen] == [48, 36, 24, 12]
    assert not bool((seen[2] | ~seen[3]).all())  # the last mask is not a part of the one before


def test_the_loss_is_the_error_of_x0_at_the_drawn_level() -> None:
    corruption, x0, noise = CORRUPTIONS["blur"], pictures(), normals(3, 3, *SIZE, seed=2)
    level, calls = drawn_levels(torch.tensor([0.0, 0.55, 0.999]), corruption), []
    assert level.tolist() == [1, 6, 10]
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def network(z: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        calls.append((z, told))
        return weight * z

    found = corruption_loss(network, corruption, x0, noise, level, NOTHING)
    ((z, told),) = calls
    assert torch.equal(told, level)
    assert torch.equal(z, corruption(x0, level, noise))
    torch.testing.assert_close(found, ((0.7 * z - x0) ** 2).mean((1, 2, 3)))
    found.sum().backward()
    torch.testing.assert_close(weight.grad, (2 * z * (0.7 * z - x0)).mean((1, 2, 3)).sum())
    huber = corruption_loss(network, corruption, x0, noise, level, NOTHING, "huber", 0.2)
    expected = 2 * torch.nn.functional.huber_loss(0.7 * z, x0, reduction="none", delta=0.2)
    torch.testing.assert_close(huber, expected.mean((1, 2, 3)))
    assert corruption_loss(network, corruption, x0.half(), noise, level, NOTHING).dtype == torch.float32


def test_the_best_predictor_of_masked_gaussian_pixels_has_the_masked_share_as_its_loss() -> None:
    """Independent unit pixels: the masked are unknown, variance 1, the others known: loss level / T."""
    corruption = PixelMasking(*SIZE, fill=0.0)
    seed, count = 8, 4000
    x0, noise = normals(count, 2, *SIZE, seed=seed), normals(count, 2, *SIZE, seed=seed + 1)
    level = torch.full((count,), 12)
    found = corruption_loss(lambda z, *_: z, corruption, x0, noise, level, NOTHING)
    # Each is a mean of 24 squares of variance 2, of 96 elements.
    error = math.sqrt(2 * 24) / 96 / math.sqrt(count)
    assert found.mean().item() == pytest.approx(0.25, abs=4 * error), f"seed {seed}"


@pytest.mark.parametrize("name", [*CORRUPTIONS])
def test_corrupting_never_waits_for_the_device(name: str) -> None:
    x0 = torch.zeros(2, 2, *SIZE, device="meta")
    level = drawn_levels(torch.zeros(2, dtype=torch.float64, device="meta"), CORRUPTIONS[name])
    noise = torch.zeros(2, 3, *SIZE, device="meta")
    assert corruption_loss(lambda z, *_: z, CORRUPTIONS[name], x0, noise, level, NOTHING).shape == (2,)


def test_wrong_requests_are_errors() -> None:
    x0, noise = pictures(), normals(3, 3, *SIZE, seed=1)
    with pytest.raises(ValueError, match="noise: found 2 channels to replace 2 of a picture, expected 3"):
        PixelMasking(*SIZE, fill=None)(x0, at(1), x0)
    assert descending_levels(10, 4) == [10, 6, 2, 0]
    for step in (0, 11):
        with pytest.raises(ValueError, match=f"step: found {step}, expected 1 to the 10 levels"):
            descending_levels(10, step)
    for name, corruption in CORRUPTIONS.items():
        with pytest.raises(ValueError, match="level: found"):
            corruption(x0, at(corruption.levels + 1), noise)
        with pytest.raises(ValueError, match=r"found a picture of \(8, 6\), expected \(6, 8\)"):
            corruption(x0.mT, at(1), noise.mT), name
    with pytest.raises(ValueError, match="pixels_per_level: found 0"):
        PixelMasking(*SIZE, pixels_per_level=0)
    with pytest.raises(ValueError, match="expected them to ascend"):
        Blur(*SIZE, [1.0, 0.5])
    with pytest.raises(ValueError, match="mask: found 0 levels"):
        GrowingMask(*SIZE, levels=0)
    with pytest.raises(ValueError, match="distance: found 'l1'"):
        corruption_loss(lambda z, *_: z, CORRUPTIONS["blur"], x0, noise, at(1), NOTHING, "l1")
    with pytest.raises(ValueError, match="output has shape"):
        corruption_loss(lambda z, *_: z[:, :1], CORRUPTIONS["blur"], x0, noise, at(1), NOTHING)
