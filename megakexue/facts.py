"""What must be equal on all hosts of a run, and the table of what is not. Imports no torch.

Ranks that differ in one of these would train on without a word, and what they train would be nobody's config. So a
launch compares them before anything is built (megakexue/run/rendezvous.py), and tools/doctor.py before a launch.

The first word of a fact's name is its kind: code, config, data, tokenizer, bundle, version, variable, device.
"""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megakexue.config import Config
from megakexue.files import sha256

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "numpy", "mosaicml-streaming", "safetensors", "flash-attn", "flash-attn-3", "triton")
"""Those that compute, reduce or read what a run trains on."""
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO",
    "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR",
)  # fmt: skip
"""Those that choose other arithmetic."""
REMEDIES = {
    "code": "check out the same commit of megakexue on all hosts, or put it on a file system that all share",
    "config": "give all hosts the same config file and the same key=value arguments",
    "data": "copy the prepared folder of the first host to the others, or put it on a file system that all share",
    "tokenizer": "copy data.tokenizer of the first host to the others",
    "bundle": "copy the bundle of the first host to the others",
    "version": "install the versions of constraints.txt on all hosts",
    "variable": "set the variable on all hosts, or on none",
    "device": "use hosts of one kind",
    "place": "start all ranks with one launcher, and only one run on a port",
}
"""What to do about a difference, by kind."""
MAX_ROWS, MAX_COLUMNS = 12, 4
"""Of the table."""


def host_facts(config: Config) -> dict[str, str]:
    """What must be equal on all hosts, as this one has it. A file that is missing here has the value `missing`."""
    folders = [source.path for source in config.data.sources if not source.is_remote]
    files = {f"data {folder}": Path(folder, "manifest.json") for folder in folders}
    files[f"tokenizer {config.data.tokenizer}"] = tokenizer = Path(config.data.tokenizer)
    if tokenizer.suffix == ".json":  # its marks are named beside it
        files[f"tokenizer {tokenizer.with_name('tokenizer_config.json')}"] = tokenizer.with_name(
            "tokenizer_config.json"
        )
    if config.train.init_from:
        files[f"bundle {config.train.init_from}"] = Path(config.train.init_from, "manifest.json")
    return (
        {f"code {path.relative_to(ROOT)}": _short_hash(path) for path in sorted((ROOT / "megakexue").rglob("*.py"))}
        | {f"config {key}": str(value) for key, value in _flat(dataclasses.asdict(config)).items()}
        | {name: _short_hash(path) for name, path in files.items()}
        | {f"version {name}": version for name, version in versions().items()}
        | {"version machine": platform.machine()}
        | {f"variable {name}": os.environ[name] for name in VARIABLES if name in os.environ}
    )


def versions() -> dict[str, str]:
    """Of Python and those packages that are installed."""
    return {name: v for name in PACKAGES if (v := _version(name))} | {"Python": platform.python_version()}


def digest(facts: Mapping[str, str]) -> str:
    """A hash of facts: hosts with the same one need not be looked at further."""
    return hashlib.sha256("\0".join(f"{name}\0{facts[name]}" for name in sorted(facts)).encode()).hexdigest()


def compare(hosts: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return a small table of what differs among hosts and what to do about it; None: nothing does.

    Args:
        hosts: the facts of each, by its name. The first one is what the others are held against.
    """
    alike: dict[str, list[str]] = {}
    for host, facts in hosts.items():
        alike.setdefault(digest(facts), []).append(host)
    if len(alike) < 2:
        return None
    groups = {_names(names): hosts[names[0]] for names in list(alike.values())[:MAX_COLUMNS]}
    of_groups = list(groups.values())
    names = dict.fromkeys(name for facts in of_groups for name in facts)
    differing = [name for name in names if len({facts.get(name) for facts in of_groups}) > 1]
    rows = [["", *groups]]
    rows += [[name, *(facts.get(name, "-") for facts in of_groups)] for name in differing[:MAX_ROWS]]
    widths = [max(len(_cut(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_cut(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if len(differing) > MAX_ROWS:
        lines.append(f"and {len(differing) - MAX_ROWS} more")
    if len(alike) > MAX_COLUMNS:
        lines.append(f"and {len(alike) - MAX_COLUMNS} more hosts that are like none of these")
    kinds = dict.fromkeys(name.split()[0] for name in differing)
    return "\n".join(
        ["the hosts are not equal, and nothing was started:", *(f"  {line}" for line in lines),
         *(f"{kind}: {REMEDIES[kind]}" for kind in kinds)]
    )  # fmt: skip


def _names(hosts: list[str], shown: int = 2) -> str:
    return ", ".join(hosts[:shown]) + (f" and {len(hosts) - shown} more" if len(hosts) > shown else "")


def _cut(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}...{text[-(width // 2 - 2) :]}"


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values by their whole keys; those of a list by their numbers too, so that a table need not cut it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) and value else value
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": value}
    return flat


def _short_hash(path: Path) -> str:
    try:
        return sha256(path)[:12]
    except OSError:
        return "missing"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
