"""A run on many GPUs, on paper: memory of each by engine, what goes over the network, time of a step.

Enters: a NetworkCost, a kind of GPU, an engine and the number of GPUs. Leaves: bytes and seconds, by closed formulas.
Symbols: P parameters, N GPUs; weights, gradients, both moments of AdamW and the average are float32, whatever autocast
computes in. Volumes are those of ring algorithms: a gather or scatter of S bytes over k members sends (k - 1)/k S from
each of them, an all-reduce twice that (Patarasuk and Yuan 2009).
"""

from dataclasses import dataclass

from ldm.training.simulation import NetworkCost

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
FLOAT32 = 4
GIB = 1 << 30
DEEPSPEED_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way (reduce_bucket_size), which is there for the whole run."""
DEEPSPEED_GATHERED = 1_000_000_000
"""Elements that ZeRO-3 may leave whole at a time (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU as its data sheet describes it, dense operations without sparsity."""

    bf16_tflops: float
    fp32_tflops: float
    """Without tensor cores: what wrapping.mixed_precision "no" gets in linear layers."""
    memory_gib: float
    """What a process finds free (80 GB on the sheet are 79.1 GiB to CUDA)."""
    link_gbytes: float
    """GB/s that one GPU sends to others of its node: NVLink, or PCIe where there is none."""
    network_gbits: float
    """Gbit/s that a usual node of 8 sends to other nodes; clouds sell the same GPU with 100 to 3,200."""
    dollars: float
    """Dollars an hour and GPU: about what clouds asked on demand at the end of 2025. Prices differ by three times."""


# Data sheets of NVIDIA: H100 Tensor Core GPU (SXM5), H200, HGX B200, A100 80GB and 40GB (SXM4), L40S, L4; GeForce RTX
# 4090: Ada GPU Architecture whitepaper. Half of a link's figure there, which counts both directions.
GPUS = {
    "b200": GPU(2250, 75, 178, 900, 3200, 5.5),
    "h200": GPU(989.4, 66.9, 139.8, 450, 3200, 3.5),
    "h100": GPU(989.4, 66.9, 79.1, 450, 3200, 2.8),
    "a100-80": GPU(312, 19.5, 79.1, 300, 1600, 1.8),
    "a100-40": GPU(312, 19.5, 39.4, 300, 400, 1.3),
    "l40s": GPU(362.05, 91.6, 44.4, 32, 100, 1.2),
    "l4": GPU(121, 30.3, 22.0, 32, 100, 0.7),
    "rtx4090": GPU(165.2, 82.6, 23.5, 32, 10, 0.5),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    """Whole blocks that a sharding engine puts together, and DeepSpeed's own."""
    passes: float
    """Activations and autocast's copies of the weights, at the peak of a micro-batch."""
    frozen: float
    """Autoencoder and text encoders."""

    @property
    def total(self) -> float:
        """The sum; the reserve for CUDA itself is not in it."""
        return sum(vars(self).values())


def memory(
    cost: NetworkCost,
    engine: str,
    processes: int,
    micro_batch: int,
    accumulation: int,
    frozen: float,
    offload: str = "none",
) -> Memory:
    """Bytes on each of `processes` GPUs under an engine, at the peak of a step.

    Args:
        frozen: bytes of the networks that are not trained.
        offload: what stays in the host's memory, `distributed.offload`: none, optimizer or parameters.
    """
    whole = float(FLOAT32 * cost.parameters)
    part = whole / processes
    weights, gradients, optimizer, average, buffers = whole, whole, 2 * whole, whole, 0.0
    if engine in ("zero1", "zero2"):
        # DeepSpeed's optimizer steps a copy of its part of the weights.
        optimizer = 3 * part
        # Stage 1 keeps gradients whole until the step, stage 2 its part, which is where each micro-batch's are summed.
        gradients = whole + part if engine == "zero1" else part
        buffers = FLOAT32 * DEEPSPEED_BUCKET
    elif engine == "zero3":
        weights, gradients, optimizer, average = part, part, 3 * part, part
        buffers = FLOAT32 * (min(DEEPSPEED_GATHERED, cost.parameters) + DEEPSPEED_BUCKET)
    elif engine == "fsdp2":
        # Until the last micro-batch, gradients are summed whole: nothing is exchanged for them.
        weights, gradients, optimizer, average = part, part if accumulation == 1 else whole, 2 * part, part
        # A block with its gradient, the next one on its way, and what belongs to no block.
        buffers = FLOAT32 * (2 * cost.largest_units[0] + cost.largest_units[1] + cost.outside_units)
    if offload != "none":
        optimizer = 0.0
    if offload == "parameters":
        weights = gradients = average = 0.0
    passes = cost.fixed_bytes + cost.sample_bytes * micro_batch
    return Memory(weights, gradients, optimizer, average, buffers, passes, frozen)


def largest_micro_batch(
    cost: NetworkCost, engine: str, processes: int, frozen: float, available: float, share: int, offload: str = "none"
) -> int:
    """Most samples of one pass that fit into `available` bytes, 0 if not even one; a divisor of `share`."""
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    needs = [memory(cost, engine, processes, size, share // size, frozen, offload).total for size in sizes]
    return max((size for size, need in zip(sizes, needs, strict=True) if need <= available), default=0)


@dataclass(frozen=True)
class Exchange:
    """Collectives of one optimizer step: how often the whole network's 4 P bytes go around."""

    reduced: int = 0
    """All-reduce of the gradients."""
    scattered: int = 0
    """Reduce-scatter of the gradients."""
    gathered: int = 0
    """All-gather of the weights."""
    hidden: float = 0.0
    """Share of the step's computing beside which they can go on."""

    def sent(self, bytes_: float, members: int) -> float:
        """Bytes that each of `members` sends."""
        return (2 * self.reduced + self.scattered + self.gathered) * bytes_ * (members - 1) / members


def exchange(engine: str, accumulation: int, recomputes: bool) -> Exchange:
    """What an engine exchanges in one step of `accumulation` micro-batches, with which part of it hidden.

    The backward pass is two thirds of a micro-batch's computing, three quarters where activations are computed again.
    """
    backward = (3 / 4 if recomputes else 2 / 3) / accumulation
    return {
        "single": Exchange(),
        "ddp": Exchange(reduced=1, hidden=backward),
        # DeepSpeed's stages 1 and 2 gather the weights after the step, when nothing is left to compute.
        "zero1": Exchange(scattered=1, gathered=1),
        "zero2": Exchange(scattered=accumulation, gathered=1),
        # Weights are gathered block by block for each pass, and let go of in between.
        "fsdp2": Exchange(scattered=1, gathered=2 * accumulation, hidden=1.0),
        "zero3": Exchange(scattered=accumulation, gathered=2 * accumulation, hidden=1.0),
    }[engine]


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them."""

    gpu: GPU
    gpus_per_node: int
    utilisation: float
    """Share of the peak at which the network's useful operations run, 0 .. 1: an assumption."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on each of N GPUs."""

    computing: float
    network: float
    """Time of the collectives if nothing else went on."""
    waiting: float
    """What of it is not hidden behind computing."""

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting

    @property
    def efficiency(self) -> float:
        """Share of the step that computes."""
        return self.computing / self.seconds


def step_time(
    cost: NetworkCost, engine: str, cluster: Cluster, processes: int, samples: int, accumulation: int, precision: str
) -> Step:
    """Time of a step of `samples` a GPU.

    Within a node each GPU has a link of its own; between nodes all GPUs of one share its network. The slower of the two
    rings is the time: NCCL runs them as one pipeline.
    """
    gpu = cluster.gpu
    peak = (gpu.fp32_tflops if precision == "no" else gpu.bf16_tflops) * 1e12
    computing = samples * (cost.training_flop + cost.recomputed_flop) / (peak * cluster.utilisation)
    done = exchange(engine, accumulation, cost.recomputed_flop > 0)
    local = min(processes, cluster.gpus_per_node)
    nodes = -(-processes // cluster.gpus_per_node)
    network = max(
        done.sent(FLOAT32 * cost.parameters, local) / (gpu.link_gbytes * 1e9),
        done.sent(FLOAT32 * cost.parameters, nodes) / (gpu.network_gbits / 8 * 1e9),
    )
    return Step(computing, network, max(0.0, network - done.hidden * computing))
