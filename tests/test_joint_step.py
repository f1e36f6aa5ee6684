"""AdamW and the average in one walk: bit by bit what both give one after the other, under torch's clipping."""

import random

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from training_runs import assert_same_state, train
from trials import SEED, number, report

from ldm.training.ema import EMA, EMAConfig
from ldm.training.engine import PlainEngine
from ldm.training.joint_step import PIECE, JointStep
from ldm.training.optimizer import OptimizerConfig, load_optimizer_tensors, make_optimizer, optimizer_tensors

MAX_NORM = 1.0
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Weights(nn.Module):
    """Parameters of given shapes, kernels in channels_last."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.each = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.to(memory_format=torch.channels_last)


class Separate:
    """torch's optimizer after the average, gradients divided before both."""

    def __init__(self, module: nn.Module, fused: bool = True) -> None:
        self.module = module
        self.optimizer = make_optimizer(module.named_parameters(), OptimizerConfig(), scaled=not fused)
        self.ema = EMA(module, EMAConfig())

    def step(self, gradients: list[Tensor]) -> None:
        give(self.module, gradients)
        given = [p.grad for p in self.module.parameters()]
        torch._foreach_div_(given, ((torch.nn.utils.get_total_norm(given) + 1e-6) / MAX_NORM).clamp(min=1.0))
        self.ema.update()
        self.optimizer.step()


