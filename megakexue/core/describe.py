"""What a config is and costs, in words: the first screen of a run, and what decoding keeps.

cached elements per token and layer:   MHA 2 h d     GQA 2 g d     MQA 2 d     MLA c + p      (10091)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any
from unicodedata import east_asian_width

from megakexue.config import Config, DataConfig, ModelConfig, ResolvedConfig, ResolvedModel
from megakexue.core.costs import flops_per_token, model_state_bytes, muon_flops, n_parameters
from megakexue.core.rope import base_notes

N_SHOWN = 4
"""Sources of a mixture, and mixtures."""
COLUMNS, LINES, INDENT = 80, 20, 12
"""Of the first screen: it fits a terminal of 80 x 24, with room for the first steps; labels are in the indent."""


def cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> dict[str, int]:
    """Return what decoding keeps for each token over all layers, for the model as MHA, GQA, MQA and MLA.

    The kind of the model comes first. The other kinds have sizes that fit it: GQA about a quarter of the heads as
    groups, MLA the proportions of the default, a latent of 4 d and a rotary key of d / 4.
    """
    h, d, e = config.n_heads, config.head_width, config.value_width
    mla = (config.mla.d_latent, config.mla.d_rope) if config.mla else (4 * d, d // 4)
    own = "MLA" if config.mla else "MHA" if config.n_groups == h else "MQA" if config.n_groups == 1 else "GQA"
    divisors = [g for g in range(2, h) if h % g == 0]
    quarter = max((g for g in divisors if g <= h // 4), default=min(divisors, default=1))
    groups = config.n_groups if own == "GQA" else quarter
    elements = {f"MHA of {h} heads": h * (d + e)}
    if groups > 1:
        elements[f"GQA of {groups} groups"] = groups * (d + e)
    elements |= {"MQA": d + e, f"MLA of {mla[0]} + {mla[1]}": sum(mla)}
    elements = dict(sorted(elements.items(), key=lambda item: not item[0].startswith(own)))
    return {name: n * config.n_layers * bytes_per_element for name, n in elements.items()}


def not_default(section: Any, prefix: str = "") -> list[str]:
    """Return as key=value what a config says and its defaults do not, such as optim.lr=0.001."""
    found = []
    for field in fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if value != (field.default if field.default_factory is MISSING else field.default_factory()):
            inner = not_default(value, f"{key}.") if is_dataclass(value) else []
            found += inner or [f"{key}={_plain(value)}"]
    return found


def _plain(value: Any) -> str:
    """A value as it is written in YAML, and after a key=."""
    if is_dataclass(value):
        return "{" + ", ".join(not_default(value)).replace("=", ": ") + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _width(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _cut(word: str) -> str:
    """Take the middle out of a word that no line has room for."""
    start, end = word[: len(word) // 2], word[len(word) // 2 :]
    while _width(word) > COLUMNS - INDENT:
        start, end = start[:-1], end[1:]
        word = f"{start}…{end}"
    return word


def fold(label: str, words: Iterable[str]) -> list[str]:
    """Return lines of at most 80 columns, with the label in the first 12. A longer word has a line, whole."""
    lines, used = [f"{label:<{INDENT - 1}}"], INDENT - 1
    for word in words:
        if used >= INDENT and used + 1 + _width(word) > COLUMNS:
            lines.append(" " * (INDENT - 1))
            used = INDENT - 1
        lines[-1] += f" {word}"
        used += 1 + _width(word)
    return lines


def describe(
    given: Config, config: ResolvedConfig, world_size: int, more: dict[str, str] | None = None,
    rows: Sequence[int] | None = None,
) -> str:  # fmt: skip
    """Return the first screen of a run: what differs from the defaults, what it costs, `more`, and remarks.

    It fits 80 columns and 20 lines: settings that have no room are left to config.yaml. Only a path that is longer
    than a line is not cut. Warnings come in addition.

    Args:
        given: the config as its author wrote it.
        config: the same, resolved.
        more: texts by their labels.
        rows: of each source, whose shares they are without weights; None: not known.
    """
    model, train, stage = config.model, config.train, config.engine.zero_stage
    state = {name: size / 2**20 for name, size in model_state_bytes(config, world_size).items()}
    size = config.engine.sequence_ranks
    n_data_ranks = world_size // size
    ranks = f"{n_data_ranks} x {size} ranks" if size > 1 else f"{world_size} ranks"
    ranks += f" x {train.n_micro_batches(n_data_ranks)} micro-batches x {train.micro_batch_size}"
    tokens, n = config.batch_tokens * train.steps, n_parameters(model)
    flops = flops_per_token(model, (config.data.seq_len + 1) / 2)
    rope = f"rope base {model.rope.base:.6g} on {model.rotary_width} of {model.head_width}"
    if model.rope.extension:
        rope += f", {model.rope.extension} from {model.rope.trained_context} to {model.rope.context} tokens"
    more_flops = muon_flops(model) / config.batch_tokens / flops if config.optim.name == "muon" else 0.0
    texts = {
        "model": f"{n:,} parameters, {flops:.4g} FLOP per token"
        + f", {more_flops:.1%} more for Muon" * (more_flops > 0),
        "scales": f"{model.residual} alpha {model.residual_alpha:.4g}, {model.attention.scale} on "
        f"{model.attention.softmax_scale:.4g}, {rope}",
        "batch": f"{train.global_batch_size} rows x {config.data.seq_len} = {config.batch_tokens:,} tokens: {ranks}"
        + "".join(
            f"; cut to {stage.seq_len} until step {stage.until_step}" for stage in config.data.stages if stage.seq_len
        ),
        "budget": f"{train.steps:,} steps, {tokens:,} tokens, {tokens / n:.1f} a parameter, {tokens * flops:.3g} FLOP",
        "state": f"ZeRO-{stage} {config.engine.dtype}, {sum(state.values()):,.1f} MiB a rank: "
        + ", ".join(f"{name} {size:,.1f}" for name, size in state.items()),
    }
    if len(config.data.sources) > 1 and (rows or any(mixture.weights for mixture in config.data.mixtures)):
        texts["mixture"] = describe_mixtures(config.data, train.steps, rows)
    texts |= more or {}
    notes = base_notes(model)
    warnings = [note for note in notes if note.startswith("WARNING")]
    if len(notes) > len(warnings):
        texts["note"] = "; ".join(note for note in notes if note not in warnings)
    lines = [line for label, text in texts.items() for line in fold(label, text.split())]
    n_rows = sum(math.ceil(_width(line) / COLUMNS) for line in lines)
    return "\n".join(_settings(given, max(1, LINES - n_rows)) + lines + warnings)


def describe_mixtures(data: DataConfig, n_steps: int, rows: Sequence[int] | None = None, *, from_step: int = 1) -> str:
    """Say the share of each source, the largest first, for each part of steps up to `n_steps`: few of many."""
    texts, begin = [], 1
    for mixture in data.mixtures:
        if begin > n_steps or mixture.until_step < from_step:
            begin = mixture.until_step + 1
            continue
        shares = mixture.shares(rows)
        words = ["by rows"]
        if shares:
            named = sorted(zip(shares, data.source_names, data.sources), key=lambda entry: -entry[0])
            words = [f"{name} {x:.1%}{' synthetic' if source.synthetic else ''}" for x, name, source in named if x]
            words = [*words[:N_SHOWN], *([f"{len(words) - N_SHOWN} more"] if len(words) > N_SHOWN else [])]
        until = f" until step {mixture.until_step}" if mixture.until_step < n_steps else ""
        texts.append(", ".join(words) + until)
        begin = mixture.until_step + 1
    return "; ".join([*texts[:N_SHOWN], *([f"{len(texts) - N_SHOWN} more parts"] if len(texts) > N_SHOWN else [])])


def _settings(given: Config, n_lines: int) -> list[str]:
    """What differs from the defaults, in `n_lines` at most."""
    said_below = ("train.run=", "train.steps=", "train.global_batch_size=", "train.micro_batch_size=", "data.seq_len=")
    words = [_cut(setting) for setting in not_default(given) if not setting.startswith(said_below)]
    for n in range(len(words), 0, -1):
        rest = f"... and {len(words) - n} more: config.yaml".split() if n < len(words) else []
        lines = fold("settings", words[:n] + rest)
        if len(lines) <= n_lines:
            break
    return lines


def describe_heads(model: ResolvedModel) -> str:
    """Return lines on the heads, and on what decoding keeps for each token as MHA, GQA, MQA and MLA."""
    heads = f"{model.n_heads} of {model.head_width} in {model.n_groups} groups"
    if model.mla:
        queries = f"from {model.mla.d_query_latent}" if model.mla.d_query_latent else "straight from the stream"
        heads = (
            f"MLA, {model.n_heads} of {model.mla.d_nope} + {model.mla.d_rope} and values of {model.value_width} from a "
            f"latent of {model.mla.d_latent}, queries {queries}"
        )
    sizes = ", ".join(f"{name} {size:,} bytes" for name, size in cache_bytes_per_token(model).items())
    return "\n".join(fold("heads", heads.split()) + fold("cache", f"per token in 16 bits: {sizes}".split()))
