"""The loop: stopped and resumed is never stopped, at every stage; what a run folder holds; refusals."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.generate import complete, load_decoder
from megakexue.config import Config, UserError, load_config, to_yaml
from megakexue.core.device import has_compiler
from megakexue.core.entropy import Observer
from megakexue.core.resolve import resolve_config
from megakexue.dist import ALONE
from megakexue.run.clock import PARTS
from megakexue.run.data import Batches
from megakexue.run.export import export_run
from megakexue.run.records import StatisticsRecord, StepRecord, read_metrics
from megakexue.text.manifest import read_manifest
from megakexue.text.prepare import PrepareArguments, prepare
from megakexue.text.tokenizer_files import tokenizer_sha256
from tests.conftest import Popen, Prepared, stdlib_files
from tests.foreign import byte_level, foreign_model
from tests.helpers import (
    ROOT,
    build,
    change_trainer,
    column,
    lines_of,
    losses_near,
    n_rows,
    outcomes,
    records,
    state_hashes,
    tiny_config,
    tiny_run,
    train_all,
)
from tests.programs import run_python
from tests.ranks import free_port, run_on_ranks


def train_with_cache(cache: str, configs: list[Config]) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    train_all(configs)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_a_compiled_run_goes_on_with_kernels_made_anew(prepared: Prepared, tmp_path: Path) -> None:
    # without validation, whose graphs are others
    options = ["engine.compile=on", "engine.recompute=product", "engine.dtype=bf16", "evaluate.every_steps=null"]
    straight, stopped = (tiny_config(prepared, tmp_path / name, *options) for name in ("straight", "stopped"))
    early = tiny_config(prepared, tmp_path / "stopped", *options, "train.stop_at_step=5")
    run_on_ranks(1, train_with_cache, str(tmp_path / "first"), [straight, early])
    run_on_ranks(1, train_with_cache, str(tmp_path / "empty"), [stopped])
    assert list((tmp_path / "empty").iterdir())
    assert column(tmp_path / "stopped") == column(tmp_path / "straight")
    rank = "rank_00000.safetensors"
    assert state_hashes(tmp_path / "stopped", 8)[rank] == state_hashes(tmp_path / "straight", 8)[rank]


@pytest.mark.slow
def test_stopped_and_resumed_is_never_stopped(prepared: Prepared, tmp_path: Path) -> None:
    # enough rows in a step that the run crosses an epoch end after the stop, with shuffled data
    batch = n_rows(prepared) // 7 // 8 * 8
    configs, names = [], []
    cases = [("gqa", s, "fp32") for s in range(4)]
    cases += [("gqa", 0, "bf16"), ("gqa", 1, "bf16"), ("gqa", 2, "fp16"), ("gqa", 3, "bf16")]
    cases += [("mla", 0, "fp32"), ("mla", 2, "fp32"), ("mla", 3, "bf16")]
    for kind, stage, dtype in cases:
        name, model = f"{kind}_{stage}_{dtype}", f"tiny_{kind}"
        options = [f"engine.zero_stage={stage}", f"engine.dtype={dtype}", f"train.global_batch_size={batch}",
                   f"train.micro_batch_size={batch // 4}", "guard.loss_scale_window=3",
                   "metrics.statistics_every_steps=7"]  # fmt: skip
        if (kind, stage, dtype) == ("gqa", 2, "fp32"):
            options.append("optim.accumulate=momentum")
        configs.append(tiny_config(prepared, tmp_path / f"straight_{name}", *options, name=model))
        stopped = tmp_path / f"stopped_{name}"
        configs.append(tiny_config(prepared, stopped, *options, "train.stop_at_step=5", name=model))
        configs.append(tiny_config(prepared, stopped, *options, name=model))
        names.append(name)
    run_on_ranks(2, train_all, configs)
    for name in names:
        straight, stopped = tmp_path / f"straight_{name}", tmp_path / f"stopped_{name}"
        assert column(stopped) == column(straight), name
        assert [r["step"] for r in records(straight) if r["kind"] == "train"] == list(range(1, 9))
        assert records(straight)[-1]["kind"] == "valid" and records(straight)[-2]["epoch"] > 1
        # masters, moments and random state of both ranks, bit for bit
        a, b = state_hashes(straight, 8), state_hashes(stopped, 8)
        assert a.keys() == b.keys() == {"rank_00000.safetensors", "rank_00001.safetensors", "trainer.json"}
        for run in (straight, stopped):
            state = json.loads((run / "checkpoints" / "step_00000008" / "trainer.json").read_text())
            assert state["config"]["train"].pop("run") == str(run)
            assert [(start["step"], start["changes"]) for start in state["lineage"]] == [(0, [])]
            del state["source"], state["lineage"]  # the commit, which may move under a test
            (a if run == straight else b)["trainer.json"] = state
        assert a == b, name
    # and the stages agree with one another: sums in another order, stated in tests/run/test_engine.py
    losses = {
        name: [r["loss"] for r in records(tmp_path / f"straight_{name}") if r["kind"] != "statistics"] for name in names
    }
    for name in names:
        kind, _, dtype = name.split("_")
        rel = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}[dtype]
        assert losses[name] == pytest.approx(losses[f"{kind}_0_fp32"], rel=rel), name


def train_with_slow_data(configs: list[Config], slow: Config) -> None:
    """Train on each; at last with a disk on rank 1 that takes 0.1 s for a row."""
    from megakexue.run.rows import Rows

    train_all(configs)
    if os.environ["RANK"] == "1":
        read = Rows.read

        def late(*arguments: Any) -> Any:
            time.sleep(0.1)
            return read(*arguments)

        Rows.read = late  # type: ignore[assignment, method-assign]
    train_all([slow])


def observed(config: Config, n_ranks: int) -> list[tuple[float, ...]]:
    """What a plain model with the initial weights shows of the first micro-batches of ranks with rows of their own."""
    resolved = resolve_config(config)
    model = build(resolved.model)
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    data = Batches(config.data, global_batch_size=size, micro_batch_size=micro, ranks=ALONE, cache=Path("unused"))
    observers = []
    for batch in data.next_step()[:n_ranks]:
        observers.append(Observer(batch.targets, batch.targets, torch.device("cpu")))
        model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets, observer=observers[-1])
    data.close()
    sums = torch.stack([o.sums() for o in observers]).sum(0).tolist()
    *largest, output = torch.stack([o.largest() for o in observers]).amax(0).tolist()
    return [*((h / n, r / m, top) for (h, n, r, m), top in zip(sums, largest, strict=True)), (output,)]


@pytest.mark.slow
def test_what_a_run_tells_of_itself(prepared: Prepared, tmp_path: Path) -> None:
    """Of attention, which is what a plain model computes and changes no bit; and of the time of each step."""
    cases = {
        "gqa 1 bf16": [], "mla 2 fp32": ["engine.recompute=block"], "mla 0 fp32": ["engine.sequence_ranks=2"],
        "gqa 3 fp32": ["engine.tile_tokens=16", "optim.accumulate=momentum"],
    }  # fmt: skip
    pairs = {}
    for case, more in cases.items():
        kind, stage, dtype = case.split()
        options = ["train.steps=2", f"engine.zero_stage={stage}", f"engine.dtype={dtype}", "evaluate.every_steps=null",
                   "train.micro_batch_size=4", *more]  # fmt: skip
        pairs[case] = [
            tiny_config(prepared, tmp_path / f"{case} {every}", *options, f"metrics.statistics_every_steps={every}",
                        name=f"tiny_{kind}") for every in ("1", "null")
        ]  # fmt: skip
    slow = tiny_config(prepared, tmp_path / "slow", "train.steps=2", "checkpoint.every_steps=1")
    run_on_ranks(2, train_with_slow_data, [config for pair in pairs.values() for config in pair], slow)

    for case, (config, without) in pairs.items():
        a, b = (state_hashes(Path(own.train.run), 2) for own in (config, without))
        assert all(a[f"rank_0000{rank}.safetensors"] == b[f"rank_0000{rank}.safetensors"] for rank in range(2)), case
        found = [r for r in read_metrics(Path(config.train.run)) if isinstance(r, StatisticsRecord)]
        assert [record.step for record in found] == [1, 2]
        assert all(layer.entropy > 0 and 0 < layer.relative_entropy < 1 for r in found for layer in r.attention), case
        is_shared = config.engine.sequence_ranks == 2
        *expected, (output,) = observed(config, 1 if is_shared else 2)
        rel = 2e-5 if config.engine.dtype == "fp32" else 2e-2
        for layer, values in zip(found[0].attention, expected, strict=True):
            assert (layer.entropy, layer.relative_entropy, layer.largest_logit) == pytest.approx(values, rel=rel), case
        if not is_shared:  # where ranks look at other tokens
            assert found[0].largest_logit == pytest.approx(output, rel=rel), case

    for run in (*(config.train.run for pair in pairs.values() for config in pair), slow.train.run):
        steps = [r for r in read_metrics(Path(run)) if isinstance(r, StepRecord)]
        for record in steps:
            assert list(record.times) == list(PARTS)
            assert sum(record.times.values()) == pytest.approx(record.step_s, rel=0.02, abs=1e-3), run
            assert all(record.times[part] > 0 for part in PARTS if part != "saving"), run
    # of the slow run: 8 rows before anything was read ahead, for which rank 0, whose records these are, waits too
    assert steps[0].times["data"] > 0.8 > 2 * steps[0].data_wait_s
    assert steps[0].times["saving"] == 0 < steps[1].times["saving"]


@pytest.mark.slow
def test_tokenizers_of_others_from_text_to_text(tmp_path: Path) -> None:
    """tokenizer.json without BOS, and sentencepiece with a dummy prefix: prepared, trained, resumed, exported."""
    files = stdlib_files(6)
    texts = [path.read_text(encoding="utf-8") for path in files]
    paths = {
        "json": byte_level(tmp_path / "qwen", "qwen", texts, 450),
        "model": foreign_model(tmp_path, add_dummy_prefix=True, pad_id=-1),
    }
    configs, names = [], {"json": ["tokenizer.json", "tokenizer_config.json"], "model": ["tokenizer.model"]}
    for kind, path in paths.items():
        arguments = PrepareArguments(seq_len=64, packing="best_fit", valid_fraction=0.2)
        manifest = prepare([str(file) for file in files], path, tmp_path / kind, arguments, processes=2)
        assert sorted(p.name for p in (tmp_path / kind).glob("tokenizer*")) == names[kind]
        assert manifest["round_trip"] == {"measured": kind == "json", "changed": 0, "paths": []}
        data = Prepared(tmp_path / kind / names[kind][0], tmp_path / kind, 64)
        straight, stopped = (tmp_path / f"{name}_{kind}" for name in ("straight", "stopped"))
        configs += [tiny_config(data, straight), tiny_config(data, stopped, "train.stop_at_step=4")]
        own = Prepared(stopped / names[kind][0], tmp_path / kind, 64)  # the run's copy, from now on
        configs.append(tiny_config(own, stopped))
    run_on_ranks(2, train_all, configs)
    for kind, path in paths.items():
        assert column(tmp_path / f"stopped_{kind}") == column(tmp_path / f"straight_{kind}")
        a, b = (state_hashes(tmp_path / f"{name}_{kind}", 8) for name in ("straight", "stopped"))
        assert a["rank_00000.safetensors"] == b["rank_00000.safetensors"]
        bundle = Bundle(export_run(tmp_path / f"stopped_{kind}", tmp_path / f"bundle_{kind}"))
        assert sorted(p.name for p in bundle.folder.glob("tokenizer*")) == names[kind]
        tokenizer = bundle.load_tokenizer()
        assert tokenizer.sha256 == tokenizer_sha256(path) == read_manifest(tmp_path / kind).tokenizer_sha256
        said = complete(load_decoder(bundle), tokenizer, ["def f(", ""], n_tokens=8, temperature=0)
        assert all("".join(piece or "" for piece in pieces) for pieces in zip(*said))
        # trained on from the bundle, with the tokenizer of another it is refused
    other = Prepared(paths["model"], tmp_path / "model", 64)
    own = Prepared(paths["json"], tmp_path / "json", 64)
    start = f"train.init_from={tmp_path / 'bundle_json'}"
    runs = [tiny_config(data, tmp_path / f"from_{i}", start, "train.steps=3") for i, data in enumerate((own, other))]
    (ends,) = run_on_ranks(1, outcomes, runs)
    assert ends[0] == "" and "is not the tokenizer of train.init_from=" in ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_gqa", "tiny_mla"])
def test_micro_batches_and_ranks_do_not_change_the_loss(name: str, prepared: Prepared, tmp_path: Path) -> None:
    runs = {(1, 48): 1, (1, 6): 1, (2, 24): 1, (2, 3): 1, (3, 16): 0, (3, 2): 1, (3, 4): 2, (3, 8): 3}
    worlds = (1, 2, 3) if name == "tiny_gqa" else (1, 2)
    for world in worlds:
        configs = [
            tiny_config(prepared, tmp_path / f"{world}_{micro}", f"train.micro_batch_size={micro}",
                        "train.global_batch_size=48", f"engine.zero_stage={stage}", name=name)
            for (n, micro), stage in runs.items() if n == world
        ]  # fmt: skip
        run_on_ranks(world, train_all, configs)
    reference = column(tmp_path / "1_48")
    for run in (f"{world}_{micro}" for world, micro in runs if world in worlds):
        for got, want in zip(column(tmp_path / run), reference, strict=True):
            assert got == losses_near(want), run  # rows and tokens are the same ones


@pytest.mark.slow
def test_a_run_in_stages_resumes_anywhere(prepared: Prepared, tmp_path: Path) -> None:
    """In the middle of each stage and at a border."""

    def config(run: str, *more: str) -> Config:
        stages = "data.stages=[{until_step: 3, seq_len: 16}, {until_step: 6, seq_len: 32}]"
        return tiny_config(prepared, tmp_path / run, stages, *more)

    parts = [config("parts", f"train.stop_at_step={stop}") for stop in (2, 3, 5, 7)]
    shared = config("shared", "engine.sequence_ranks=2", "engine.zero_stage=3")
    run_on_ranks(2, train_all, [config("straight"), *parts, config("parts"), shared])
    same_bits(tmp_path, 8)
    log = (tmp_path / "straight" / "logs" / "rank_0.log").read_text()
    assert re.findall(r"step (\d): from here on rows of (\d+) tokens", log) == [("4", "32"), ("7", "64")]
    for got, want in zip(records(tmp_path / "shared"), records(tmp_path / "straight"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-5)


@pytest.mark.slow
def test_a_compiled_run_in_stages_resumes_at_a_border(prepared: Prepared, tmp_path: Path) -> None:
    """The process that goes on compiles for its own length alone, and computes the same bits."""
    options = ["data.stages=[{until_step: 2, seq_len: 32}]", "engine.compile=on", "evaluate.every_steps=null",
               "model.n_layers=1", "train.steps=4"]  # fmt: skip
    straight, parts = (tiny_config(prepared, tmp_path / run, *options) for run in ("straight", "parts"))
    first = tiny_config(prepared, tmp_path / "parts", *options, "train.stop_at_step=2")
    run_on_ranks(1, train_all, [straight])
    for config in (first, parts):
        run_on_ranks(1, train_all, [config])
    same_bits(tmp_path, 4)


def same_bits(folder: Path, step: int) -> None:
    """Assert that the runs `straight` and `parts` are one in records, weights and state."""
    assert column(folder / "straight") == column(folder / "parts")
    a, b = (state_hashes(folder / run, step) for run in ("straight", "parts"))
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a if name != "trainer.json")


def launch(popen: Popen, prepared: Prepared, run: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command of the README on two ranks, as a session of its own that can be killed whole."""
    command = [
        "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "launch/train.py",
        "configs/tiny_gqa.yaml", *tiny_run(prepared, run, *overrides),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check_reads(run: Path, output: str) -> None:
    """Compare what `test_launched_run_survives_a_kill` says that it has read with what its steps have had."""
    last = lines_of(run)[-1]
    assert (last["kind"], last["step"]) == ("read", 30)
    by_step = [r["sources"] for r in records(run)]
    for name, read in last["sources"].items():
        assert read["tokens"] == sum(sources[name]["n_tokens"] for sources in by_step if name in sources), name
    rows = [read["rows"] for read in last["sources"].values()]
    # of 16 rows a step; windows are longer than the run, so shares within it are not exact
    assert sum(rows) == 30 * 16 and abs(rows[1] - (22 * 4 + 8 * 8)) < 30
    assert "step 23: from here on data 50.0%, made 50.0% synthetic (data.stages)" in output
    assert "mixture     data 75.0%, made 25.0% synthetic until step 22; data 50.0%, made" in output
    assert re.search(rf"\nread        source +rows +tokens  share  epochs  up to step 30\n +data +{rows[0]} ", output)
    assert re.search(rf"\n +made +{rows[1]} .* synthetic\n +all +480 ", output)


@pytest.mark.slow
def test_launched_run_survives_a_kill(prepared: Prepared, tmp_path: Path, popen: Popen) -> None:
    arguments = PrepareArguments(seq_len=prepared.seq_len, packing="best_fit", valid_fraction=0.2)
    prepare([str(stdlib_files(9)[8])], prepared.tokenizer, tmp_path / "made", arguments, processes=1)
    # another mixture begins between the kill and the end
    weights = (
        f"data.sources=[{{path: {prepared.data}, weight: 1}}, {{path: {tmp_path}/made, weight: 1, synthetic: true}}]",
        "data.stages=[{until_step: 22, weights: {data: 3, made: 1}}]",
        "data.max_synthetic=0.5",
    )
    options = ["train.steps=30", "checkpoint.every_steps=5", "engine.zero_stage=3", "evaluate.every_steps=null",
               "metrics.peak_tflops=null", *weights]  # fmt: skip
    killed = launch(popen, prepared, tmp_path / "killed", *options)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 17):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    output = killed.communicate()[0]
    assert len(records(tmp_path / "killed")) < 30
    again = launch(popen, prepared, tmp_path / "killed", *options)
    output_again = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output_again
    resumed = re.search(r"\nstart       resumed from\s+\S*step_000000(15|20|25)\n", output_again)
    assert resumed, output_again
    # the same in processes that no launcher has started, and nobody has killed
    run_on_ranks(2, train_all, [tiny_config(prepared, tmp_path / "straight", *options)])
    assert column(tmp_path / "killed") == column(tmp_path / "straight")
    hashes = [state_hashes(tmp_path / run, 30) for run in ("killed", "straight")]
    assert all(hashes[0][name] == hashes[1][name] for name in hashes[0] if name != "trainer.json")
    check_reads(tmp_path / "killed", output_again)
    assert [r["step"] for r in records(tmp_path / "killed")] == list(range(1, 31))

    # what the user was told before the first step, and the folder as docs/folders.md shows it
    for words in ("settings    model.vocab_size=512 model.d_model=32", " parameters, ", "deepnorm alpha", "rope base",
                  "30 steps, 30,720 tokens", "ZeRO-3 fp32, ",
                  "attention   blocked: the fastest form on CPU",
                  "optimizer   tiger, in chunks of 65,536: fewer than", "start       new weights from train.seed=0",
                  "MFU         of ", f"run         {tmp_path / 'killed'}\n            (config.yaml, "):  # fmt: skip
        assert words in output
    shown = re.findall(r"^ +(\d+)/30 +\d+\.\d{4} ", output_again, re.MULTILINE)
    assert list(map(int, shown)) == list(range(int(resumed[1]) + 1, 31))
    # nothing that is not ours, but of the launcher: no line of DeepSpeed's INFO, no warning of torch
    foreign = [line for line in output_again.splitlines() if re.search(r"INFO|WARNING|Warning", line)]
    assert all(re.search(r"\[(launch|runner|real_accelerator)\.py:", line) for line in foreign), foreign
    end = output_again[output_again.index("steps       30 of 30: 30 applied\n") :].splitlines()
    first = ["steps", "loss", "tokens", "time", "read", "data", "made", "all", "run", "next", "tools/export_model.py"]
    assert [line.split()[0] for line in end[:11]] == first
    run = tmp_path / "killed"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "deepspeed.json", "lock", "logs", "metrics.jsonl", "source.txt", "starts.jsonl",
        "tokenizer.model",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    log = (run / "logs" / "rank_1.log").read_text()
    assert "step 0 of 30" in log and f"step {resumed[1]} of 30" in log
    resolved = load_config(run / "config.yaml")
    assert isinstance(resolved.model.rope.base, float) and resolved.model.residual_alpha is not None
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3


