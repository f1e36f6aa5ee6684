"""Activation checkpointing by policy: gradients stay, memory falls in the order that the policies promise."""

import pytest
import torch
from conftest import ROOT
from test_plan_run import allocated_peak
from unet_pairs import random_inputs, small_pair

from ldm.config import parse_config, to_yaml
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.recomputation import POLICIES, Policy, recompute
from ldm.training.simulation import network_cost
from ldm.training.wrapping import WrappingConfig

CONFIG = UNetConfig(
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    block_out_channels=[32, 64],
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=96,
)


def output_and_gradients(unet: UNet) -> list[torch.Tensor]:
    x, t, conditioning = random_inputs(unet.config, 1, (8, 8))
    output = unet(x, t, conditioning)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(unet.parameters()))]


def test_outputs_and_gradients_of_every_policy_are_those_without() -> None:
    unet, _ = small_pair(layers_per_block=2)
    expected = output_and_gradients(unet)
    for policy in POLICIES:
        recompute(unet, policy)
        assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(unet), expected, strict=True)), policy


def test_memory_falls_and_work_grows_as_the_policies_say() -> None:
    costs = {policy: network_cost(CONFIG, 32, 12, precision="no", checkpointing=policy) for policy in POLICIES}
    none, transformers, outer, whole = (costs[policy] for policy in ("none", "transformers", "outer", "all"))
    # The outermost level holds most of the memory, at four times the pixels of the next.
    assert whole.sample_bytes < outer.sample_bytes < 0.7 * none.sample_bytes
    assert whole.sample_bytes < transformers.sample_bytes < none.sample_bytes
    assert none.recomputed_flop == 0 < outer.recomputed_flop < whole.recomputed_flop
    assert 0 < transformers.recomputed_flop < whole.recomputed_flop
    peaks = {}
    for policy in POLICIES:
        unet = UNet(CONFIG)
        recompute(unet, policy)
        peaks[policy] = allocated_peak(unet, 2, 32, 12)
    assert peaks["all"] < peaks["outer"] < peaks["none"]
    assert peaks["all"] < peaks["transformers"] < peaks["none"]


@pytest.mark.parametrize(("policy", "blocks"), [("none", 0), ("transformers", 4), ("outer", 3), ("all", 12)])
def test_each_policy_recomputes_its_blocks_and_can_be_taken_back(
    policy: Policy, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.models import blocks as module

    unet, _ = small_pair()
    counted = []
    real = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: (counted.append(a[0]), real(*a, **k))[1])
    recompute(unet, "all")
    recompute(unet, policy)
    output_and_gradients(unet)
    assert len(counted) == blocks


def test_configs_of_earlier_checkpoints_say_it_by_true_and_false() -> None:
    """Each checkpoint holds its config: it has to be read as long as anyone resumes or replays it."""
    assert WrappingConfig(gradient_checkpointing=True) == WrappingConfig(gradient_checkpointing="all")
    for old, new in (("true", "all"), ("false", "none"), ("outer", "outer")):
        words = [f"--config={ROOT / 'configs/debug.yaml'}", f"--wrapping.gradient_checkpointing={old}"]
        config = parse_config(words, prog="", description="")
        assert config.wrapping.gradient_checkpointing == new
        assert f"gradient_checkpointing: {new}" in to_yaml(config)


def test_an_unknown_policy_is_refused_by_name() -> None:
    unet, _ = small_pair()
    with pytest.raises(ValueError, match=r"gradient_checkpointing: found 'some', expected one of none, transformers"):
        recompute(unet, "some")  # type: ignore[arg-type]
