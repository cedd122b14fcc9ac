"""Peak FLOP/s by config, by measurement and by data sheet; the memory of a process."""

import math
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from megakexue.config import MetricsConfig, load_config
from megakexue.core import device
from megakexue.core.costs import product_shapes
from megakexue.core.device import data_sheet_tflops, memory_gib, peak_flops
from tests.helpers import ROOT

CPU = torch.device("cpu")


def test_peak_from_the_config() -> None:
    peak, source = peak_flops(MetricsConfig(peak_tflops=123.5), CPU, torch.bfloat16)
    assert peak == 123.5e12
    assert source == "of metrics.peak_tflops=123.5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_cpu_is_measured(dtype: torch.dtype) -> None:
    peak, source = peak_flops(MetricsConfig(), CPU, dtype)
    assert 1e9 < peak < 1e14  # from an emulated dtype on one core to a large server
    name = str(dtype).removeprefix("torch.")
    assert source == f"of {peak / 1e12:.3g} TFLOP/s: an estimate, from {name} products timed here"


def test_peak_of_a_cpu_is_that_of_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {(1024, 1024, 1024): 1e9, (1024, 128, 384): 3e9, (1024, 384, 128): 2e9}
    monkeypatch.setattr(device, "_product_flops", lambda dtype, *shape: speeds[shape])
    # what is timed is no larger than 1024 each way: a start takes no second for it
    peak, _ = peak_flops(MetricsConfig(), CPU, torch.float32, [(4096, 128, 384), (1024, 384, 128)])
    assert peak == 3e9


def test_no_product_of_a_step_is_above_the_peak() -> None:
    config = load_config(ROOT / "configs" / "tiny_gqa.yaml")
    shapes = product_shapes(config.model, config.train.micro_batch_size * config.data.seq_len)
    peak, _ = peak_flops(MetricsConfig(), CPU, torch.float32, shapes)
    for m, k, n in shapes:
        x, weight = torch.randn(m, k), torch.randn(n, k)
        began = time.perf_counter()
        for _ in range(5):
            functional.linear(x, weight)
        assert 5 * 2 * m * k * n / (time.perf_counter() - began) < 1.5 * peak


@pytest.mark.parametrize(
    ("gpu", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA B200", 2250, math.nan),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        # names that hold the name of another chip
        ("NVIDIA GeForce RTX 4090 D", math.nan, math.nan),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan, math.nan),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", math.nan, math.nan),
        ("NVIDIA A10G", math.nan, math.nan),
        ("NVIDIA L40", math.nan, math.nan),
        ("NVIDIA GH200 480GB", math.nan, math.nan),
    ],
)
def test_peak_of_a_known_gpu(gpu: str, half: float, single: float) -> None:
    assert data_sheet_tflops(gpu, torch.bfloat16) == pytest.approx(half, rel=0, nan_ok=True)
    assert data_sheet_tflops(gpu, torch.float16) == pytest.approx(half, rel=0, nan_ok=True)
    assert data_sheet_tflops(gpu, torch.float32) == pytest.approx(single, rel=0, nan_ok=True)
    assert math.isnan(data_sheet_tflops(gpu, torch.float64))


def test_unknown_peak_says_what_to_set() -> None:
    peak, source = peak_flops(MetricsConfig(), torch.device("meta"), torch.bfloat16)
    assert math.isnan(peak)
    assert source == "not shown: the bfloat16 peak of meta is not known; set metrics.peak_tflops from its data sheet"


def test_memory_of_a_cpu_process_is_its_peak() -> None:
    before = memory_gib(CPU)
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    assert resident - 0.01 <= before < total_gib
    n_gib = before - resident + 0.125
    block = torch.ones(round(n_gib * 2**28))
    assert memory_gib(CPU) >= before + 0.1
    del block
    assert memory_gib(CPU) >= before + 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_peak_and_memory() -> None:
    device = torch.device("cuda")
    peak, source = peak_flops(MetricsConfig(), device, torch.bfloat16)
    assert torch.cuda.get_device_name(device) in source
    assert math.isnan(peak) == source.startswith("not shown")
    block = torch.ones(2**28, device=device)
    assert memory_gib(device) >= block.nbytes / 2**30
