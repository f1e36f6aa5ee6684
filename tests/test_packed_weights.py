"""Kernels laid out once for sampling on a CPU: the same numbers, nothing left behind, nothing where it may not be."""

import pytest
import torch
from torch import nn
from unet_pairs import PARITY_LIMIT, deviation, random_inputs, small_pair

from ldm.models.compiled import compile_blocks
from ldm.models.convolution import Conv2d
from ldm.sampling.generation import generate
from ldm.sampling.packed_weights import packed_convolutions

NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def count_packed(network: nn.Module) -> int:
    return sum("forward" in vars(module) for module in network.modules())


@NEEDS_ONEDNN
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_packed_convolution_is_the_convolution(dtype: torch.dtype, kernel: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(kernel)
    module = Conv2d(24, 40, kernel, padding=kernel // 2, stride=stride).to(memory_format=torch.channels_last)
    for side in (9, 4):
        x = torch.randn(3, 24, side, side, generator=generator)
        exact = nn.functional.conv2d(
            x.double(), module.weight.double(), module.bias.double(), stride=stride, padding=kernel // 2
        )
        with packed_convolutions(module), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            found = [module(x), module(x)]
        assert {out.dtype for out in found} == {dtype}
        limit = 1e-6 if dtype == torch.float32 else 0.01
        assert all(deviation(out.double(), exact) < limit for out in found)


@NEEDS_ONEDNN
def test_the_network_is_packed_within_the_block_and_as_it_was_after_it_even_after_an_error() -> None:
    unet, _ = small_pair()
    unet.to(memory_format=torch.channels_last)
    given = random_inputs(unet.config, 0, (8, 8))
    names = list(unet.state_dict())
    with torch.no_grad():
        expected = unet(*given)
        with packed_convolutions(unet):
            assert count_packed(unet) == sum(isinstance(module, nn.Conv2d) for module in unet.modules()) > 10
            assert deviation(unet(*given), expected) < PARITY_LIMIT
            assert list(unet.state_dict()) == names
    with pytest.raises(KeyError), packed_convolutions(unet):
        raise KeyError
    assert count_packed(unet) == 0
    # Weights that changed in between are seen.
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
        with packed_convolutions(unet):
            found = unet(*given)
        assert deviation(found, unet(*given)) < PARITY_LIMIT < deviation(found, expected)


@NEEDS_ONEDNN
def test_gradients_come_from_the_convolutions_themselves() -> None:
    unet, _ = small_pair()
    given = random_inputs(unet.config, 0, (8, 8))
    expected = torch.autograd.grad(unet(*given).sum(), list(unet.parameters()))
    with packed_convolutions(unet):
        found = torch.autograd.grad(unet(*given).sum(), list(unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_networks_and_forwards_of_others_are_left_alone() -> None:
    unet, _ = small_pair()
    called = []
    plain = unet.conv_in.forward
    unet.conv_in.forward = lambda x: (called.append(1), plain(x))[1]  # type: ignore[method-assign]
    with torch.no_grad(), packed_convolutions(unet):
        unet(*random_inputs(unet.config, 0, (8, 8)))
    assert called == [1]
    assert "forward" in vars(unet.conv_in)
    compiled, _ = small_pair()
    compile_blocks(compiled, "eager")
    with packed_convolutions(compiled):
        assert count_packed(compiled) == 0


@NEEDS_ONEDNN
def test_sampling_packs_network_and_decoder_and_leaves_nothing(pipeline, monkeypatch) -> None:
    seen = []
    for module in (pipeline.unet.conv_in, pipeline.autoencoder.decoder.conv_in):
        module.register_forward_pre_hook(lambda module, _: seen.append("forward" in vars(module)))
    generate(pipeline, ["red heart"], seed=0, sampler="dpmpp_2m", steps=3, guidance=3.0)
    assert seen == [True] * 4
    assert count_packed(pipeline.unet) + count_packed(pipeline.autoencoder) == 0
    for module in (pipeline.unet.conv_in, pipeline.autoencoder.decoder.conv_in):
        module._forward_pre_hooks.clear()