def test_a_start_imports_neither_streaming_nor_torchs_compiler(prepared: Prepared, tmp_path: Path) -> None:
    # which take longer than all else: a source on this disk and eager blocks need neither
    code = """
import sys
from megakexue.config import load_config
from megakexue.run.train import train

train(load_config("configs/tiny_gqa.yaml", sys.argv[1:]))
print(sorted({"streaming", "torch._dynamo", "torch._inductor"} & sys.modules.keys()))
"""
    done = run_python(code, *tiny_run(prepared, tmp_path / "run", "train.steps=2", "evaluate.every_steps=null"))
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def train_poisoned(config: Config, factors: dict[int, float]) -> str:
    """Train with the embedding of the last rank multiplied by `factors[step]` in those steps."""
    import torch

    from megakexue.core.decoder import Embedding
    from megakexue.run.guard import TrainingStopped
    from megakexue.run.train import train

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    n_micro_batches = config.train.n_micro_batches(world_size // config.engine.sequence_ranks)
    forward, n_calls = Embedding.forward, 0
    folders = (Path(config.train.run) / "checkpoints").glob("step_*")
    first = max((int(path.name[5:]) for path in folders), default=0)

    def poisoned(self: Any, tokens: Any) -> Any:
        nonlocal n_calls
        step = first + n_calls // n_micro_batches + 1
        n_calls += torch.is_grad_enabled()
        out = forward(self, tokens)
        return out * factors[step] if step in factors and rank == world_size - 1 else out

    Embedding.forward = poisoned  # type: ignore[method-assign]
    try:
        train(config)
    except TrainingStopped as error:
        return str(error)
    finally:
        Embedding.forward = forward  # type: ignore[method-assign]
    return "went on"


@pytest.mark.parametrize(
    ("policy", "last_step", "words"),
    [
        ("stop", 3, "guard.on_nonfinite=stop ends the run here"),
        ("skip", 4, "2 bad steps in a row (guard.max_bad_steps)"),
    ],
)
def test_bad_steps_end_the_run_and_are_on_record(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str], policy: str, last_step: int, words: str
) -> None:
    unread = tmp_path / "unread"
    shutil.copytree(prepared.data, unread)
    config = tiny_config(
        prepared, tmp_path, f"guard.on_nonfinite={policy}", "guard.max_bad_steps=2", "train.micro_batch_size=16",
        "evaluate.every_steps=null",
        f"data.sources=[{{path: {prepared.data}, weight: 1e9}}, {{path: {unread}, weight: 1e-9}}]",
    )  # fmt: skip
    (message,) = run_on_ranks(1, train_poisoned, config, {step: math.nan for step in range(3, 9)})
    assert f"WARNING: data source {unread} gives none of the " in capfd.readouterr().out
    assert f"step {last_step}: loss nan" in message and words in message
    assert "; gradients that are not finite: embedding.weight and 19 more; this began in the loss of rank 0;" in message
    assert [r["status"] for r in records(tmp_path)] == ["applied"] * 2 + ["skipped"] * (last_step - 2)
    assert records(tmp_path)[-1]["loss"] == "nan"
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert re.search(r"rows of this rank: \[\['.*train/shard.00000.mds row \d+', ", log)
    dump = tmp_path / "dumps" / f"step_{last_step:08d}"
    assert f"`tools/replay_step.py {dump}`" in message
    trainer = json.loads((dump / "trainer.json").read_text())
    assert trainer["reason"] in message and len(trainer["rows"]["0"][0]) == 16 and not trainer["is_finite"]


