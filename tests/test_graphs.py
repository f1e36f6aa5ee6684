"""Evaluations that are recorded and replayed are the network's, whatever changes between them; on a GPU, too."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from unet_pairs import PARITY_LIMIT, deviation, random_inputs, small_pair

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.sampling.generation import encode_prompts, initial_noise, sample_latents
from ldm.sampling.graphs import SHAPES, CudaRecorder, Replayed, lowered, replayed


class Tape:
    """Stands in for a graph: what is repeated reads the buffers of the recording, and writes where it wrote first."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        result = torch.full_like(work(), float("nan"))  # recording a graph computes nothing

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return replay, result


def small_unet() -> UNet:
    return small_pair()[0].eval()


def tape_of(network: Replayed) -> Tape:
    assert isinstance(network.recorder, Tape)
    return network.recorder


@torch.no_grad()
def test_replays_follow_latents_timesteps_and_prompts() -> None:
    unet = small_unet()
    network = replayed(unet, Tape)
    kept = []
    for seed in (0, 2, 4, 6):
        x, t, conditioning = random_inputs(unet.config, seed, (8, 8))
        for told in (conditioning, unet.with_keys_values(conditioning)):
            for at in (t, t + 100, t):
                kept.append((network(x, at, told), unet(x, at, told)))
    # Later replays write into the same buffer: what was returned before must not change.
    assert all(torch.equal(found, expected) for found, expected in kept)
    assert (tape_of(network).recorded, tape_of(network).replayed) == (2, len(kept))


@torch.no_grad()
def test_every_shape_and_precision_has_its_recording_and_old_ones_go() -> None:
    unet = small_unet()
    network = replayed(unet, Tape)
    for side in (4, 6, 8, 10, 12, 4):
        given = random_inputs(unet.config, 0, (side, side))
        assert torch.equal(network(*given), unet(*given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(*given), unet(*given))
    assert len(network.recordings) == SHAPES
    assert tape_of(network).recorded == 12  # the first shape's had gone when it came again


@torch.no_grad()
def test_lowered_weights_of_a_recording_outlive_autocast_and_are_its_own() -> None:
    unet = small_unet()
    given = random_inputs(unet.config, 0, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected = replayed(unet, Tape)(*given)
    with torch.autocast("cpu", torch.bfloat16):
        network = replayed(unet, Tape)
        assert torch.equal(network(*given), expected)
        assert torch.equal(unet(*given), expected)
    assert tape_of(network).recorded == 1
    names = lowered(unet, torch.bfloat16)
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}
    norms = {name for name in dict(unet.named_parameters()) if "norm" in name}
    assert norms == dict(unet.named_parameters()).keys() - names.keys()


@torch.no_grad()
@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_change_are_recorded_anew(inside: bool) -> None:
    unet = small_unet()
    given = random_inputs(unet.config, 0, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        before = replayed(unet, Tape)(*given)
        if inside:
            unet.conv_in.weight.mul_(2)
        else:
            unet.conv_in.weight.data = 2 * unet.conv_in.weight.data
    with torch.autocast("cpu", torch.bfloat16):
        found = replayed(unet, Tape)(*given)
        assert torch.equal(found, unet(*given))
    assert not torch.equal(found, before)


def test_with_gradients_the_network_itself_is_evaluated() -> None:
    unet = small_unet()
    network = replayed(unet, Tape)
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    x.requires_grad_()
    (found,) = torch.autograd.grad(network(x, t, conditioning).sum(), x)
    (expected,) = torch.autograd.grad(unet(x, t, conditioning).sum(), x)
    assert torch.equal(found, expected)
    assert tape_of(network).recorded == 0


def test_recordings_go_with_their_network() -> None:
    unet = small_unet()
    gone = weakref.ref(unet)
    with torch.no_grad():
        network = replayed(unet, Tape)
        network(*random_inputs(unet.config, 0, (8, 8)))
    network.recordings.clear()  # the stand-in's replay computes with the network, which a graph does not
    del unet
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="is gone"):
        network.renew()


def test_sampling_replays_each_step(pipeline, monkeypatch) -> None:
    from ldm.sampling import ready_network

    conditioning, unconditional = encode_prompts(pipeline, ["red heart", "a dog"])
    noise = initial_noise(1, range(2), pipeline.latent_shape)
    settings = {"sampler": "dpmpp_2m", "steps": 5, "guidance": 3.0}
    expected = sample_latents(pipeline, conditioning, unconditional, noise, **settings)
    networks = []
    monkeypatch.setattr(ready_network, "replayed", lambda unet: networks.append(replayed(unet, Tape)) or networks[-1])
    monkeypatch.setattr(pipeline, "replays", True)
    found = sample_latents(pipeline, conditioning, unconditional, noise, **settings)
    assert torch.equal(found, expected)
    assert (tape_of(networks[0]).recorded, tape_of(networks[0]).replayed) == (1, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_networks_values(dtype: torch.dtype) -> None:
    unet = small_unet().cuda().to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            network = replayed(unet, CudaRecorder)
            for side in (8, 16, 8):
                x, t, conditioning = random_inputs(unet.config, side, (side, side))
                given: tuple[Tensor, Tensor, Conditioning] = x.cuda(), t.cuda(), conditioning.to("cuda")
                limit = PARITY_LIMIT if dtype == torch.float32 else 0.02
                assert deviation(network(*given), unet(*given)) < limit
