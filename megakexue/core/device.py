"""The device to compute on: dtypes by name, which device, its peak FLOP/s and its memory.

MFU is model FLOP/s over the peak FLOP/s that `peak_flops` gives.
"""

import logging
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

from megakexue.config import MetricsConfig, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that are used in configs and on command lines."""


def find_device(name: str | None = None, index: int = 0) -> torch.device:
    """Return the device `name`, which a program was given by --device; None: GPU number `index`, or else the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name is not None:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one compiled graph for each shape that it is called with; it raises where it would break.

    torch gives up after eight graphs of a function, which several models in one process may need.
    """
    torch._dynamo.config.recompile_limit = 64
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # which warns on a CPU of having no CUDA
    return torch.compile(function, fullgraph=True, dynamic=False)


# Dense TFLOP/s of one GPU from NVIDIA's data sheets: bf16 and fp16 with fp32 accumulation, then fp32 outside the tensor
# cores (TF32 off). The first row counts whose words all stand in the device's name.
_DATA_SHEET: dict[str, tuple[float, float]] = {
    "B200": (2250, math.nan),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H800 PCIe": (756, 51),
    "H800": (989, 67),
    "H20": (148, 44),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
# a GPU with such a word in its name is a part or a variant of one in the table
_OTHER_CHIP = {"MIG", "GRID", "Laptop", "D", "Ti"}


def data_sheet_tflops(gpu: str, dtype: torch.dtype) -> float:
    """Return the dense TFLOP/s of the GPU with the device name `gpu`; nan when it is not in the table."""
    words = set(re.split(r"[\s-]+", gpu))
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or words & _OTHER_CHIP:
        return math.nan
    for name, (half, single) in _DATA_SHEET.items():
        if words.issuperset(name.split()):
            return single if dtype == torch.float32 else half
    return math.nan


def peak_flops(
    config: MetricsConfig, device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]] = ()
) -> tuple[float, str]:
    """Return the peak FLOP/s of one device, nan if unknown, and what a run says of it.

    Args:
        shapes: of the step's own matrix products, (rows, inputs, outputs). On a CPU they are timed, since its data
            sheet says little: the fastest is the peak.
    """
    name = str(dtype).removeprefix("torch.")
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12, f"of metrics.peak_tflops={config.peak_tflops:g}"
    if device.type == "cpu":
        sizes = {(min(m, 1024), min(k, 1024), min(n, 1024)) for m, k, n in [(1024, 1024, 1024), *shapes]}
        flops = max(_product_flops(dtype, *size) for size in sizes)
        return flops, f"of {flops / 1e12:.3g} TFLOP/s: an estimate, from {name} products timed here"
    gpu = device_name(device)
    tflops = data_sheet_tflops(gpu, dtype)
    if math.isnan(tflops):
        return (
            math.nan,
            f"not shown: the {name} peak of {gpu} is not known; set metrics.peak_tflops from its data sheet",
        )
    tf32 = " without TF32" if dtype == torch.float32 else ""
    return tflops * 1e12, f"of {tflops:g} dense {name} TFLOP/s{tf32}: the data sheet of {gpu}"


def _product_flops(dtype: torch.dtype, m: int, k: int, n: int) -> float:
    """Return the FLOP/s of a layer's product, in the best of nine tries or of a tenth of a second."""
    x, weight = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 9 and (not seconds or time.perf_counter() - began < 0.1):
        start = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * m * k * n / min(seconds)


def device_name(device: torch.device) -> str:
    """As its maker calls a GPU; else the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: on a GPU what PyTorch has reserved, on CPU the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
