"""Plans a run before a GPU is paid for: `python tools/plan_run.py --config configs/sd15.yaml --gpus 64 --gpu h100`.

In: a run's config, a kind and a number of GPUs. Out: memory of a GPU by engine, time, cost, data and network volume,
and the number of GPUs past which more of them no longer pay; as text, or with --json as one object. Nothing is loaded:
the network runs without numbers (ldm/training/simulation.py), the rest is arithmetic (ldm/training/scaling.py).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ldm.config import RunConfig, build, make_parser
from ldm.training.distributed import split_global_batch
from ldm.training.recomputation import POLICIES, Policy
from ldm.training.scaling import (
    ENGINES,
    FLOAT32,
    GIB,
    GPUS,
    Cluster,
    exchange,
    largest_micro_batch,
    memory,
    step_time,
)
from ldm.training.simulation import NetworkCost, network_cost

DAY = 86_400


@dataclass
class PlanConfig:
    """What is assumed beside the run's own config."""

    gpus: int = 8
    """Number of GPUs, which is that of processes."""
    gpu: Literal["b200", "h200", "h100", "a100-80", "a100-40", "l40s", "l4", "rtx4090"] = "h100"
    """Kind of GPU; its figures are in ldm/training/scaling.py, with where they come from."""
    gpus_per_node: int = 8
    """GPUs that share a node's links and its network."""
    network_gbits: float | None = None
    """Gbit/s between nodes, all adapters of a node together; unset: what is usual for nodes of this kind."""
    utilisation: float = 0.30
    """Share of the GPU's peak that useful operations reach, before communication. Published for networks like this: 24
    to 36 %."""
    dollars_per_gpu_hour: float | None = None
    """Price; unset: about what clouds asked at the end of 2025 (ldm/training/scaling.py)."""
    reserve_gib: float = 4.0
    """Memory of a GPU for CUDA's own context, cuDNN's and NCCL's workspaces, and gaps between tensors."""
    frozen_parameters: float = 2.07e8
    """Parameters of autoencoder and text encoders, float32, on each GPU: 2.07e8 are Stable Diffusion 1.x's, 4.24e8
    those of 2.x, 9.0e8 SDXL's."""
    samples_per_shard: int = 10_000
    """Samples in an encoded shard."""
    efficiency: float = 0.90
    """Share of a step that has to compute where more GPUs are said to pay."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        for name in ("utilisation", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a share above 0, up to 1")
        for name in ("reserve_gib", "frozen_parameters", "dollars_per_gpu_hour"):
            if (found := getattr(self, name)) is not None and found < 0:
                raise ValueError(f"{name}: found {found}, expected 0 or more")
        if self.network_gbits is not None and self.network_gbits <= 0:
            raise ValueError(f"network_gbits: found {self.network_gbits}, expected a positive number")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status 0. What cannot be planned ends it with 2; what does not fit is told."""
    parser = make_parser("tools/plan_run.py", (__doc__ or "").splitlines()[0])
    parser.add_class_arguments(PlanConfig, as_group=True)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    parsed = parser.parse_args(argv)
    config = build(parser, parsed)
    try:
        options = PlanConfig(**{field.name: parsed[field.name] for field in fields(PlanConfig)})
        found = plan(config, options)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(found, indent=1) if parsed.json else "\n".join(lines(found)))
    return 0


