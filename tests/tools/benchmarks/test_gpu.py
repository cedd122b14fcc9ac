"""Everything that wants a GPU, run at tiny sizes without one; what stops an item; whose time is whose."""

import json
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

PROGRAM = ROOT / "tools" / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # without the compiler, which takes minutes on a CPU
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run([PROGRAM, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_mistakes(tmp_path: Path) -> None:
    cases = {
        "--only rates nothing": "--only nothing: there is no such item",
        "--only": "--only needs an item",
        "--limit 0": "--limit 0 must be a number of seconds above 0",
        "--out": "--out needs a value",
        f"--out {tmp_path}": f"--out {tmp_path} exists: give another folder",
        "--large": "there is no option --large",
    }
    for arguments, message in cases.items():
        done = run(*arguments.split())
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stdout == ""


def test_help_names_each_item_and_its_seconds() -> None:
    shown, script = run("--help").stdout, PROGRAM.read_text()
    items = dict(part.split(":") for part in script.partition("items=(")[2].partition(")")[0].split())
    for item, seconds in items.items():
        assert f"  {item:<9} {seconds:>3} s   " in shown
    assert sum(map(int, items.values())) <= 8 * 60
    program = runpy.run_path(str(PROGRAM.with_name("gpu.py")))
    assert list(items) == list(program["ITEMS"])


def test_an_item_that_takes_too_long_is_stopped_and_the_next_one_begins(tmp_path: Path) -> None:
    done = run("--only", "attention", "rates", "--limit", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert lines(tmp_path / "out") == [{"item": item, "error": "stopped after 1 s"} for item in ("rates", "attention")]


@pytest.mark.slow
def test_every_item_runs(tmp_path: Path) -> None:
    """But for the step without a compiler, which is `step` with other arms, and the tests."""
    items = "rates", "attention", "loss", "block", "step"
    done = run("--only", *items, "--limit", "300", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict]] = {}
    for line in lines(tmp_path / "out"):
        assert "error" not in line, line
        found.setdefault(line["item"], []).append(line)
    assert [line["small"] for line in found["rates"][:1]] == [True] and len(found["rates"]) == 8
    # two kernels, with and without documents, one width of heads and two
    assert len(found["attention"]) == 8
    for line in found["attention"]:
        assert line["errors"].keys() == {"out", "dq", "dk", "dv"} and max(line["errors"].values()) < 0.01
    assert len({line["loss"] for line in found["loss"]}) == 1 and len(found["loss"]) == 4
    assert [line["compiled"] for line in found["block"]] == [False, True]
    (step,) = found["step"]
    for arm in ("ours-compiled", "transformers-compiled"):
        groups = step["arms"][arm]["profile"]
        assert all(groups[name]["launches"] > 0 for name in ("products", "attention", "elementwise", "tail"))


def test_whose_time_is_whose() -> None:
    summary: Callable = runpy.run_path(str(PROGRAM.with_name("step.py")))["summary"]
    names = {
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>": "products",
        "aten::addmm": "products",
        "cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "triton_tem_fused_flex_attention_backward_2": "attention",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention",
        "triton_red_fused__softmax__to_copy_mean_mul_pow_rsqrt_0": "elementwise",
        "void cunn_SoftMaxForward<4, BFloat16, float>": "elementwise",
        "void at::native::vectorized_elementwise_kernel<4, mul>": "elementwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "aten::copy_": "copies",
    }
    for name, group in names.items():
        found = summary([(name, 0.0, 10.0), (name, 15.0, 30.0), ("gemm", 45.0, 1.0)])
        ms = {g: numbers["ms"] for g, numbers in found.items() if g != "products" or group == "products"}
        assert ms.pop(group) == pytest.approx(0.041 if group == "products" else 0.04), name
        assert not any(ms.values()), name
        assert sum(numbers["idle_ms"] for numbers in found.values()) == pytest.approx(0.005)
    found = summary([("gemm", 0.0, 10.0), ("multiply", 12.0, 3.0), ("multiply", 12.5, 1.0), ("gemm", 5.0, 5.0)])
    assert found["tail"] == {"ms": pytest.approx(0.004), "idle_ms": pytest.approx(0.002), "launches": 2}
    assert summary([])["products"]["launches"] == 0
