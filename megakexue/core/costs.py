"""What a config costs by count: parameters, FLOPs, bytes of a rank. Formulas alone, without torch and without a GPU.

    FLOPs per token, forward and backward = 6 P + 3 A,   A = 2 L h (d + e) n

P: parameters in matrix products. The head counts once, tied or not; looking up the embedding is no product.
L: layers. n: mean number of visible keys, (t + 1) / 2 for rows of one document; those who do not halve attention for
causality count n = t. MLA is trained in the plain form, so that all its projections are in P.

The memory of a rank is largest at one of a few moments of a step (`peak_memory`): in the loss, where all activations
are kept and the logits of a chunk exist; at the top of the backward pass, where the first gradients come on top of
them; at its bottom, where all gradients exist; or while gradients are reduced and put together.

What must stay true: `n_parameters` equals the module's sum, FLOPs equal torch's own counter, and bytes are within 5 %
of what torch allocates in a step at every ZeRO stage (tests).
"""

import math
from typing import Any

from megakexue.config import LOSS_CHUNK, Config, ModelConfig, require
from megakexue.core.axes import AXES, entries, matrix_shapes, shape
from megakexue.core.owners import newton_schulz_flops

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element, by the names of dtypes in configs."""

ALL_REDUCE_ELEMENTS = 500_000_000
"""What DeepSpeed puts together in one all-reduce at stage 0 (MEMORY_OPT_ALLREDUCE_SIZE of its engine)."""

PERSISTENT_ELEMENTS = 100_000
"""Parameters up to this size are never partitioned at stage 3 (its stage3_param_persistence_threshold)."""

LIVE_ELEMENTS = 1_000_000_000
"""The most that stage 3 keeps gathered, and the distance within which it keeps what it will use again (its
stage3_max_live_parameters and stage3_max_reuse_distance)."""


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the elements, over all layers, of each entry of the axis table that the config has."""
    return {
        name: math.prod(shape(name, config)) * (config.n_layers if name.startswith("blocks.") else 1)
        for name in entries(config)
    }


def n_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def flops_per_token(config: ModelConfig, n_keys: float) -> float:
    """Return the FLOPs of one token's forward and backward when a query sees `n_keys` keys on average."""
    counts = parameter_counts(config)
    in_products = sum(n for name, n in counts.items() if AXES[name].role == "matrix")
    in_products += config.vocab_size * config.d_model
    attention = 2 * config.n_layers * config.n_heads * (config.head_width + config.value_width) * n_keys
    return 6 * in_products + 3 * attention


def muon_flops(config: ModelConfig) -> int:
    """Return the FLOPs of Newton-Schulz in a step, of all ranks."""
    return sum(newton_schulz_flops(shape) for shape in matrix_shapes(config).values())


def product_shapes(config: ModelConfig, n_rows: int) -> list[tuple[int, int, int]]:
    """Return (rows, inputs, outputs) of some of the step's matrix products, for `n_rows` tokens at a time."""
    d, width = config.d_model, config.n_heads * config.head_width
    return [(n_rows, d, width), (n_rows, d, config.d_ff), (n_rows, config.d_ff, d), (n_rows, d, config.vocab_size)]


