"""How long a step takes on GPUs that are not there yet: a sum of what the step does, each at a published rate.

Of a micro-batch of n tokens on one GPU, forward and backward:

    products     6 P n FLOPs, and what `engine.recompute` adds, at the rate of large products in training shapes
    attention    A n forward and 2.5 A n backward (scores are computed again), at a rate that grows with the documents
    elementwise  bytes of norms, SwiGLU, rotation, residuals and the loss, at the rate of copies
    launches     if the host needs longer to start the kernels than the GPU for all of the above, that time counts

and once a step the optimizer's pass over this rank's share (with Muon, Newton-Schulz of the rank that has most of it,
as products), and communication. A collective of S bytes takes the longer
of two times, S / (rate of a GPU inside its node) and S / (rate of a node), and a latency that grows with the nodes. In
our engine stages 0 to 2 do not overlap communication with computation (`overlap_comm` is off), and stage 3 does.

    stage    bytes of weights sent in a step of k micro-batches, w the width of the training dtype
    0        2 w N                 all-reduce, once (k times with accumulate: momentum, as at stage 1)
    1        w N + w N             reduce, gather
    2        k w N + w N           reduce each micro-batch, gather
    3        k (w N + w N or 2 w N)  reduce each micro-batch; gather forward, and again backward above 1e9 parameters

Muon sends directions to the owners of matrices and results back, from a GPU w / R bytes an element of them each way (at
stage 0: nothing there, w back). Ranks that share rows exchange in each layer what attention takes and gives
(`_exchanged_per_token`). Nothing hides either.

What must stay true: every constant has a name and a source, and is the same for all models. What the plan is worth is
in docs/scale.md, beside published throughputs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from megakexue.config import LOSS_CHUNK, MAX_CONTEXT, Config, require
from megakexue.core.axes import matrix_shapes
from megakexue.core.costs import (
    LIVE_ELEMENTS,
    WIDTHS,
    block_elements,
    flops_per_token,
    model_state_bytes,
    n_data_ranks,
    n_parameters,
    peak_memory,
    tile_of,
)
from megakexue.core.owners import largest_flops


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU with its links. Data sheets, but for `products`."""

    tflops: float
    """Dense bf16 TFLOP/s, against which MFU is counted."""
    products: float
    """TFLOP/s of the best products that were measured."""
    memory_gib: float
    """What the driver reports."""
    hbm: float
    """TB/s."""
    nvlink: float
    """GB/s of one GPU in one direction."""
    forward: float
    """TFLOP/s of attention's forward pass in long rows, heads of 128, causal."""
    backward: float
    half_length: tuple[float, float]
    """Tokens of a document at which attention has half of these rates: forward, backward."""
    nic_gbit: float
    """Gbit/s of network a GPU that its machines usually have."""


# Products: the table of maximum achievable matmul FLOPS in github.com/stas00/ml-engineering (compute/accelerator); H200
# as H100, whose chip it has. Attention: on Hopper FlashAttention-3, 364/560/667/685 forward and 182/316/444/539
# backward at 1k/2k/4k/8k (triton-lang/tritonbench 1267); on A100 FlashAttention-2, at most 73 % and 63 % of the peak
# (arXiv 2307.08691). Of B200 no kernel's rate is used: it is the H100's, times the ratio of the products
GPUS = {
    "a100": Gpu(
        tflops=312, products=267.9, memory_gib=79.2, hbm=2.04, nvlink=300, forward=228, backward=196,
        half_length=(512, 512), nic_gbit=200,
    ),
    "h100": Gpu(
        tflops=989, products=794.5, memory_gib=79.1, hbm=3.35, nvlink=450, forward=760, backward=650,
        half_length=(900, 2200), nic_gbit=400,
    ),
    "h200": Gpu(
        tflops=989, products=794.5, memory_gib=139.8, hbm=4.8, nvlink=450, forward=760, backward=650,
        half_length=(900, 2200), nic_gbit=400,
    ),
    "b200": Gpu(
        tflops=2250, products=1745.0, memory_gib=178.4, hbm=8.0, nvlink=900, forward=1670, backward=1430,
        half_length=(900, 2200), nic_gbit=400,
    ),
}  # fmt: skip

