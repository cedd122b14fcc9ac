"""Every setting of a run in one place: frozen dataclasses, filled from defaults, a YAML file and `key=value` arguments.

A section of the YAML, its class, its module and its test have one name: `optim:` is `OptimConfig` is
`megakexue/core/optim.py` is `tests/core/test_optim.py`. What can be computed from other fields is a property or a
function, never a field. A config does not change after it is loaded.

A class checks its own fields in `__post_init__`; `Config` checks fields of different sections against each other.

This module imports neither torch nor any other module of ours. So a launch script on a login node can refuse a bad
config in a third of a second.

Units end a name (`seq_len` in tokens, `timeout_s`, `warmup_steps`); counts begin with `n_`, widths with `d_`. `None`
means "off" or "chosen for you"; the docstring of the field says which.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import posixpath
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Status = Literal["applied", "skipped", "shrunk", "rolled back"]
"""How an optimizer step ends: in exactly one of these ways, the same on all ranks."""
Recompute = Literal["none", "product", "feed_forward", "block"]
"""What the backward pass computes again, from least to most."""
Extension = Literal["base", "interpolate", "ntk", "ntk_exact", "ntk_mixed", "yarn", "llama3", "longrope"]
"""How the angles of RoPE change for a longer context."""

IGNORED = -100
"""The target of a position that predicts nothing."""

LOSS_CHUNK = {"cpu": 512, "cuda": 4096}
"""Tokens whose logits exist at a time in the loss, by device. CPU: they fit the cache; CUDA: few launches, and products
that are fast."""

PREEMPTED = 75
"""Exit code of a run that was ended by a signal and has saved itself. It is EX_TEMPFAIL of sysexits.h: try again."""

Place = Annotated[str, "a path"]
"""The type of a field that names a file or a folder: a leading ~ is the home folder."""

BOUND = 2**63
"""Every number of a config is below it, so that seeds, counters and tensors can hold it."""

MAX_CONTEXT = 2**26
"""Tokens in the longest row or context. The search for a RoPE base looks at each distance in it."""

MAX_HEAD_WIDTH = 2**16
"""The same search takes memory for each pair of a head."""

YEAR_S = 31_536_000
"""The longest time that a setting may have: what waits for it cannot count arbitrarily far."""


class UserError(ValueError):
    """Something that a user wrote is wrong. The message is one line: what, where, what to do. Exit code 2."""


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`, and end it without a traceback where a user or his machine did something.

    A `UserError` is one line on stderr and exit code 2, and so is a stdout that cannot be written. If the reader of
    stdout has left, as in `| head`, the program ends in silence, with the exit code of SIGPIPE.
    """
    try:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            # None: it was closed before the start. And a failure of the program itself goes first
            if sys.stdout and not isinstance(sys.exc_info()[1], Exception):
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError:
        try:
            print(flush=True)  # an empty line, if something else has failed
        except OSError as failure:
            mute_stdout()
            if isinstance(failure, BrokenPipeError):
                sys.exit(128 + signal.SIGPIPE)
            print(f"error: cannot write the output: {failure}", file=sys.stderr)
            sys.exit(2)
        raise


