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

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Status = Literal["applied", "skipped", "shrunk", "rolled back"]
"""How an optimizer step ends: in exactly one of these ways, the same on all ranks."""

IGNORED = -100
"""The target of a position that predicts nothing."""

PREEMPTED = 75
"""Exit code of a run that was ended by a signal and has saved itself. It is EX_TEMPFAIL of sysexits.h: try again."""


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


def positive(section: Any, *keys: str, alternative: str = "") -> None:
    """Require finite numbers above 0. `alternative` ends the message: what else the user may write."""
    _each(section, keys, lambda value: 0 < value < math.inf, f"be positive{alternative}")


def not_negative(section: Any, *keys: str) -> None:
    """Require finite numbers of 0 or more."""
    _each(section, keys, lambda value: 0 <= value < math.inf, "not be negative")


def above_one(section: Any, *keys: str) -> None:
    """Require finite numbers above 1."""
    _each(section, keys, lambda value: 1 < value < math.inf, "be above 1")


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
    extension: Literal["base", "interpolate", "ntk", "ntk_exact", "ntk_mixed", "yarn"] | None = None
    """How to finetune weights, trained for `trained_context` tokens, for the longer `context`.
    With k = context / trained_context:
    base: use a new base;
    interpolate: divide all angles by k;
    ntk: multiply the base by k (9675);
    ntk_exact: multiply the base by k^(d/(d-2)), which divides the lowest frequency by exactly k;
    ntk_mixed: divide the frequency of pair i by exp(a i^ntk_mixed_exponent), with a such that the last pair is divided
    by k (9706);
    yarn: keep the fast pairs, interpolate the slow ones (9948).
    None: the weights are not trained yet, or keep their context."""
    trained_context: int | None = None
    """Tokens that the weights were trained for. Only `extension` uses it."""
    ntk_mixed_exponent: float = 0.625
    """1 is NTK-fixed; towards 0 it becomes interpolation (9706)."""
    yarn_temperature: bool | None = None
    """Whether yarn multiplies the attention scores by (0.1 ln k + 1)^2 (9948). None: yes, when `attention.scale` is
    constant. The other scales have a temperature of their own, so with them you must say true or false."""

    def __post_init__(self) -> None:
        if isinstance(self.base, str):
            require(self.base == "auto", f"model.rope.base={self.base!r} must be a number or 'auto'")
        else:
            require(1 < self.base < math.inf, f"model.rope.base={self.base} must be above 1 and finite")
        positive(self, "model.rope.context")
        require(0 < self.fraction <= 1, f"model.rope.fraction={self.fraction} must be in (0, 1]")
        above_one(self, "model.rope.trained_context")
        trained = self.trained_context
        require(
            trained is None or self.context is None or trained < self.context,
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
        require(self.d_rope % 2 == 0, f"model.mla.d_rope={self.d_rope} must be even, since RoPE rotates pairs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder. A bundle holds this section with every scale as a number."""

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
    """Whether the head uses the weights of the input embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in each RMS norm."""
    residual: Literal["deepnorm", "prenorm"] = "deepnorm"
    """deepnorm: x = norm(alpha x + F(x)) (8978, DeepNet); prenorm: x = x + F(norm(x))."""
    deepnorm_recipe: Literal["auto", "paper", "sgd", "adam", "lamb"] = "auto"
    """Which row of 8978 gives alpha and the initial gain. auto: lamb for tiger, adam for lion and adamw."""
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
        positive(self, "model.norm_eps", "model.gain_centre", "model.residual_alpha", "model.branch_gain")
        positive(self, "model.embed_scale", "model.logit_scale")
        self._check_recipe()

    def _check_heads(self) -> None:
        multiple(self, "model.n_heads", "model.n_kv_heads", f": set model.n_kv_heads to a divisor of {self.n_heads}")
        if self.d_head is None:
            multiple(self, "model.d_model", "model.n_heads", ": change one, or set model.d_head")
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

    path: str
    """A folder written by tools/prepare_data.py. It is a local path, or s3://, gs://, ... for a copy in a bucket.
    file:// treats a mounted folder as remote: its shards are then cached on the local disk."""
    weight: float | None = None
    """Share of the mixture, relative to the other weights. None in all sources: shares by the number of rows."""

    def __post_init__(self) -> None:
        require(self.weight is None or self.weight > 0, f"data.sources: weight={self.weight} must be positive")

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: list[SourceConfig]
    tokenizer: str
    """Path of the tokenizer.model that the sources were prepared with. Its hash is checked."""
    seq_len: int
    """Tokens in a row that the model sees. It must be the row length that tools/prepare_data.py was given."""
    shuffle: bool = True
    shuffle_seed: int = 0
    cache: str | None = None
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
        paths = [source.path for source in self.sources]
        require(len(set(paths)) == len(paths), f"data.sources names a path twice: {paths}")
        above_one(self, "data.seq_len")
        positive(self, "data.n_prefetch")
        not_negative(self, "data.shuffle_seed", "data.download_retries")
        require(self.download_timeout_s > 0, f"data.download_timeout_s={self.download_timeout_s} must be positive")


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
    name: Literal["tiger", "lion", "adamw"] = "tiger"
    lr: float | None = None
    """Peak learning rate; the schedule's factor multiplies it. For tiger it is relative: each element of a matrix moves
    by lr RMS(matrix), each element of a gain by lr / 2 (9512). None: tiger 1e-3, lion and adamw 3e-4."""
    beta1: float | None = None
    """Decay of the momentum. None: tiger 0.965, which is its only beta; lion 0.95; adamw 0.9."""
    beta2: float | None = None
    """None: lion 0.98, adamw 0.95."""
    eps: float = 1e-8
    """The eps of adamw, and of `embedding: adamw`."""
    weight_decay: float | None = None
    """Decoupled decay of matrices and embeddings. Gains never decay. None: tiger and lion 0.01, adamw 0.1."""
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
        """Refuse what the rules of tiger, lion and adamw do not use."""
        if self.name == "tiger":
            no_effect(self, "optim.beta2", "optim.name=tiger, whose one beta is optim.beta1: leave it null")
        if self.name == "adamw":
            no_effect(self, "optim.embedding", "optim.name=adamw: leave it null")
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
        if "adamw" not in (self.name, self.embedding):
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
        require(
            self.initial_loss_scale > 0 and math.log2(self.initial_loss_scale).is_integer(),
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
class MetricsConfig:
    every_steps: int = 1
    """Every so many steps, a status line is printed and a record goes to metrics.jsonl."""
    tensorboard: bool = True
    """Whether the records also go to TensorBoard."""
    statistics_every_steps: int | None = 100
    """Every so many steps, statistics of each tensor are recorded: the RMS of its weights, its update and its gradient,
    and how well the directions of the last two agree. None: off."""
    peak_tflops: float | None = None
    """TFLOP/s of one device that MFU is measured against. None: from the data sheet of a known GPU; on CPU, an
    estimate: matrix products as large as the step's are timed at the start."""

    def __post_init__(self) -> None:
        positive(self, "metrics.every_steps")
        positive(self, "metrics.statistics_every_steps", alternative=", or null for off")
        peak = self.peak_tflops
        require(peak is None or peak > 0, f"metrics.peak_tflops={peak} must be positive, or null")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: int = 1
    """What ZeRO shards over ranks. 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """The dtype of weights, activations and gradients. Master weights and optimizer state are always fp32."""
    bucket_elements: int = 50_000_000
    """Elements in a communication bucket. Its buffers take that much memory."""
    timeout_s: float = 1800.0
    """A collective that waits longer ends the run."""

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        require(self.bucket_elements > 0, f"engine.bucket_elements={self.bucket_elements} must be positive")
        require(self.timeout_s > 0, f"engine.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 500
    """Save every so many steps. The run also saves at its last step, and when it is asked to stop by SIGTERM, SIGINT,
    SIGUSR1 or SIGHUP."""
    keep_last: int = 3
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int | None = None
    """Also keep the checkpoints of every so many steps, for ever."""
    asynchronous: bool = True
    """Whether a thread writes the checkpoint while training goes on. It writes from a copy in host memory, as large as
    this rank's share."""
    grace_s: float = 300.0
    """Seconds from a signal to the end of the process, saved or not. Take what the cluster gives, less a margin."""

    def __post_init__(self) -> None:
        positive(self, "checkpoint.every_steps", "checkpoint.keep_last")
        multiple(self, "checkpoint.keep_every", "checkpoint.every_steps", ", or null: other steps are not saved")
        require(self.grace_s > 0, f"checkpoint.grace_s={self.grace_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int | None = 500
    """Validate on the sources' valid split every so many steps, and at the last step. None: off."""
    n_rows: int = 256
    """At most so many rows, always the same ones."""

    def __post_init__(self) -> None:
        positive(self, "evaluate.every_steps", alternative=", or null for off")
        positive(self, "evaluate.n_rows")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: str
    """The run folder. Running the same command again goes on from its newest checkpoint."""
    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Rows in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int
    """Rows that one rank takes through the model at a time."""
    seed: int = 0
    """Seed of the initial weights. Each tensor has its own stream, so ranks and ZeRO stages do not matter."""
    init_from: str | None = None
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
        trained = self.model.rope.trained_context
        require(
            trained is None or trained < (context or self.data.seq_len),
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


# --- reading and writing ---------------------------------------------------------------------------------------------

T = TypeVar("T")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file over the defaults, and `key=value` overrides over both.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown (the nearest name is suggested), a value has the
            wrong type, or two fields do not fit each other.
    """
    path = Path(path)
    require(path.is_file(), f"no config file {path}: the shipped ones are in configs/")
    for override in overrides or []:
        require("=" in override, f"{override!r} is not of the form key=value, such as train.steps=100")
    try:
        values = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides or [])))
    except Exception as error:  # YAML's and OmegaConf's own errors have no common class
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return build(Config, values, where=str(path))


def build(section: type[T], values: Any, where: str) -> T:
    """Make the frozen dataclass `section` from plain or OmegaConf values; errors name `where` and the key."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), values))  # type: ignore[return-value]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        first, key = str(error).split("\n")[0], getattr(error, "full_key", None)
        at = f" (at {key})" if key and str(key) not in first else ""
        raise UserError(f"{where}: {first}{at}") from error


def to_yaml(section: Any) -> str:
    """The YAML text of a dict of plain values, or of a config dataclass with every field."""
    values = section if isinstance(section, dict) else dataclasses.asdict(section)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file. Raises UserError: it is none."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML's and OmegaConf's own errors have no common class
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
