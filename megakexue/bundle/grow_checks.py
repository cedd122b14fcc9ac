"""What growth refuses: targets that cannot compute what the weights do, and choices that leave capacity unused.

Sizes may become larger, and scales may change, since weights make up for them. All else that the function depends on
must be as it was. A message names the nearest target that can be reached.
"""

import math
from operator import attrgetter

import numpy as np

from megakexue.bundle.axis_maps import AXIS_NAMES, Choices, make_layers, make_maps, sides
from megakexue.config import ResolvedModel, require
from megakexue.core.axes import axes, axis_sizes, parameter_names
from megakexue.core.rope import frequencies


def check_growth(old: ResolvedModel, new: ResolvedModel, choices: Choices) -> None:
    """Raise UserError where weights of `old` cannot become ones of `new` that compute the same and learn."""
    _check_kind(old, new)
    _check_settings(old, new)
    _check_sizes(old, new)
    _check_heads(old, new)
    if old.mla is None:
        _check_groups(old, new)
    _check_logit_scale(old, new)
    _check_frequencies(old, new)
    _check_choices(old, new, choices)


def locked_axes(old: ResolvedModel, new: ResolvedModel, choices: Choices) -> list[str]:
    """Name the axes whose copies get equal gradients for ever, since nothing reads them apart."""
    if choices.noise > 0:
        return []
    maps = make_maps(old, new, choices)
    ancestors = {x: maps[x].index[maps[x].live] for x in "mcqfhe" if x in maps}
    copied = [x for x, taken in ancestors.items() if len(taken) > len(taken.unique())]
    return [AXIS_NAMES[x] for x in copied if not _is_read_at_random(x, old, new, choices)]


def _is_read_at_random(letter: str, old: ResolvedModel, new: ResolvedModel, choices: Choices) -> bool:
    """Whether, without noise, something reads the axis with random weights: fresh rows, or the matrices of new blocks.

    New rows of the vocabulary do not: they are made of old rows, and read what those read.
    """
    if letter == "m" and any(layer.old is None for layer in make_layers(old, new, choices.depth)):
        return True
    maps = make_maps(old, new, choices)
    readers = [name for name in parameter_names(new) if letter in axes(name).contracted and axes(name).out != "v"]
    return any(bool(sides(maps, name)[0].fresh.any()) for name in readers)


def _check_kind(old: ResolvedModel, new: ResolvedModel) -> None:
    require(
        (old.mla is None) == (new.mla is None),
        "model.mla: grouped-query and latent attention are no sizes of one another: keep the kind of the weights",
    )
    latents = [c.mla and c.mla.d_query_latent for c in (old, new)]
    require(
        (latents[0] is None) == (latents[1] is None),
        f"model.mla.d_query_latent={latents[1]}: a latent can be widened, not put in or taken out, and that of the "
        f"weights is {latents[0]}: set model.mla.d_query_latent={latents[0]}",
    )
    require(
        new.rope.context <= old.rope.context,
        f"data.seq_len={new.rope.context}: the weights were trained on rows of {old.rope.context} tokens, and "
        f"longer ones are a step of their own: grow with data.seq_len={old.rope.context}, and extend the grown "
        "model afterwards (model.rope.extension)",
    )


def _check_settings(old: ResolvedModel, new: ResolvedModel) -> None:
    """Refuse another value of what the function depends on and is not a size."""
    keys = ["norm_eps", "residual", "gain_centre"]
    keys += [f"attention.{name}" for name in ("scale", "similarity", "log_n_base", "log_n_floor")]
    keys += ["attention.qkv_bias", "attention.qk_norm"]
    keys += [f"rope.{name}" for name in ("extension", "trained_context", "ntk_mixed_exponent", "yarn_temperature")]
    keys += [f"rope.{name}" for name in ("llama3_factor", "llama3_slow", "llama3_fast", "longrope_factors")]
    if old.rope.extension not in (None, "base"):
        keys.append("rope.context")
    if old.attention.similarity == "cosine":  # whose queries are normed, so that they cannot make up for it
        keys.append("attention.softmax_scale")
    for key in keys:
        a, b = (attrgetter(key)(config) for config in (old, new))
        require(a == b, f"model.{key}={b} changes what the weights compute, which have {a}: set model.{key}={a}")
    require(
        old.tie_embeddings or not new.tie_embeddings,
        "model.tie_embeddings=true: embedding and head of the weights are two matrices, which one cannot hold: set "
        "model.tie_embeddings=false",
    )


def _check_sizes(old: ResolvedModel, new: ResolvedModel) -> None:
    keys = ["vocab_size", "d_model", "n_layers", "n_heads", "d_ff"]
    if old.mla:
        keys += [f"mla.{name}" for name in ("d_latent", "d_query_latent", "d_nope", "d_rope", "d_value")]
    else:
        keys += ["n_kv_heads", "d_head"]
    for key in keys:
        a, b = (attrgetter(key)(config) for config in (old, new))
        require(a is None or a <= b, f"model.{key}={b} is below that of the weights: set model.{key}={a} or more")


