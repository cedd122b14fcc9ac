"""Small models, configs, runs and records that several tests use."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    GuardConfig,
    LossConfig,
    MetricsConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    ResolvedConfig,
    ResolvedModel,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    load_config,
    to_yaml,
)
from megakexue.core.attention import Backend
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.resolve import resolve, resolve_config, resolve_optim
from megakexue.run.guard import GuardState
from megakexue.run.metrics import Metrics
from megakexue.run.records import StatisticsRecord, StepRecord, TensorStatistics
from megakexue.run.state import TrainerState, plain
from tests.conftest import Prepared

ROOT = Path(__file__).parents[1]


def tiny_run(prepared: Prepared, run: Path, *overrides: str) -> list[str]:
    """Overrides of configs/tiny_gqa.yaml for a run of a second on the prepared text."""
    return [
        f"data.sources=[{{path: {prepared.data}}}]", f"data.tokenizer={prepared.tokenizer}",
        f"data.seq_len={prepared.seq_len}", f"train.run={run}", "model.vocab_size=512", "model.d_model=32",
        "model.n_layers=2", "model.d_ff=48", "train.steps=8", "train.global_batch_size=16", "optim.warmup_steps=2",
        "evaluate.every_steps=4", "evaluate.n_rows=13", "checkpoint.every_steps=3", "metrics.tensorboard=false",
        "metrics.peak_tflops=1", "engine.bucket_elements=3000", *overrides,
    ]  # fmt: skip


def tiny_config(prepared: Prepared, run: Path, *overrides: str, name: str = "tiny_gqa") -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", tiny_run(prepared, run, *overrides))


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
BUNDLES = {"7b_32k": "7b_from_1b", "tiny_2048": "tiny_gqa"}
"""Of what the bundles are that configs take their model from."""


def bundle_config(folder: Path, model: ResolvedModel) -> Path:
    """What a config takes of a bundle: its config, which says nothing without a manifest."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(to_yaml({"model": dataclasses.asdict(model), "lineage": {}}))
    return folder


def load_shipped(path: Path, folder: Path, overrides: list[str] | None = None) -> Config:
    """Load a file of configs/, whose bundle is then in `folder`."""
    if path.stem not in BUNDLES:
        return load_config(path, overrides)
    model = resolve_config(load_config(ROOT / "configs" / f"{BUNDLES[path.stem]}.yaml")).model
    return load_config(path, [f"train.init_from={bundle_config(folder / 'bundle', model)}", *(overrides or [])])


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(run: Path) -> list[dict[str, Any]]:
    """The records of steps, but the last line of all, which says what they have read."""
    return [record for record in lines_of(run) if record["kind"] != "read"]


TIMES = {"tokens_per_s", "mfu", "memory_gib", "data_wait_s", "step_s", "times"}


def column(run: Path) -> list[dict[str, Any]]:
    """All that a run recorded but what the clock and the machine decide."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in lines_of(run)]


def losses_near(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded line whose losses may differ by the order of float32 sums."""

    def near(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: near(key, part) for key, part in value.items()}
        return pytest.approx(value, rel=2e-5) if name in ("loss", "grad_norm", "bits_per_byte") else value

    return {name: near(name, value) for name, value in record.items()}


def state_hashes(run: Path, step: int) -> dict[str, Any]:
    manifest = json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def train_all(configs: list[Config]) -> None:
    from megakexue.run.train import train

    for config in configs:
        train(config)


def outcomes(configs: list[Config]) -> list[str]:
    """What each run ends with: "" or the refusal."""
    from megakexue.run.train import train

    ends = []
    for config in configs:
        try:
            train(config)
            ends.append("")
        except UserError as error:
            ends.append(str(error))
    return ends


def make_config(
    prepared: Prepared,
    *,
    stage: int = 0,
    dtype: str = "fp32",
    micro: int = 2,
    tied: bool = False,
    mla: bool = False,
    emo: bool = False,
    optim: dict[str, Any] | None = None,
    guard: dict[str, Any] | None = None,
    rows: int = 8,
    steps: int = 4,
) -> ResolvedConfig:
    # sizes that no number of ranks divides, so that partitions cut through tensors and rows
    kind: dict[str, Any] = dict(n_kv_heads=2, d_head=10, attention=AttentionConfig(qkv_bias=True, qk_norm=True))
    if mla:
        kind = dict(mla=MlaConfig(d_latent=17, d_query_latent=23, d_nope=7, d_rope=6, d_value=11))
    model = ModelConfig(vocab_size=517, d_model=36, n_layers=2, n_heads=6, d_ff=50, tie_embeddings=tied, **kind)
    settings: dict[str, Any] = {"name": "adamw", "lr": 1e-2} | (optim or {})
    return ResolvedConfig(
        model=resolve(model, settings["name"], prepared.seq_len),
        data=DataConfig(
            sources=[SourceConfig(path=str(prepared.data))], tokenizer=str(prepared.tokenizer), seq_len=prepared.seq_len
        ),
        train=TrainConfig(
            run="unused",
            steps=steps,
            global_batch_size=rows,
            micro_batch_size=micro,
            init_from="unused" if emo else None,
        ),
        # a norm that clips every step, so that clipping is under test too
        optim=resolve_optim(OptimConfig(**{"warmup_steps": 1, "clip_norm": 0.1} | settings), tied),
        loss=LossConfig(z_loss=1e-3 if emo else 0.0, emo=emo),
        guard=GuardConfig(**guard or {}),
        engine=EngineConfig(zero_stage=stage, dtype=dtype, bucket_elements=3000),  # type: ignore[arg-type]
    )