def model_state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Return bytes on each rank of weights, gradients, fp32 masters and optimizer state, by the ZeRO stage.

    ZeRO splits optimizer state and masters from stage 1 on, gradients from 2, weights from 3. In fp32, stage 0 trains
    the weights themselves and has no masters. Not counted: communication buckets, activations, and the second head that
    every rank holds with `loss.emo`.
    """
    n, stage = n_parameters(config.model), config.engine.zero_stage
    width = WIDTHS[config.engine.dtype]

    def split(from_stage: int) -> int:
        return world_size if stage >= from_stage else 1

    state = sum(
        WIDTHS[dtype] * count
        for name, count in parameter_counts(config.model).items()
        for dtype in config.optim.state_dtypes(AXES[name].role).values()
    )
    masters = 0 if stage == 0 and config.engine.dtype == "fp32" else 4 * n
    return {
        "weights": width * n // split(3),
        "gradients": width * n // split(2),
        "masters": masters // split(1),
        "optimizer": state // split(1),
    }


# --- activations -----------------------------------------------------------------------------------------------------


def kept_of_layer(config: Config, is_compiled: bool, recompute: str | None = None) -> tuple[int, int]:
    """Return the bytes that a block keeps for its backward pass: for each token, and beside that once.

    Attention keeps queries, keys, values, its result and a float32 sum a head, as every fused kernel does (`blocked`
    on a CPU keeps probabilities too). An eager norm keeps two float32 tensors and its result; a compiled one its input
    and its result. SwiGLU keeps gate, up and their product; eager also silu(gate).

    Args:
        recompute: instead of `engine.recompute`; `tiles`: none, with tiles of tokens.
    """
    model, w = config.model, WIDTHS[config.engine.dtype]
    recompute = recompute or (
        "tiles" if tile_of(config) and config.engine.recompute == "none" else config.engine.recompute
    )
    m, f, is_prenorm = model.d_model, model.d_ff, model.residual == "prenorm"
    if recompute == "block":
        return w * m, 0
    attention, once = _kept_of_attention(config, is_compiled)
    norm = _kept_of_norm(m, w, is_compiled)
    if recompute == "tiles":  # the stream, which an eager norm in 16 bits keeps as float32 alone
        return attention + (norm + w * m * (not is_compiled and w < 4) if is_prenorm else w * m), once
    branch = norm + w * f * {"none": 3 if is_compiled else 4, "product": 2, "feed_forward": 0}[recompute]
    if recompute == "feed_forward" and is_prenorm:
        branch = w * m
    return norm + branch + attention, once


def _kept_of_norm(width: int, w: int, is_compiled: bool) -> int:
    return 2 * w * width + 4 if is_compiled else 8 * width + 4 + w * width


def _kept_of_attention(config: Config, is_compiled: bool) -> tuple[int, int]:
    """Return the bytes that attention keeps without its norm: for each token, and beside that once."""
    model, w, n_shared = config.model, WIDTHS[config.engine.dtype], config.engine.sequence_ranks
    h, g = model.n_heads, max(model.n_groups, n_shared)  # a rank of those that share rows has one group at least
    per_token = w * (h + g) * (model.head_width + model.value_width) + 4 * h
    if model.attention.qk_norm:  # rotation keeps no result of a norm
        per_token += (h + g) * ((w if is_compiled else 8) * model.head_width + 4)
    if model.mla is None:
        return per_token, 0
    mla = model.mla
    latents = [mla.d_latent, *([mla.d_query_latent] if mla.d_query_latent else [])]
    if not is_compiled and w == 4:  # a norm keeps its input, a view of the product that has the rotary key too
        per_token += w * mla.d_rope
    if n_shared > 1:  # the latents and rotary keys of all tokens of the row, where these are what ranks exchange
        sent = n_shared * (mla.d_latent + mla.d_rope)
        per_token += w * sent * (sent < h * (mla.d_nope + mla.d_rope + mla.d_value))
    # the projections into latents are put side by side, and that copy is kept
    return per_token + sum(_kept_of_norm(n, w, is_compiled) for n in latents), w * model.d_model * (
        sum(latents) + mla.d_rope
    )


def tile_of(config: Config) -> int | None:
    """Return the tokens of a tile, or None where a rank's part of a row is one."""
    own, tile = config.data.seq_len // config.engine.sequence_ranks, config.engine.tile_tokens
    return tile if tile and tile < own else None


