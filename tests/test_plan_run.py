"""Plans against what is known or measured: published operation counts, a real run's tensors, the allocator's peak."""

import contextlib
import functools
import io
import json
from dataclasses import replace

import pytest
import tiny_runs
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

from ldm.config import load_config
from ldm.data.manifest import Manifest
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.train import train_step
from ldm.training.distributed import split_global_batch, start_accelerator
from ldm.training.metrics import Clock
from ldm.training.recomputation import POLICIES, Policy, recompute
from ldm.training.run import build_run
from ldm.training.scaling import GPUS, Cluster, exchange, largest_micro_batch, memory, step_time
from ldm.training.simulation import NetworkCost, forward_flop, network_cost
from tools import plan_run

SD1 = UNetConfig(cross_attention_dim=768)
SD2 = UNetConfig(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
SMALL = UNetConfig(
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    block_out_channels=[64, 128],
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=96,
)
COST = NetworkCost(
    parameters=1_000_000_000,
    largest_units=(50_000_000, 40_000_000),
    outside_units=30_000_000,
    forward_flop=8e11,
    recomputed_flop=0.0,
    fixed_bytes=2e9,
    sample_bytes=1e9,
)


@pytest.mark.parametrize(
    ("config", "side", "gmac"), [(SD1, 32, 90.1), (SD1, 64, 401.6), (SD2, 32, 90.5), (SD2, 64, 402.1)]
)
def test_forward_operations_are_the_published_ones(config: UNetConfig, side: int, gmac: float) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    assert round(forward_flop(unet, side, 77) / 2e9, 1) == gmac


@functools.cache
def small_cost(precision: str, checkpointing: Policy) -> NetworkCost:
    return network_cost(SMALL, 32, 12, precision=precision, checkpointing=checkpointing)


def allocated_peak(unet: UNet, batch: int, side: int, tokens: int) -> int:
    """Most bytes that the allocator had given out during a forward and backward pass, gradients let go of at once."""
    inputs = torch.randn(batch, 4, side, side), torch.rand(batch), Conditioning(torch.randn(batch, tokens, 96))

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in unet.parameters()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        unet(*inputs).float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    events = measured.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", POLICIES)
def test_memory_of_the_passes_is_what_the_allocator_gives_out(checkpointing: Policy) -> None:
    cost = small_cost("no", checkpointing)
    unet = UNet(SMALL)
    recompute(unet, checkpointing)
    for batch in (2, 5):
        estimate = cost.fixed_bytes + batch * cost.sample_bytes
        assert estimate == pytest.approx(allocated_peak(unet, batch, 32, 12), rel=0.06)


def test_checkpointing_trades_memory_for_less_than_another_forward_pass() -> None:
    plain, less = small_cost("no", "none"), small_cost("no", "all")
    assert less.sample_bytes < 0.5 * plain.sample_bytes
    assert plain.recomputed_flop == 0
    assert 0.5 * plain.forward_flop < less.recomputed_flop <= plain.forward_flop
    assert less.training_flop == plain.training_flop == 3 * plain.forward_flop


def test_half_precision_halves_activations_and_adds_copies_of_matrices_and_kernels() -> None:
    full, half = (small_cost(precision, "none") for precision in ("no", "bf16"))
    assert half.sample_bytes == pytest.approx(full.sample_bytes / 2, rel=0.03)
    matrices = sum(p.numel() for p in UNet(SMALL).parameters() if p.dim() > 1)
    assert half.fixed_bytes == pytest.approx(full.fixed_bytes + 2 * matrices, rel=0.05)


def test_weights_gradients_moments_and_average_are_a_real_runs_to_the_byte(tmp_path, monkeypatch) -> None:
    tiny_runs.make(tmp_path / "material")
    monkeypatch.chdir(tmp_path)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    config = load_config(tmp_path / "material/config.yaml")
    accelerator = start_accelerator(config.distributed, "no")
    split = split_global_batch(24, 1, 8)
    run = build_run(config, accelerator, split, print)
    gradients: dict[str, int] = {}

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradients[str(id(parameter))] = parameter.grad.nbytes

    parameters = list(run.pipeline.unet.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(note)
    train_step(run, 0, run.data.training_batches(run.share, 0, 1), Clock())
    cost = replace(COST, parameters=sum(parameter.numel() for parameter in parameters))
    estimate = memory(cost, "single", 1, split.micro_batch, split.accumulation, 0.0)
    moments = [one for name, one in run.engine.optimizer_tensors().items() if not name.endswith("/step")]
    assert estimate.weights == sum(parameter.nbytes for parameter in parameters)
    assert estimate.gradients == sum(gradients.values())
    assert estimate.optimizer == sum(one.nbytes for one in moments)
    averaged = {name: run.ema.state_dict()[name] for name, _ in run.pipeline.unet.named_parameters()}
    assert estimate.average == sum(one.nbytes for one in averaged.values())
    assert estimate.buffers == 0


def test_what_engines_share_out_is_whole_on_one_process_and_a_part_on_several() -> None:
    whole = 4e9
    for engine, shared in (("ddp", ()), ("zero1", ("optimizer",)), ("zero2", ("optimizer", "gradients"))):
        few, many = (memory(COST, engine, count, 4, 1, 0.0) for count in (2, 8))
        for part in ("weights", "average", "gradients", "optimizer"):
            ratio = getattr(few, part) / getattr(many, part)
            assert ratio == (4 if part in shared else pytest.approx(1, rel=0.6 if engine == "zero1" else 0))
    for engine in ("fsdp2", "zero3"):
        many = memory(COST, engine, 8, 4, 1, 0.0)
        assert (many.weights, many.gradients, many.average) == (whole / 8,) * 3
    assert memory(COST, "fsdp2", 8, 4, 1, 0.0).optimizer == 2 * whole / 8
    # Micro-batches before the last one exchange nothing: their gradients are summed whole.
    assert memory(COST, "fsdp2", 8, 4, 2, 0.0).gradients == whole
    assert memory(COST, "ddp", 8, 4, 1, 0.0).total == 5 * whole + 2e9 + 4 * 1e9
    assert memory(COST, "fsdp2", 8, 4, 1, 0.0, "parameters").weights == 0


def test_largest_micro_batch_is_the_last_that_fits_and_divides_the_share() -> None:
    def need(size: int) -> float:
        return memory(COST, "ddp", 4, size, 24 // size, 1e9).total

    assert largest_micro_batch(COST, "ddp", 4, 1e9, need(8), 24) == 8
    assert largest_micro_batch(COST, "ddp", 4, 1e9, need(8) - 1, 24) == 6  # 7 does not divide 24
    assert largest_micro_batch(COST, "ddp", 4, 1e9, need(1) - 1, 24) == 0


@pytest.mark.parametrize(
    ("engine", "accumulation", "rounds"),
    [("single", 3, 0), ("ddp", 3, 2), ("zero1", 3, 2), ("zero2", 3, 4), ("fsdp2", 3, 7), ("zero3", 3, 9)],
)
def test_volume_is_that_of_the_rings_whatever_the_accumulation(engine: str, accumulation: int, rounds: int) -> None:
    moved = exchange(engine, accumulation, False)
    assert moved.sent(4e9, 1) == 0
    assert moved.sent(4e9, 2) == rounds * 4e9 / 2
    assert moved.sent(4e9, 1000) == pytest.approx(rounds * 4e9, rel=2e-3)


def test_time_of_a_step_is_computing_and_what_of_the_slower_ring_is_not_hidden() -> None:
    gpu = replace(GPUS["h100"], bf16_tflops=1000.0, link_gbytes=400.0, network_gbits=1600.0)
    cluster = Cluster(gpu, gpus_per_node=8, utilisation=0.5)
    # 10 samples of 2.4 TFLOP at 500 TFLOP/s, however they are split into micro-batches.
    for accumulation in (1, 2, 5):
        assert step_time(COST, "ddp", cluster, 1, 10, accumulation, "bf16").computing == pytest.approx(0.048)
    # All-reduce of 4 GB: within a node 2 * 7/8 * 4 GB at 400 GB/s, between two nodes 2 * 1/2 * 4 GB at 200 GB/s.
    assert step_time(COST, "ddp", cluster, 8, 10, 1, "bf16").network == pytest.approx(0.0175)
    two = step_time(COST, "ddp", cluster, 16, 10, 1, "bf16")
    assert two.network == pytest.approx(0.02)
    assert two.waiting == 0  # the backward pass takes 0.032 s
    assert step_time(COST, "ddp", cluster, 16, 10, 5, "bf16").waiting == pytest.approx(0.02 - 0.048 * 2 / 3 / 5)
    assert step_time(COST, "zero1", cluster, 16, 10, 1, "bf16").waiting == pytest.approx(0.02)
    again = replace(COST, recomputed_flop=8e11)
    assert step_time(again, "ddp", cluster, 1, 10, 1, "bf16").computing == pytest.approx(0.064)


@pytest.fixture(scope="module")
def planned() -> dict:
    config = ROOT / "configs/debug.yaml"
    words = ["--training.global_batch=64", "--training.steps=1000", "--gpus=16", "--gpu=a100-80", "--json"]
    return run([f"--config={config}", *words])


def run(words: list[str]) -> dict:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert plan_run.main(words) == 0
    return json.loads(said.getvalue())


def test_a_plan_adds_up(planned: dict) -> None:
    assert planned["batch"] == {"global_batch": 64, "processes": 16, "accumulation": 1, "micro_batch": 4}
    mine = next(row for row in planned["engines"] if row["engine"] == planned["engine"] == "ddp")
    assert mine["total"] == pytest.approx(sum(mine["memory"].values()))
    assert planned["steps_a_day"] * mine["step_seconds"] == pytest.approx(86_400)
    assert planned["images_a_second"] * mine["step_seconds"] == pytest.approx(64)
    hours = 1000 * mine["step_seconds"] / 3600
    assert planned["dollars"] == pytest.approx(hours * 16 * GPUS["a100-80"].dollars)
    assert [row["gpus"] for row in planned["scaling"]] == [1, 2, 4, 8, 16, 32, 64]
    efficient = [row["efficiency"] for row in planned["scaling"]]
    assert efficient == sorted(efficient, reverse=True)
    assert planned["scales_to"] == max(row["gpus"] for row in planned["scaling"] if row["efficiency"] >= 0.9)


def test_a_plan_of_one_gpu_scales_to_several_that_have_to_exchange_gradients(planned: dict) -> None:
    words = ["--training.global_batch=64", "--training.steps=1000", "--gpus=1", "--gpu=a100-80", "--json"]
    alone = run([f"--config={ROOT / 'configs/debug.yaml'}", *words])
    assert (alone["engine"], alone["scaling_engine"]) == ("single", "ddp")
    assert alone["scaling"] == planned["scaling"]


def test_a_samples_bytes_are_those_of_encoded_shards(encoded_shards, planned: dict) -> None:
    manifest = Manifest.load(encoded_shards)
    real = sum(manifest.path(shard).stat().st_size for shard in range(len(manifest.shards))) / sum(manifest.counts)
    assert planned["sample_bytes"] == pytest.approx(real, rel=0.05)


def test_text_names_what_is_assumed_and_every_engine(capsys) -> None:
    config = ROOT / "configs/debug.yaml"
    assert plan_run.main([f"--config={config}", "--gpus=2", "--gpu=l40s", "--dollars_per_gpu_hour=7"]) == 0
    said = capsys.readouterr().out
    for word in ("ddp", "fsdp2", "zero1", "zero2", "zero3", "$7.00 a GPU hour", "30% of the peak", "2 x l40s"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus=3"], "global_batch 16 cannot be split over 3 processes"),
        (["--gpu=h900"], "h900"),
        (["--utilisation=1.5"], "utilisation: found 1.5"),
        (["--network_gbits=0"], "network_gbits: found 0"),
        (["--dollars_per_gpu_hour=-1"], "dollars_per_gpu_hour: found -1"),
        (["--gpus=2", "--distributed.engine=single"], "distributed.engine is single, but --gpus is 2"),
        (["--unet.sample_size=null"], "unet.sample_size is not set"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_names_the_setting(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        plan_run.main([f"--config={ROOT / 'configs/debug.yaml'}", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
