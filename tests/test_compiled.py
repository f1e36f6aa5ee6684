"""Compilation by repeated block keeps names and values and compiles nothing anew; what is miscompiled never trains."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from unet_pairs import PARITY_LIMIT, SMALL, deviation, random_inputs, small_pair

from ldm.models.attention import BACKENDS, attention
from ldm.models.blocks import ResidualBlock
from ldm.models.compiled import compile_blocks, compile_frozen, eager, is_compiled, repeated_blocks
from ldm.models.parity_gate import ParityError, Trial, check_compiled
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training import wrapping
from ldm.training.distributed import BatchSplit
from ldm.training.fp8 import use_fp8
from ldm.training.launched import DistributedConfig, EngineError
from ldm.training.optimizer import OptimizerConfig
from ldm.training.recomputation import recompute
from ldm.training.wrapping import WrappingConfig, wrap_network

CPU = torch.device("cpu")
TRIAL = Trial(micro_batch=2, side=8, text_length=5)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fresh() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(UNetConfig(**SMALL)).to(memory_format=torch.channels_last)


def gradients(unet: UNet, seed: int = 0) -> list[torch.Tensor]:
    output = unet(*random_inputs(unet.config, seed, (8, 8)))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(unet.parameters()))]


@pytest.mark.parametrize("policy", ["none", "all"])
def test_blocks_compile_in_place_once_and_give_the_networks_outputs_and_gradients(policy: Any) -> None:
    unet, _ = small_pair()
    names, expected = list(unet.state_dict()), gradients(unet)
    recompute(unet, policy)
    assert compile_blocks(unet, "aot_eager") == len(repeated_blocks(unet)) == 12
    assert is_compiled(unet)
    assert list(unet.state_dict()) == names
    for found, reference in zip(gradients(unet), expected, strict=True):
        assert deviation(found, reference) < PARITY_LIMIT
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (2, 4, 6):
            gradients(unet, seed)
    with eager(unet):
        assert not is_compiled(unet)
    assert is_compiled(unet)


class Doubling(torch.nn.Module):
    """A convolution that doubles 16 channels; torch compiles no module of its own as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(16, 32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)


def test_frozen_weights_are_constants_of_the_program_and_of_no_other_networks() -> None:
    """A kernel that is written over counts no more; other weights get a program of their own; gradients see all."""
    networks = [Doubling().eval() for _ in range(2)]
    x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [network(x) for network in networks]
        for network, own in zip(networks, expected, strict=True):
            compile_frozen(network)
            assert deviation(network(x), own) < PARITY_LIMIT
            network.convolution.weight.mul_(2)
            assert deviation(network(x), own) < PARITY_LIMIT
    found = networks[0](x)
    with eager(networks[0]):
        assert deviation(found, networks[0](x)) < PARITY_LIMIT
    assert deviation(found, expected[0]) > 0.5
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in networks[0].parameters())


def test_no_shape_is_compiled_as_a_variable() -> None:
    """Blocks of different widths share their code: a shape that varies would make their channels vary."""
    variable: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        variable.extend(size for given in inputs for size in getattr(given, "shape", [given]) if type(size) is not int)
        return graph.forward

    unet, _ = small_pair()
    compile_blocks(unet, backend)
    for side in (8, 12):
        unet(*random_inputs(unet.config, 0, (side, side))).square().sum().backward()
    assert variable == []


def test_as_many_shapes_as_a_run_of_buckets_has_are_compiled_with_and_without_gradients() -> None:
    """SDXL's config has 11 buckets, and its validation batches of other sizes: torch's own limit is 8 programs."""
    unet, _ = small_pair(layers_per_block=1, block_out_channels=(32, 64))
    compile_blocks(unet, "eager")
    shapes = [(2 * (4 + i), 2 * (15 - i)) for i in range(11)]
    for shape in shapes:
        unet(*random_inputs(unet.config, 0, shape)).square().sum().backward()
    for shape in shapes:
        with torch.no_grad():
            unet(*random_inputs(unet.config, 0, shape))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xformers"])
def test_attention_of_torchs_kernels_is_one_graph(backend: str) -> None:
    q = torch.randn(2, 2, 32, 8)
    whole = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(q, q, q, backend), attention(q, q, q, backend))


def test_the_trial_leaves_network_and_gradients_as_they_were_and_compiles_what_the_run_needs() -> None:
    unet = fresh()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state = torch.get_rng_state()
    compile_blocks(unet, "aot_eager")
    assert check_compiled(unet, TRIAL, CPU, torch.float32) < 1e-4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):
        unet(*TRIAL.inputs(unet.config, CPU)).sum().backward()