def n_data_ranks(config: Config, world_size: int) -> int:
    """Return how many parts the rows of a batch are dealt to: ranks, or groups of ranks that share rows.

    Raises:
        UserError: `engine.sequence_ranks` does not divide the ranks.
    """
    size = config.engine.sequence_ranks
    require(world_size % size == 0, f"engine.sequence_ranks={size} must divide the {world_size} ranks")
    return world_size // size


# --- the moments of a step -------------------------------------------------------------------------------------------


Parts = dict[str, int]
"""Bytes by part: weights, gradients, masters, optimizer, buckets, gathered (weights), activations, loss, work."""


def moments(
    config: Config, world_size: int, *, n_rows: int | None = None, is_compiled: bool = True, chunk: int | None = None
) -> dict[str, Parts]:
    """Return what a rank holds at those moments of a step at which the most may be held.

    `work` is what the backward pass of one block has beside what is kept for it: the part that is computed again, and
    gradients of activations. Not counted: the CUDA context, the buffers of NCCL, fragmentation, tokens, and what an
    update works with at a time.

    Args:
        n_rows: of a micro-batch, instead of `train.micro_batch_size`.
        is_compiled: whether blocks and loss are compiled, as they are on a GPU by default.
        chunk: tokens whose logits exist at a time, instead of a GPU's.

    Raises:
        UserError: the global batch is not a multiple of what all ranks take at a time.
    """
    model, w = config.model, WIDTHS[config.engine.dtype]
    n_tokens = (n_rows or config.train.micro_batch_size) * config.data.seq_len // config.engine.sequence_ranks
    held, reduced = _held(config, world_size)
    head, stream = w * model.vocab_size * model.d_model, w * n_tokens * model.d_model
    d_head = 4 * model.vocab_size * model.d_model  # float32, since many chunks are added up
    kept, last_norm, work = _activations(config, n_tokens, is_compiled)
    logits = _logits(model, n_tokens, chunk or LOSS_CHUNK["cuda"], w, is_compiled)
    # the gradient of the head is multiplied with a factor, and cast, before the float32 one is forgotten
    scaled = head + (d_head if w < 4 and not is_compiled else 0)
    ends = held | {"gradients": held.get("gradients", 0) + reduced.pop("new gradients"), "work": work}
    top = _plus(ends, reduced | {"activations": kept - last_norm, "loss": stream + head})
    found = {
        "in the loss": held | {"activations": kept, "loss": 2 * stream + d_head + logits},
        "behind the loss": held | {"activations": kept, "loss": 2 * stream + d_head + scaled},
        "at the top of backward": top,
    }
    if config.engine.zero_stage == 3:  # the head's gradient is copied, and those of a block wait; its weights are gone
        reduction = _plus(top, {"buckets": head + w * block_elements(model), "gathered": -head})
        found["in the first reduction"] = reduction | {"activations": kept - kept // model.n_layers, "work": 0}
    if config.optim.name == "muon":
        found["in the exchange of matrices"] = _in_the_exchange(config, world_size, held)
    return found | _at_the_end(config, world_size, held, ends, reduced, kept)


def peak_memory(config: Config, world_size: int, **options: Any) -> tuple[str, Parts]:
    """Return the moment at which a rank holds most, and what it holds then. Arguments as for `moments`."""
    return max(moments(config, world_size, **options).items(), key=lambda moment: sum(moment[1].values()))


def _plus(first: Parts, second: Parts) -> Parts:
    return {key: first.get(key, 0) + second.get(key, 0) for key in {**first, **second}}


def block_elements(model: ModelConfig) -> int:
    counts = parameter_counts(model)
    return sum(n for name, n in counts.items() if name.startswith("blocks.")) // model.n_layers


def _held(config: Config, world_size: int) -> tuple[Parts, Parts]:
    """Return what is there before the last micro-batch's forward pass, and what its backward pass adds at its top."""
    model, stage, w = config.model, config.engine.zero_stage, WIDTHS[config.engine.dtype]
    held = model_state_bytes(config, world_size)
    gradients, bucket, is_alone = held.pop("gradients"), w * config.engine.bucket_elements, world_size == 1
    if config.loss.emo:
        held["weights"] += w * model.vocab_size * model.d_model
    is_carried = (
        config.train.n_micro_batches(n_data_ranks(config, world_size)) > 1 and config.optim.accumulate == "gradient"
    )
    if stage == 3:
        counts = parameter_counts(model).items()
        whole = sum(n for name, n in counts if math.prod(shape(name, model)) <= PERSISTENT_ELEMENTS)
        live = min(n_parameters(model), max(LIVE_ELEMENTS, whole))
        # DeepSpeed has buffers for this rank's gradients and for the bucket all the time
        return held | {"gradients": gradients, "buckets": bucket, "gathered": w * live}, {"new gradients": 0}
    if is_carried:
        held["gradients"] = gradients
        if stage == 1 and not is_alone:
            held["buckets"] = bucket
    adds = {"new gradients": 0}
    if not is_alone and stage:
        # stage 2 makes this rank's share anew in each micro-batch, and then adds it to that of those before
        adds = {"new gradients": gradients if stage == 2 else 0, "buckets": bucket - held.get("buckets", 0)}
    return held, adds


def _at_the_end(
    config: Config, world_size: int, held: Parts, ends: Parts, reduced: Parts, kept: int
) -> dict[str, Parts]:
    """Return the moments at the end of the last backward pass, and behind it."""
    model, stage, w = config.model, config.engine.zero_stage, WIDTHS[config.engine.dtype]
    n, state, is_alone = n_parameters(model), model_state_bytes(config, world_size), world_size == 1
    own, all_gradients = state.pop("gradients"), w * n
    matrices = [math.prod(shape(name, model)) for name in entries(model) if name.startswith("blocks.")]
    # one that does not fit into the bucket waits for the next one
    largest = w * max(matrices) * (2 if max(matrices) > config.engine.bucket_elements and stage == 2 else 1)
    bottom = _plus(ends, reduced) | {"activations": kept // model.n_layers}
    if stage == 3:
        return {}
    if stage == 2 and not is_alone:
        bottom = _plus(bottom, {"buckets": largest})
        return {"at the bottom of backward": bottom, "putting together": state | {"gradients": 2 * own}}
    bottom["gradients"] = all_gradients
    moments = {"at the bottom of backward": bottom}
    if is_alone:
        copy = 0 if stage == 0 else all_gradients
        return moments | {"putting together": state | {"gradients": all_gradients + copy}}
    if stage == 0:
        more = {"gradients": all_gradients, "buckets": w * min(n, ALL_REDUCE_ELEMENTS)}
    else:
        more = {"gradients": all_gradients + w * n // world_size, "buckets": w * config.engine.bucket_elements}
    return moments | {"in the reduction": state | more}


def _in_the_exchange(config: Config, world_size: int, held: Parts) -> Parts:
    """Return what a rank holds while Muon's matrices are at their owners: two messages, and Newton-Schulz of one."""
    stage, w, n = config.engine.zero_stage, WIDTHS[config.engine.dtype], n_parameters(config.model)
    sizes = sorted(matrix_shapes(config.model).values(), key=math.prod)
    largest, of_all = math.prod(sizes[-1]), sum(math.prod(size) for size in sizes)
    message = max(largest, min(config.engine.bucket_elements, of_all // world_size))
    answer = message if stage else max(largest * world_size, min(config.engine.bucket_elements, of_all))
    work = w * (message + answer + 3 * largest + 2 * min(sizes[-1]) ** 2)
    if stage == 3:
        return held | {"work": work}
    state = model_state_bytes(config, world_size)
    return state | {"gradients": w * n // (world_size if stage else 1), "work": work}


def _activations(config: Config, n_tokens: int, is_compiled: bool) -> tuple[int, int, int]:
    """Return the bytes that all blocks and the last norm keep, those of that norm, and the work of one block."""
    model, w = config.model, WIDTHS[config.engine.dtype]
    per_token, once = kept_of_layer(config, is_compiled)
    whole_per_token, whole_once = kept_of_layer(config, is_compiled, "none")
    last_norm = n_tokens * (0 if model.residual == "deepnorm" else (2 * w if is_compiled else 8) * model.d_model + 4)
    # inputs that wait on the host: one is there for the layer at work
    n_layers = 1 if config.engine.recompute_offload else model.n_layers
    kept_by_all = n_layers * (n_tokens * per_token + once) + last_norm + _rotary_bytes(config, n_tokens)
    again = n_tokens * (whole_per_token - per_token) + whole_once - once
    m, f, recompute = model.d_model, model.d_ff, config.engine.recompute
    if tile := tile_of(config):
        return (
            kept_by_all,
            last_norm,
            _work_in_tiles(
                config, n_tokens, tile * n_tokens // (config.data.seq_len // config.engine.sequence_ranks), is_compiled
            ),
        )
    if is_compiled:  # a gradient of the width of SwiGLU, or three where the compiler has to make its tensors again
        return (
            kept_by_all,
            last_norm,
            again + n_tokens * w * f * (1 if recompute in ("none", "block") else 3) + w * f * m,
        )
    # at its top, a block is in the backward pass of its last norm, or behind that in that of SwiGLU, where the norm's
    # tensors are gone and two gradients of its width have come; with prenorm SwiGLU is the last
    of_norm = n_tokens * (16 * m if model.residual == "deepnorm" else 2 * w * f)
    of_swiglu = n_tokens * (2 * w * f - 6 * m)
    work = again + max(of_norm, of_swiglu) if recompute == "block" else max(of_norm, again + of_swiglu)
    return kept_by_all, last_norm, work


def _rotary_bytes(config: Config, n_tokens: int) -> int:
    """Return the bytes of cosines and sines in float32: the tables of a row, and those of a rank's tokens."""
    model = config.model
    return 4 * model.rotary_width * (1 if model.attention.scale == "constant" else 2) * (n_tokens + config.data.seq_len)


def _work_in_tiles(config: Config, n_tokens: int, n_of_tile: int, is_compiled: bool) -> int:
    """Return the work of a block whose feed-forward is in tiles: in a tile's backward pass, or in attention's."""
    model, w = config.model, WIDTHS[config.engine.dtype]
    m, f, h, g, d, e = (
        model.d_model, model.d_ff, model.n_heads, model.n_groups, model.head_width, model.value_width,
    )  # fmt: skip
    counts = parameter_counts(model)
    names = "attention.wo", *(f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down"))
    behind = sum(counts[f"blocks.{name}"] for name in names) // model.n_layers
    attention, once = _kept_of_attention(config, is_compiled)
    again = n_tokens * attention + once if config.engine.recompute == "block" else 0
    streams = (
        n_tokens * w * (2 * m + h * e)
    )  # gradients of the block's result, of its input and of what attention gives
    of_tile = n_of_tile * (2 * _kept_of_norm(m, w, is_compiled) + w * f * (3 if is_compiled else 4))
    of_tile += n_of_tile * (w * f if is_compiled else max(16 * m, 2 * w * f - 6 * m)) + (4 + w) * behind
    # an eager rotation computes in float32
    rotated = n_tokens * (w if is_compiled else 12) * h * d
    return again + streams + max(of_tile, w * behind + n_tokens * w * ((h + g) * d + g * e) + rotated)


def _logits(model: ModelConfig, n_tokens: int, chunk: int, w: int, is_compiled: bool) -> int:
    """Return the bytes of a chunk's logits: as they come, in float32, one temporary, and gradients."""
    n = min(chunk, n_tokens) * model.vocab_size
    return n * (2 * w if is_compiled else 8 if w == 4 else 10)
