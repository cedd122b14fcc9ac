"""Every knob of a run, in one place: frozen dataclasses, filled from defaults, a YAML file and `key=value` arguments.

The YAML section is the config class is the module is the test: `optim:` is `OptimConfig` is `megakexue/optim.py` is
`tests/test_optim.py`. Nothing is written back after loading: what can be computed is a property or a function.

This module imports neither torch nor any module of ours, so that a launch script on a login node refuses a bad
config in a third of a second.

Units end a name (`seq_len` in tokens, `timeout_s`, `warmup_steps`); counts begin with `n_`, widths with `d_`;
`None` is off or "chosen for you", as the field says.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Status = Literal["applied", "skipped", "shrunk", "rolled back"]
"""How an optimizer step ends: in exactly one of these, the same on all ranks."""

IGNORED = -100
"""The target of a position that predicts nothing."""


PREEMPTED = 75
"""Exit code of a run that a signal has ended, saved: EX_TEMPFAIL of sysexits.h, try again later."""


class UserError(ValueError):
    """Something that a user wrote is wrong. The message is one line: what, where, what to do. Exit code 2."""


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main` and turn a `UserError` into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    base: int | float | str = "auto"
    """A number, or `auto`: from the bound rule (10122) for `context`."""
    rule: Literal["safe", "infimum"] = "safe"
    """What `auto` takes: the base above which every base is valid, or the smallest valid one, in a narrow window."""
    context: int | None = None
    """Tokens that the base must serve. None: `data.seq_len`."""
    fraction: float = 1.0
    """Share of a GQA head that is rotated, its last part; of an MLA head it is `model.mla.d_rope`."""
    extension: Literal["base", "interpolate", "ntk", "ntk_exact", "ntk_mixed", "yarn"] | None = None
    """For weights that were trained for `trained_context` and go on with `context`, k = context / trained_context:
    base: a new base; interpolate: angles / k; ntk: base k (9675); ntk_exact: base k^(d/(d-2)), which interpolates the
    lowest frequency exactly; ntk_mixed: pair i slowed down by exp(a i^ntk_mixed_exponent), the last by k (9706);
    yarn: fast pairs kept, slow ones interpolated (9948)."""
    trained_context: int | None = None
    ntk_mixed_exponent: float = 0.625
    """1 is NTK-fixed, 0 interpolation (9706)."""
    yarn_temperature: bool | None = None
    """Scores times (0.1 ln k + 1)^2 (9948). None: yes; with any attention.scale but constant it must be said."""

    def __post_init__(self) -> None:
        if isinstance(self.base, str):
            require(self.base == "auto", f"model.rope.base={self.base!r} must be a number or 'auto'")
        else:
            require(1 < self.base < math.inf, f"model.rope.base={self.base} must be above 1 and finite")
        require(self.context is None or self.context > 0, f"model.rope.context={self.context} must be positive")
        require(0 < self.fraction <= 1, f"model.rope.fraction={self.fraction} must be in (0, 1]")
        trained = self.trained_context
        require(trained is None or trained > 1, f"model.rope.trained_context={trained} must be above 1")
        require(
            trained is None or self.context is None or trained < self.context,
            f"model.rope.trained_context={trained} must be below model.rope.context={self.context}, the longer one: "
            "without a longer context, set model.rope.extension=null",
        )
        require(
            self.rule == "safe" or isinstance(self.base, str),
            f"model.rope.rule={self.rule} has no effect with model.rope.base={self.base}: set the base to auto",
        )
        require(
            (self.extension is None) == (trained is None),
            f"model.rope.extension={self.extension} does not fit model.rope.trained_context={trained}: an extension "
            "needs the tokens that the weights were trained for, and nothing else uses them",
        )
        require(
            self.extension == "ntk_mixed" or self.ntk_mixed_exponent == 0.625,
            f"model.rope.ntk_mixed_exponent={self.ntk_mixed_exponent} has no effect with model.rope.extension="
            f"{self.extension}: use ntk_mixed",
        )
        require(
            0 < self.ntk_mixed_exponent <= 1,
            f"model.rope.ntk_mixed_exponent={self.ntk_mixed_exponent} must be in (0, 1]; for 0 use interpolate",
        )
        require(
            self.extension == "yarn" or self.yarn_temperature is None,
            f"model.rope.yarn_temperature={self.yarn_temperature} has no effect with model.rope.extension="
            f"{self.extension}: use yarn",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    backend: Literal["auto", "flash", "varlen", "flex", "sdpa", "blocked", "reference"] = "auto"
    """auto: the order is in megakexue/attention.py; the choice and its reason are printed at the start."""
    scale: Literal["log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"] = "log_n"
    """What multiplies q.k / sqrt(d), n = keys visible in the query's own document.
    log_n: ln(max(n, floor)) / ln(base) (8823); log_n_clipped: max(1, ln n / ln base), for weights trained without
    (9706); constant: 1; gradient_max: 0.84 sqrt(ln max(n, floor)), gradient_max_constant: 2.5 (9812)."""
    log_n_base: float | None = None
    """None: 512 for log_n; for log_n_clipped the context that the weights were trained for."""
    log_n_floor: int | None = None
    """None: 16, for the scales that use it."""
    similarity: Literal["dot", "key_norm", "cosine"] = "dot"
    """key_norm: q.k / |k| without 1/sqrt(d); cosine: 4 ln n cos(q, k), with scale=constant n = context / 2 (9859)."""
    softmax_scale: float | None = None
    """None: 1/sqrt(head width) for dot, 1 for key_norm and cosine, 4 ln(context / 2) for cosine with scale=constant.
    Written as a number into a bundle, since a longer context must keep it."""

    def __post_init__(self) -> None:
        base, floor = self.log_n_base, self.log_n_floor
        require(base is None or 1 < base < math.inf, f"model.attention.log_n_base={base} must be above 1")
        require(floor is None or floor > 1, f"model.attention.log_n_floor={floor} must be above 1")
        require(
            base is None or (self.scale in ("log_n", "log_n_clipped") and self.similarity != "cosine"),
            f"model.attention.log_n_base={base} has no effect with scale={self.scale}, similarity={self.similarity}: "
            "leave it null",
        )
        require(
            floor is None or self.scale in ("log_n", "gradient_max"),
            f"model.attention.log_n_floor={floor} has no effect with scale={self.scale}: leave it null",
        )
        require(
            self.similarity != "cosine" or self.scale in ("log_n", "constant"),
            f"model.attention.similarity=cosine does not fit scale={self.scale}: use log_n (4 ln n) or constant "
            "(4 ln(context / 2))",
        )
        scale = self.softmax_scale
        require(scale is None or 0 < scale < math.inf, f"model.attention.softmax_scale={scale} must be positive")


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """The widths of multi-head latent attention (10091, DeepSeek-V2)."""

    d_latent: int = 512
    """Of the latent that keys and values are made from, which the cache holds."""
    d_query_latent: int | None = None
    """Of the query's latent; None: queries straight from the stream."""
    d_nope: int = 96
    """Unrotated part of a query and key head."""
    d_rope: int = 32
    """Rotated part; its key is shared by all heads. 96 + 32 is what every kernel takes beside values of 128."""
    d_value: int = 128

    def __post_init__(self) -> None:
        for name in ("d_latent", "d_query_latent", "d_nope", "d_rope", "d_value"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.mla.{name}={value} must be positive")
        require(self.d_rope % 2 == 0, f"model.mla.d_rope={self.d_rope} must be even, since RoPE rotates pairs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_kv_heads: int | None = None
    """Key/value heads of grouped-query attention: 1 is MQA; None: n_heads, which is MHA."""
    d_head: int | None = None
    """None: d_model / n_heads."""
    mla: MlaConfig | None = None
    """Given, even as {}: multi-head latent attention of these widths instead of grouped-query attention."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    residual: Literal["deepnorm", "prenorm"] = "deepnorm"
    """deepnorm: x = norm(alpha x + F(x)) (8978, DeepNet); prenorm: x = x + F(norm(x))."""
    deepnorm_recipe: Literal["auto", "paper", "sgd", "adam", "lamb"] = "auto"
    """Which row of 8978 gives alpha and the initial gain; auto follows the optimizer family."""
    residual_alpha: float | None = None
    """None: from the recipe. Written as a number into a bundle, whose weights it belongs to."""
    branch_gain: float | None = None
    """Gain of a whole residual branch at initialisation; None: from the recipe."""
    gain_centre: float = 1.0
    """What the gains of norms start at, and what the guard's shrink draws them to; growth keeps it."""
    embed_scale: float | None = None
    """Multiplies the embedding rows; None: sqrt(d_model), which starts the stream at RMS 1."""
    logit_scale: float | None = None
    """Multiplies the logits; None: 1 untied, ln(vocab_size) / (2 sqrt(d_model)) tied (9698)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}={value} must be positive")
        if self.mla is None:
            require(
                self.n_heads % self.n_groups == 0,
                f"model.n_heads={self.n_heads} must be a multiple of model.n_kv_heads={self.n_kv_heads}: "
                f"set model.n_kv_heads to a divisor of {self.n_heads}",
            )
            if self.d_head is None:
                require(
                    self.d_model % self.n_heads == 0,
                    f"model.d_model={self.d_model} must be a multiple of model.n_heads={self.n_heads}: "
                    "change one, or set model.d_head",
                )
            rotated = self.rope.fraction * self.head_width
            require(
                abs(rotated - self.rotary_width) < 1e-3 and self.rotary_width % 2 == 0 and self.rotary_width > 0,
                f"model.rope.fraction={self.rope.fraction:g} of a head width (model.d_head) of {self.head_width} is "
                f"{rotated:.4g}, which must be an even number, since RoPE rotates pairs",
            )
        else:
            for name in ("n_kv_heads", "d_head"):
                require(
                    getattr(self, name) is None,
                    f"model.{name}={getattr(self, name)} has no effect with model.mla: leave it null; model.mla has "
                    "the widths, and every head its own keys",
                )
            require(
                self.rope.fraction == 1,
                f"model.rope.fraction={self.rope.fraction} has no effect with model.mla: set model.mla.d_rope",
            )
            require(
                self.attention.similarity == "dot",
                f"model.attention.similarity={self.attention.similarity} needs each head's keys, which the cache of "
                "model.mla does not hold: use dot",
            )
        require(
            self.rope.extension != "yarn"
            or self.attention.scale == "constant"
            or self.rope.yarn_temperature is not None,
            f"model.rope.extension=yarn and model.attention.scale={self.attention.scale} are both temperatures of the "
            "softmax: set model.rope.yarn_temperature=false for the second alone, or true for their product",
        )
        for name in ("norm_eps", "gain_centre", "residual_alpha", "branch_gain", "embed_scale", "logit_scale"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"model.{name}={value} must be positive")
        require(
            self.residual == "deepnorm" or self.deepnorm_recipe == "auto",
            f"model.deepnorm_recipe={self.deepnorm_recipe} has no effect with model.residual={self.residual}: "
            "use deepnorm, or leave the recipe at auto",
        )
        require(
            self.residual == "deepnorm" or self.residual_alpha in (None, 1),
            f"model.residual_alpha={self.residual_alpha} has no effect with model.residual={self.residual}: "
            "use deepnorm, or leave it null",
        )
        require(
            self.deepnorm_recipe == "auto" or self.residual_alpha is None or self.branch_gain is None,
            f"model.deepnorm_recipe={self.deepnorm_recipe} has no effect beside model.residual_alpha and "
            "model.branch_gain: leave it at auto, or these null",
        )

    @property
    def n_groups(self) -> int:
        """Key/value heads; in MLA each head has its own."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def head_width(self) -> int:
        """Of queries and keys."""
        if self.mla is not None:
            return self.mla.d_nope + self.mla.d_rope
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def value_width(self) -> int:
        return self.mla.d_value if self.mla is not None else self.head_width

    @property
    def rotary_width(self) -> int:
        """Of a head, the part that RoPE rotates."""
        return self.mla.d_rope if self.mla is not None else round(self.rope.fraction * self.head_width)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str
    """A folder written by tools/prepare_data.py: local, or s3://, gs://, ... for a copy of it in a bucket, or
    file://, which treats a mounted folder as remote, so that its shards are cached on the local disk."""
    weight: float | None = None
    """Share of the mixture, relative to the other weights. None (in all sources): by the number of rows."""

    def __post_init__(self) -> None:
        require(self.weight is None or self.weight > 0, f"data.sources: weight={self.weight} must be positive")

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: list[SourceConfig]
    tokenizer: str
    """Path of the tokenizer.model that the sources were prepared with; its hash is checked."""
    seq_len: int
    """Tokens in a row that the model sees; must be the row length that prepare_data was given."""
    shuffle: bool = True
    shuffle_seed: int = 0
    cache: str | None = None
    """Folder for shards of remote sources. None: `cache` in the run folder, private to the run."""
    cache_limit: str | None = None
    """Bytes of shards kept on disk for each node, such as 200gb; None: no limit."""
    download_retries: int = 3
    download_timeout_s: float = 120.0
    n_prefetch: int = 8
    """Micro-batches that each rank reads ahead."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty: name a folder written by tools/prepare_data.py")
        weighted = [source.weight is not None for source in self.sources]
        require(
            all(weighted) or not any(weighted),
            "data.sources: give every source a weight, or none (then rows count)",
        )
        paths = [source.path for source in self.sources]
        require(len(set(paths)) == len(paths), f"data.sources names a path twice: {paths}")
        require(self.seq_len > 1, f"data.seq_len={self.seq_len} must be above 1")
        require(self.n_prefetch > 0, f"data.n_prefetch={self.n_prefetch} must be positive")
        require(self.shuffle_seed >= 0, f"data.shuffle_seed={self.shuffle_seed} must not be negative")
        require(self.download_retries >= 0, f"data.download_retries={self.download_retries} must not be negative")
        require(self.download_timeout_s > 0, f"data.download_timeout_s={self.download_timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is added to the cross-entropy; what is logged as the loss is the cross-entropy alone."""

    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 for each target token; 1e-4 is usual, 0 is off."""
    emo: bool = False
    """For finetuning: half cross-entropy, half EMO over the rows of the head that training started from (9797)."""
    emo_max_ratio: float = 3.0
    """EMO is weighted so that it is as large as the cross-entropy of its token, with at most this weight."""

    def __post_init__(self) -> None:
        require(0 <= self.z_loss < math.inf, f"loss.z_loss={self.z_loss} must not be negative")
        require(0 < self.emo_max_ratio < math.inf, f"loss.emo_max_ratio={self.emo_max_ratio} must be positive")
        require(
            self.emo or self.emo_max_ratio == 3.0,
            f"loss.emo_max_ratio={self.emo_max_ratio} has no effect with loss.emo=false",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["tiger", "lion", "adamw"] = "tiger"
    lr: float | None = None
    """Peak learning rate, which the schedule's factor multiplies. For tiger it is relative: a matrix moves by
    lr RMS(matrix) in each element, a gain by lr / 2 (9512). None: tiger 1e-3, lion and adamw 3e-4."""
    beta1: float | None = None
    """None: tiger 0.965, which is its only beta; lion 0.95; adamw 0.9."""
    beta2: float | None = None
    """None: lion 0.98, adamw 0.95."""
    eps: float = 1e-8
    """Of adamw, and of `embedding: adamw`."""
    weight_decay: float | None = None
    """Decoupled, on matrices and embeddings; gains are never decayed. None: tiger and lion 0.01, adamw 0.1."""
    rms_floor: float = 1e-3
    """tiger: the least RMS that a matrix or row counts with, so that one that is all zero learns."""
    embedding: Literal["lazy", "dense", "adamw"] | None = None
    """How tiger and lion move the input embedding, whose rare rows would drift to 1 / weight_decay (9736).
    lazy: a row moves only in steps that gave it a gradient; dense: as any other; adamw: by AdamW with betas of 0.9 and
    0.95. None: lazy, and dense when it is tied to the head, which gives every row a gradient."""
    embedding_lr: float | None = None
    """Peak learning rate of `embedding: adamw`, absolute as AdamW's. None: 3e-4."""
    accumulate: Literal["gradient", "momentum"] = "gradient"
    """gradient: micro-batches are added up in a gradient of the training dtype. momentum (tiger): in its momentum, in
    fp32 and with no other buffer (8634); `clip` then applies to each micro-batch."""
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of tiger's momentum."""
    schedule: Literal["cosine", "wsd", "piecewise"] = "cosine"
    """After warmup. cosine: to final_lr at train.steps; wsd: constant, then linear over decay_steps;
    piecewise: linear through `points`, constant after the last (9512)."""
    warmup_steps: int = 100
    decay_steps: int | None = None
    """Length of the final decay of `wsd`."""
    final_lr: float = 0.1
    """Factor at the last step of cosine and wsd."""
    points: dict[int, float] = field(default_factory=dict)
    """step: factor, for `piecewise`; (0, 0) is put in front when 0 is missing, which is its warmup."""
    clip: Literal["min", "smooth"] | None = "min"
    """min: g min(1, c/|g|); smooth: g c/(|g| + c) (7469); None: no clipping."""
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "rms_floor", "embedding_lr"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"optim.{name}={value} must be positive")
        decay = self.weight_decay
        require(decay is None or 0 <= decay < math.inf, f"optim.weight_decay={decay} must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"optim.{name}={value} must be in [0, 1)")
        require(
            self.name != "tiger" or self.beta2 is None,
            f"optim.beta2={self.beta2} has no effect with optim.name=tiger, whose one beta is optim.beta1: "
            "leave it null",
        )
        require(
            self.name != "adamw" or self.embedding is None,
            f"optim.embedding={self.embedding} has no effect with optim.name=adamw: leave it null",
        )
        require(
            self.embedding == "adamw" or self.embedding_lr is None,
            f"optim.embedding_lr={self.embedding_lr} has no effect with optim.embedding={self.embedding}: use adamw",
        )
        for name, default in (("accumulate", "gradient"), ("momentum_dtype", "fp32"), ("rms_floor", 1e-3)):
            value = getattr(self, name)
            require(
                self.name == "tiger" or value == default,
                f"optim.{name}={value} is for optim.name=tiger, not {self.name}: leave it at {default}",
            )
        require(
            self.accumulate == "gradient" or self.embedding != "adamw",
            "optim.embedding=adamw needs the whole gradient: set optim.accumulate=gradient",
        )
        require(
            self.eps == 1e-8 or "adamw" in (self.name, self.embedding),
            f"optim.eps={self.eps} has no effect with optim.name={self.name}: leave it at 1e-8",
        )
        norm = self.clip_norm
        require(0 < norm < math.inf, f"optim.clip_norm={norm} must be positive; optim.clip=null turns it off")
        require(0 <= self.final_lr <= 1, f"optim.final_lr={self.final_lr} is a factor: it must be in [0, 1]")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} must not be negative")
        decay = self.decay_steps
        require(decay is None or decay > 0, f"optim.decay_steps={decay} must be positive")
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

    def resolved(self, tie_embeddings: bool) -> "OptimConfig":
        """Return the config with every number that `None` leaves to the optimizer."""
        lr, beta1, beta2, decay = {
            "tiger": (1e-3, 0.965, None, 0.01),
            "lion": (3e-4, 0.95, 0.98, 0.01),
            "adamw": (3e-4, 0.9, 0.95, 0.1),
        }[self.name]
        values: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": decay}
        if self.name != "adamw":
            values["embedding"] = "dense" if tie_embeddings else "lazy"
        if self.embedding == "adamw":
            values["embedding_lr"] = 3e-4
        return dataclasses.replace(self, **{k: v for k, v in values.items() if getattr(self, k) is None})


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    on_nonfinite: Literal["shrink", "skip", "stop", "rollback"] = "skip"
    """What all ranks do together when the loss or a gradient is not finite on any of them.
    shrink: tensors with such a gradient go a little towards their centre, the others move on (9512); skip: nothing
    changes; stop: nothing changes and the run ends; rollback: back to the last checkpoint's weights, with the batches
    since then left out. A gradient that overflows fp16 while the loss is finite is the loss scale's fault: skipped."""
    shrink_ratio: float = 0.99
    """shrink: w becomes (w - c) shrink_ratio + c, where c is model.gain_centre for gains and 0 for the rest (9512)."""
    on_spike: Literal["log", "skip", "rollback"] | None = "log"
    """What happens when loss or gradient norm is far above the last `spike_window` steps. log: a warning."""
    spike_sigmas: float = 6.0
    """How far: above the median by so many standard deviations, which 1.4826 median deviations stand for."""
    spike_window: int = 128
    """Steps that a step is compared with; none is called a spike before half of them are there."""
    max_bad_steps: int = 20
    """So many steps in a row that were not applied, or rollbacks without 1000 good steps in a row, stop the run."""
    initial_loss_scale: float = 65536.0
    """fp16 only: doubled after `loss_scale_window` good steps, halved at a bad one."""
    loss_scale_window: int = 1000

    def __post_init__(self) -> None:
        require(self.max_bad_steps > 0, f"guard.max_bad_steps={self.max_bad_steps} must be positive")
        require(
            self.initial_loss_scale > 0 and math.log2(self.initial_loss_scale).is_integer(),
            f"guard.initial_loss_scale={self.initial_loss_scale} must be a power of two, so that unscaling is exact",
        )
        require(self.loss_scale_window > 0, f"guard.loss_scale_window={self.loss_scale_window} must be positive")
        require(0 < self.shrink_ratio < 1, f"guard.shrink_ratio={self.shrink_ratio} must be in (0, 1)")
        require(
            self.on_nonfinite == "shrink" or self.shrink_ratio == 0.99,
            f"guard.shrink_ratio={self.shrink_ratio} has no effect with guard.on_nonfinite={self.on_nonfinite}: "
            "use shrink",
        )
        require(0 < self.spike_sigmas < math.inf, f"guard.spike_sigmas={self.spike_sigmas} must be positive")
        require(
            self.on_spike is not None or (self.spike_sigmas, self.spike_window) == (6.0, 128),
            f"guard.spike_sigmas={self.spike_sigmas} and guard.spike_window={self.spike_window} have no effect with "
            "guard.on_spike=null: leave them at 6.0 and 128",
        )
        require(self.spike_window >= 8, f"guard.spike_window={self.spike_window} must be at least 8, for a median")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    every_steps: int = 1
    """A status line and a record in metrics.jsonl every so many steps."""
    tensorboard: bool = True
    statistics_every_steps: int | None = 100
    """Every so many steps: weight, update, their directions and the gradient's, for each tensor. None: off."""
    peak_tflops: float | None = None
    """What MFU is measured against, for one device. None: the data sheet of a known GPU; on CPU a measured matmul."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"metrics.every_steps={self.every_steps} must be positive")
        every = self.statistics_every_steps
        require(every is None or every > 0, f"metrics.statistics_every_steps={every} must be positive, or null for off")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"metrics.peak_tflops={self.peak_tflops} must be positive, or null",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights, activations and gradients; masters and optimizer state are always fp32."""
    bucket_elements: int = 50_000_000
    """Elements in a communication bucket; its buffers cost that much memory."""
    timeout_s: float = 1800.0
    """A collective that waits longer ends the run."""

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        require(self.bucket_elements > 0, f"engine.bucket_elements={self.bucket_elements} must be positive")
        require(self.timeout_s > 0, f"engine.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 500
    """And at the last step, and when the run is asked to stop (SIGTERM, SIGINT, SIGUSR1)."""
    keep_last: int = 3
    keep_every: int | None = None
    """Also keep those of every so many steps, for ever."""
    asynchronous: bool = True
    """Write in a thread while training goes on, from a copy in host memory as large as this rank's share."""
    grace_s: float = 300.0
    """Seconds from a signal to the end of the process, saved or not: what the cluster gives, less a margin."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"checkpoint.every_steps={self.every_steps} must be positive")
        require(self.keep_last > 0, f"checkpoint.keep_last={self.keep_last} must be positive")
        require(
            self.keep_every is None or (self.keep_every > 0 and self.keep_every % self.every_steps == 0),
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every_steps={self.every_steps}, "
            "or null: other steps are not saved",
        )
        require(self.grace_s > 0, f"checkpoint.grace_s={self.grace_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int | None = 500
    """Validation on the sources' valid split, and at the last step. None: off."""
    n_rows: int = 256
    """At most so many rows, always the same ones."""

    def __post_init__(self) -> None:
        require(
            self.every_steps is None or self.every_steps > 0,
            f"evaluate.every_steps={self.every_steps} must be positive, or null for off",
        )
        require(self.n_rows > 0, f"evaluate.n_rows={self.n_rows} must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: str
    """The run folder. Running the same command again goes on from its newest checkpoint."""
    steps: int
    global_batch_size: int
    """Rows in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int
    """Rows that one rank takes through the model at a time."""
    seed: int = 0
    """Of the initial weights, tensor by tensor, so that ranks and stages do not matter."""
    init_from: str | None = None
    """A bundle to start from; its model section must agree with `model`."""
    init_optimizer: Literal["keep", "reset"] = "reset"
    """keep: go on with the optimizer's state in that bundle (tools/export_model.py --optimizer, tools/grow_model.py).
    The schedule begins anew, so optim.warmup_steps warms the rate up again; 20 to 200 steps are usual."""
    init_data: Literal["continue", "start"] = "start"
    """continue: with the rows after those that the bundle was trained on, in the same order of the same data."""
    stop_at_step: int | None = None
    """Save a checkpoint and stop there, as an interruption would; the schedule still runs to `steps`."""
    accept_changes: list[str] = field(default_factory=list)
    """Keys that may differ from those of the checkpoint that the run goes on from, such as optim.lr; `data` for other
    rows or another order, read from their beginning. A resume names the keys that need it."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of "
            f"train.micro_batch_size={self.micro_batch_size}",
        )
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative")
        for name, default in (("init_optimizer", "reset"), ("init_data", "start")):
            value = getattr(self, name)
            require(
                self.init_from is not None or value == default,
                f"train.{name}={value} has no effect with train.init_from=null: name a bundle, or set it to {default}",
            )

    def n_micro_batches(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks takes in one optimizer step."""
        rows = self.micro_batch_size * world_size
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of train.micro_batch_size="
            f"{self.micro_batch_size} times the {world_size} ranks = {rows}",
        )
        return self.global_batch_size // rows


@dataclass(frozen=True, kw_only=True)
class Config:
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
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} must not be above train.steps={self.train.steps}",
        )
        if self.optim.decay_steps is not None:
            total = self.optim.warmup_steps + self.optim.decay_steps
            require(
                total <= self.train.steps,
                f"optim.warmup_steps + optim.decay_steps = {total} must not be above train.steps={self.train.steps}",
            )
        stop = self.train.stop_at_step
        require(
            stop is None or 0 < stop <= self.train.steps,
            f"train.stop_at_step={stop} must be between 1 and train.steps={self.train.steps}",
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens in an optimizer step, padding included."""
        return self.train.global_batch_size * self.data.seq_len


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
        merged = OmegaConf.merge(OmegaConf.structured(section), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        first, key = str(error).split("\n")[0], getattr(error, "full_key", None)
        at = f" (at {key})" if key and str(key) not in first else ""
        raise UserError(f"{where}: {first}{at}") from error


def to_yaml(section: Any) -> str:
    """The YAML text of a config dataclass, every field included."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(section)))


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, saying `what` the file is, when it is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read {what}: {error}") from error
    require(isinstance(value, dict), f"{path}: {what} must be a JSON object")
    return value


def require_new_file(option: str, path: Path, overwrite: bool) -> None:
    """Refuse a file that `option` names if its folder is missing, or if it is there and not to be replaced."""
    require(path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")
    require(overwrite or not path.exists(), f"{option} {path} exists: choose another name or add --overwrite")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that no half of it is ever found."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_inputs(config: Config) -> None:
    """Check what can be checked before torch is imported: that the files named exist and fit each other.

    Raises:
        UserError: a data folder or the tokenizer is missing, or they were not made for one another.
    """
    tokenizer = Path(config.data.tokenizer)
    require(tokenizer.is_file(), f"data.tokenizer={tokenizer}: no such file; train one with tools/train_tokenizer.py")
    digest = sha256(tokenizer)
    for source in config.data.sources:
        if not source.is_remote:
            check_source(Path(source.path), config, digest)


def check_source(folder: Path, config: Config, tokenizer_sha256: str) -> None:
    """Check the manifest of one prepared folder against the config. Raises UserError."""
    require(
        (folder / "manifest.json").is_file(),
        f"data.sources: {folder} has no manifest.json: make the folder with tools/prepare_data.py",
    )
    manifest = read_json(folder / "manifest.json", "the manifest of prepared data")
    missing = {"tokenizer_sha256", "seq_len", "vocab_size", "splits"} - manifest.keys()
    require(not missing, f"{folder}/manifest.json lacks {sorted(missing)}: prepare the data again")
    require(
        manifest["tokenizer_sha256"] == tokenizer_sha256,
        f"data.tokenizer={config.data.tokenizer} (sha256 {tokenizer_sha256[:12]}) is not the tokenizer that {folder} "
        f"was prepared with ({manifest['tokenizer_sha256'][:12]}): use {folder}/tokenizer.model or prepare again",
    )
    require(
        manifest["seq_len"] == config.data.seq_len,
        f"data.seq_len={config.data.seq_len} differs from the rows of {folder} (seq_len={manifest['seq_len']}): "
        "change data.seq_len or prepare the data again",
    )
    require(
        manifest["vocab_size"] <= config.model.vocab_size,
        f"model.vocab_size={config.model.vocab_size} is below the {manifest['vocab_size']} pieces of the tokenizer: "
        f"set model.vocab_size to at least {manifest['vocab_size']}",
    )
