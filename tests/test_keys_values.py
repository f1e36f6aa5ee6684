"""Keys and values of a prompt, computed once: the same prediction as from its text, through all that moves a prompt."""

import os
import random
from typing import Any

import pytest
import torch
from test_unet_parity import random_config
from torch import Tensor
from unet_pairs import SMALL, call_diffusers, deviation, random_inputs, small_pair

from ldm.diffusion.guidance import guided
from ldm.models.blocks import Attention
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

TRIALS = int(os.environ.get("LDM_KEYS_TRIALS", "8"))
SEED = int(os.environ.get("LDM_KEYS_SEED", "0"))


def sdxl_small() -> UNet:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "transformer_layers_per_block": [1, 3],
    }
    settings: dict[str, Any] = {**SMALL, **values, "projection_class_embeddings_input_dim": 46}
    unet = UNet(UNetConfig(**settings))
    for parameter in unet.parameters():  # no layer may stay at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def projections(unet: UNet) -> list[str]:
    """Names of the projections of texts that the network is seen to call from here on."""
    called: list[str] = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


@torch.no_grad()
def test_predictions_from_keys_and_values_equal_those_of_diffusers_from_the_text_on_random_configs() -> None:
    """8 configs (LDM_KEYS_TRIALS), seed 0 (LDM_KEYS_SEED): SD 1.x, 2.x, XL and inpainting in small."""
    rng = random.Random(SEED)
    worst = 0.0
    for trial in range(TRIALS):
        family = ("sd1", "sd2", "inpainting", "sdxl")[trial % 4]
        ours, theirs = small_pair(**random_config(rng, family))
        x, t, conditioning = random_inputs(ours.config, trial, (9, 11))
        prepared = ours.with_keys_values(conditioning)
        called = projections(ours)
        for _ in range(2):  # what one evaluation is told the next is told again
            found = ours(x, t, prepared)
        assert not called
        worst = max(worst, deviation(found, call_diffusers(theirs, x, t, conditioning)))
        assert torch.equal(found, ours(x, t, conditioning))
        assert called
    print(f"\n{TRIALS} configs, seed {SEED}: {worst}")
    assert worst < 1e-5


@torch.no_grad()
def test_keys_and_values_have_the_precision_of_the_autocast_in_which_they_are_made() -> None:
    unet = sdxl_small()
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        prepared = unet.with_keys_values(conditioning)
        assert torch.equal(unet(x, t, prepared), unet(x, t, conditioning))
    assert prepared.keys_values is not None
    assert {tensor.dtype for pair in prepared.keys_values for tensor in pair} == {torch.bfloat16}
    # Made outside of it, they are rounded where they are used: nothing fails on two dtypes.
    early = unet.with_keys_values(conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        assert deviation(unet(x, t, early), unet(x, t, conditioning)) < 0.02


@torch.no_grad()
def test_guidance_joins_keys_and_values_of_both_halves() -> None:
    unet = sdxl_small()
    x, _, with_text = random_inputs(unet.config, 0, (8, 8))
    _, _, without = random_inputs(unet.config, 2, (8, 8))

    def denoiser(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return unet(x, sigma, conditioning)

    sigma = torch.full((2,), 300.0)
    expected = guided(denoiser, with_text, without, 4.0)(x, sigma)
    called = projections(unet)
    prepared = [unet.with_keys_values(part) for part in (with_text, without)]
    called.clear()
    assert torch.equal(guided(denoiser, prepared[0], prepared[1], 4.0)(x, sigma), expected)
    assert not called


@torch.no_grad()
def test_rows_that_are_selected_expanded_or_moved_take_their_keys_and_values_along() -> None:
    unet = sdxl_small()
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    prepared = unet.with_keys_values(conditioning)
    for rows in (slice(1, 2), torch.tensor([1, 0]), torch.tensor([False, True])):
        found, plain = prepared.select(rows), conditioning.select(rows)
        expected = unet(x[rows], t[rows], plain)
        assert found.keys_values is not None
        assert deviation(unet(x[rows], t[rows], found), expected) < 1e-6
    one = prepared.select(slice(0, 1)).expand(2)
    assert one.keys_values is not None
    assert deviation(unet(x, t, one), unet(x, t, conditioning.select(slice(0, 1)).expand(2))) < 1e-6
    assert prepared.to("cpu").keys_values is not None
    meta = prepared.to("meta").keys_values
    assert meta is not None
    assert {tensor.device.type for pair in meta for tensor in pair} == {"meta"}


def test_keys_and_values_are_dropped_with_the_text_that_they_were_made_of() -> None:
    unet = sdxl_small()
    _, _, conditioning = random_inputs(unet.config, 0, (8, 8))
    prepared = unet.with_keys_values(conditioning)
    empty = Conditioning(torch.zeros(1, 7, 12), torch.zeros(1, 10))
    assert prepared.where(torch.tensor([True, False]), empty).keys_values is None
    assert prepared.to(dtype=torch.bfloat16).keys_values is None
    assert prepared.to(dtype=torch.float32).keys_values is not None


def test_keys_and_values_that_do_not_fit_are_refused_with_what_was_found() -> None:
    unet, (other, _) = sdxl_small(), small_pair()
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    prepared = unet.with_keys_values(conditioning)
    pairs = prepared.keys_values
    assert pairs is not None
    assert len(pairs) == sum(isinstance(module, Attention) for module in unet.modules()) / 2 == 12
    foreign = other.with_keys_values(Conditioning(conditioning.text)).keys_values
    longer = unet.with_keys_values(
        Conditioning(torch.cat([conditioning.text] * 2, dim=1), conditioning.pooled, conditioning.sizes)
    )
    wrong = [foreign, pairs[:-1], longer.keys_values, tuple((k[:1], v[:1]) for k, v in pairs)]
    for given in wrong:
        with pytest.raises(ValueError, match=r"keys_values: found \d+ pairs, .* expects 12, \[\(2, 7, 32\)\]"):
            unet(x, t, Conditioning(conditioning.text, conditioning.pooled, conditioning.sizes, given))
    with pytest.raises(ValueError, match="keys_values is given in 1 of 2 batches"):
        Conditioning.cat([prepared, conditioning])
    with pytest.raises(ValueError, match="keys_values: found batches of different numbers or shapes"):
        Conditioning.cat([prepared, Conditioning(conditioning.text, conditioning.pooled, conditioning.sizes, foreign)])


def test_a_compiled_network_takes_keys_and_values_in_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    unet = sdxl_small().requires_grad_(False)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    for seed in (0, 2):
        x, t, conditioning = random_inputs(unet.config, seed, (8, 8))
        expected = unet(x, t, conditioning)
        assert deviation(compiled(x, t, unet.with_keys_values(conditioning)), expected) < 1e-5
    assert counter.frame_count == 1