def test_a_stop_without_a_dump_and_one_by_a_spike(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "dumps").touch()  # as when the disk is full: no folder can be made
    options = ["train.micro_batch_size=16", "evaluate.every_steps=null", "optim.lr=1e-3", "guard.max_bad_steps=1"]
    full = tiny_config(prepared, tmp_path / "full", *options)
    spike = tiny_config(prepared, tmp_path / "spike", *options, "guard.on_spike=skip", "guard.spike_window=8")
    ((by_disk, by_spike),) = run_on_ranks(1, poisoned_runs, [(full, {2: math.inf}), (spike, {7: 40.0})])
    assert "step 2: loss" in by_disk and "the step is not kept for tools/replay_step.py: cannot save" in by_disk
    assert "step 7: loss" in by_spike and ": a spike, " in by_spike and "set guard.on_spike=log" in by_spike
    assert by_spike.endswith("step_00000007` looks for numbers that are not finite") and "none" not in by_spike
    trainer = json.loads((tmp_path / "spike" / "dumps" / "step_00000007" / "trainer.json").read_text())
    assert trainer["is_finite"]


def test_a_limit_below_the_rollbacks_so_far_ends_the_run_at_a_good_step(prepared: Prepared, tmp_path: Path) -> None:
    options = ["guard.on_nonfinite=rollback", "evaluate.every_steps=null", "train.micro_batch_size=16"]
    config = tiny_config(prepared, tmp_path, *options, "train.stop_at_step=2")
    assert run_on_ranks(1, train_poisoned, config, {}) == ["went on"]
    guard = json.loads((tmp_path / "checkpoints/step_00000002/trainer.json").read_text())["guard"]
    change_trainer(tmp_path, 2, {"guard": guard | {"n_rollbacks": 5}})
    lower = ["guard.max_bad_steps=3", "train.accept_changes=[guard.max_bad_steps]"]
    (message,) = run_on_ranks(1, train_poisoned, tiny_config(prepared, tmp_path, *options, *lower), {})
    assert "step 3: loss 6." in message and "; 5 times rolled back (guard.max_bad_steps) without 1000 good" in message
    assert [r["status"] for r in records(tmp_path)] == ["applied", "applied", "skipped"]
    # the step is kept, with where its rows come from
    assert message.endswith("step_00000003` looks for numbers that are not finite")
    rows = json.loads((tmp_path / "dumps/step_00000003/trainer.json").read_text())["rows"]
    assert "train/shard.00000.mds row " in rows["0"][0][0]
    assert "rows of this rank: [['" in (tmp_path / "logs" / "rank_0.log").read_text()


