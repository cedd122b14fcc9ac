"""The device to compute on: dtypes by name, which device, its peak FLOP/s and its memory.

MFU is model FLOP/s over the peak FLOP/s that `peak_flops` gives.
"""

import math
import re
import resource
import statistics
import sys
import time

import torch

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


def peak_flops(config: MetricsConfig, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of one device, nan if unknown, and a sentence that says where the number comes from."""
    name = str(dtype).removeprefix("torch.")
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12, f"MFU is against metrics.peak_tflops={config.peak_tflops:g}."
    if device.type == "cpu":
        flops = _matmul_flops(dtype)
        return flops, (
            f"MFU is against a {name} matmul of 1024 x 1024 measured here with {torch.get_num_threads()} threads: "
            f"{flops / 1e12:.3g} TFLOP/s."
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tflops = data_sheet_tflops(gpu, dtype)
    if math.isnan(tflops):
        return math.nan, (
            f"MFU is not shown: the {name} peak of {gpu} is not known; set metrics.peak_tflops from its data sheet."
        )
    tf32 = " without TF32" if dtype == torch.float32 else ""
    return tflops * 1e12, f"MFU is against the data sheet of {gpu}: {tflops:g} dense {name} TFLOP/s{tf32}."


def _matmul_flops(dtype: torch.dtype, n: int = 1024) -> float:
    matrix = torch.ones(n, n, dtype=dtype)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])  # the first ones set the kernel up


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: on a GPU what PyTorch has reserved, on CPU the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