def miscompiling(change: Callable[[torch.fx.Node], bool]) -> Callable[..., Any]:
    """A backend that gets one operation of each graph wrong by a few percent, forward alone."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if change(node):
                with graph.graph.inserting_after(node):
                    wrong = graph.graph.call_function(torch.mul, (node, 1.5))
                node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
                break
        graph.recompile()
        return graph.forward

    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_that_is_compiled_wrongly_is_caught_before_training(dtype: torch.dtype) -> None:
    """In a network whose last layers are zero, so that nothing of it would show in the output."""
    unet = fresh()
    assert not any(p.any() for m in unet.modules() if isinstance(m, ResidualBlock) for p in m.conv2.parameters())
    compile_blocks(unet, miscompiling(lambda node: "group_norm" in str(node.target)))
    with pytest.raises(
        ParityError, match=r"^wrapping.compile: the .* is [0-9.]+ relative off .* set wrapping.compile to"
    ):
        check_compiled(unet, TRIAL, CPU, dtype)
    assert not unet.conv_out.weight.any()


def test_a_backward_pass_that_is_compiled_wrongly_is_caught_too() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 0.5 * gradient

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def call(*given: Any) -> Any:
            out = graph.forward(*given)
            return tuple(Wrong.apply(part) for part in out)

        return call

    unet = fresh()
    compile_blocks(unet, backend)
    with pytest.raises(ParityError, match=r"the gradient of \w+.* is .* relative off"):
        check_compiled(unet, TRIAL, CPU, torch.float32)


def test_numbers_that_are_not_finite_are_caught() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: tuple(part * float("nan") for part in graph.forward(*given))

    unet = fresh()
    compile_blocks(unet, backend)
    with pytest.raises(ParityError, match="the output of the compiled network is nan"):
        check_compiled(unet, TRIAL, CPU, torch.float32)


def test_compiled_blocks_train_under_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # no other host's name is looked up
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        unet, _ = small_pair()
        expected = gradients(unet)[1:]
        compile_blocks(unet, "aot_eager")
        wrapped = torch.nn.parallel.DistributedDataParallel(unet)
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(*random_inputs(unet.config, 0, (8, 8))).square().sum().backward()
        for parameter, reference in zip(unet.parameters(), expected, strict=True):
            assert deviation(parameter.grad, reference) < PARITY_LIMIT
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("trial", [TRIAL, None])
def test_wrapping_tries_what_it_compiles_before_the_engine_goes_around(trial: Any, monkeypatch: Any) -> None:
    wrong = miscompiling(lambda node: "group_norm" in str(node.target))
    monkeypatch.setattr(wrapping, "compile_blocks", lambda unet: compile_blocks(unet, wrong))

    def wrap() -> Any:
        return wrap_network(
            fresh(), Accelerator(cpu=True, mixed_precision="no"), WrappingConfig(mixed_precision="no", compile=True),
            "single", DistributedConfig(), OptimizerConfig(), BatchSplit(4, 1, 1, 4), trial,
        )  # fmt: skip

    if trial is None:
        wrap()
    else:
        with pytest.raises(ParityError):
            wrap()


def test_torchs_own_compiler_gives_the_blocks_values_and_gradients() -> None:
    """One block of each kind, really compiled."""
    unet, _ = small_pair()
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    blocks = repeated_blocks(unet)
    kept = [blocks[0], next(block for block in blocks if not isinstance(block, ResidualBlock))]
    expected = gradients(unet)
    for block in kept:
        block.compile(dynamic=False, fullgraph=True)
    for found, reference in zip(gradients(unet), expected, strict=True):
        assert deviation(found, reference) < PARITY_LIMIT
    with torch._dynamo.config.patch(error_on_recompile=True):
        unet(x, t, conditioning).sum().backward()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_float8_rounds_matrix_products_and_leaves_names_and_parameters() -> None:
    unet, plain = (small_pair(cross_attention_dim=32, norm_num_groups=8)[0] for _ in range(2))
    assert use_fp8(unet, CPU, emulated=True) == 40  # ten linear layers in each of four transformer blocks
    assert {name: (p.dtype, p.shape) for name, p in unet.named_parameters()} == {
        name: (p.dtype, p.shape) for name, p in plain.named_parameters()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found, reference = (network(*random_inputs(plain.config, 0, (8, 8))).detach() for network in (unet, plain))
    assert 1e-4 < float((found - reference).float().norm() / reference.float().norm()) < 0.1
    odd = small_pair(cross_attention_dim=12)[0]
    assert use_fp8(odd, CPU, emulated=True) == 32  # keys and values of 12 features are no multiples of 16


def test_float8_without_its_library_or_device_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(EngineError, match=r"torchao is not installed: pip install 'ldm\[fp8\]'"):
        use_fp8(fresh(), CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(EngineError, match=r"found no GPU, expected an NVIDIA GPU of capability 8.9"):
        use_fp8(fresh(), CPU)
    for engine in ("fsdp2", "zero1"):
        with pytest.raises(EngineError, match=rf"wrapping.fp8 is true: with {engine} it has not been tried"):
            wrapping.check_engine(engine, "none", WrappingConfig(fp8=True))