def _check_heads(old: ResolvedModel, new: ResolvedModel) -> None:
    for what, a, b in (
        ("rotates", old.rotary_width, new.rotary_width),
        ("leaves unrotated", old.head_width - old.rotary_width, new.head_width - new.rotary_width),
    ):
        require(
            a <= b,
            f"model.rope.fraction={new.rope.fraction:g} {what} {b} dimensions of a head of {new.head_width}, fewer "
            f"than the {a} of the weights: set model.rope.fraction={old.rotary_width / new.head_width:g}",
        )
    normed = {"attention.similarity=cosine": old.attention.similarity == "cosine"}
    normed["attention.qk_norm=true"] = old.attention.qk_norm
    for setting, norms_both in normed.items():
        require(
            not norms_both or old.head_width == new.head_width,
            f"model.d_head={new.head_width}: {setting} would have new dimensions be silent in "
            f"query and key, and could not learn: set model.d_head={old.head_width} and grow model.n_heads",
        )


def _check_groups(old: ResolvedModel, new: ResolvedModel) -> None:
    """Refuse groups in which some old query head has no place under a copy of its own key/value head."""
    needed, slots = old.n_heads // old.n_groups, new.n_heads // new.n_groups
    able = [g for g in range(old.n_groups, new.n_heads + 1)
            if new.n_heads % g == 0 and g >= old.n_groups * -(-needed // (new.n_heads // g))]  # fmt: skip
    nearest = min(able, key=lambda g: abs(g - new.n_groups))  # each head its own group is always able
    require(
        new.n_groups in able,
        f"model.n_kv_heads={new.n_groups} with model.n_heads={new.n_heads}: each of the {old.n_groups} "
        f"key/value heads of the weights serves {needed} query heads, and groups of {slots} would need "
        f"{old.n_groups * -(-needed // slots)} of them: set model.n_kv_heads={nearest}",
    )


def _check_logit_scale(old: ResolvedModel, new: ResolvedModel) -> None:
    """Refuse another logit scale with tied embeddings: one matrix can make up for the embedding's scale alone."""
    needed = old.logit_scale * new.embed_scale / (old.embed_scale * (new.d_model / old.d_model))
    require(
        not new.tie_embeddings or math.isclose(new.logit_scale, needed, rel_tol=1e-12),
        f"model.logit_scale={new.logit_scale!r}: with tied embeddings the logits of these weights need "
        f"{needed!r}: set model.logit_scale={needed!r}",
    )


def _check_frequencies(old: ResolvedModel, new: ResolvedModel) -> None:
    """Refuse rotary dimensions among which some pair of the weights does not find its frequency."""
    theta, wider = (frequencies(c.rope, c.rotary_width) for c in (old, new))
    base, ratio = float(old.rope.base), new.rotary_width / old.rotary_width
    remedies = []
    if ratio == 1:
        remedies = [f"model.rope.base={base!r}, that of the weights"]
    elif old.rope.extension not in ("ntk", "ntk_exact", "ntk_mixed"):  # whose frequencies are no powers of another base
        remedies = [f"model.rope.base={base**ratio!r} (base^{ratio:g})"]
        remedies += [f"{base!r}, that of the weights"] if ratio.is_integer() else []
    if ratio != 1 and old.mla is None:
        remedies.append(f"model.rope.fraction={old.rotary_width / new.head_width:g}, which rotates as much as before")
    elif not remedies:
        remedies = [f"model.mla.d_rope={old.rotary_width}"]
    require(
        bool(np.isclose(wider, theta[:, None], rtol=1e-12, atol=0).any(1).all()),
        f"model.rope.base={new.rope.base} on a rotary width of {new.rotary_width} does not have the frequencies of the "
        f"weights, base {base:g} on {old.rotary_width}, and no other can stand for them: set {', or '.join(remedies)}",
    )


def _check_choices(old: ResolvedModel, new: ResolvedModel, choices: Choices) -> None:
    require(0 <= choices.noise < math.inf, f"--noise {choices.noise} must be a number from 0 on")
    require(choices.seed >= 0, f"--seed {choices.seed} must not be negative")
    if new.n_layers > old.n_layers and choices.depth == "pair":
        for name, size in (("d_ff", new.d_ff), ("mla.d_value" if new.mla else "d_head", new.value_width)):
            require(size % 2 == 0, f"model.{name}={size} must be even, since new blocks are pairs: or --depth zero")
    if choices.width == "pad" and choices.noise == 0:
        for letter, key in (("m", "d_model"), ("c", "mla.d_latent"), ("q", "mla.d_query_latent")):
            a, b = (axis_sizes(config).get(letter) for config in (old, new))
            require(
                a == b or _is_read_at_random(letter, old, new, choices),
                f"--noise 0 leaves the new channels of model.{key}={b} without a reader, so that they "
                "would never learn: leave --noise at 1, or use --width copy",
            )