SHAPES = 720 / 794.5
"""What products in the shapes of training reach of the best ones: 720 TFLOP/s on H100 and H200 (SemiAnalysis, MI300X vs
H100 vs H200 benchmark, part 1: training)."""
FLEX = (300 / 760, 245 / 650)
"""What FlexAttention reaches of the rates above, forward and backward: an estimate for H100 and H200."""
HBM = 0.85
"""Of the data sheet's memory rate. Copies reach 0.9 (3.0 of 3.35 TB/s on an H100), kernels with sums a little less."""
SUSTAINED = 0.84
"""What a step reaches of the sum of its kernels at these rates: clocks under a lasting load, gaps, shapes that do not
fit, and the kernels of overlapped collectives beside the others. This one is fitted: 1 / 1.19, the mean of what the sum
alone gives over what was measured for MPT 1B, 3B and 7B on 8 A100 (1.22, 1.19, 1.17)."""
LAUNCH_S = 20e-6
"""A kernel from Python with autograd: a model of 20M in 0.09 s a step of 4100 kernels (docs/benchmarks.md)."""
NVLINK, NETWORK = 0.8, 0.8
"""Of the link's rate: 360 GB/s of 450 is usual for nccl-tests inside an H100 node; over InfiniBand it reaches 0.9 and
more in long tests, in training less."""
LATENCY_S = 15e-6
"""A collective on a ring, for each node in it."""
OVERLAP = 0.9
"""Of the computation, that stage 3 can hide communication under: not the first gather and the last reduction."""
STRAGGLERS = 0.005
"""Of the computation, lost to the slowest GPU at each doubling of the nodes: torchtitan's 8B lost 2.3 to 2.7 % in all
from 8 to 128 GPUs (benchmarks/llama3_h100_202412_torchtitan.md)."""
MARGIN, CONTEXT_GIB = 0.06, 1.5
"""What a plan leaves free of the memory, for fragmentation, and the CUDA context with NCCL's buffers."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    gpu: Gpu
    n_gpus: int
    gpus_per_node: int = 8
    nic_gbit: float | None = None
    """Gbit/s of network a GPU; None: as usual for this GPU."""

    @property
    def n_nodes(self) -> int:
        return math.ceil(self.n_gpus / self.gpus_per_node)

    def collective_s(self, n_bytes: float, n_times: int = 1) -> float:
        """Return the seconds of gathering or reducing this many bytes in all, in `n_times` collectives."""
        inside = min(self.n_gpus, self.gpus_per_node)
        seconds = n_bytes * (inside - 1) / inside / (self.gpu.nvlink * 1e9 * NVLINK)
        if self.n_nodes > 1:
            node = (self.nic_gbit or self.gpu.nic_gbit) / 8 * 1e9 * NETWORK * inside
            seconds = max(seconds, n_bytes * (self.n_nodes - 1) / self.n_nodes / node)
        return seconds + n_times * LATENCY_S * self.n_nodes * (self.n_gpus > 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    parts: dict[str, float]
    """Seconds of a step, which add up."""
    tokens: int
    """Of a step, of all GPUs."""
    n_gpus: int
    flops: float
    """Of a token, causal attention counted as the half that it is."""
    flops_of_squares: float
    """The same where it is not halved, as most published figures have it."""
    peak: float
    """FLOP/s of a GPU."""

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.tokens / self.step_s / self.n_gpus

    def mfu(self, *, squares: bool = False) -> float:
        return self.tokens_per_s * (self.flops_of_squares if squares else self.flops) / self.peak


def n_keys(seq_len: int, document: int | None) -> float:
    """Return how many keys a query sees on average, in rows packed with documents of this many tokens."""
    return (min(document or seq_len, seq_len) + 1) / 2


def _device_s(config: Config, gpu: Gpu, document: int | None, is_compiled: bool) -> tuple[float, float, float]:
    """Return the seconds of products, attention and elementwise work of one token, forward and backward."""
    model, recompute = config.model, config.engine.recompute
    keys = n_keys(config.data.seq_len, document)
    products = flops_per_token(model, 0)
    forward = 2 * model.n_layers * model.n_heads * (model.head_width + model.value_width) * keys
    head = 6 * model.vocab_size * model.d_model
    passes = 1.0
    if recompute == "feed_forward":
        products += 4 * model.n_layers * model.d_model * model.d_ff
    elif recompute == "block":  # with tiles too: what is in them is not computed a third time
        products, passes = products + (products - head) / 3, 2.0
    elif tile_of(config):
        behind = 3 * model.d_ff + model.n_heads * model.value_width
        products += 2 * model.n_layers * model.d_model * behind
    length = min(document or config.data.seq_len, config.data.seq_len)
    halves = [length / (length + half) for half in gpu.half_length]
    speeds = FLEX if model.attention.backend == "flex" else (1.0, 1.0)
    rates = [rate * half * speed * 1e12 for rate, half, speed in zip((gpu.forward, gpu.backward), halves, speeds)]
    attention = passes * forward / rates[0] + 2.5 * forward / rates[1]
    n_bytes = traffic_per_token(config, is_compiled) * (4 / 3 if recompute == "block" else 1)
    return products / (gpu.products * SHAPES * 1e12), attention, n_bytes / (gpu.hbm * 1e12 * HBM)


def traffic_per_token(config: Config, is_compiled: bool) -> float:
    """Return the bytes that a token's forward and backward pass moves beside products and attention.

    Compiled, in tensors that are read or written: SwiGLU 3 forward, 6 backward, of width f; two norms with residuals 4
    and 5 each of width m; rotation 2 and 2 of queries and keys; the loss reads logits twice and writes gradients. Of
    configs/1b.yaml this is 195 kB a layer, and 201 in the code that the compiler makes. Eager, from counts of the same
    config: a norm moves 144 bytes an element, SwiGLU 28, rotation 101, residuals and embedding 60, and the loss 75.
    """
    model, w = config.model, WIDTHS[config.engine.dtype]
    m, f, v = model.d_model, model.d_ff, model.vocab_size
    rotated = (model.n_heads + model.n_groups) * model.head_width
    chunk = min(LOSS_CHUNK["cuda"], _own_tokens(config))
    head = (8 + w) * v * m / chunk  # each chunk is added to the head's gradient in float32
    if is_compiled:
        return model.n_layers * w * (9 * f + 18 * m + 4 * rotated) + 3 * w * v + head
    return model.n_layers * (2 * 144 * m + 28 * f + 101 * rotated + 60 * m) + 75 * v + head


def _launches(config: Config, is_compiled: bool) -> int:
    """Return the kernels of a micro-batch: as counted in a profile of configs/1b.yaml."""
    n_chunks = math.ceil(_own_tokens(config) / LOSS_CHUNK["cuda"])
    a_layer, a_chunk = (36, 10) if is_compiled else (131, 33)
    n_tiles = math.ceil(_own_row(config) / (tile_of(config) or _own_row(config)))
    return config.model.n_layers * a_layer * n_tiles + n_chunks * a_chunk + 20


def _own_row(config: Config) -> int:
    """Return the tokens of a row that one rank has."""
    return config.data.seq_len // config.engine.sequence_ranks


def _own_tokens(config: Config) -> int:
    return config.train.micro_batch_size * _own_row(config)


def _exchanged_per_token(config: Config) -> float:
    """Return the bytes that a rank sends in one layer, forward and backward, for each of its tokens."""
    model, size = config.model, config.engine.sequence_ranks
    h, g, d, e = model.n_heads, max(model.n_groups, size), model.head_width, model.value_width
    there = (h + g) * d + g * e
    if model.mla:  # latents to every rank, where these are less
        mla = model.mla
        there = h * d + min(size * (mla.d_latent + mla.d_rope), h * (mla.d_nope + mla.d_rope + mla.d_value))
    passes = 3 if config.engine.recompute == "block" else 2
    return WIDTHS[config.engine.dtype] * passes * (there + h * e) * (size - 1) / size


def _exchange_s(config: Config, cluster: Cluster, n_micro: int) -> float:
    """Return the seconds in which ranks that share rows exchange queries, keys, values and results, in a step."""
    size, gpu, layers = config.engine.sequence_ranks, cluster.gpu, n_micro * config.model.n_layers
    if size == 1:
        return 0.0
    inside, n_nodes = size <= cluster.gpus_per_node, math.ceil(size / cluster.gpus_per_node)
    rate = gpu.nvlink * NVLINK if inside else (cluster.nic_gbit or gpu.nic_gbit) / 8 * NETWORK
    passes = 3 if config.engine.recompute == "block" else 2
    n_bytes = layers * _own_tokens(config) * _exchanged_per_token(config)
    return n_bytes / (rate * 1e9) + layers * 2 * passes * LATENCY_S * n_nodes


def _communication(config: Config, cluster: Cluster, n_micro: int) -> tuple[float, float]:
    """Return the seconds of a step's collectives that wait for computation, and of those that may overlap with it."""
    n, w, stage = n_parameters(config.model), WIDTHS[config.engine.dtype], config.engine.zero_stage
    if cluster.n_gpus == 1:
        return 0.0, 0.0
    n_reductions = n_micro if stage >= 2 or config.optim.accumulate == "momentum" else 1
    n_buckets = math.ceil(n / config.engine.bucket_elements)
    if stage == 3:
        blocks = math.ceil(n / block_elements(config.model))
        a_micro = 2 if n <= LIVE_ELEMENTS else 3
        return 0.0, cluster.collective_s(n_micro * a_micro * w * n, n_micro * a_micro * blocks)
    if stage == 0:
        return cluster.collective_s(2 * n_reductions * w * n, n_reductions), 0.0
    return cluster.collective_s((n_reductions + 1) * w * n, n_reductions * n_buckets + 1), 0.0


