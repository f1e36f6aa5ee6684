"""Learning rates against transformers' schedulers and closed forms; optimizer state against an undisturbed run."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from ldm.training.optimizer import (
    OptimizerConfig,
    clipping_scale,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.GroupNorm(1, 7), nn.Conv2d(7, 2, 2))
        return network.to(memory_format=torch.channels_last)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range, config: OptimizerConfig) -> None:
    for step in steps:
        x = torch.linspace(-1, 1, 3 * 3 * 25).reshape(3, 3, 5, 5) * (step + 1)
        set_learning_rate(optimizer, learning_rate(step, 20, config))
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedule_is_that_of_transformers_one_step_on(schedule, reference):
    # Theirs gives step 0 a learning rate of 0, a step that trains nothing; ours starts at their step 1.
    config = OptimizerConfig(lr=3e-4, schedule=schedule, warmup_steps=7)
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = reference(theirs, num_warmup_steps=7, num_training_steps=50)
    for step in range(50):
        theirs.step()
        scheduler.step()
        assert learning_rate(step, 50, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20)


def test_learning_rate_at_first_step_warmup_end_and_last_step():
    config = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=100, final_fraction=0.1)
    assert learning_rate(0, 1000, config) == pytest.approx(1e-5)
    assert learning_rate(99, 1000, config) == pytest.approx(1e-3)
    assert learning_rate(999, 1000, config) == pytest.approx(1e-4)
    constant = OptimizerConfig(lr=1e-3, schedule="constant", warmup_steps=100)
    assert learning_rate(100, 1000, constant) == learning_rate(999, 1000, constant) == 1e-3


def test_state_through_safetensors_continues_bit_by_bit(tmp_path):
    config = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=3)
    whole, halves = small_network(), small_network()
    optimizer = make_optimizer(whole.named_parameters(), config)
    train(whole, optimizer, range(20), config)

    first = make_optimizer(halves.named_parameters(), config)
    train(halves, first, range(11), config)
    contiguous = {name: tensor.contiguous() for name, tensor in optimizer_tensors(first).items()}
    save_file(contiguous, tmp_path / "optimizer.safetensors")
    second = make_optimizer(halves.named_parameters(), config)
    load_optimizer_tensors(second, load_file(tmp_path / "optimizer.safetensors"))
    train(halves, second, range(11, 20), config)

    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, halves.state_dict()[name]), name
    ours, theirs = optimizer_tensors(second), optimizer_tensors(optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_that_does_not_fit_is_listed_by_name():
    network = small_network()
    config = OptimizerConfig()
    optimizer = make_optimizer(network.named_parameters(), config)
    train(network, optimizer, range(1), config)
    tensors = optimizer_tensors(optimizer)
    del tensors["0.weight/exp_avg"]
    tensors["1.bias/exp_avg_sq"] = torch.zeros(3)
    tensors["9.weight/step"] = torch.zeros(())
    with pytest.raises(
        ValueError, match=r"0\.weight/exp_avg is missing.*1\.bias/exp_avg_sq has shape \(3,\).*9\.weight/step"
    ):
        load_optimizer_tensors(make_optimizer(network.named_parameters(), config), tensors)


def test_only_matrices_and_kernels_are_decayed():
    network = small_network()
    optimizer = make_optimizer(network.named_parameters(), OptimizerConfig(weight_decay=0.3))
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decay == {
        "0.weight": 0.3, "2.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.bias": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("warmup_steps", -1), ("beta2", 1.0), ("final_fraction", 1.5), ("max_grad_norm", -1.0)],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}: found {value}"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 0.5, 1e6])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
def test_a_clipping_scale_divides_as_torch_clipping_multiplies(max_norm, size):
    gradients = [torch.randn(17, 5, generator=torch.Generator().manual_seed(n)) * size for n in range(3)]
    norm = torch.nn.utils.get_total_norm(gradients)
    parameters = [nn.Parameter(torch.zeros(17, 5)) for _ in gradients]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    scale = clipping_scale(norm, max_norm)
    assert (scale is None) == (max_norm == 0)
    for p, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient if scale is None else gradient / scale, p.grad, rtol=3e-7, atol=0)
