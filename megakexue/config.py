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
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

IGNORED = -100
"""The target of a position that predicts nothing."""


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
    """A number, or `auto`: the smallest safe base for `context` by the bound rule (10122)."""
    context: int | None = None
    """Tokens that the base must serve. None: `data.seq_len`."""

    def __post_init__(self) -> None:
        if isinstance(self.base, str):
            require(self.base == "auto", f"model.rope.base={self.base!r} must be a number or 'auto'")
        else:
            require(self.base > 1, f"model.rope.base={self.base} must be above 1")
        require(self.context is None or self.context > 0, f"model.rope.context={self.context} must be positive")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    backend: Literal["auto", "flash", "sdpa", "blocked", "reference"] = "auto"
    """auto: flash-attn on CUDA when installed, else SDPA; the blocked form on CPU."""
    scale: Literal["log_n", "constant"] = "log_n"
    """log_n: queries times ln(max(n, floor)) / ln(base), n = keys visible in the query's own document (8823)."""
    log_n_base: int = 512
    log_n_floor: int = 16

    def __post_init__(self) -> None:
        require(self.log_n_base > 1, f"model.attention.log_n_base={self.log_n_base} must be above 1")
        require(self.log_n_floor > 1, f"model.attention.log_n_floor={self.log_n_floor} must be above 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    d_head: int | None = None
    """None: d_model / n_heads."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    residual: Literal["deepnorm", "prenorm"] = "deepnorm"
    """deepnorm: x = norm(alpha x + F(x)) (8978, DeepNet); prenorm: x = x + F(norm(x))."""
    deepnorm_recipe: Literal["auto", "paper", "sgd", "adam", "lamb"] = "auto"
    """Which row of 8978 gives alpha and the initial gain; auto follows the optimizer family."""
    residual_alpha: float | None = None
    """None: from the recipe. Written as a number into a bundle, since growth must keep it."""
    branch_gain: float | None = None
    """Gain of a whole residual branch at initialisation; None: from the recipe."""
    embed_scale: float | None = None
    """Multiplies the embedding rows; None: sqrt(d_model), which starts the stream at RMS 1."""
    logit_scale: float | None = None
    """Multiplies the logits; None: 1 untied, ln(vocab_size) / (2 sqrt(d_model)) tied (9698)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads={self.n_heads} must be a multiple of model.n_kv_heads={self.n_kv_heads}: "
            f"set model.n_kv_heads to a divisor of {self.n_heads}",
        )
        if self.d_head is None:
            require(
                self.d_model % self.n_heads == 0,
                f"model.d_model={self.d_model} must be a multiple of model.n_heads={self.n_heads}: "
                "change one, or set model.d_head",
            )
        require(self.head_width % 2 == 0, f"model.d_head={self.head_width} must be even, since RoPE rotates pairs")
        for name in ("norm_eps", "residual_alpha", "branch_gain", "embed_scale", "logit_scale"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"model.{name}={value} must be positive")
        require(
            self.residual == "deepnorm" or self.deepnorm_recipe == "auto",
            f"model.deepnorm_recipe={self.deepnorm_recipe} has no effect with model.residual={self.residual}: "
            "use deepnorm, or leave the recipe at auto",
        )

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads


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
class OptimConfig:
    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    """Peak learning rate, which the schedule's factor multiplies."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled, on matrices and embeddings; gains are never decayed."""
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
        for name in ("lr", "eps"):
            require(0 < getattr(self, name) < math.inf, f"optim.{name}={getattr(self, name)} must be positive")
        require(0 <= self.weight_decay < math.inf, f"optim.weight_decay={self.weight_decay} must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        require(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive; optim.clip=null turns it off")
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


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What all ranks do together when the loss or a gradient is not finite on any of them."""
    max_bad_steps: int = 20
    """So many bad steps in a row stop the run."""
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


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    every_steps: int = 1
    """A status line and a record in metrics.jsonl every so many steps."""
    tensorboard: bool = True
    peak_tflops: float | None = None
    """What MFU is measured against, for one device. None: the data sheet of a known GPU; on CPU a measured matmul."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"metrics.every_steps={self.every_steps} must be positive")
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
    keep_last: int = 3

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"checkpoint.every_steps={self.every_steps} must be positive")
        require(self.keep_last > 0, f"checkpoint.keep_last={self.keep_last} must be positive")


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
    stop_at_step: int | None = None
    """Save a checkpoint and stop there, as an interruption would; the schedule still runs to `steps`."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of "
            f"train.micro_batch_size={self.micro_batch_size}",
        )
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative")

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