def poisoned_runs(runs: list[tuple[Config, dict[int, float]]]) -> list[str]:
    return [train_poisoned(config, factors) for config, factors in runs]


@pytest.mark.slow
def test_rolled_back_is_as_if_the_steps_since_the_checkpoint_had_been_skipped(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for stage, name in ((1, "tiger"), (3, "muon")):
        for run, policy, bad in (("rolled_back", "rollback", (1, 5)), ("skipped", "skip", (1, 4, 5))):
            options = [f"engine.zero_stage={stage}", f"guard.on_nonfinite={policy}", "checkpoint.every_steps=3",
                       f"optim.name={name}", "evaluate.every_steps=null"]  # fmt: skip
            factors = dict.fromkeys(bad, math.inf)
            runs.append((tiny_config(prepared, tmp_path / f"{run}_{stage}", *options), factors))
            if policy == "rollback":
                # stopped at the checkpoint that it goes back to: it rolls back again
                stopped = tmp_path / f"stopped_{stage}"
                runs.append((tiny_config(prepared, stopped, *options, "train.stop_at_step=3"), factors))
                runs.append((tiny_config(prepared, stopped, *options), factors))
    assert run_on_ranks(2, poisoned_runs, runs) == [["went on"] * len(runs)] * 2
    out = capfd.readouterr().out
    for first, last, checkpoint in ((1, 1, "step_00000000"), (4, 5, "step_00000003")):
        words = f"rolled_back_1/checkpoints/{checkpoint}; the batches of steps {first} to {last} are left out"
        assert re.search(rf"WARNING: step {last}: loss .*; gradients that are not .*: back to the .*{words}", out), out
    for stage in (1, 3):
        rolled_back, skipped, stopped = (tmp_path / f"{run}_{stage}" for run in ("rolled_back", "skipped", "stopped"))
        statuses = [r["status"] for r in records(rolled_back) if r["kind"] == "train"]
        assert statuses == ["rolled back"] + ["applied"] * 3 + ["rolled back"] + ["applied"] * 3
        for other in (skipped, stopped):
            files = [state_hashes(run, 8) for run in (rolled_back, other)]
            ranks = [{k: v for k, v in hashes.items() if k != "trainer.json"} for hashes in files]
            assert len(ranks[0]) == 2 and ranks[0] == ranks[1], other
        assert column(rolled_back) == column(stopped)
        # what step 4 learned is gone, and the same steps as in the other run follow
        assert column(rolled_back)[5:] == column(skipped)[5:]


@pytest.mark.slow
def test_spikes_are_logged_skipped_or_rolled_back(prepared: Prepared, tmp_path: Path) -> None:
    expected = {"log": "applied", "skip": "skipped", "rollback": "rolled back"}
    options = ["train.steps=14", "guard.spike_window=16", "evaluate.every_steps=null", "optim.lr=1e-3"]
    runs = [
        (tiny_config(prepared, tmp_path / policy, *options, f"guard.on_spike={policy}"), {11: 40.0})
        for policy in expected
    ]
    run_on_ranks(2, poisoned_runs, runs)
    for policy, status in expected.items():
        statuses = [r["status"] for r in records(tmp_path / policy)]
        assert statuses == ["applied"] * 10 + [status] + ["applied"] * 3, policy
        log = (tmp_path / policy / "logs" / "rank_1.log").read_text()
        assert re.search(r"step 11: loss .*: a spike, .* sigmas above .*; rows of this rank: ", log)
    # a resumed run would decide alike: the window is in the checkpoint
    state = json.loads((tmp_path / "log" / "checkpoints" / "step_00000014" / "trainer.json").read_text())
    assert len(state["guard"]["losses"]) == 14


Samples = dict[int, list[tuple[int, int]]]


def train_watched(config: Config) -> Samples:
    """Train; return the samples of each step on this rank; assert that each load gives the state that is on disk."""
    import torch
    from safetensors import safe_open

    from megakexue.run import checkpoint
    from megakexue.run.engine import Engine
    from megakexue.run.train import train

    step_of, restore, samples = Engine.train_step, checkpoint.restore, {}

    def watched(self: Any, batches: Any, lr: float, step: int, **options: Any) -> Any:
        samples[step] = [(s.epoch, s.sample) for batch in batches for s in batch.samples]
        return step_of(self, batches, lr, step, **options)

    def compared(folder: Path, engine: Any) -> None:
        restore(folder, engine)
        whole: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for path in folder.glob("rank_*"):
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    if key.count("/") == 2:
                        kind, name, first = key.split("/")
                        whole.setdefault((kind, name), []).append((int(first), file.get_tensor(key)))
        n = 0
        for segment, views in engine.state_tensors():
            for kind, view in views.items():
                on_disk = torch.cat([tensor for _, tensor in sorted(whole[kind, segment.name], key=lambda x: x[0])])
                assert torch.equal(view, on_disk[segment.start : segment.stop]), segment
                n += 1
        assert n

    Engine.train_step, checkpoint.restore = watched, compared  # type: ignore[method-assign]
    train(config)
    return samples


@pytest.mark.slow
def test_other_ranks_and_other_stages_go_on_with_the_same_run(prepared: Prepared, tmp_path: Path) -> None:
    options = ["train.global_batch_size=12", "train.micro_batch_size=2", "train.steps=12", "evaluate.every_steps=null",
               "metrics.statistics_every_steps=null"]  # fmt: skip

    def order(of_ranks: list[Samples]) -> list[list[tuple[int, int]]]:
        """The samples of each step, over ranks and micro-batches."""
        return [sorted(s for samples in of_ranks for s in samples[step]) for step in sorted(of_ranks[0])]

    fixed = order(run_on_ranks(2, train_watched, tiny_config(prepared, tmp_path / "fixed", *options)))
    moved: list[list[tuple[int, int]]] = []
    for ranks, stage, stop in ((2, 1, 3), (1, 3, 6), (3, 0, 9), (2, 2, 12)):
        config = tiny_config(
            prepared, tmp_path / "moved", *options, f"engine.zero_stage={stage}", f"train.stop_at_step={stop}"
        )
        moved += order(run_on_ranks(ranks, train_watched, config))
    assert moved == fixed
    for got, want in zip(column(tmp_path / "moved"), column(tmp_path / "fixed"), strict=True):
        assert got | {"grad_norm": 0} == losses_near(want | {"grad_norm": 0})
    lineage = json.loads((tmp_path / "moved/checkpoints/step_00000012/trainer.json").read_text())["lineage"]
    assert [(start["step"], start["changes"]) for start in lineage] == [
        (0, []),
        (3, ["engine.zero_stage 1 -> 3", "ranks 2 -> 1"]),
        (6, ["engine.zero_stage 3 -> 0", "ranks 1 -> 3 (from rank 1 on with random states of their own)"]),
        (9, ["engine.zero_stage 0 -> 2", "ranks 3 -> 2"]),
    ]


@pytest.mark.slow
def test_ranks_may_share_rows_from_one_start_to_the_next(prepared: Prepared, tmp_path: Path) -> None:
    import torch

    from megakexue.run.replay import Dump, replay

    options = ["train.global_batch_size=8", "train.micro_batch_size=2", "train.steps=9", "metrics.tensorboard=false"]
    run_on_ranks(1, train_all, [tiny_config(prepared, tmp_path / "one", *options)])
    for data_ranks, sequence_ranks, stop in ((2, 2, 3), (4, 1, 6), (1, 2, 9)):
        config = tiny_config(
            prepared, tmp_path / "shared", *options, f"engine.sequence_ranks={sequence_ranks}",
            f"train.stop_at_step={stop}",
        )  # fmt: skip
        run_on_ranks(data_ranks * sequence_ranks, train_all, [config])
    for got, want in zip(column(tmp_path / "shared"), column(tmp_path / "one"), strict=True):
        for key, value in want.items():
            if isinstance(value, float):
                assert got[key] == pytest.approx(value, rel=2e-5, abs=1e-7), key
    poisoned = tiny_config(
        prepared, tmp_path / "bad", *options, "engine.sequence_ranks=2", "guard.on_nonfinite=stop", "train.steps=4",
        "optim.warmup_steps=0",
    )  # fmt: skip
    said = run_on_ranks(2, train_poisoned, poisoned, {2: math.nan})
    # in attention the number of one rank reaches the other's heads
    assert said[0] == said[1] and "guard.on_nonfinite=stop ends the run here" in said[0], said
    found = replay(Dump(tmp_path / "bad" / "dumps" / "step_00000002"), device=torch.device("cpu"))
    assert found.left_out == [] and len(found.micro_batches) == 4, found


def test_a_bad_step_names_its_first_tensor_and_the_ranks_where_it_began() -> None:
    from megakexue.run.engine import StepResult
    from megakexue.run.train import _culprits

    def said(loss: float, grad_norm: float, **facts: Any) -> str:
        return _culprits(
            StepResult(
                loss=loss, grad_norm=grad_norm, n_targets=1, status="skipped", note="", reason_to_stop=None, **facts
            )
        )

    assert said(2.0, 1e9) == ""  # a spike
    one = said(2.0, math.inf, bad_tensors=["head.weight"], bad_gradient_ranks=[3])
    assert one == "; gradients that are not finite: head.weight; this began in the backward pass of rank 3"
    both = said(math.nan, math.nan, bad_tensors=["a", "b", "c"], bad_loss_ranks=[0, 2], bad_gradient_ranks=[1])
    assert both.endswith(": a and 2 more; this began in the loss of ranks 0, 2 and the backward pass of rank 1")
    many = said(math.nan, 1.0, bad_loss_ranks=list(range(1000)))
    assert many.endswith("finite: none; this began in the loss of ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more")
    nobody = said(2.0, math.inf, bad_tensors=["a"])
    assert nobody.endswith("; this began in the sum over ranks, for the numbers of each rank are finite")


class Signaller:
    """Sends a signal to one rank at a place of its training."""

    def __init__(self, config: Config, place: str, rank: int) -> None:
        self.metrics, self.place = Path(config.train.run) / "metrics.jsonl", place
        self.own, self.rank, self.n = int(os.environ["RANK"]), rank, Counter[str]()

    def ask(self, what: str, at: int, number: int) -> None:
        self.n[what] += 1
        if self.n[what] == at and self.own == self.rank:
            os.kill(os.getpid(), number)

    def before_forward(self) -> None:
        import torch

        # 4 micro-batches a step: in the second one of the second step
        if self.place in ("accumulation", "twice") and torch.is_grad_enabled():
            self.ask("forward", 6, signal.SIGTERM)
            if self.place == "twice" and self.n["forward"] == 6:
                time.sleep(1.0)  # as a launcher does that passes on what its group has got
                self.ask("forward", 7, signal.SIGINT)

    def before_evaluation(self) -> None:
        has_trained = '"kind": "train", "step": 9' in self.metrics.read_text()
        if self.place == "evaluation" or (self.place == "last" and has_trained):
            self.ask("evaluation", 2, signal.SIGINT)

    def before_row(self) -> None:
        """On rank 0 the storage stalls; the other rank gets the signal, while it waits for rank 0."""
        self.n["row"] += 1
        if self.place == "data" and self.n["row"] >= 45 and self.own == 0:
            time.sleep(600)
        if self.place == "data" and self.n["row"] == 45 and self.own == self.rank:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()


def calling_first(action: Callable[[], None], owner: Any, name: str) -> Any:
    """A context in which a method calls `action` first."""
    original = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        action()
        return original(*arguments, **options)

    return mock.patch.object(owner, name, both)


def interrupted(config: Config, place: str, rank: int) -> Any:
    """Train with a signal to `rank` at `place`; return the exit code, or what else ended the run."""
    from megakexue.core.decoder import Decoder
    from megakexue.run.engine import Engine
    from megakexue.run.rows import Rows
    from megakexue.run.train import train

    signaller = Signaller(config, place, rank)
    with (
        calling_first(signaller.before_forward, Decoder, "forward"),
        calling_first(signaller.before_evaluation, Engine, "evaluation_loss"),
        calling_first(signaller.before_row, Rows, "read"),
    ):
        try:
            train(config)
        except SystemExit as end:
            return end.code
        except UserError as error:
            return str(error)
    return 0


def interruptions(config: Config, places: list[tuple[str, int]]) -> list[Any]:
    return [interrupted(config, *place) for place in places]


@pytest.mark.slow
def test_a_signal_to_any_rank_is_seen_wherever_it_comes_and_costs_nothing(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["train.micro_batch_size=2", "train.steps=9", "evaluate.every_steps=2", "evaluate.n_rows=17",
               "checkpoint.every_steps=100", "engine.zero_stage=3", "data.n_prefetch=1"]  # fmt: skip
    straight, stopped = (tiny_config(prepared, tmp_path / name, *options) for name in ("straight", "stopped"))
    places = [("accumulation", 1), ("evaluation", 0), ("data", 1), ("twice", 0), ("last", 1), ("", 0), ("", 0)]
    run_on_ranks(2, train_all, [straight])
    assert run_on_ranks(2, interruptions, stopped, places) == [[75, 75, 75, 75, 75, 0, 0]] * 2
    out = capfd.readouterr().out
    ends = re.findall(r"stopped: (.*); (saved after step \d|before the first step); the same command goes on", out)
    assert [words for words, _ in ends] == ["SIGTERM on rank 1", "SIGINT on rank 0", "SIGUSR1 on rank 1",
                                            "SIGTERM on rank 0", "SIGINT on rank 1"]  # fmt: skip
    assert [kept for _, kept in ends][:2] == ["saved after step 1", "saved after step 2"]
    assert ends[4][1] == "saved after step 9"
    # validations that were given up are made up for, and nothing else shows
    assert column(tmp_path / "stopped") == column(tmp_path / "straight")
    files = [state_hashes(tmp_path / run, 9) for run in ("straight", "stopped")]
    ranks = [{name: sha for name, sha in of_run.items() if name != "trainer.json"} for of_run in files]
    assert len(ranks[0]) == 2 and ranks[0] == ranks[1]


def failing(config: Config, at_row: int) -> Any:
    """Train with a shard that cannot be read on the last rank from some row on."""
    from megakexue.run.rows import Rows
    from megakexue.run.train import train

    read, n = Rows.read, 0

    def read_row(self: Any, row: int) -> Any:
        nonlocal n
        n += 1
        if n >= at_row and os.environ["RANK"] == "1":
            raise UserError(f"{self.locate(row).split()[0]}: cannot read this shard")
        return read(self, row)

    Rows.read = read_row  # type: ignore[method-assign]
    try:
        train(config)
    except (UserError, SystemExit) as end:
        return str(end)
    finally:
        Rows.read = read  # type: ignore[method-assign]


@pytest.mark.slow
def test_data_that_cannot_be_read_ends_all_ranks_and_is_saved(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path, "checkpoint.every_steps=100", "evaluate.every_steps=null")
    ends = run_on_ranks(2, failing, config, 30)
    assert ends[0] == "2" and "train/shard.00000.mds: cannot read this shard" in ends[1]
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert re.search(r"stopped: rank 1 failed: .*shard.00000.mds: cannot read this shard; saved after step 3", log)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step_00000003"]


def train_with_a_full_disk(config: Config, steps: tuple[int, int]) -> str:
    """Train while the second rank can write nothing in saves of steps from ... to."""
    from megakexue.run import checkpoint, saves
    from megakexue.run.guard import TrainingStopped
    from megakexue.run.train import train

    save_file = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        step = checkpoint.step_of(path.parent.with_suffix(""))
        if steps[0] <= step < steps[1] and os.environ["RANK"] == "1":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    checkpoint.save_file, saves.RETRY_S = full, (0.1, 0.1)  # type: ignore[assignment]
    try:
        train(config)
    except TrainingStopped as end:
        return str(end)
    return ""


def train_disagreeing(config: Config) -> str:
    """Train while the second rank loses touch with the others at the end of a save."""
    from megakexue.run.saves import Saver

    finish = Saver.finish

    def lost(self: Any) -> bool:
        if finish(self) and os.environ["RANK"] == "1":
            raise RuntimeError("connection lost")
        return True

    Saver.finish = lost  # type: ignore[method-assign]
    return train_with_a_full_disk(config, (0, 0))


def poisoned_with_a_full_disk(config: Config) -> str:
    from megakexue.run import checkpoint

    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.save_file = full  # type: ignore[assignment]
    return train_poisoned(config, {2: math.inf})


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_run(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [
        "train.steps=9",
        "evaluate.every_steps=null",
        "checkpoint.every_steps=4",
        "checkpoint.keep_last=9",
        "checkpoint.asynchronous=false",
    ]  # so that it is the next step that knows
    first = tiny_config(prepared, tmp_path / "first", *options)
    assert run_on_ranks(2, train_with_a_full_disk, first, (4, 7)) == ["", ""]
    out = capfd.readouterr().out
    again = re.findall(
        r"WARNING: cannot save .*step_0000000(\d): {'rank 1': .*No space left on device.*}; training "
        r"goes on, and tries again at step (\d); if the disk is full, make room",
        out,
    )
    assert again == [("4", "5"), ("5", "7")]
    saved = sorted(path.name for path in (tmp_path / "first" / "checkpoints").glob("step_*"))
    assert saved == ["step_00000008", "step_00000009"]  # that of step 7 only until there was a newer one
    assert [r["step"] for r in records(tmp_path / "first")] == list(range(1, 10))
    # a save that the ranks do not agree on ends them all: they could never agree on another one
    third = tiny_config(prepared, tmp_path / "third", *options)
    for end in run_on_ranks(2, train_disagreeing, third):
        assert "the ranks cannot agree on a checkpoint any more (rank 1: connection lost): run the same command" in end
    # a rollback needs something to go back to
    fourth = tiny_config(prepared, tmp_path / "fourth", *options, "guard.on_nonfinite=rollback")
    for end in run_on_ranks(2, poisoned_with_a_full_disk, fourth):
        assert "step 2: loss" in end and "and no checkpoint could be written to roll back to" in end
    # and where the last one cannot be written either, the program says what to do
    second = tiny_config(prepared, tmp_path / "second", *options)
    for end in run_on_ranks(2, train_with_a_full_disk, second, (8, 99)):
        assert "step 9 cannot be written" in end and "run the same command again: it goes on from step 4" in end
    saved = sorted(path.name for path in (tmp_path / "second" / "checkpoints").iterdir())
    assert saved == ["latest", "step_00000004"]


def test_yaml_of_a_run_is_its_config(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