def plan(config: RunConfig, options: PlanConfig) -> dict[str, Any]:
    """All figures, in bytes, seconds and dollars; raises ValueError where the global batch cannot be split."""
    engine = config.distributed.engine
    if engine == "auto":
        engine = "ddp" if options.gpus > 1 else "single"
    if engine == "single" and options.gpus > 1:
        raise ValueError(f"distributed.engine is single, but --gpus is {options.gpus}")
    gpu = GPUS[options.gpu]
    gpu = replace(gpu, network_gbits=options.network_gbits or gpu.network_gbits)
    cluster = Cluster(gpu, options.gpus_per_node, options.utilisation)
    split = split_global_batch(config.training.global_batch, options.gpus, config.training.max_micro_batch)
    side, precision = config.unet.sample_size, config.wrapping.mixed_precision
    if side is None:
        raise ValueError("unet.sample_size is not set: it says how large the latents are")
    precision = "bf16" if precision == "auto" else precision
    tokens = config.text_encoder.max_length or 77

    def cost_of(checkpointing: Policy) -> NetworkCost:
        return network_cost(config.unet, side, tokens, precision=precision, checkpointing=checkpointing)

    checkpointing = config.wrapping.gradient_checkpointing
    assert isinstance(checkpointing, str)
    costs = {policy: cost_of(policy) for policy in POLICIES}
    cost, frozen = costs[checkpointing], FLOAT32 * options.frozen_parameters
    available = (gpu.memory_gib - options.reserve_gib) * GIB
    offload = config.distributed.offload
    rows: list[dict[str, Any]] = []
    for name in ENGINES if options.gpus > 1 else ("single", "fsdp2", "zero1", "zero2", "zero3"):
        if name == "single" and options.gpus > 1:
            continue
        own = offload if name == engine else "none"
        parts = memory(cost, name, options.gpus, split.micro_batch, split.accumulation, frozen, own)
        share = split.micro_batch * split.accumulation
        largest = {
            policy: largest_micro_batch(one, name, options.gpus, frozen, available, share, own)
            for policy, one in costs.items()
        }
        moved = exchange(name, split.accumulation, cost.recomputed_flop > 0)
        time = step_time(cost, name, cluster, options.gpus, share, split.accumulation, precision)
        rows.append(
            {
                "engine": name,
                "memory": asdict(parts),
                "total": parts.total,
                "fits": parts.total <= available,
                "largest_micro_batch": largest["none"],
                "largest_micro_batch_checkpointed": largest["all"],
                "largest_micro_batches": largest,
                "sent_per_step": moved.sent(FLOAT32 * cost.parameters, options.gpus),
                "step_seconds": time.seconds,
                "network_seconds": time.network,
                "efficiency": time.efficiency,
            }
        )
    mine = next(row for row in rows if row["engine"] == engine)
    seconds = float(mine["step_seconds"])
    rate = config.training.global_batch / seconds
    days = config.training.steps * seconds / DAY
    price = options.dollars_per_gpu_hour if options.dollars_per_gpu_hour is not None else gpu.dollars
    several = "ddp" if engine == "single" else engine
    scaling = scales(config, cost, several, cluster, precision)
    paying = [row["gpus"] for row in scaling if row["efficiency"] >= options.efficiency]
    sample = sample_bytes(config, side, tokens)
    block = config.data.shards_per_block * options.samples_per_shard * sample
    return {
        "gpu": options.gpu,
        "gpus": options.gpus,
        "assumed": {
            **asdict(gpu),
            **asdict(options),
            "dollars_per_gpu_hour": price,
            "network_gbits": gpu.network_gbits,
        },
        "engine": engine,
        "offload": offload,
        "batch": asdict(split),
        "network": asdict(cost) | {"training_flop": cost.training_flop},
        "checkpointing": checkpointing,
        "policies": {
            policy: {"sample_bytes": one.sample_bytes, "recomputed_flop": one.recomputed_flop}
            for policy, one in costs.items()
        },
        "precision": precision,
        "available": available,
        "engines": rows,
        "steps": config.training.steps,
        "steps_a_day": DAY / seconds,
        "images_a_second": rate,
        "days": days,
        "dollars": days * 24 * options.gpus * price,
        "checkpoint_bytes": 4 * FLOAT32 * cost.parameters + frozen,
        "sample_bytes": sample,
        "data_bytes_a_second": rate * sample,
        "shards_open_per_rank": config.data.shards_per_block,
        "cache_bytes_per_node": 2 * block,
        "scaling_engine": several,
        "scaling": scaling,
        "scales_to": max(paying, default=1),
    }


