"""The hosts of a run: the hostfile, a command on one of them by ssh, and the variables that a run needs on each.

A login by ssh starts with the environment of a fresh login, and so does each of its ranks. `PASSED` is the one list of
what must go with it. What launches by other means (Slurm, Kubernetes, DeepSpeed's `.deepspeed_env`) follows it too.

Imports no torch.
"""

import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megakexue.config import UserError, require

PASSED = {
    "MEGAKEXUE_*": "our own",
    "PATH": "compilers and other programs that libraries start",
    "LD_LIBRARY_PATH": "shared libraries, such as those of CUDA and MPI",
    "LD_PRELOAD": "another allocator",
    "PYTHON*": "where Python finds modules, and how it hashes and prints",
    "LANG": "the encoding of text and of file names",
    "LC_*": "the same",
    "CC": "the compiler of compiled blocks and of DeepSpeed's extensions",
    "CXX": "the same",
    "OMP_*": "threads of a rank: another number adds up in another order",
    "MKL_*": "the same, and which instructions compute",
    "KMP_*": "how threads wait, and on which cores",
    "ATEN_CPU_CAPABILITY": "which instructions compute on a CPU",
    "ONEDNN_*": "the same",
    "CUDA_*": "which GPUs are used and how work is queued; where the compiler of CUDA is",
    "CUBLAS_*": "which sums are deterministic",
    "CUDNN_*": "the same",
    "NVIDIA_TF32_OVERRIDE": "the precision of matrix products",
    "TORCH*": "torch's own switches, its logs, its distributed layer and TorchInductor; caches and built extensions",
    "PYTORCH_*": "the allocator",
    "TRITON_*": "the kernels' compiler and its cache",
    "DS_*": "DeepSpeed's own, such as DS_ACCELERATOR",
    "NCCL_*": "the network between GPUs",
    "GLOO_*": "the network between CPUs, such as GLOO_SOCKET_IFNAME",
    "UCX_*": "the network below MPI",
    "FI_*": "the network of EFA and other libfabric cards",
    "AWS_*": "credentials and endpoint of a bucket with data",
    "S3_*": "the same",
    "GOOGLE_*": "the same",
    "GCS_*": "the same",
    "AZURE_*": "the same",
    "OCI_*": "the same",
    "HF_*": "the same, and where the cache is",
    "http_proxy": "the way to a bucket",
    "https_proxy": "the same",
    "no_proxy": "the same",
}
"""The variables that a run needs on each host, each with the reason. A * at the end stands for any rest of the name."""

CONNECT_S = 10
"""A host that does not answer for so long is not reachable."""
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=4",
)  # fmt: skip
"""Asks no questions, and notices within a minute that a host or its network is gone."""


@dataclass(frozen=True)
class Host:
    name: str
    """As the hostfile has it: a name or an address, perhaps with `user@` before it."""
    slots: int
    """Ranks on it."""

    @property
    def address(self) -> str:
        """By which other hosts reach it."""
        return self.name.rpartition("@")[2]

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, by its name."""
        own = socket.gethostname()
        return self.name in {"localhost", "127.0.0.1", own, own.partition(".")[0]}


def read_hostfile(path: str | Path) -> list[Host]:
    """Read a file of DeepSpeed's format: `NAME slots=N` in a line, in the order of ranks; # begins a comment.

    Raises:
        UserError: it cannot be read, or a line is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the hostfile {path}: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        # a name that begins with - would be an option of ssh, and "," and ":" separate hosts in MEGAKEXUE_HOSTS
        match = re.fullmatch(r"([\w.@][\w.@-]*)\s+slots=([1-9]\d{0,4})", text, re.ASCII)
        if not match:
            raise UserError(
                f"{path}, line {number}: {text!r} is no host: write `NAME slots=N`, such as `node1 slots=8`"
            )
        name, slots = match.groups()
        require(name not in hosts, f"{path}, line {number}: {name} was named before: give each host one line")
        hosts[name] = Host(name, int(slots))
    require(bool(hosts), f"{path} names no host: write one `NAME slots=N` a line, such as `node1 slots=8`")
    return list(hosts.values())


def hosts_variable(hosts: Sequence[Host]) -> str:
    """The value of MEGAKEXUE_HOSTS, such as `n1:8,n2:8`, by which a rank can name the host of another one."""
    return ",".join(f"{host.address}:{host.slots}" for host in hosts)


def read_hosts_variable(variable: str) -> list[str]:
    """The name of the host of each rank, from MEGAKEXUE_HOSTS."""
    pairs = [part.rpartition(":") for part in variable.split(",")]
    return [name for name, _, slots in pairs for _ in range(int(slots))]


def is_passed(name: str) -> bool:
    """Whether a variable goes to all hosts."""
    return any(name.startswith(known[:-1]) if known.endswith("*") else name == known for known in PASSED)


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that goes to all hosts."""
    return {name: value for name, value in environment.items() if is_passed(name)}


def ssh_command(
    host: Host, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, folder: str | Path | None = None
) -> list[str]:
    """Return a command line that runs a program on another host, in a folder and with variables beside its own.

    It asks for no password. Exit code 255 is ssh's own: the host was not reached, or did not let us in. Variables can
    be seen there in the list of processes, so secrets go another way.
    """
    words = ["exec", "env", *(f"{name}={value}" for name, value in (env or {}).items()), *map(str, command)]
    begin = f"cd {shlex.quote(str(folder))} && " if folder is not None else ""
    return [*SSH, host.name, begin + " ".join(map(shlex.quote, words))]


def deepspeed_env(environment: Mapping[str, str]) -> str:
    """The text of a `.deepspeed_env`, which `deepspeed --hostfile` reads: the variables that go to all hosts.

    DeepSpeed 0.19.8 puts each value that is not plain between double quotes of a remote shell, and pdsh before it takes
    % for its own. PYTHON* is left out: DeepSpeed sends these itself, with the current folder in PYTHONPATH.

    Raises:
        UserError: a value has two lines.
    """
    lines = []
    for name, value in sorted(passed(environment).items()):
        require("\n" not in value, f"{name} has more than one line, which .deepspeed_env cannot hold: unset it")
        if not name.startswith("PYTHON"):
            quoted = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
            lines.append(f"{name}={quoted}\n")
    return "".join(lines)