QUIET = MetricsConfig(tensorboard=False)


def make_record(step: int, **values: Any) -> StepRecord:
    """A plausible step of a small run, the same each time."""
    defaults = {
        "loss": 2.5 + 4 / math.sqrt(step),
        "grad_norm": 0.8 + 1 / step,
        "lr": 3e-4 * min(1, step / 10),
        "tokens": 4096 * step,
        "tokens_per_s": 41234.5,
        "mfu": 0.381,
        "memory_gib": 12.3,
        "status": "applied",
        "loss_scale": 1.0,
        "epoch": step / 300,
        "data_wait_s": 0.01,
        "step_s": 0.1,
        "bits_per_byte": 1.25,
    }
    return StepRecord(step=step, **{**defaults, **values})


def make_tensor(**values: float) -> TensorStatistics:
    defaults = {"weight_rms": 0.02, "update_rms": 2e-5, "gradient_rms": 3e-4, "cosine": 0.31, "sign_agreement": 0.62}
    return TensorStatistics(**{**defaults, **values})


def make_statistics(step: int, **values: Any) -> StatisticsRecord:
    """The statistics of a plausible step, the same each time."""
    tensors = {"embedding.weight": make_tensor(cosine=0.1 + step / 1000), "blocks.0.attention.wq": make_tensor()}
    return StatisticsRecord(
        **{"step": step, "whole": make_tensor(), "tensors": tensors, "n_drifting_rows": 0, **values}
    )


def tiny(**changes: Any) -> ResolvedModel:
    values: dict[str, Any] = dict(vocab_size=97, d_model=48, n_layers=3, n_heads=6, d_ff=80)
    if "mla" not in changes:
        values["n_kv_heads"] = 2
    return resolve(ModelConfig(**(values | changes)), "adamw", 64)


def build(config: ResolvedModel, backend: Backend = "reference", dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config, backend).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, config, 0))
    return model


KINDS: dict[str, dict[str, Any]] = {
    "gqa": dict(n_kv_heads=2),
    "biases and norms of heads": dict(n_kv_heads=2, attention=AttentionConfig(qkv_bias=True, qk_norm=True)),
    "mha": dict(n_kv_heads=6, d_head=10),
    "mqa": dict(n_kv_heads=1, d_head=10),
    "partly rotated": dict(n_kv_heads=2, d_head=12, rope=RopeConfig(fraction=0.5)),
    "mla": dict(mla=MlaConfig(d_latent=20, d_query_latent=28, d_nope=10, d_rope=6, d_value=14)),
    "mla with whole queries": dict(mla=MlaConfig(d_latent=20, d_nope=8, d_rope=8, d_value=12)),
}
VARIANTS: list[dict[str, Any]] = [
    dict(residual=r, tie_embeddings=t) | kind
    for r in ("deepnorm", "prenorm")
    for t in (False, True)
    for kind in KINDS.values()
]


def positions_of(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def make_state(step: int, config: Config, guard: GuardState | None = None, **values: Any) -> TrainerState:
    """The trainer's state of a run that has made `step` steps."""
    empty = GuardState(scales_loss=False, loss_scale=1.0, losses=[], log_norms=[])
    known: dict[str, Any] = {"data": "rows", "tokenizer": "ids", "source": "code", "world_size": 1}
    return TrainerState(step=step, guard=guard or empty, config=plain(config), **known | values)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_run(
    run: Path, steps: range, *, resume_step: int = 0, n_steps: int = 20, bad: dict[int, str] | None = None
) -> None:
    with Metrics(run, QUIET, n_steps=n_steps, resume_step=resume_step) as metrics:
        for step in steps:
            metrics.log_step(make_record(step, status=(bad or {}).get(step, "applied")))
            if step % 4 == 0:
                metrics.log_statistics(make_statistics(step))
            if step % 5 == 0:
                metrics.log_validation(step, 2.6 + 4 / step, 65536)


def n_rows(prepared: Prepared) -> int:
    return json.loads((prepared.data / "manifest.json").read_text())["splits"]["train"]["rows"]


def change_trainer(run: Path, step: int, change: dict[str, Any]) -> None:
    """Write other values into a checkpoint, with a manifest that vouches for them."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    text = json.dumps(json.loads((folder / "trainer.json").read_text()) | change)
    (folder / "trainer.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