def _muon_s(config: Config, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of Newton-Schulz in a step, and those in which matrices go to their owners and back."""
    if config.optim.name != "muon":
        return 0.0, 0.0
    shapes, n_gpus, gpu = matrix_shapes(config.model), cluster.n_gpus, cluster.gpu
    seconds = largest_flops(shapes, n_gpus) / (gpu.products * SHAPES * 1e12)
    n, bucket = sum(math.prod(size) for size in shapes.values()), config.engine.bucket_elements
    is_sharded = config.engine.zero_stage > 0
    per_gpu = WIDTHS[config.engine.dtype] * (2 * n / n_gpus if is_sharded else n) * (n_gpus - 1) / n_gpus
    rate = gpu.nvlink * NVLINK if cluster.n_nodes == 1 else (cluster.nic_gbit or gpu.nic_gbit) / 8 * NETWORK
    n_rounds = math.ceil(n / bucket / (n_gpus if is_sharded else 1))
    return seconds, per_gpu / (rate * 1e9) + 2 * n_rounds * LATENCY_S * cluster.n_nodes * (n_gpus > 1)


def _tail_bytes(config: Config, world_size: int) -> float:
    """Return what the end of a step moves: gradients put together, squared and used, state and masters, weights."""
    n, w, stage = n_parameters(config.model), WIDTHS[config.engine.dtype], config.engine.zero_stage
    state = model_state_bytes(config, world_size)
    own = n / (world_size if stage else 1)
    return own * ((2 * w if stage in (1, 2) else 0) + 3 * w + 8) + 2 * state["optimizer"]


def plan(config: Config, cluster: Cluster, *, document: int | None = None, is_compiled: bool = True) -> Plan:
    """Return the seconds of a step by part.

    Args:
        document: average tokens of the documents in a packed row; None: each row is one.

    Raises:
        UserError: the config computes in fp32, whose rates are not known here, or its batch does not divide.
    """
    require(config.engine.dtype != "fp32", "engine.dtype=fp32: rates are known of 16 bits only: use bf16 or fp16")
    gpu, t = cluster.gpu, config.data.seq_len
    n_micro = config.train.n_micro_batches(n_data_ranks(config, cluster.n_gpus))
    tokens = _own_tokens(config)
    device = [n_micro * tokens * x for x in _device_s(config, gpu, document, is_compiled)]
    launches = n_micro * _launches(config, is_compiled) * LAUNCH_S
    compute = max(sum(device) / SUSTAINED, launches)
    waits, hidden = _communication(config, cluster, n_micro)
    newton_schulz, matrices = _muon_s(config, cluster)
    parts = dict(zip(("products", "attention", "elementwise"), device)) | {
        "gaps": compute - sum(device),
        "optimizer": _tail_bytes(config, cluster.n_gpus) / (gpu.hbm * 1e12 * HBM) + newton_schulz,
        "communication": waits
        + matrices
        + _exchange_s(config, cluster, n_micro)
        + max(0.0, hidden - OVERLAP * compute),
        "stragglers": compute * STRAGGLERS * math.log2(cluster.n_nodes),
    }
    keys = n_keys(t, document)
    flops, squares = (flops_per_token(config.model, x) for x in (keys, 2 * keys - 1))
    return Plan(
        parts=parts, tokens=n_micro * tokens * cluster.n_gpus, n_gpus=cluster.n_gpus, flops=flops,
        flops_of_squares=squares, peak=gpu.tflops * 1e12,
    )  # fmt: skip


def usable_bytes(gpu: Gpu) -> float:
    """Return what tensors may take of a GPU's memory."""
    return (gpu.memory_gib * (1 - MARGIN) - CONTEXT_GIB) * 2**30


def largest_micro_batch(config: Config, cluster: Cluster, *, is_compiled: bool = True) -> int:
    """Return the most rows of a micro-batch that fit the GPU's memory; 0: not even one does."""
    room, rows = usable_bytes(cluster.gpu), 0
    step = 2**20  # rows: more than any GPU takes
    while step:
        _, parts = peak_memory(config, cluster.n_gpus, n_rows=rows + step, is_compiled=is_compiled)
        if sum(parts.values()) <= room:
            rows += step
        step //= 2
    return rows


LONG_ROWS: dict[str, dict[str, Any]] = {
    name: {"recompute": recompute, "tile_tokens": tile, "recompute_offload": offload}
    for name, recompute, tile, offload in (
        ("none", "none", None, False), ("block", "block", None, False), ("block, tiles", "block", 8192, False),
        ("block, tiles, offload", "block", 8192, True),
    )
}  # fmt: skip
"""Settings of `engine` for longer and longer rows."""


def longest_row(config: Config, cluster: Cluster, *, is_compiled: bool = True) -> int:
    """Return the most tokens, in thousands of 1024 for each rank that shares it, of one row that fits; 0: none does.

    Raises:
        UserError: `engine.sequence_ranks` does not divide the GPUs, or does not fit the model's heads.
    """
    size, room, found = config.engine.sequence_ranks, usable_bytes(cluster.gpu), 0
    step = MAX_CONTEXT // 1024 // size // 2
    while step:
        made = with_rows_of(config, (found + step) * 1024 * size, cluster.n_gpus)
        if sum(peak_memory(made, cluster.n_gpus, is_compiled=is_compiled)[1].values()) <= room:
            found += step
        step //= 2
    return found * 1024 * size


def with_rows_of(config: Config, seq_len: int, world_size: int) -> Config:
    """Return the config with one row of so many tokens for each group of ranks that share it, in one micro-batch."""
    n_rows = n_data_ranks(config, world_size)
    stages = [replace(stage, seq_len=None) for stage in config.data.stages if stage.weights is not None]
    return replace(
        config, data=replace(config.data, seq_len=seq_len, stages=stages),
        model=replace(config.model, rope=replace(config.model.rope, context=None)),
        train=replace(config.train, micro_batch_size=1, global_batch_size=n_rows),
    )  # fmt: skip