def sample_bytes(config: RunConfig, side: int, tokens: int) -> int:
    """Bytes of one encoded sample in a tar: moments (and the mirrored ones'), text states, caption and note."""
    width = 2 if config.encoding.dtype == "float16" else 4
    # An inpainting network is told more channels than a latent has, one that learns its variance puts out more.
    channels = min(config.unet.in_channels, config.unet.out_channels)
    arrays = [2 * channels * side * side] * (1 + config.encoding.flipped)
    if config.encoding.text_states:
        arrays += [tokens * config.unet.cross_attention_dim]
        arrays += [config.unet.pooled_channels] * bool(config.unet.pooled_channels)
    sizes = [128 + width * array for array in arrays] + [100, 100]  # the arrays' own headers; caption and note
    return sum(512 + -(-size // 512) * 512 for size in sizes)  # tar's header and padding


def scales(config: RunConfig, cost: NetworkCost, engine: str, cluster: Cluster, precision: str) -> list[dict[str, Any]]:
    """Time of a step on 1, 2, 4, ... GPUs, as far as they divide the global batch."""
    rows = []
    count = 1
    while count <= config.training.global_batch:
        if config.training.global_batch % count == 0:
            split = split_global_batch(config.training.global_batch, count, config.training.max_micro_batch)
            share = split.micro_batch * split.accumulation
            name = "single" if count == 1 and engine == "ddp" else engine
            time = step_time(cost, name, cluster, count, share, split.accumulation, precision)
            rows.append(
                {
                    "gpus": count,
                    "micro_batch": split.micro_batch,
                    "accumulation": split.accumulation,
                    "step_seconds": time.seconds,
                    "images_a_second": config.training.global_batch / time.seconds,
                    "efficiency": time.efficiency,
                }
            )
        count *= 2
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """The plan as text."""
    network, assumed, batch = found["network"], found["assumed"], found["batch"]
    said = [
        f"{found['gpus']} x {found['gpu']} ({assumed['memory_gib']} GiB, {assumed['bf16_tflops']:g} TFLOP/s bf16), "
        f"{assumed['gpus_per_node']} a node, {assumed['network_gbits']:g} Gbit/s between nodes; "
        f"engine {found['engine']}, offload {found['offload']}, precision {found['precision']}, "
        f"checkpointing {found['checkpointing']}",
        f"network: {network['parameters']:,} parameters; forward {network['forward_flop'] / 2e9:,.1f} GMAC, training "
        f"{network['training_flop'] / 1e12:.3f} TFLOP a sample"
        + (f" and {network['recomputed_flop'] / 1e12:.3f} computed again" if network["recomputed_flop"] else ""),
        f"global batch {batch['global_batch']} = {batch['processes']} GPUs x {batch['accumulation']} accumulation "
        f"x {batch['micro_batch']} micro-batch",
        "",
        f"memory of a GPU in GiB ({found['available'] / GIB:.1f} for the run, {assumed['reserve_gib']:g} in reserve)",
        "engine   weights gradients optimizer average buffers passes frozen | total fits | largest micro-batch, "
        "checkpointed | sent/step GB  step s  computing",
    ]
    for row in found["engines"]:
        parts = row["memory"]
        columns = ("weights", "gradients", "optimizer", "average", "buffers", "passes", "frozen")
        widths = (9, 10, 10, 8, 8, 7, 7)
        sizes = "".join(f"{parts[name] / GIB:{width}.2f}" for name, width in zip(columns, widths, strict=True))
        said.append(
            f"{row['engine']:7}{sizes} |{row['total'] / GIB:6.1f} {'yes ' if row['fits'] else 'NO  '} |"
            f"{row['largest_micro_batch']:20}{row['largest_micro_batch_checkpointed']:14} |"
            f"{row['sent_per_step'] / 1e9:13.2f}{row['step_seconds']:8.3f}{row['efficiency']:10.0%}"
        )
    mine = next(row for row in found["engines"] if row["engine"] == found["engine"])
    said += ["", f"checkpointing     passes of a sample MiB   computed again   largest micro-batch ({found['engine']})"]
    said += [
        f"{policy:13}{one['sample_bytes'] / 2**20:28,.1f}"
        f"{one['recomputed_flop'] / (3 * network['forward_flop']):17.0%}{mine['largest_micro_batches'][policy]:22}"
        for policy, one in found["policies"].items()
    ]
    said += [
        "",
        f"time: {found['steps_a_day']:,.0f} steps a day, {found['images_a_second']:,.0f} images/s; {found['steps']:,} "
        f"steps take {found['days']:,.1f} days and ${found['dollars']:,.0f} at "
        f"${assumed['dollars_per_gpu_hour']:.2f} a GPU hour",
        f"  (useful operations at {assumed['utilisation']:.0%} of the peak: --utilisation; without waiting for data, "
        "validation and checkpoints; micro-batches of a few samples reach less)",
        f"data: {found['sample_bytes'] / 1024:,.1f} KiB a sample, {found['data_bytes_a_second'] / 1e6:,.1f} MB/s over "
        f"all GPUs; every rank reads from {found['shards_open_per_rank']} shards at a time (data.shards_per_block), "
        f"all from the same ones; a node's cache of shards at URLs holds two such blocks: "
        f"{found['cache_bytes_per_node'] / 1e9:,.1f} GB",
        f"a checkpoint: {found['checkpoint_bytes'] / 1e9:,.1f} GB",
        "",
        f"scaling of this global batch under {found['scaling_engine']}",
        "   GPUs  micro-batch x accumulation   step s   images/s  computing",
    ]
    said += [
        f"{row['gpus']:7}{row['micro_batch']:13} x {row['accumulation']:<12}{row['step_seconds']:9.3f}"
        f"{row['images_a_second']:11,.0f}{row['efficiency']:11.0%}"
        for row in found["scaling"]
    ]
    last = found["scaling"][-1]["gpus"]
    limit = found["scales_to"]
    said.append(
        f"more than {limit} GPUs spend over {1 - assumed['efficiency']:.0%} of a step waiting for the network"
        if limit < last
        else f"up to {last} GPUs, one sample each at the end, the network is hidden behind computing; more need a "
        "larger global batch"
    )
    return said


if __name__ == "__main__":
    sys.exit(main())
