"""A run that begins with released weights where only one of the two networks has a variance, or both do."""

import pytest
import tiny_sources
import torch
from test_initial_weights import assert_close, begun, inputs, ours, theirs

from ldm.models.conditioning import Conditioning


def test_a_network_without_variance_keeps_its_mean_and_begins_between_the_bounds(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released")
    unet, record, said = begun(tmp_path / "released", out_channels=8)
    found = ours(unet, *inputs(4))
    assert_close(found[:, :4], theirs(source, *inputs(4)))
    assert not found[:, 4:].any(), "a raw 0 is the middle of the bounds' logarithms"
    line = "conv_out: 4 rows of a variance are new and zero: it begins at the geometric mean of its bounds"
    assert [one.strip() for one in said[1:]] == [line]
    assert line in record


def test_a_new_variance_learns_from_the_first_step(tmp_path):
    tiny_sources.make_unet(tmp_path / "released")
    unet, _, _ = begun(tmp_path / "released", out_channels=8)
    x, t, text = inputs(4)
    (unet(x, t, Conditioning(text))[:, 4:] - 1).square().mean().backward()
    assert unet.conv_out.weight.grad[4:].abs().min() > 0


def test_a_learned_variance_is_left_out_of_a_network_without(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released", out_channels=8)
    unet, _, said = begun(tmp_path / "released")
    assert_close(ours(unet, *inputs(4)), theirs(source, *inputs(4))[:, :4])
    assert [one.strip() for one in said[1:]] == ["conv_out: the 4 rows of the source's learned variance are left out"]


@pytest.mark.parametrize("channels", [3, 6])
def test_with_other_latents_means_go_to_means_and_variances_to_variances(tmp_path, channels):
    source = tiny_sources.make_unet(tmp_path / "released", out_channels=8)
    unet, _, said = begun(tmp_path / "released", in_channels=channels, out_channels=2 * channels)
    kept = min(channels, 4)
    x, t, text = inputs(channels)
    padded = torch.zeros(2, 4, 8, 8)
    padded[:, :kept] = x[:, :kept]
    x[:, kept:] = 0
    mean, raw = theirs(source, padded, t, text).chunk(2, dim=1)
    own_mean, own_raw = ours(unet, x, t, text).chunk(2, dim=1)
    assert_close(own_mean[:, :kept], mean[:, :kept])
    assert_close(own_raw[:, :kept], raw[:, :kept])
    assert not own_mean[:, kept:].any()
    assert not own_raw[:, kept:].any()
    assert any(f"conv_out: 4 rows became {channels}" in line for line in said)


def test_eight_means_are_no_four_with_their_variances(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released", in_channels=8, out_channels=8)
    unet, _, said = begun(tmp_path / "released", out_channels=8)
    x, t, text = inputs(4)
    found = ours(unet, x, t, text)
    assert_close(found[:, :4], theirs(source, torch.cat([x, torch.zeros_like(x)], 1), t, text)[:, :4])
    assert not found[:, 4:].any()
    assert any("conv_out: 8 rows became 4, the first 4 are kept" in line for line in said)
