"""The formulas against the module's own sum and torch's flop counter."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len

from megakexue.config import MlaConfig, ModelConfig, load_config
from megakexue.core.axes import matrix_shapes
from megakexue.core.costs import flops_per_token, n_parameters
from megakexue.core.decoder import Cache
from megakexue.core.describe import cache_bytes_per_token, describe, describe_heads, describe_mixtures, not_default
from megakexue.core.resolve import resolve_config
from tests.conftest import Prepared
from tests.helpers import KINDS, ROOT, SHIPPED, build, load_shipped, positions_of, tiny


def test_cache_bytes() -> None:
    # 10091: DeepSeek-V2's 128 heads of 128; elements per token and layer 2 n_h d_h, 2 n_g d_h, 2 d_h, and 576
    sizes: dict[str, Any] = dict(vocab_size=8, d_model=5120, n_layers=60, d_ff=8, n_heads=128)
    v2 = MlaConfig(d_latent=512, d_query_latent=1536, d_nope=128, d_rope=64, d_value=128)
    elements = {k: n // 120 for k, n in cache_bytes_per_token(ModelConfig(**sizes, mla=v2)).items()}
    assert next(iter(elements.items())) == ("MLA of 512 + 64", 576)
    assert elements["MHA of 128 heads"] == 128 * (192 + 128)  # its own heads, keys of 192 and values of 128
    gqa = cache_bytes_per_token(ModelConfig(**sizes, n_kv_heads=8, d_head=128))
    assert {k: n // 120 for k, n in gqa.items()} == {
        "GQA of 8 groups": 2 * 8 * 128,
        "MHA of 128 heads": 2 * 128 * 128,
        "MQA": 2 * 128,
        "MLA of 512 + 32": 544,
    }
    for heads, groups in ((2, None), (3, None), (4, 2), (9, 3), (14, 2), (16, 4)):
        names = [
            name for name in cache_bytes_per_token(ModelConfig(**(sizes | {"n_heads": heads}), mla=v2)) if "GQA" in name
        ]
        assert names == ([f"GQA of {groups} groups"] if groups else [])
    assert [next(iter(cache_bytes_per_token(ModelConfig(**sizes, n_kv_heads=g, d_head=128)))) for g in (None, 1)] == [
        "MHA of 128 heads",
        "MQA",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_bytes_are_those_that_decoding_keeps(kind: str) -> None:
    config = tiny(**KINDS[kind])
    model, tokens = build(config), torch.randint(0, 97, (2, 33))
    caches = [Cache() for _ in model.blocks]
    model.hidden(tokens, positions_of(tokens), caches=caches)
    assert sum(c.bytes_per_token for c in caches) == next(iter(cache_bytes_per_token(config, 4).values()))


@pytest.mark.parametrize("name", ["tiny_gqa", "tiny_mla"])
def test_description_names_the_numbers(name: str) -> None:
    stages = "data.stages=[{until_step: 9, seq_len: 64}]"
    given = load_config(ROOT / "configs" / f"{name}.yaml", ["optim.name=adamw", stages])
    config = resolve_config(given)
    text = " ".join(f"{describe(given, config, 2)}\n{describe_heads(config.model)}".split())
    assert config.model.rope.base == {"tiny_gqa": 7400, "tiny_mla": 59400}[name]
    for words in ("settings model.vocab_size=4096 model.d_model=128", "optim.name=adamw", "checkpoint.every_steps=10",
                  f"{n_parameters(config.model):,} parameters", f"rope base {config.model.rope.base:g} on ",
                  "2 ranks x 2 micro-batches x 4; cut to 64 until step 9", "16 rows x 256 = 4,096 tokens",
                  "200 steps, 819,200 tokens",
                  "ZeRO-1 fp32", "log_n on ",
                  *{"tiny_gqa": ("heads 4 of 32 in 2 groups", "GQA of 2 groups 1,024 bytes"),
                    "tiny_mla": ("MLA, 4 of 16 + 16 and values of 32", "MLA of 64 + 16 640 bytes")}[name],
                  ):  # fmt: skip
        assert words in text, words


def test_mixtures_by_step() -> None:
    sources = "data.sources=[{path: web, weight: 3}, {path: made, weight: 1, synthetic: true}]"
    stages = "data.stages=[{until_step: 9, seq_len: 64}, {until_step: 20, weights: {web: 1, made: 0}}]"
    given = load_config(ROOT / "configs" / "tiny_gqa.yaml", [sources, stages])
    lines = describe(given, resolve_config(given), 2)
    words = "web 75.0%, made 25.0% synthetic until step 9; web 100.0% until step 20; web 75.0%, made 25.0% synthetic"
    assert f"mixture {words}" in " ".join(lines.split())
    many = ", ".join(f"{{path: s{i}}}" for i in range(9))
    data = load_config(ROOT / "configs" / "tiny_gqa.yaml", [f"data.sources=[{many}]"]).data
    assert describe_mixtures(data, 10) == "by rows"
    shares = "s8 20.0%, s7 17.8%, s6 15.6%, s5 13.3%, 5 more"
    assert describe_mixtures(data, 10, range(1, 10)) == shares


MORE = {
    "attention": "varlen: flash needs flash-attn (3: not installed, 4: not installed, 2: not installed): pip install "
    "'megakexue[gpu]'",
    "optimizer": "tiger, in chunks of 65,536: fewer than 16,777,216 elements a rank",
    "start": "weights of bundles/7b_from_1b, with the state of its tiger after 50000 updates, data from epoch 0, "
    "sample 25600000 on",
    "MFU": "of 989 dense bfloat16 TFLOP/s: the data sheet of NVIDIA H100 80GB HBM3",
    "run": "runs/数据/数据数据数据数据数据数据数据数据 (config.yaml, metrics.jsonl, logs/, checkpoints/)",
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_first_screen_fits_a_terminal(path: Path, tmp_path: Path) -> None:
    folder = "/mnt/数据/" + "long_name/" * 12
    many = [f"data.tokenizer={folder}tokenizer.model", f"data.sources=[{{path: {folder}data}},{{path: data/web2}}]",
            f"train.run={folder}run", "optim.name=lion", "optim.clip=smooth", "guard.on_nonfinite=shrink",
            "guard.on_spike=rollback", "metrics.every_steps=10", "checkpoint.keep_every=1000", "engine.timeout_s=600",
            "metrics.tensorboard=false", "checkpoint.every_steps=100", "data.n_prefetch=4"]  # fmt: skip
    for overrides in ([], many):
        given = load_shipped(path, tmp_path, overrides)
        lines = describe(given, resolve_config(given), given.engine.sequence_ranks, MORE).splitlines()
        assert len(lines) <= 20 and max(map(cell_len, lines)) <= 80, "\n".join(lines)
        labels = [line.split()[0] for line in lines if line[0] != " "]
        assert labels[:6] == ["settings", "model", "scales", "batch", "budget", "state"] and {*MORE} <= {*labels}
        n_said = sum("=" in word for line in lines[: labels.index("model") + 9] for word in line.split())
        assert n_said >= 5
    assert "more: config.yaml" in " ".join(lines)


def test_what_muon_costs_is_said() -> None:
    given = load_config(SHIPPED[0].parent / "tiny_gqa.yaml", ["optim.name=muon"])
    config = resolve_config(given)
    text = describe(given, config, 1, MORE)
    # 20 rows^2 columns + 10 rows^3 of each matrix, once in 4,096 tokens
    more = sum(20 * min(s) ** 2 * max(s) + 10 * min(s) ** 3 for s in matrix_shapes(config.model).values())
    share = more / (4096 * flops_per_token(config.model, 128.5))
    assert f"FLOP per token, {share:.1%} more for Muon\n" in text and 0.05 < share < 0.1
    assert len(text.splitlines()) <= 20
    assert "Muon" not in describe(given, resolve_config(load_config(SHIPPED[0])), 1)


def test_a_path_that_is_longer_than_a_line_is_whole() -> None:
    given = load_config(SHIPPED[0])
    run = "/mnt/" + "x" * 90
    assert f"run         {run}\n            (files)" in describe(
        given, resolve_config(given), 1, {"run": f"{run} (files)"}
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_settings_are_what_makes_the_config_of_the_defaults(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    given = load_shipped(
        path, tmp_path, ["data.sources=[{path: a, weight: 2},{path: b, weight: 0.5}]", "data.shuffle=false"]
    )
    assert load_config(tmp_path / "empty.yaml", not_default(given)) == given


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / "describe.py", *arguments], capture_output=True, text=True)


def test_the_program() -> None:
    done = program(
        str(ROOT / "configs" / "1b.yaml"), "model.n_kv_heads=null", "model.mla={}", "--ranks", "8", "--parameters"
    )
    assert done.returncode == 0, done.stderr
    for words in ("MLA, 16 of 96 + 32 and values of 128 from a latent of 512", "blocks.attention.wk_up",
                  "1536x512", "cache per token in 16 bits: MLA of 512 + 32 26,112 bytes"):  # fmt: skip
        assert words in " ".join(done.stdout.split()), done.stdout
    for arguments, message in [
        (["configs/none.yaml"], "error: no config file configs/none.yaml: the shipped ones are in configs/"),
        ([str(ROOT / "configs" / "1b.yaml"), "--ranks", "0"], "error: --ranks 0 must be positive"),
        (
            [str(ROOT / "configs" / "tiny_gqa.yaml"), "model.n_heads=64"],
            "tiny_gqa.yaml: no RoPE base satisfies the boun",
        ),
        (
            [str(ROOT / "configs" / "1b.yaml"), "engine.sequence_ranks=4", "--ranks", "6"],
            "error: --ranks 6 must be a multiple of engine.sequence_ranks=4",
        ),
        ([str(ROOT / "configs" / "1b.yaml"), "--ranks", "7"], "must be a multiple of train.micro_batch_size=4 times"),
    ]:
        done = program(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_program_checks_what_a_launch_would(prepared: Prepared, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "tiny_gqa.yaml")
    # a folder that is to be made later does not hide the mistake in one that is there
    sources = f"data.sources=[{{path: {tmp_path}/later}},{{path: {prepared.data}}}]"
    inputs = [f"data.tokenizer={prepared.tokenizer}", f"data.seq_len={prepared.seq_len}", sources]
    done = program(config, *inputs)
    missing = f"WARNING: a launch needs these, which do not exist yet: {tmp_path}/later\n"
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(missing)
    done = program(config, *inputs, "data.seq_len=77")
    assert (done.returncode, done.stdout) == (2, "") and "data.seq_len=77 does not divide the rows of " in done.stderr
    done = program(config, f"data.tokenizer={tmp_path}/none", "data.sources=[{path: s3://bucket/data}]")
    assert done.returncode == 0 and done.stdout.endswith(f"yet: {tmp_path}/none\n")