class Joint:
    """The engine's step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.engine = PlainEngine(
            Accelerator(cpu=True), module, module, make_optimizer(module.named_parameters(), OptimizerConfig())
        )
        self.optimizer = self.engine.optimizer.optimizer
        self.ema = EMA(module, EMAConfig(), self.engine.parts)

    def step(self, gradients: list[Tensor]) -> None:
        give(self.module, gradients)
        self.engine.clip(MAX_NORM)
        self.engine.average_before_step(self.ema)
        self.engine.step(1e-4)


def give(module: nn.Module, gradients: list[Tensor]) -> None:
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        p.grad = torch.empty_like(p).copy_(gradient)


def pair(shapes: list[tuple[int, ...]], seed: int, device: str = "cpu") -> tuple[Joint, Separate]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ours, theirs = Weights(shapes).to(device), Weights(shapes).to(device)
    theirs.load_state_dict(ours.state_dict())
    return Joint(ours), Separate(theirs)


def drawn(shapes: list[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def assert_equal(ours: Joint, theirs: Separate) -> None:
    pairs = [
        (ours.module.state_dict(), theirs.module.state_dict()),
        (ours.ema.state_dict(), theirs.ema.state_dict()),
        (optimizer_tensors(ours.optimizer), optimizer_tensors(theirs.optimizer)),
    ]
    for a, b in pairs:
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert ours.ema.updates == theirs.ema.updates


SHAPES = [(7,), (3 * PIECE + 5,), (40, 30, 3, 3), (1,), (300, 290), (64, 130, 1, 1), (260, 260, 3, 3)]


def test_weights_moments_counts_and_average_are_those_of_both_one_after_the_other() -> None:
    trials = number("LDM_JOINT_STEPS", 6)
    for trial in range(trials):
        rng = random.Random(1000 * SEED + trial)
        shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES))) + [(rng.randint(1, 400), rng.randint(1, 400))]
        ours, theirs = pair(shapes, trial)
        for step in range(4):
            gradients = drawn(shapes, 10 * trial + step, scale=rng.choice([1.0, 1e-7]))
            ours.step(gradients)
            theirs.step(gradients)
        assert_equal(ours, theirs)
    report("joint steps", networks=trials)


def test_every_step_but_the_first_is_a_joint_one_and_clears_the_gradients(monkeypatch) -> None:
    taken = []
    take = JointStep.take
    monkeypatch.setattr(JointStep, "take", lambda self, *given: (taken.append(1), take(self, *given)))
    ours, _ = pair(SHAPES, 1)
    for step in range(3):
        ours.step(drawn(SHAPES, step))
        assert len(taken) == step
        assert all(p.grad is None for p in ours.module.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_steps_follow_torch_clipping_with_the_unfused_optimizer(device) -> None:
    ours, theirs = pair(SHAPES, 2, device)
    module = theirs.module
    optimizer, ema = make_optimizer(module.named_parameters(), OptimizerConfig(), scaled=True), EMA(module, EMAConfig())
    for step, scale in enumerate((1.0, 1e-5, 3.0, 1e-3)):
        gradients = drawn(SHAPES, step, scale)
        ours.step(gradients)
        assert ours.optimizer.defaults["fused"]
        give(module, gradients)
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        ema.update()
        optimizer.step()
    for a, b in zip(ours.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(ours.ema.averages, ema.averages, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_bad_step_still_averages_and_leaves_weights_moments_and_counts() -> None:
    ours, theirs = pair(SHAPES, 3)
    for step in range(2):
        for way in (ours, theirs):
            way.step(drawn(SHAPES, step))
    bad = drawn(SHAPES, 2)
    bad[3][0] = torch.nan
    give(ours.module, bad)
    ours.engine.clip(MAX_NORM)
    ours.engine.average_before_step(ours.ema)
    skipped, norm = ours.engine.step(1e-4)
    assert skipped == 1
    assert norm.isnan()
    theirs.ema.update()
    assert_equal(ours, theirs)


def test_averages_shown_and_states_loaded_in_between_change_nothing() -> None:
    ours, theirs = pair(SHAPES, 4)
    for step in range(7):
        gradients = drawn(SHAPES, step)
        ours.step(gradients)
        theirs.step(gradients)
        if step == 1:
            with ours.ema.applied():
                pass
        if step == 2:  # as a resumed run does: other tensors, the same numbers
            load_optimizer_tensors(ours.optimizer, {k: v.clone() for k, v in optimizer_tensors(ours.optimizer).items()})
        if step == 3:
            state = {name: tensor.clone() for name, tensor in ours.ema.state_dict().items()}
            ours.ema.load_state_dict(state, ours.ema.updates)
            for p in ours.module.parameters():
                p.data = p.data.clone(memory_format=torch.preserve_format)
        if step == 4:
            another = EMA(ours.module, EMAConfig(), ours.engine.parts)
            another.load_state_dict(ours.ema.state_dict(), ours.ema.updates)
            ours.ema = another
    assert_equal(ours, theirs)


def test_a_gradient_in_another_memory_format_is_that_of_the_same_elements() -> None:
    ours, theirs = pair(SHAPES, 5)
    for step in range(3):
        gradients = drawn(SHAPES, step)
        theirs.step(gradients)
        for p, gradient in zip(ours.module.parameters(), gradients, strict=True):
            p.grad = gradient.clone()  # kernels in NCHW
        ours.engine.clip(1e9)
        scale = (torch.nn.utils.get_total_norm([p.grad for p in ours.module.parameters()]) + 1e-6).clamp(min=1.0)
        ours.engine._grad_scale = scale
        if step == 0:  # torch's own first step takes gradients in their parameter's format only
            give(ours.module, gradients)
        ours.engine.average_before_step(ours.ema)
        ours.engine.step(1e-4)
    for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("missing", ["gradient", "average"])
def test_what_is_not_there_for_all_parameters_is_done_as_before(missing) -> None:
    ours, theirs = pair(SHAPES, 6)
    gradients = drawn(SHAPES, 0)
    ours.step(gradients)
    theirs.step(gradients)
    for way in (ours, theirs):
        give(way.module, drawn(SHAPES, 1, 1e-6))
        if missing == "gradient":
            way.module.each[0].grad = None
    if missing == "average":
        other = EMA(nn.Linear(2, 2), EMAConfig())
        assert not ours.engine._joint.serves(other)
        return
    ours.engine.clip(0)
    ours.engine.average_before_step(ours.ema)
    ours.engine.step(1e-4)
    theirs.ema.update()
    theirs.optimizer.step()
    assert_equal(ours, theirs)


def test_a_run_that_logs_each_step_is_byte_by_byte_one_that_logs_none(encoded_shards, tmp_path, monkeypatch) -> None:
    # A logged step ends with its average; others leave it to the step that follows.
    taken, take = [], JointStep.take
    monkeypatch.setattr(JointStep, "take", lambda self, *given: (taken.append(1), take(self, *given)))
    options = ("--training.steps=8", "--training.checkpoint_every=5")
    train(tmp_path / "each", encoded_shards, *options, "--metrics.log_every=1")
    assert not taken
    train(tmp_path / "none", encoded_shards, *options, "--metrics.log_every=100")
    assert len(taken) == 5  # not the first two, of which the first is logged, and not the one after a checkpoint
    assert_same_state(tmp_path / "each/checkpoints/latest", tmp_path / "none/checkpoints/latest")