def mute_stdout() -> None:
    """Let what is written to stdout go nowhere, what it still holds too: Python writes that when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# --- checks that many fields share -----------------------------------------------------------------------------------
# A key names a field as the YAML does, such as optim.lr; its last part is the attribute of `section`. None passes.


def _each(section: Any, keys: tuple[str, ...], holds: Callable[[float], bool], rule: str) -> None:
    """Require numbers for which `holds` is true; `rule` is what the message says that they must do."""
    for key in keys:
        value = getattr(section, key.rpartition(".")[2])
        require(value is None or holds(value), f"{key}={value} must {rule}")
        require(value is None or value < BOUND, f"{key}={value} is too large: it must be below 2^63")


def positive(section: Any, *keys: str, alternative: str = "") -> None:
    """Require numbers above 0 and below 2^63. `alternative` ends the message: what else the user may write."""
    _each(section, keys, lambda value: value > 0, f"be positive{alternative}")


def not_negative(section: Any, *keys: str) -> None:
    """Require numbers of 0 or more, below 2^63."""
    _each(section, keys, lambda value: value >= 0, "not be negative")


def above_one(section: Any, *keys: str) -> None:
    """Require numbers above 1 and below 2^63."""
    _each(section, keys, lambda value: value > 1, "be above 1")


def at_most(section: Any, limit: int, *keys: str) -> None:
    """Require numbers up to a limit, beyond which no machine could make what they ask for."""
    _each(section, keys, lambda value: value <= limit, f"be at most {limit}")


def seconds(section: Any, *keys: str) -> None:
    """Require times that a timer can wait for."""
    _each(section, keys, lambda value: 0.001 <= value <= YEAR_S, f"be between 0.001 and {YEAR_S} seconds, a year")


def name_sources(paths: list[str]) -> list[str]:
    """Return a short name for each source: the last part of its path, or the path where two have the same."""
    names = [Path(path).name for path in paths]
    return [path if names.count(name) > 1 else name for name, path in zip(names, paths)]


def multiple(section: Any, key: str, divisor_key: str, remedy: str = "") -> None:
    """Require that one number is above 0 and a multiple of another one. `remedy` ends the message."""
    value, divisor = (getattr(section, k.rpartition(".")[2]) for k in (key, divisor_key))
    fits = value is None or divisor is None or (value > 0 and value % divisor == 0)
    require(fits, f"{key}={value} must be a multiple of {divisor_key}={divisor}{remedy}")


def no_effect(section: Any, key: str, reason: str) -> None:
    """Require that an unused field has its default. `reason`: the setting that makes it useless, and the remedy."""
    name = key.rpartition(".")[2]
    value, default = getattr(section, name), getattr(type(section), name)
    require(value == default, f"{key}={value} has no effect with {reason}")


# --- the sections ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base, and how weights go on to a longer context."""

    base: int | float | str = "auto"
    """A number, or `auto`: chosen for `context` tokens by the bound rule (10122)."""
    rule: Literal["safe", "infimum"] = "safe"
    """What `auto` takes. safe: a base above which all bases are valid. infimum: the smallest valid base; bases a little
    above it may be invalid again."""
    context: int | None = None
    """Tokens that the base must serve. None: `data.seq_len`."""
    fraction: float = 1.0
    """Share of a GQA head that is rotated: its last part. For MLA, set `model.mla.d_rope` instead."""
    extension: Extension | None = None
    """How to finetune weights, trained for `trained_context` tokens, for the longer `context`.
    With k = context / trained_context:
    base: use a new base;
    interpolate: divide all angles by k;
    ntk: multiply the base by k (9675);
    ntk_exact: multiply the base by k^(d/(d-2)), which divides the lowest frequency by exactly k;
    ntk_mixed: divide the frequency of pair i by exp(a i^ntk_mixed_exponent), with a such that the last pair is divided
    by k (9706);
    yarn: keep the fast pairs, interpolate the slow ones (9948);
    llama3: the same with the bounds and the division of Llama 3.1 (arXiv 2407.21783), see `llama3_factor`;
    longrope: divide the frequency of each pair by a number of its own, see `longrope_factors`.
    None: the weights are not trained yet, or keep their context."""
    trained_context: int | None = None
    """Tokens that the weights were trained for. Only `extension` uses it."""
    ntk_mixed_exponent: float = 0.625
    """1 is NTK-fixed; towards 0 it becomes interpolation (9706)."""
    yarn_temperature: bool | None = None
    """Whether yarn multiplies the attention scores by (0.1 ln k + 1)^2 (9948). None: yes, when `attention.scale` is
    constant. The other scales have a temperature of their own, so with them you must say true or false."""
    llama3_factor: float | None = None
    """What llama3 divides the angles of slow pairs by. None: k."""
    llama3_slow: float = 1.0
    """A pair that takes fewer turns than this in the trained context is slow (`low_freq_factor`)."""
    llama3_fast: float = 4.0
    """A pair that takes more turns than this keeps its angle (`high_freq_factor`); between the two it is a mixture."""
    longrope_factors: list[float] | None = None
    """What longrope divides the frequencies by, a number for each rotated pair, the fastest first (arXiv 2402.13753).
    They are those of the weights at all lengths, so `trained_context` may be `context`."""

    def __post_init__(self) -> None:
        if isinstance(self.base, str):
            require(self.base == "auto", f"model.rope.base={self.base!r} must be a number or 'auto'")
        else:
            # narrow heads in a long context need more than 2^63
            require(1 < self.base < math.inf, f"model.rope.base={self.base} must be above 1 and finite")
        positive(self, "model.rope.context")
        at_most(self, MAX_CONTEXT, "model.rope.context", "model.rope.trained_context")
        require(0 < self.fraction <= 1, f"model.rope.fraction={self.fraction} must be in (0, 1]")
        above_one(self, "model.rope.trained_context")
        trained = self.trained_context
        require(
            self.context is None or self.is_longer(self.context),
            f"model.rope.trained_context={trained} must be below model.rope.context={self.context}, the longer one: "
            "without a longer context, set model.rope.extension=null",
        )
        if not isinstance(self.base, str):
            no_effect(self, "model.rope.rule", f"model.rope.base={self.base}: set the base to auto")
        require(
            (self.extension is None) == (trained is None),
            f"model.rope.extension={self.extension} does not fit model.rope.trained_context={trained}: an extension "
            "needs the tokens that the weights were trained for, and nothing else uses them",
        )
        if self.extension != "ntk_mixed":
            no_effect(self, "model.rope.ntk_mixed_exponent", f"model.rope.extension={self.extension}: use ntk_mixed")
        exponent = self.ntk_mixed_exponent
        require(0 < exponent <= 1, f"model.rope.ntk_mixed_exponent={exponent} must be in (0, 1]; for 0 use interpolate")
        if self.extension != "yarn":
            no_effect(self, "model.rope.yarn_temperature", f"model.rope.extension={self.extension}: use yarn")
        self._check_llama3()
        if self.extension != "longrope":
            no_effect(self, "model.rope.longrope_factors", f"model.rope.extension={self.extension}: use longrope")
        factors = self.longrope_factors
        require(
            self.extension != "longrope" or (factors is not None and all(factor > 0 for factor in factors)),
            f"model.rope.longrope_factors={_shown(factors)} must be positive numbers, one for each rotated pair",
        )

    def is_longer(self, context: int) -> bool:
        """Whether an extension, if there is one, can be to so many tokens."""
        trained = self.trained_context
        return trained is None or trained < context or (self.extension == "longrope" and trained == context)

    def _check_llama3(self) -> None:
        if self.extension != "llama3":
            for name in ("llama3_factor", "llama3_slow", "llama3_fast"):
                no_effect(self, f"model.rope.{name}", f"model.rope.extension={self.extension}: use llama3")
        positive(self, "model.rope.llama3_factor", "model.rope.llama3_slow", "model.rope.llama3_fast")
        require(
            self.llama3_slow < self.llama3_fast,
            f"model.rope.llama3_slow={self.llama3_slow} must be below model.rope.llama3_fast={self.llama3_fast}",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    backend: Literal["auto", "flash", "varlen", "flex", "sdpa", "blocked", "reference"] = "auto"
    """auto: the first that works here, in the order of megakexue/core/attention.py. The run prints which it took, and
    why."""
    scale: Literal["log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"] = "log_n"
    """What multiplies the scores q.k / sqrt(d). n is the number of keys that the query sees in its own document.
    log_n: ln(max(n, floor)) / ln(base) (8823);
    log_n_clipped: max(1, ln n / ln base), for weights that were trained without such a factor (9706);
    constant: 1;
    gradient_max: 0.84 sqrt(ln max(n, floor)) (9812);
    gradient_max_constant: 2.5 (9812)."""
    log_n_base: float | None = None
    """The `base` in log_n and log_n_clipped. None: 512 for log_n; for log_n_clipped the tokens that the weights were
    trained for."""
    log_n_floor: int | None = None
    """The `floor` in log_n and gradient_max. None: 16."""
    similarity: Literal["dot", "key_norm", "cosine"] = "dot"
    """dot: scores are q.k / sqrt(d);
    key_norm: q.k / |k|, without the 1 / sqrt(d);
    cosine: 4 ln(n) cos(q, k), where n is fixed to context / 2 with scale=constant (9859)."""
    softmax_scale: float | None = None
    """The constant part of the factor. None: 1 / sqrt(head width) for dot; 1 for key_norm and cosine; 4 ln(context / 2)
    for cosine with scale=constant. A bundle holds it as a number, since a longer context must not change it."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias, as in Qwen2. It starts at 0, and moves as the gains of norms do:
    at half of tiger's rate, without decay."""
    qk_norm: bool = False
    """Whether the queries and keys of each head pass an RMS norm with a gain before they are rotated, as in Qwen3
    (QK-Norm, arXiv 2010.04245). It bounds the scores, so that larger rates are stable."""

    def __post_init__(self) -> None:
        above_one(self, "model.attention.log_n_base", "model.attention.log_n_floor")
        if self.scale not in ("log_n", "log_n_clipped") or self.similarity == "cosine":
            reason = f"scale={self.scale}, similarity={self.similarity}: leave it null"
            no_effect(self, "model.attention.log_n_base", reason)
        if self.scale not in ("log_n", "gradient_max"):
            no_effect(self, "model.attention.log_n_floor", f"scale={self.scale}: leave it null")
        require(
            self.similarity != "cosine" or self.scale in ("log_n", "constant"),
            f"model.attention.similarity=cosine does not fit scale={self.scale}: use log_n (4 ln n) or constant "
            "(4 ln(context / 2))",
        )
        positive(self, "model.attention.softmax_scale")
        require(
            not self.qk_norm or self.similarity == "dot",
            f"model.attention.qk_norm=true does not fit similarity={self.similarity}, which is a norm without a gain: "
            "use one of them",
        )


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """The widths of multi-head latent attention (10091, DeepSeek-V2)."""

    d_latent: int = 512
    """Width of the latent that keys and values are made from. The cache holds this latent."""
    d_query_latent: int | None = None
    """Width of the latent that queries are made from. None: no such latent; queries come straight from the stream."""
    d_nope: int = 96
    """Width of the part of a query or key head that is not rotated."""
    d_rope: int = 32
    """Width of the part that is rotated; all heads share its key. Every kernel takes 96 + 32 beside values of 128."""
    d_value: int = 128
    """Width of a value head."""

    def __post_init__(self) -> None:
        positive(self, "model.mla.d_latent", "model.mla.d_query_latent", "model.mla.d_nope")
        positive(self, "model.mla.d_rope", "model.mla.d_value")
        at_most(self, MAX_HEAD_WIDTH, "model.mla.d_nope", "model.mla.d_rope", "model.mla.d_value")
        at_most(self, 2**31, "model.mla.d_latent", "model.mla.d_query_latent")
        require(self.d_rope % 2 == 0, f"model.mla.d_rope={self.d_rope} must be even, since RoPE rotates pairs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder. A bundle holds this section with every scale as a number.

    In a file or on the command line, `from: bundle` takes the section of the bundle `train.init_from`, all but
    attention.backend; other keys beside it go on top. With another `rope.extension` on top, and if they are not given:
    rope.trained_context is the bundle's context, rope.context is data.seq_len, and the base is `auto` where it changes.
    """

    vocab_size: int
    """Rows of the embedding: at least the number of the tokenizer's pieces."""
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    """Width inside the feed-forward part."""
    n_kv_heads: int | None = None
    """Key/value heads of grouped-query attention (GQA). 1 is MQA. None: n_heads, which is MHA."""
    d_head: int | None = None
    """Width of a head. None: d_model / n_heads."""
    mla: MlaConfig | None = None
    """If given, even as {}: multi-head latent attention of these widths instead of grouped-query attention."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    tie_embeddings: bool = False
    """Whether the head uses the weights of the input embedding. With deepnorm, whose stream stays close to the
    embedding, such models learned far more slowly in the runs of docs/experiments.md: prefer prenorm with it."""
    norm_eps: float = 1e-6
    """Added to the mean square in each RMS norm."""
    residual: Literal["deepnorm", "prenorm"] = "deepnorm"
    """deepnorm: x = norm(alpha x + F(x)) (8978, DeepNet); prenorm: x = x + F(norm(x))."""
    deepnorm_recipe: Literal["auto", "paper", "sgd", "adam", "lamb"] = "auto"
    """Which row of 8978 gives alpha and the initial gain. auto: lamb for tiger, adam for the others."""
    residual_alpha: float | None = None
    """The alpha of deepnorm. None: from the recipe. A bundle holds it as a number, since it belongs to the weights."""
    branch_gain: float | None = None
    """Gain of a whole residual branch at initialisation. None: from the recipe."""
    gain_centre: float = 1.0
    """Value at which the gains of norms start, and towards which the guard's shrink draws them. Growth keeps it."""
    embed_scale: float | None = None
    """Multiplies the rows of the embedding. None: sqrt(d_model), so that the stream starts at RMS 1."""
    logit_scale: float | None = None
    """Multiplies the logits. None: 1 for an untied head, ln(vocab_size) / (2 sqrt(d_model)) for a tied one (9698)."""

    def __post_init__(self) -> None:
        positive(self, "model.vocab_size", "model.d_model", "model.n_layers", "model.n_heads", "model.n_kv_heads")
        positive(self, "model.d_head", "model.d_ff")
        at_most(self, 2**31, "model.vocab_size", "model.d_model", "model.d_ff", "model.n_heads", "model.n_kv_heads")
        at_most(self, 2**16, "model.n_layers")
        if self.mla is None:
            self._check_heads()
        else:
            self._check_mla()
        require(
            self.rope.extension != "yarn"
            or self.attention.scale == "constant"
            or self.rope.yarn_temperature is not None,
            f"model.rope.extension=yarn and model.attention.scale={self.attention.scale} are both temperatures of the "
            "softmax: set model.rope.yarn_temperature=false for the second alone, or true for their product",
        )
        factors = self.rope.longrope_factors
        require(
            factors is None or 2 * len(factors) == self.rotary_width,
            f"model.rope.longrope_factors has {len(factors or [])} numbers, and RoPE rotates {self.rotary_width // 2} "
            "pairs: give one for each",
        )
        positive(self, "model.norm_eps", "model.gain_centre", "model.residual_alpha", "model.branch_gain")
        positive(self, "model.embed_scale", "model.logit_scale")
        self._check_recipe()

    def _check_heads(self) -> None:
        multiple(self, "model.n_heads", "model.n_kv_heads", f": set model.n_kv_heads to a divisor of {self.n_heads}")
        if self.d_head is None:
            multiple(self, "model.d_model", "model.n_heads", ": change one, or set model.d_head")
        width = self.head_width
        require(
            width <= MAX_HEAD_WIDTH,
            f"a head width (model.d_head) of {width} must be at most {MAX_HEAD_WIDTH}",
        )
        rotated = self.rope.fraction * self.head_width
        require(
            abs(rotated - self.rotary_width) < 1e-3 and self.rotary_width % 2 == 0 and self.rotary_width > 0,
            f"model.rope.fraction={self.rope.fraction:g} of a head width (model.d_head) of {self.head_width} is "
            f"{rotated:.4g}, which must be an even number, since RoPE rotates pairs",
        )

    def _check_mla(self) -> None:
        own = "model.mla: leave it null; model.mla has the widths, and every head its own keys"
        no_effect(self, "model.n_kv_heads", own)
        no_effect(self, "model.d_head", own)
        no_effect(self.rope, "model.rope.fraction", "model.mla: set model.mla.d_rope")
        require(
            self.attention.similarity == "dot",
            f"model.attention.similarity={self.attention.similarity} needs each head's keys, which the cache of "
            "model.mla does not hold: use dot",
        )
        for name in ("qkv_bias", "qk_norm"):
            no_effect(self.attention, f"model.attention.{name}", "model.mla: its latents have norms of their own")

    def _check_recipe(self) -> None:
        if self.residual != "deepnorm":
            other = f"model.residual={self.residual}: use deepnorm, or leave"
            no_effect(self, "model.deepnorm_recipe", f"{other} the recipe at auto")
            if self.residual_alpha != 1:  # what a prenorm bundle holds
                no_effect(self, "model.residual_alpha", f"{other} it null")
        require(
            self.deepnorm_recipe == "auto" or self.residual_alpha is None or self.branch_gain is None,
            f"model.deepnorm_recipe={self.deepnorm_recipe} has no effect beside model.residual_alpha and "
            "model.branch_gain: leave it at auto, or these null",
        )

    @property
    def n_groups(self) -> int:
        """Number of key/value heads. In MLA each head has its own."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def head_width(self) -> int:
        """Width of a query or key head."""
        if self.mla is not None:
            return self.mla.d_nope + self.mla.d_rope
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def value_width(self) -> int:
        """Width of a value head."""
        return self.mla.d_value if self.mla is not None else self.head_width

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that RoPE rotates."""
        return self.mla.d_rope if self.mla is not None else round(self.rope.fraction * self.head_width)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of prepared data."""

    path: Place
    """A folder written by tools/prepare_data.py. It is a local path, or s3://, gs://, ... for a copy in a bucket.
    file:// treats a mounted folder as remote: its shards are then cached on the local disk."""
    weight: float | None = None
    """Share of the mixture, relative to the other weights. None in all sources: shares by the number of rows. With
    weights in `data.stages` it is the weight after the last stage, and may be 0."""
    synthetic: bool = False
    """Whether models wrote the text. `data.max_synthetic` caps the share of such sources (9687)."""

    def __post_init__(self) -> None:
        if self.weight is not None:
            _check_weight(self.weight, "data.sources: weight")

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def place(self) -> str:
        """The folder by a name that it has alone: no slash too many, and behind all links."""
        scheme, is_remote, path = self.path.rpartition("://")
        if scheme in ("", "file"):
            return os.path.realpath(path)
        return f"{scheme}{is_remote}{posixpath.normpath(path)}"


def _check_weight(weight: float, key: str) -> None:
    # beyond these bounds, the share of a source could not be computed
    require(weight == 0 or 1e-9 <= weight <= 1e9, f"{key}={weight} must be positive, from 1e-9 to 1e9, or 0")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Steps that train on shorter rows, or on another mixture of the sources."""

    until_step: int
    """The last of these steps. They begin after those of the stage before, or with the first."""
    seq_len: int | None = None
    """Tokens in a row, a divisor of data.seq_len: each row of a step is cut into rows of this length. None:
    data.seq_len."""
    weights: dict[str, float] | None = None
    """Weight of each source in these steps, by the last part of its path, such as {web: 9, code: 1}; 0 is none of it.
    None: the weights in `data.sources`."""

    def __post_init__(self) -> None:
        positive(self, "data.stages.until_step")
        above_one(self, "data.stages.seq_len")
        for name, weight in (self.weights or {}).items():
            _check_weight(weight, f"data.stages.weights: {name}")
        require(
            self.seq_len is not None or self.weights is not None,
            f"data.stages: the stage until_step={self.until_step} changes nothing: give it seq_len or weights",
        )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Steps that take their rows from the sources in the same shares."""

    until_step: int
    """The last of them."""
    weights: list[float] | None
    """Of each source in the order of `data.sources`. None: shares by the number of rows."""

    def shares(self, rows: Sequence[int] | None = None) -> list[float] | None:
        """Return the share of each source. None: without weights it needs the `rows` of each."""
        weights = rows if self.weights is None else self.weights
        return None if weights is None else [weight / math.fsum(weights) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: list[SourceConfig]
    tokenizer: Place
    """Path of the tokenizer.model or tokenizer.json that the sources were prepared with. Its hash is checked."""
    seq_len: int
    """Tokens in a row that the model sees: the row length that tools/prepare_data.py was given, or a divisor of it, so
    that a prepared row makes several."""
    stages: list[StageConfig] = field(default_factory=list)
    """The first steps on shorter rows or other weights, such as [{until_step: 1000, seq_len: 256}, {until_step: 5000,
    weights: {web: 9, code: 1}}]; the steps after the last stage have rows of `seq_len` and the weights of `sources`.
    Rows are cut within a micro-batch, so each step has the same tokens in any stage. `seq_len` stays the unit of batch
    sizes, of positions in the data and of validation, and the default of model.rope.context."""
    max_synthetic: float | None = None
    """Largest share of rows that the sources with `synthetic: true` may have together, in each stage (9687). A config
    above it is refused. None: no limit."""
    shuffle: bool = True
    shuffle_seed: int = 0
    cache: Place | None = None
    """Folder for shards of remote sources. None: `cache` in the run folder, which only this run uses."""
    cache_limit: str | None = None
    """Most bytes of shards that each node keeps on disk, such as 200gb. None: no limit."""
    download_retries: int = 3
    """How often a download is tried again after it failed."""
    download_timeout_s: float = 120.0
    """Seconds after which a download counts as failed."""
    n_prefetch: int = 8
    """Micro-batches that each rank reads ahead."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty: name a folder written by tools/prepare_data.py")
        weighted = {source.weight is not None for source in self.sources}
        require(len(weighted) == 1, "data.sources: give every source a weight, or none (then rows count)")
        for i, source in enumerate(self.sources):
            same = [other.path for other in self.sources[:i] if other.place == source.place]
            require(not same, f"data.sources names a folder twice: {[*same, source.path]}")
        above_one(self, "data.seq_len")
        at_most(self, MAX_CONTEXT, "data.seq_len")
        self._check_stages()
        self._check_weights()
        cap = self.max_synthetic
        require(cap is None or 0 <= cap <= 1, f"data.max_synthetic={cap} is a share: it must be from 0 to 1")
        positive(self, "data.n_prefetch")
        not_negative(self, "data.shuffle_seed", "data.download_retries")
        at_most(self, 100, "data.download_retries")
        seconds(self, "data.download_timeout_s")

    def _check_stages(self) -> None:
        for before, stage in itertools.pairwise(self.stages):
            require(
                before.until_step < stage.until_step,
                f"data.stages.until_step={stage.until_step} comes after {before.until_step}: each stage must end later "
                "than the one before",
            )
        for stage in self.stages:
            require(
                stage.seq_len is None or self.seq_len % stage.seq_len == 0,
                f"data.stages.seq_len={stage.seq_len} must divide data.seq_len={self.seq_len}, the longest "
                "rows, which are cut",
            )

    def seq_len_at(self, step: int) -> int:
        """Tokens in a row of a step, counted from 1."""
        return next((stage.seq_len for stage in self.stages if step <= stage.until_step), None) or self.seq_len

    def _check_weights(self) -> None:
        names = self.source_names
        for stage in (stage for stage in self.stages if stage.weights is not None):
            given = stage.weights or {}
            where = f"data.stages: the weights until_step={stage.until_step}"
            unknown = [name for name in given if name not in names]
            require(not unknown, f"{where} name {unknown[:1]}, which is no source: data.sources has {_shown(names)}")
            missing = [name for name in names if name not in given]
            require(not missing, f"{where} lack {_shown(missing)}: name each source; 0 is none of it")
            require(any(given.values()), f"{where} are all 0: give at least one source a weight")
        for source, name in zip(self.sources, names):
            require(
                source.weight != 0 or any((stage.weights or {}).get(name) for stage in self.stages),
                f"data.sources: weight={source.weight} must be positive, since no stage reads {name}: or leave it out",
            )
        is_read = any(source.weight != 0 for source in self.sources)
        require(is_read, "data.sources: every weight is 0: give a source one, for the steps after the last stage")

    @property
    def source_names(self) -> list[str]:
        """A short name for each source: the last part of its path, or the path where two have the same."""
        return name_sources([source.path for source in self.sources])

    @property
    def mixtures(self) -> list[Mixture]:
        """The mixtures in turn. Steps that follow one another in the same shares are one; the last has no end."""
        names, last = self.source_names, [source.weight for source in self.sources if source.weight is not None] or None
        ends = [*((stage.until_step, stage.weights) for stage in self.stages), (BOUND, None)]
        of_stages = [
            Mixture(until_step=end, weights=last if given is None else [given[name] for name in names])
            for end, given in ends
        ]
        pairs = itertools.pairwise([*of_stages, None])
        return [one for one, following in pairs if one and not (following and one.shares() == following.shares())]

    def check_synthetic(self, n_steps: int, rows: Sequence[int] | None = None) -> None:
        """Refuse a mixture of the first `n_steps` steps with more synthetic text than `max_synthetic`.

        Args:
            rows: of each source, for mixtures without weights; None: these are not checked.

        Raises:
            UserError: it names the sources, their share and the steps.
        """
        if self.max_synthetic is None:
            return
        begin, is_synthetic = 1, [source.synthetic for source in self.sources]
        for mixture in self.mixtures:
            shares, end = mixture.shares(rows) or [], min(mixture.until_step, n_steps)
            of = {n: x for n, x, made in zip(self.source_names, shares, is_synthetic) if made and x}
            require(
                begin > n_steps or sum(of.values()) <= self.max_synthetic + 1e-9,
                f"data.max_synthetic={self.max_synthetic}, but in steps {begin} to {end} the synthetic sources have a "
                f"share of {sum(of.values()):.4g} ({', '.join(f'{n} {x:.4g}' for n, x in of.items())}): lower their "
                "weights, add other text, or raise data.max_synthetic",
            )
            begin = end + 1


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is added to the cross-entropy. What is logged as the loss is the cross-entropy alone."""

    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 for each target token. 1e-4 is usual; 0 is off."""
    emo: bool = False
    """For finetuning: train on half cross-entropy, half EMO. EMO compares tokens by the rows of the head that training
    started from (9797)."""
    emo_max_ratio: float = 3.0
    """EMO gets the weight that makes it as large as the cross-entropy of its token, but at most this weight."""

    def __post_init__(self) -> None:
        not_negative(self, "loss.z_loss")
        positive(self, "loss.emo_max_ratio")
        if not self.emo:
            no_effect(self, "loss.emo_max_ratio", "loss.emo=false")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["tiger", "lion", "adamw", "muon"] = "tiger"
    """Which rule moves the weights. muon is for the matrices of attention and feed-forward (10592, 10739): AdamW moves
    embedding, head, gains and biases, at the same rate and decay, with betas of 0.9 and 0.95."""
    lr: float | None = None
    """Peak learning rate; the schedule's factor multiplies it. For tiger it is relative: each element of a matrix moves
    by lr RMS(matrix), each element of a gain by lr / 2 (9512). None: tiger 1e-3, the others 3e-4."""
    beta1: float | None = None
    """Decay of the momentum. None: tiger 0.965 and muon 0.95, each its only beta; lion 0.95; adamw 0.9."""
    beta2: float | None = None
    """None: lion 0.98, adamw 0.95."""
    eps: float = 1e-8
    """The eps of adamw, of what muon leaves to it, and of `embedding: adamw`."""
    weight_decay: float | None = None
    """Decoupled decay of matrices and embeddings. Gains never decay. None: tiger and lion 0.01, adamw and muon 0.1."""
    rms_floor: float = 1e-3
    """tiger: a matrix or row with a smaller RMS counts as if it had this RMS. So even one that is all zero learns."""
    embedding: Literal["lazy", "dense", "adamw"] | None = None
    """How tiger and lion move the input embedding, whose rare rows would otherwise drift to 1 / weight_decay (9736).
    lazy: a row moves only in a step that gave it a gradient;
    dense: every row moves in every step, like any other weight;
    adamw: by AdamW with betas of 0.9 and 0.95.
    None: lazy; but dense when it is tied to the head, which gives every row a gradient."""
    embedding_lr: float | None = None
    """Peak learning rate of `embedding: adamw`. It is absolute, as AdamW's are. None: 3e-4."""
    accumulate: Literal["gradient", "momentum"] = "gradient"
    """Where the gradients of micro-batches are added up.
    gradient: in a gradient of the training dtype;
    momentum (tiger only): in tiger's fp32 momentum, with no other buffer (8634). `clip` then applies to each
    micro-batch."""
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of tiger's momentum."""
    schedule: Literal["cosine", "wsd", "piecewise"] = "cosine"
    """What the factor of `lr` does after warmup.
    cosine: it falls to final_lr at train.steps;
    wsd: it is constant, then falls to final_lr on a line over the last decay_steps;
    piecewise: it follows straight lines through `points`, and is constant after the last of them (9512)."""
    warmup_steps: int = 100
    """Steps in which the factor rises from 0 to 1, on a line."""
    decay_steps: int | None = None
    """Steps of the final decay of `wsd`."""
    final_lr: float = 0.1
    """Factor at the last step of cosine and wsd."""
    points: dict[int, float] = field(default_factory=dict)
    """`step: factor` pairs of `piecewise`. If step 0 is missing, it starts from (0, 0): the first point is then the end
    of its warmup."""
    clip: Literal["min", "smooth"] | None = "min"
    """How a gradient g is clipped to c = clip_norm. min: g min(1, c / |g|); smooth: g c / (|g| + c) (7469). None: not
    at all."""
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "optim.lr", "optim.eps", "optim.rms_floor", "optim.embedding_lr")
        not_negative(self, "optim.weight_decay")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"optim.{name}={value} must be in [0, 1)")
        self._check_rules()
        positive(self, "optim.clip_norm", alternative="; optim.clip=null turns it off")
        require(0 <= self.final_lr <= 1, f"optim.final_lr={self.final_lr} is a factor: it must be in [0, 1]")
        self._check_schedule()

    def _check_rules(self) -> None:
        """Refuse what the rule does not use."""
        if self.name in ("tiger", "muon"):
            no_effect(self, "optim.beta2", f"optim.name={self.name}, whose one beta is optim.beta1: leave it null")
        if self.name in ("adamw", "muon"):
            no_effect(self, "optim.embedding", f"optim.name={self.name}: leave it null")
        if self.embedding != "adamw":
            no_effect(self, "optim.embedding_lr", f"optim.embedding={self.embedding}: use adamw")
        for name in ("accumulate", "momentum_dtype", "rms_floor"):
            value, default = getattr(self, name), getattr(OptimConfig, name)
            refusal = f"optim.{name}={value} is for optim.name=tiger, not {self.name}: leave it at {default}"
            require(self.name == "tiger" or value == default, refusal)
        require(
            self.accumulate == "gradient" or self.embedding != "adamw",
            "optim.embedding=adamw needs the whole gradient: set optim.accumulate=gradient",
        )
        if self.name != "muon" and "adamw" not in (self.name, self.embedding):
            no_effect(self, "optim.eps", f"optim.name={self.name}: leave it at 1e-8")

    def _check_schedule(self) -> None:
        not_negative(self, "optim.warmup_steps")
        positive(self, "optim.decay_steps")
        if self.schedule == "piecewise":
            require(
                all(step >= 0 and 0 <= factor < math.inf for step, factor in self.points.items()),
                f"optim.points={self.points}: steps and factors must not be negative",
            )
            require(len(self.points) > 0, "optim.schedule=piecewise needs optim.points, such as {1000: 1, 5000: 0.1}")
            require(
                self.warmup_steps == 0,
                f"optim.warmup_steps={self.warmup_steps} has no effect with optim.schedule=piecewise: set it to 0; "
                "the first of optim.points is the warmup",
            )
        else:
            require(not self.points, f"optim.points has no effect with optim.schedule={self.schedule}: use piecewise")
        require(
            (self.decay_steps is not None) == (self.schedule == "wsd"),
            f"optim.decay_steps={self.decay_steps} does not fit optim.schedule={self.schedule}: "
            "wsd needs it, the others do not use it",
        )

    def rule(self, role: str) -> str:
        """Return the rule that moves a parameter of this role of the axis table: tiger, lion, muon or adamw."""
        if self.name == "muon" and role != "matrix":
            return "adamw"
        return "adamw" if role == "embedding" and self.embedding == "adamw" else self.name

    def state_dtypes(self, role: str) -> dict[str, str]:
        """Return the state tensors that a parameter of this role has beside its master, and their dtypes by name."""
        if self.rule(role) == "adamw":
            return {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
        return {"momentum": self.momentum_dtype}


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens at losses and gradients that are not finite, or far too large."""

    on_nonfinite: Literal["shrink", "skip", "stop", "rollback"] = "skip"
    """What all ranks do together when the loss or a gradient is not finite on any of them.
    shrink: tensors with such a gradient move a little towards their centre, the others train on (9512);
    skip: nothing changes in this step;
    stop: nothing changes in this step, and the run ends;
    rollback: the weights of the last checkpoint come back, and the batches since then are left out.
    If the loss is finite but a gradient overflows fp16, the loss scale was too large: the step is skipped."""
    shrink_ratio: float = 0.99
    """shrink: w becomes (w - c) shrink_ratio + c, where c is model.gain_centre for gains and 0 for the rest (9512)."""
    on_spike: Literal["log", "skip", "rollback"] | None = "log"
    """What happens when the loss or the gradient norm is far above that of the last `spike_window` steps.
    log: a warning. skip and rollback: as for `on_nonfinite`. None: off."""
    spike_sigmas: float = 6.0
    """How far is a spike: so many standard deviations above the median of the window. One standard deviation is taken
    as 1.4826 times the median distance from the median."""
    spike_window: int = 128
    """Steps that a step is compared with. No step is called a spike before half of the window is filled."""
    max_bad_steps: int = 20
    """The run stops after so many steps in a row that were not applied. It also stops after so many rollbacks, unless
    1000 good steps in a row came between them."""
    initial_loss_scale: float = 65536.0
    """fp16 only: the loss scale at the start. It doubles after `loss_scale_window` good steps and halves at a bad
    one."""
    loss_scale_window: int = 1000

    def __post_init__(self) -> None:
        positive(self, "guard.max_bad_steps")
        positive(self, "guard.initial_loss_scale")
        require(
            math.log2(self.initial_loss_scale).is_integer(),
            f"guard.initial_loss_scale={self.initial_loss_scale} must be a power of two, so that unscaling is exact",
        )
        positive(self, "guard.loss_scale_window")
        require(0 < self.shrink_ratio < 1, f"guard.shrink_ratio={self.shrink_ratio} must be in (0, 1)")
        if self.on_nonfinite != "shrink":
            no_effect(self, "guard.shrink_ratio", f"guard.on_nonfinite={self.on_nonfinite}: use shrink")
        positive(self, "guard.spike_sigmas")
        require(
            self.on_spike is not None or (self.spike_sigmas, self.spike_window) == (6.0, 128),
            f"guard.spike_sigmas={self.spike_sigmas} and guard.spike_window={self.spike_window} have no effect with "
            "guard.on_spike=null: leave them at 6.0 and 128",
        )
        require(self.spike_window >= 8, f"guard.spike_window={self.spike_window} must be at least 8, for a median")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. The key is that of `wandb login` or WANDB_API_KEY on the host of rank 0."""

    project: str
    entity: str | None = None
    """The team or user. None: the default of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline: into the folder `wandb` of the run, for `wandb sync`."""

    def __post_init__(self) -> None:
        require(self.project.strip() != "", "metrics.wandb.project is empty: name one")


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    experiment: str
    uri: str | None = None
    """The tracking server, such as http://host:5000. None: MLFLOW_TRACKING_URI on the host of rank 0."""

    def __post_init__(self) -> None:
        require(self.experiment.strip() != "", "metrics.mlflow.experiment is empty: name one")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    every_steps: int = 1
    """Every so many steps, a status line is printed and a record goes to metrics.jsonl."""
    tensorboard: bool = True
    """Whether the records also go to TensorBoard."""
    wandb: WandbConfig | None = None
    """Whether they also go to W&B, such as {project: mine}. It needs `pip install 'megakexue[wandb]'`. A resume goes on
    with the same W&B run. If W&B cannot be reached, a line says so, and training goes on. None: off."""
    mlflow: MlflowConfig | None = None
    """The same for MLflow, such as {experiment: mine, uri: 'http://host:5000'}: `pip install 'megakexue[mlflow]'`."""
    statistics_every_steps: int | None = 100
    """Every so many steps, statistics of each tensor are recorded: the RMS of its weights, its update and its gradient,
    and how well the directions of the last two agree; and of each layer the entropy of attention and its largest logit.
    None: off."""
    profile_steps: list[int] = field(default_factory=list)
    """[first, last]: rank 0 writes a trace of these steps by torch's profiler into the folder `profile` of the run. Two
    or three are enough, after the first ones, which compile. []: off."""
    peak_tflops: float | None = None
    """TFLOP/s of one device that MFU is measured against. None: from the data sheet of a known GPU; on CPU, an
    estimate: matrix products as large as the step's are timed at the start."""

    def __post_init__(self) -> None:
        positive(self, "metrics.every_steps")
        positive(self, "metrics.statistics_every_steps", alternative=", or null for off")
        positive(self, "metrics.peak_tflops", alternative=", or null")
        steps = self.profile_steps
        require(
            not steps or (len(steps) == 2 and 0 < steps[0] <= steps[1]),
            f"metrics.profile_steps={steps} must be the first and the last step of the trace, such as [10, 12], or []",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: int = 1
    """What ZeRO shards over ranks. 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """The dtype of weights, activations and gradients. Master weights and optimizer state are always fp32."""
    bucket_elements: int = 50_000_000
    """Elements in a communication bucket. Its buffers take that much memory."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether each block and the loss are compiled (torch.compile), which rounds differently. auto: on a GPU; on a CPU
    with a C++ compiler for runs so long that they earn the minute that it takes. The run prints which, and why."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it, which saves memory and changes no bit. product: the
    product in SwiGLU, at hardly any cost; feed_forward: SwiGLU's two first products too; block: all but a block's
    input, a third more work. The way to longer rows and larger micro-batches."""
    recompute_offload: bool = False
    """With recompute=block, keep the inputs of blocks in the host's pinned memory instead of the GPU's. Changes no
    bit."""
    tile_tokens: int | None = None
    """Compute the feed-forward and what else looks at one token alone for so many tokens of a row at a time, and again
    in the backward pass. For rows that are much longer than this, such as 8192. It rounds differently. null: off."""
    sequence_ranks: int = 1
    """Neighbouring ranks that share rows, for rows that are too long for one: each computes a part of the tokens, and
    in attention some of the heads (Ulysses). It divides the ranks, model.n_heads and data.seq_len. It may change at a
    resume."""
    timeout_s: float = 1800.0
    """A collective that waits longer ends the run."""
    rendezvous_s: float = 120.0
    """How long ranks wait at the start for others to come. Those that are missing are named."""
    stall_s: float = 30.0
    """After so long without progress the run says which rank is behind, and writes stacks into its logs. It goes on."""

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        positive(self, "engine.bucket_elements", "engine.sequence_ranks")
        positive(self, "engine.tile_tokens", alternative=", or null for off")
        require(
            not self.recompute_offload or self.recompute == "block",
            f"engine.recompute_offload=true moves what engine.recompute=block keeps, and it is {self.recompute}: "
            "set it to block",
        )
        require(
            self.tile_tokens is None or self.recompute in ("none", "block"),
            f"engine.tile_tokens={self.tile_tokens} computes the feed-forward again by itself: set engine.recompute to "
            f"none or block instead of {self.recompute}",
        )
        at_most(self, 2**31 - 1, "engine.bucket_elements")
        seconds(self, "engine.timeout_s", "engine.rendezvous_s", "engine.stall_s")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 500
    """Save every so many steps. The run also saves at its last step, and when it is asked to stop by SIGTERM, SIGINT,
    SIGUSR1 or SIGHUP."""
    keep_last: int = 3
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int | None = None
    """Also keep the checkpoints of every so many steps, for ever."""
    export: Literal["hf"] | None = None
    """hf: each checkpoint of `every_steps`, and the last one, also becomes a folder for Hugging Face in the run's
    exports/, which stays as long as the checkpoint. A program beside the run writes it. None: no exports."""
    asynchronous: bool = True
    """Whether a thread writes the checkpoint while training goes on. It writes from a copy in host memory, as large as
    this rank's share."""
    grace_s: float = 300.0
    """Seconds from a signal to the end of the process, saved or not. Take what the cluster gives, less a margin."""

    def __post_init__(self) -> None:
        positive(self, "checkpoint.every_steps", "checkpoint.keep_last")
        multiple(self, "checkpoint.keep_every", "checkpoint.every_steps", ", or null: other steps are not saved")
        seconds(self, "checkpoint.grace_s")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int | None = 500
    """Validate on the sources' valid split every so many steps, and at the last step. None: off."""
    n_rows: int = 256
    """At most so many rows, always the same ones."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues greedily at each validation, such as ["Once upon a time", "def "]. They go to
    metrics.jsonl and to TensorBoard. Each token is a forward pass of all ranks. Changes no bit of training."""
    prompt_tokens: int = 32
    """Tokens that each prompt is continued by. A prompt and these must fit into data.seq_len."""

    def __post_init__(self) -> None:
        positive(self, "evaluate.every_steps", alternative=", or null for off")
        positive(self, "evaluate.n_rows", "evaluate.prompt_tokens")
        require(
            not self.prompts or self.every_steps is not None,
            "evaluate.prompts are continued at validations, and evaluate.every_steps=null: give it steps",
        )
        require(len(self.prompts) <= 16, f"evaluate.prompts has {len(self.prompts)} texts, and may have 16")
        if not self.prompts:
            no_effect(self, "evaluate.prompt_tokens", "evaluate.prompts=[]: name texts")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: Place
    """The run folder. Running the same command again goes on from its newest checkpoint."""
    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Rows in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int
    """Rows that one rank takes through the model at a time."""
    seed: int = 0
    """Seed of the initial weights. Each tensor has its own stream, so ranks and ZeRO stages do not matter."""
    init_from: Place | None = None
    """A bundle to start from. Its model section must agree with `model`."""
    init_optimizer: Literal["keep", "reset"] = "reset"
    """keep: go on with the optimizer's state in the bundle, which tools/export_model.py --optimizer or
    tools/grow_model.py wrote. The schedule begins anew, so optim.warmup_steps warms the rate up again; 20 to 200 steps
    are usual. reset: start with a fresh state."""
    init_data: Literal["continue", "start"] = "start"
    """continue: go on with the rows after those that the bundle was trained on, in the same order of the same data.
    start: begin with the first row."""
    stop_at_step: int | None = None
    """Save a checkpoint at this step and stop, as an interruption would. The schedule still runs to `steps`."""
    accept_changes: list[str] = field(default_factory=list)
    """Keys that may differ from the checkpoint that the run goes on from, such as optim.lr. `data` accepts other rows
    or another order, which are then read from their beginning. A resume that needs a key here names it."""

    def __post_init__(self) -> None:
        positive(self, "train.steps", "train.global_batch_size", "train.micro_batch_size")
        multiple(self, "train.global_batch_size", "train.micro_batch_size")
        not_negative(self, "train.seed")
        if self.init_from is None:
            reason = "train.init_from=null: name a bundle, or set it to"
            no_effect(self, "train.init_optimizer", f"{reason} reset")
            no_effect(self, "train.init_data", f"{reason} start")

    def n_micro_batches(self, n_data_ranks: int) -> int:
        """Return how many micro-batches each of `n_data_ranks` ranks takes in one optimizer step.

        Raises:
            UserError: the global batch is not a multiple of what all ranks take at a time.
        """
        rows = self.micro_batch_size * n_data_ranks
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of train.micro_batch_size="
            f"{self.micro_batch_size} times the {n_data_ranks} ranks = {rows}",
        )
        return self.global_batch_size // rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole config: what a YAML of configs/ and the config.yaml of a run hold."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        context = self.model.rope.context
        require(
            context is None or context >= self.data.seq_len,
            f"model.rope.context={context} must be at least data.seq_len={self.data.seq_len}: "
            "raise it, or leave it null to follow data.seq_len",
        )
        self._check_sequence_ranks()
        trained = self.model.rope.trained_context
        require(
            self.model.rope.is_longer(context or self.data.seq_len),
            f"model.rope.trained_context={trained} must be below data.seq_len={self.data.seq_len}, which is the "
            "context when model.rope.context is null: without a longer context, set model.rope.extension=null",
        )
        require(
            trained is None or self.train.init_from is not None,
            f"model.rope.extension={self.model.rope.extension} needs trained weights, and train.init_from is null: "
            "name a bundle, or train from the start with model.rope.extension=null",
        )
        require(
            not self.loss.emo or self.train.init_from is not None,
            "loss.emo=true needs a trained head (9797), and train.init_from is null: train without it first, then "
            "start from the exported bundle",
        )
        require(
            self.optim.embedding is None or self.optim.embedding == "dense" or not self.model.tie_embeddings,
            f"optim.embedding={self.optim.embedding} does not fit model.tie_embeddings=true, where every row has a "
            "gradient in every step: leave it null",
        )
        require(
            self.optim.accumulate == "gradient" or self.guard.on_spike != "skip",
            "guard.on_spike=skip does not fit optim.accumulate=momentum, whose momentum holds the batch before its "
            "loss is known: use rollback or log",
        )
        warmup, steps, stop = self.optim.warmup_steps, self.train.steps, self.train.stop_at_step
        require(warmup <= steps, f"optim.warmup_steps={warmup} must not be above train.steps={steps}")
        end = warmup + (self.optim.decay_steps or 0)
        require(end <= steps, f"optim.warmup_steps + optim.decay_steps = {end} must not be above train.steps={steps}")
        require(
            stop is None or 0 < stop <= steps, f"train.stop_at_step={stop} must be between 1 and train.steps={steps}"
        )
        last = self.data.stages[-1].until_step if self.data.stages else 0
        require(last <= steps, f"data.stages.until_step={last} must not be above train.steps={steps}")
        self.data.check_synthetic(steps)

    def _check_sequence_ranks(self) -> None:
        size, model = self.engine.sequence_ranks, self.model
        divided = [("model.n_heads", model.n_heads), ("data.seq_len", self.data.seq_len)]
        lengths = [stage.seq_len for stage in self.data.stages if stage.seq_len is not None]
        for key, n in [*divided, *(("data.stages.seq_len", length) for length in lengths)]:
            require(n % size == 0, f"engine.sequence_ranks={size} must divide {key}={n}")
        groups = model.n_heads if model.mla or model.n_kv_heads is None else model.n_kv_heads
        require(
            groups % size == 0 or size % groups == 0,
            f"engine.sequence_ranks={size} must divide model.n_kv_heads={groups}, or be a multiple of it",
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens in an optimizer step, padding included."""
        return self.train.global_batch_size * self.data.seq_len


# --- the sections that resolve, with nothing left to choose: made by megakexue/core/resolve.py -----------------------


@dataclass(frozen=True, kw_only=True)
class ResolvedRope(RopeConfig):
    """RoPE with its base as a number."""

    base: float = field()
    context: int = field()

    @property
    def stretch(self) -> float:
        """k = context / trained_context of an extension; 1 without one."""
        return self.context / self.trained_context if self.trained_context else 1.0


@dataclass(frozen=True, kw_only=True)
class ResolvedAttention(AttentionConfig):
    """Attention with its scale as a number."""

    softmax_scale: float = field()


@dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
    """A model of which nothing is left to choose, as bundles and checkpoints hold it."""

    rope: ResolvedRope = field()
    attention: ResolvedAttention = field()
    residual_alpha: float = field()
    branch_gain: float = field()
    embed_scale: float = field()
    logit_scale: float = field()


@dataclass(frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    """An optimizer with the numbers that `name` decides."""

    lr: float = field()
    beta1: float = field()
    weight_decay: float = field()


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """What a run works with, made by `megakexue.core.resolve.resolve_config`."""

    model: ResolvedModel = field()
    optim: ResolvedOptim = field()


# --- numbers, as YAML, overrides and the options of programs have them -----------------------------------------------


def parse_integer(value: Any) -> int:
    """Read 1000, "1_000", "010" (ten) or "1e3". Raises ValueError, whose message says what it must be."""
    is_huge = str(value).lstrip("+-").casefold() == ".inf" if isinstance(value, str) else False
    with suppress(ArithmeticError):  # it is no number
        if isinstance(value, str | int) and not isinstance(value, bool):
            exact = Decimal(value)
            is_huge = exact.is_infinite() or exact.adjusted() > 18 or abs(exact) >= BOUND
            if not is_huge and exact == exact.to_integral_value():
                return int(exact)
    beyond = "is out of range: it must be between -2^63 and 2^63"
    raise ValueError(beyond if is_huge else "must be a whole number, such as 1000 or 1e3")


def parse_number(value: Any) -> float:
    """Read a finite number: 0.1, 3 or "1e-3". Raises ValueError, whose message says what it must be."""
    form = "number, such as 0.1 or 1e-3"
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        is_other = str(value).lstrip("+-").casefold() not in (".inf", ".nan")
        raise ValueError(f"must be a {'' if is_other else 'finite '}{form}") from None
    except OverflowError:
        parsed = math.inf
    if not math.isfinite(parsed):
        raise ValueError(f"must be a finite {form}")
    return parsed


Number = TypeVar("Number", int, float)


def _argument(parse: Callable[[Any], Number], text: str) -> Number:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} {error}") from error


def as_integer(text: str) -> int:
    """The `type` of a program's option: an integer below 2^63."""
    return _argument(parse_integer, text)


def as_number(text: str) -> float:
    """The `type` of a program's option: a finite number."""
    return _argument(parse_number, text)


# --- YAML ------------------------------------------------------------------------------------------------------------
# Values are read as the text that stands there. What a text means is decided by the type of its field: to YAML alone,
# a run that is called 007, on or 2024_01_01 would be a number or a truth value.


class _TextLoader(yaml.SafeLoader):
    """Reads every value as text, but null as None."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in ("null", "merge")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that is there twice is written twice


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # in its other styles PyYAML writes a line separator of Unicode as it is, and reads a space
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)


_YAML_FAULTS = {
    r"'\t'": "there is a tab here: YAML wants spaces",
    "unexpected end of stream": "the quote that begins here is not closed",
    "expected ',' or": "the bracket that opens here is not closed, or lacks a comma",
    "mapping values": "there is a second ': ' here: put a text with a colon into quotes",
    "expected ':'": "a ': ' is missing",
    "cannot start any token": "a text that begins with this character needs quotes",
    "expected <block end>": "this line does not fit those above: look at the indent, and for a quote or bracket",
}
"""By words of PyYAML's message: what the user did."""


def _parse_yaml(text: str, loader_class: type[Any], where: str, *, is_file: bool = True) -> Any:
    """Return the values of a YAML text. Raises UserError, which names `where` and, in a file, line and column."""
    try:
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            _refuse_double_keys(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = str(error.problem or error.context)
        unknown = problem if type(error) is yaml.MarkedYAMLError else f"this is no YAML: {problem}"
        found = next((said for words, said in _YAML_FAULTS.items() if words in problem), unknown)
        mark = error.context_mark if "here is not closed" in found or "opens here" in found else error.problem_mark
        mark = mark or error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if is_file and mark else where
        raise UserError(f"{place}: {found}") from error
    except RecursionError as error:
        raise UserError(f"{where}: it is nested too deeply") from error
    except Exception as error:  # what a tag such as !!int does with a text that does not fit it
        raise UserError(f"{where}: this is no YAML: {' '.join(str(error).split())}") from error


def _refuse_double_keys(root: yaml.Node | None) -> None:
    """Raise yaml.MarkedYAMLError for a key that is no text, or is there twice: one of its values would be lost.

    PyYAML itself raises subclasses only.
    """
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
            continue
        names = set()
        for key, value in node.value:
            is_text = isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":null")
            if not is_text or key.value in names:
                problem = f"the key {_shown(key.value)} is there twice" if is_text else "a key must be a text"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(key.value)
            stack.append(value)


def _read_file(path: Path) -> str:
    require(path.is_file(), f"{path}: " + ("this is a folder" if path.is_dir() else "no such file"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is no UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file. Raises UserError: it is none."""
    return _parse_yaml(_read_file(path), yaml.SafeLoader, str(path))


def to_yaml(section: Any) -> str:
    """The YAML text of a dict of plain values, for `read_yaml`, or of a whole config, for `load_config`."""
    values = section if isinstance(section, dict) else _escaped(dataclasses.asdict(section))
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=BOUND)
    return text


def _escaped(values: Any) -> Any:
    r"""Write ${ as \${, so that `load_config` takes it as it is."""
    if isinstance(values, dict):
        return {key: _escaped(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_escaped(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


# --- a config, from texts --------------------------------------------------------------------------------------------

T = TypeVar("T")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file over the defaults, and `key=value` overrides over both.

    `${key}` in a value is replaced by the value of that key.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown (the nearest name is suggested), a value has the
            wrong type, or two fields do not fit each other.
    """
    path = Path(path)
    require(path.is_file() or path.is_dir(), f"no config file {path}: the shipped ones are in configs/")
    values = _parse_yaml(_read_file(path), _TextLoader, str(path))
    form = "a config has sections, such as `model:` and `data:`; the shipped ones are in configs/"
    require(isinstance(values, dict), f"{path}: this is {'empty' if values is None else 'no config'}: {form}")
    try:
        for override in overrides or []:
            values = _merged(values, _parse_override(override))
        values = _filled(values, str(path))
    except RecursionError as error:
        raise UserError(f"{path}: it is nested too deeply") from error
    model = values.get("model")
    if isinstance(model, dict) and "from" in model:
        values = values | {"model": _from_bundle(values, {**model}, str(path))}
    return build(Config, values, where=str(path))


def _from_bundle(values: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the model section of the bundle `train.init_from`, with what is `given` beside `from: bundle` on top."""
    source = given.pop("from")
    require(
        source == "bundle",
        f"{where}: model.from={_shown(source)} must be bundle, which is that of train.init_from",
    )
    folder = train.get("init_from") if isinstance(train := values.get("train"), dict) else None
    require(
        isinstance(folder, str) and folder != "",
        f"{where}: model.from=bundle takes the model of train.init_from, and that is null: name a bundle",
    )
    section = _bundle_model(Path(_read(Place, folder, "train.init_from")), where)
    rope, old = given.get("rope"), section["rope"]
    extension = rope.get("extension") if isinstance(rope, dict) else None
    seq_len = data.get("seq_len") if isinstance(data := values.get("data"), dict) else None
    if extension is None:
        is_longer = False
        with suppress(ValueError):  # what is no number is refused later
            is_longer = parse_integer(seq_len) > parse_integer(old["context"])
        require(
            not is_longer,
            f"{where}: data.seq_len={_shown(seq_len)} is longer than the context of {old['context']} of "
            f"train.init_from={folder}: set model.rope.extension, such as base or yarn",
        )
    elif old["extension"] in (None, "base"):  # else it stays what it is, or is refused at the start
        kept = {"fraction": old["fraction"], "trained_context": old["context"]}
        section["rope"] = kept if extension == "base" else kept | {"base": old["base"]}
    merged: dict[str, Any] = _merged(section, given)
    return merged


def _bundle_model(folder: Path, where: str) -> dict[str, Any]:
    """Read the model section of a bundle as texts, without attention.backend, which is no matter of the weights."""
    path = folder / "config.yaml"
    require(
        path.is_file() and (folder / "manifest.json").is_file(),
        f"{where}: model.from=bundle: train.init_from={folder} is no bundle: make one with tools/export_model.py "
        "of a run, or tools/import_hf.py of a Hugging Face folder or a GGUF file",
    )
    content = _parse_yaml(_read_file(path), _TextLoader, str(path))
    require(isinstance(content, dict) and "model" in content, f"{path} has no section model: export the bundle again")
    section: dict[str, Any] = content["model"]
    build(ResolvedModel, section, where=str(path))
    return section | {"attention": {k: v for k, v in section["attention"].items() if k != "backend"}}


def _parse_override(override: str) -> dict[str, Any]:
    """Return the values of one `key=value`, nested by the parts of the key."""
    key, equals, text = override.partition("=")
    names, text = key.split("."), text.strip()
    shown = _shown(override)
    require(equals == "=" and all(names), f"{shown!r} is not of the form key=value, such as train.steps=100")
    is_text = _is_text(_declared(Config, names)) and not text.startswith(("'", '"'))
    values: Any = text
    if not is_text or text in ("", "~", "null", "Null", "NULL"):
        values = _parse_yaml(text, _TextLoader, shown, is_file=False)
    for name in reversed(names):
        values = {name: values}
    return values


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The types of which a value of the type `kind` has one."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _declared(section: type[Any], names: list[str]) -> Any:
    """Return the type of the field that a key names, or None."""
    kind: Any = section
    for name in names:
        owner = next((k for k in _kinds(kind) if dataclasses.is_dataclass(k)), None)
        kind = None if owner is None else get_type_hints(owner, include_extras=True).get(name)
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a field takes any text, so that on the command line nothing in it has a meaning to YAML."""
    return set(_kinds(kind)) - {NoneType} in ({str}, {Place})


def _merged(old: Any, new: Any) -> Any:
    """Return the values of `old` with those of `new` over them."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old.get(key), value) for key, value in new.items()}
    return new


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no dict or list, with its key."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            part = f".{name}" if isinstance(values, dict) else f"[{name}]"
            yield from _leaves(value, f"{key}{part}".lstrip("."))
    else:
        yield key, values


def _default_texts(value: Any) -> Any:
    """The defaults of a section, or of one that it has, as a YAML file would have them."""
    if isinstance(value, type):
        hints = get_type_hints(value)
        found = {}
        for f in dataclasses.fields(value):
            if f.default_factory is not MISSING or f.default is not MISSING:
                found[f.name] = _default_texts(f.default if f.default_factory is MISSING else f.default_factory())
            elif dataclasses.is_dataclass(hints[f.name]):
                found[f.name] = _default_texts(hints[f.name])
        return found
    if dataclasses.is_dataclass(value):
        return _default_texts(type(value))
    return value if value is None or isinstance(value, dict | list) else _shown(value)


def _taken(values: Any, filled: Any) -> Any:
    """Take the texts with a ${ from `filled`, and all others as they are: some mean something else to OmegaConf."""
    if isinstance(values, dict):
        return {key: _taken(value, filled[key]) for key, value in values.items()}
    if isinstance(values, list):
        return [_taken(value, part) for value, part in zip(values, filled, strict=True)]
    return filled if "${" in str(values) else values


def _filled(values: dict[str, Any], where: str) -> Any:
    """Replace each ${key} in a text by the value of the key."""
    texts = {key: text for key, text in _leaves(values) if "${" in str(text)}
    if not texts:
        return values
    try:
        filled = OmegaConf.to_container(OmegaConf.create(_merged(_default_texts(Config), values)), resolve=True)
        return _taken(values, filled)
    except OmegaConfBaseException as error:
        key = error.full_key if error.full_key in texts else next(iter(texts))
        raise UserError(
            f"{where}: {key}={_shown(texts[key])}: ${{...}} must name another setting, such as ${{engine.zero_stage}}; "
            "for the characters themselves write \\${"
        ) from error


def build(section: type[T], values: Any, where: str) -> T:
    """Make the dataclass `section` from values that are texts or of the types of its fields.

    Raises:
        UserError: it names `where` and the key.
    """
    try:
        made: T = _read_section(section, values, "")
        return made
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: it is nested too deeply") from error


def _shown(value: Any) -> str:
    """A value as a user writes it, on one line."""
    if isinstance(value, dict):
        text = f"{{{', '.join(f'{_shown(name)}: {_shown(part)}' for name, part in value.items())}}}"
    elif isinstance(value, list):
        text = f"[{', '.join(map(_shown, value))}]"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else f"{text[:97]}..."


def _read(kind: Any, value: Any, key: str) -> Any:
    """Return what a field of the type `kind` holds for a value. Raises UserError: it must be something else."""
    kinds = _kinds(kind)
    if kind is Any or (value is None and NoneType in kinds):
        return value
    is_float = float in kinds and isinstance(value, str) and not value.strip("+-").replace("_", "").isdigit()
    *others, last = (k for k in kinds if k is not NoneType and not (is_float and k is int))
    for other in others:
        with suppress(UserError):
            return _read_one(other, value, key)
    return _read_one(last, value, key)


def _read_one(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, key)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        form = f"must be a list, such as [{_form(parts[0], value)}]"
        require(isinstance(value, list), f"{key}={_shown(value)} {form}")
        return [_read(parts[0], part, f"{key}[{i}]") for i, part in enumerate(value)]
    if origin is dict:
        require(isinstance(value, dict), f"{key}={_shown(value)} must be pairs in braces, such as {{1000: 0.5}}")
        pairs = {_read(parts[0], k, f"{key}: key"): _read(parts[1], v, f"{key}.{k}") for k, v in value.items()}
        require(len(pairs) == len(value), f"{key}={_shown(value)} names one key twice")
        return pairs
    try:
        if origin is Literal:
            if value not in parts:
                raise ValueError(f"must be one of {', '.join(parts)}")
            return value
        return _SCALARS[kind](value)
    except ValueError as error:
        raise UserError(f"{key}={_shown(value)} {error}") from error


def _read_section(kind: Any, values: Any, key: str) -> Any:
    fields = {f.name: f.default is not MISSING or f.default_factory is not MISSING for f in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        rest = "; leave it out for the defaults" if values is None else ""
        raise UserError(f"{key}={_shown(values)} must be of the form {_form(kind, values)}{rest}")
    prefix = f"{key}." if key else ""
    for name in [name for name in values if name not in fields]:
        near = difflib.get_close_matches(str(name), fields, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"{key or 'a config'} has {', '.join(fields)}"
        raise UserError(f"{prefix}{_shown(name)} is no setting: {hint}")
    missing = [f"{prefix}{name}" for name, has_default in fields.items() if not has_default and name not in values]
    require(not missing, f"missing: {', '.join(missing)}")
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: _read(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _form(kind: Any, value: Any) -> str:
    """How a value is written as one of the type `kind`."""
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    if not names or (isinstance(value, dict) and value and value.keys() <= {*names}):
        return _shown(value)
    return f"{{{names[0]}: {_shown(value) if isinstance(value, str | int | float) else '...'}}}"


def _parse_bool(value: Any) -> bool:
    text = _shown(value).casefold()
    if text not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError("must be true or false")
    return text in ("true", "yes", "on")


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text" + ("" if isinstance(value, dict | list) else "; in quotes it is one"))
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise ValueError("must be UTF-8") from None
    return value


def _parse_place(value: Any) -> str:
    text = os.path.expanduser(_parse_text(value))
    if not text or "\0" in text:
        raise ValueError("must name a file or a folder")
    return text


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: parse_integer, float: parse_number, bool: _parse_bool, str: _parse_text, Place: _parse_place,
}  # fmt: skip
