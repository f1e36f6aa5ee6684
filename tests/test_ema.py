"""The average of the weights against closed forms, figures of the literature and diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ldm.training.ema import EMA, EMAConfig


def constant(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(2, 3, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_thousand_small_steps_are_not_lost_whatever_the_weights_dtype(dtype):
    # A bf16 average stands still at 0.898; float32 gives 1 - 0.1 * 0.9999^20000 = 0.98647.
    layer = constant(0.9, dtype)
    ema = EMA(layer, EMAConfig(decay=0.9999, warmup=False))
    first = float(layer.weight.detach()[0, 0])
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1.0)
    for _ in range(20_000):
        ema.update()
    expected = 1 - (1 - first) * 0.9999**20_000
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert float(ema.state_dict()["weight"][0, 0]) == pytest.approx(expected, abs=5e-4)


def test_average_of_a_random_walk_is_that_of_diffusers():
    # diffusers' first call copies the weights whatever its decay: spent before the walk begins.
    generator = torch.Generator().manual_seed(11)
    layer = nn.Linear(4, 4)
    ema = EMA(layer, EMAConfig(decay=0.9, warmup=False))
    theirs = EMAModel(layer.parameters(), decay=0.9, min_decay=0.9)
    theirs.step(layer.parameters())
    for _ in range(50):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        ema.update()
        theirs.step(layer.parameters())
    for ours, other in zip(ema.state_dict().values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_warm_up_decay_and_configured_decay_is_never_overwritten():
    ema = EMA(constant(0.0), EMAConfig(decay=0.995, warmup=True))
    assert [ema.decay(k) for k in (0, 1, 10)] == [1 / 10, 2 / 11, 11 / 20]
    for _ in range(5):
        ema.update()
    assert ema.config.decay == 0.995
    assert ema.decay(10**6) == 0.995


def test_warm_up_goes_on_from_update_to_update():
    layer = constant(0.0)
    ema = EMA(layer, EMAConfig(decay=0.995, warmup=True))
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1.0)
    forgotten = 1.0
    for k in range(6):
        ema.update()
        forgotten *= (1 + k) / (10 + k)
        assert ema.updates == k + 1
        assert float(ema.state_dict()["bias"][0]) == pytest.approx(1 - forgotten, rel=1e-6)


def test_average_differs_from_moving_weights_and_tracks_them():
    layer = constant(0.0)
    ema = EMA(layer, EMAConfig(decay=0.9, warmup=False))
    for k in range(1, 101):
        for parameter in layer.parameters():
            nn.init.constant_(parameter, float(k))
        ema.update()
    # A ramp is followed at the distance d / (1 - d) = 9, once the start is forgotten.
    assert float(ema.state_dict()["bias"][0]) == pytest.approx(100 - 9, abs=1e-2)


def test_weights_come_back_bit_by_bit_also_after_an_error():
    layer = nn.Linear(8, 8)
    ema = EMA(layer, EMAConfig(decay=0.5, warmup=False))
    with torch.no_grad():
        layer.weight.mul_(3.0)
    ema.update()
    weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}

    def fail_while_applied():
        with ema.applied():
            assert torch.equal(layer.weight, average["weight"])
            assert not torch.equal(layer.weight, weights["weight"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_applied()
    assert all(torch.equal(layer.state_dict()[name], weights[name]) for name in weights)
    assert all(torch.equal(ema.state_dict()[name], average[name]) for name in average)


def test_optimizer_still_moves_the_weights_after_the_average_was_applied():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    ema = EMA(layer, EMAConfig(decay=0.9, warmup=False))
    with ema.applied():
        pass
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(ema.state_dict()["weight"], before)


def test_names_are_those_of_the_plain_module_when_it_is_compiled():
    layer = nn.Linear(2, 2)
    layer.compile()
    assert list(EMA(layer, EMAConfig()).state_dict()) == ["weight", "bias"]


def test_state_of_another_network_is_refused_by_name():
    ema = EMA(nn.Linear(2, 2), EMAConfig())
    with pytest.raises(KeyError, match="bias"):
        ema.load_state_dict({"weight": torch.zeros(2, 2)}, 1)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), expected \(2, 2\)"):
        ema.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, 1)
