"""What the launcher says of this process: its place in the world, and where rank 0 is. Imports no torch.

The variables are looked at in this order:

    RANK, WORLD_SIZE, LOCAL_RANK    `deepspeed` and torchrun, with LOCAL_SIZE or LOCAL_WORLD_SIZE, MASTER_ADDR and
                                    MASTER_PORT
    OMPI_COMM_WORLD_*               mpirun of Open MPI
    PMI_*, MPI_LOCAL*               mpirun of MPICH and Intel MPI
    PMIX_RANK                       whoever starts processes by PMIx; it does not say of how many
    SLURM_*                         srun
    none of them                    one process alone

Slurm is the last, since mpirun starts its own helpers with srun. Where PMI or PMIx leaves something out, Slurm may say
the rest, if they agree. A world of one task is one process alone. A larger one is mapped to the variables of the first
line if everything is said, and refused if not: otherwise each process would train alone, in the same folder. Only
MASTER_ADDR may be missing, if all are on one node, or if srun or mpirun says where the first one is; and MASTER_PORT,
if the job has a number. A first rank that is elsewhere finds out that the address is not its own.

A batch script of Slurm, and a shell of salloc, are one process and no task of srun, whatever SLURM_NTASKS is. If that
is above 1, and no launcher has set its variables, `srun` or `deepspeed` was forgotten, and the start is refused.
"""

import base64
import json
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakexue.config import UserError
from megakexue.hosts import read_hosts_variable


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process: in the world, on its node, and on the axes that the world is divided by.

    Neighbouring ranks form a sequence group, whose members share rows: rank = data_rank * sequence_size +
    sequence_rank. What is counted in rows is divided among data ranks; what is counted in processes, among the world.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this node."""
    sequence_size: int = 1
    """Ranks that share the same rows: `engine.sequence_ranks`."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Ranks that take rows of their own."""
        return self.world_size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size


ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
"""The place of a program that has no launcher."""
_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
_PLACE, _ADDRESS = tuple(_OF_ONE), ("MASTER_ADDR", "MASTER_PORT")
_REMEDY = (
    "start with `deepspeed launch/train.py`, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and "
    "MASTER_PORT for each process"
)
_SYSTEMS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PMIx": ("PMIX_RANK",),
}  # fmt: skip
"""What each calls RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE."""
PATIENCE_S = 3.0
"""In which a launcher ends the other ranks when one has ended."""
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
"""Numbers and names that the processes of one start have in common, and other starts have not."""
_NO_STEP = 2**32 - 16
"""Slurm's step numbers from here on are no steps of srun: 4294967291 is a batch script."""


class WrongPlace(UserError):
    """A value that is wrong for this process, and may be right for the others."""


def read_ranks() -> Ranks:
    """Return this process's place in the world.

    Raises:
        UserError: the launcher says too little, or what cannot be.
    """
    variables = read_environment()
    rank, world_size, local_rank, local_size = (int(variables[name]) for name in _PLACE)
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_size)


def read_environment() -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, and in a larger world MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: as `read_ranks`.
    """
    if any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _checked("the launcher", _of_launcher())
    return _checked(*_of_system())


@contextmanager
def said_once(of: Literal["node", "world"]) -> Iterator[None]:
    """Let one process say the mistake that all of a node, or of the world, find here; the others end with its code.

    Of the world, the first rank says it. Another node may have other files, so its first rank says it too, but only
    after a while, in which a launcher that has seen the first rank end will have ended it.
    """
    try:
        yield
    except WrongPlace:
        raise
    except UserError:
        if not _is_zero(_LOCAL_RANKS):
            sys.exit(2)
        if of == "world" and not _is_zero(_RANKS):
            time.sleep(PATIENCE_S)
        raise


def _is_zero(names: tuple[str, ...]) -> bool:
    """Whether the first of these variables that is set is 0, or none is."""
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _of_launcher() -> dict[str, str]:
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE
    torchrun = _found(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    found = _found(_PLACE) | torchrun | _found(_ADDRESS, _ADDRESS)
    needed = _PLACE if found.get("WORLD_SIZE") == "1" else _PLACE + _ADDRESS
    if missing := [name for name in needed if name not in found]:
        raise UserError(
            f"the launcher set {', '.join(found)}, but not {', '.join(missing)}: {_REMEDY}; for one process alone, "
            "unset them"
        )
    return found


def _of_system() -> tuple[str, dict[str, str]]:
    """Return who has started this process, and the variables as a launcher would set them."""
    told = {system: _found(names) for system, names in _SYSTEMS.items()} | {"Slurm": _of_slurm()}
    told = {system: found for system, found in told.items() if found}
    if not told:
        return "nobody", _OF_ONE
    system, found = next(iter(told.items()))
    for other in told.values():
        if all(other.get(name, value) == value for name, value in found.items()):
            found = other | found
    if found.get("WORLD_SIZE") == "1":
        return system, _OF_ONE
    if missing := [name for name in _PLACE if name not in found]:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        slurm = "; in a batch script, start with `srun launch/train.py`; for one process alone, unset SLURM_NTASKS"
        raise UserError(
            f"{system} says that this process has {said}, but not {' and '.join(missing)}: {_REMEDY}"
            f"{slurm if system == 'Slurm' else ''}"
        )
    return system, found | _address(found)


def _found(names: tuple[str, ...], keys: tuple[str, ...] = _PLACE) -> dict[str, str]:
    """The variables `names` that are set, by what a launcher calls them."""
    return {key: os.environ[name] for key, name in zip(keys, names) if name in os.environ}


def _of_slurm() -> dict[str, str]:
    """What Slurm says of this task. What is no task gets no place on its node, so that it is refused or alone."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if "SLURM_STEP_NUM_TASKS" in os.environ and not (step.isdigit() and int(step) >= _NO_STEP):
        return _found(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")) | _tasks_of_node()
    if "SLURM_PROCID" not in os.environ:  # a shell outside of the allocation's nodes
        return {}
    # a job that was not asked for tasks has no SLURM_NTASKS, and one process
    is_batch = "SLURM_JOB_ID" in os.environ and os.environ["SLURM_PROCID"] == "0"
    return ({"WORLD_SIZE": "1"} if is_batch else {}) | _found(("SLURM_PROCID", "SLURM_NTASKS"))


def _tasks_of_nodes() -> list[str]:
    """The number of tasks of each node, which Slurm writes such as `2(x3),1`."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [count] * int(times or 1)
    return counts


def _tasks_of_node() -> dict[str, str]:
    counts = _tasks_of_nodes()
    node = os.environ.get("SLURM_NODEID", "0" if len(counts) == 1 else "")
    return {"LOCAL_SIZE": counts[int(node)]} if node.isdigit() and int(node) < len(counts) else {}


def _address(found: dict[str, str]) -> dict[str, str]:
    address, job = _found(_ADDRESS, _ADDRESS), [os.environ[name] for name in _JOB if name in os.environ]
    if found["LOCAL_SIZE"] == found["WORLD_SIZE"]:
        address.setdefault("MASTER_ADDR", "127.0.0.1")
    elif first := _first_host():
        address.setdefault("MASTER_ADDR", first)
    if job:  # below 32768, from where on the kernel gives ports to whoever asks for any
        address.setdefault("MASTER_PORT", str(20_000 + zlib.crc32(" ".join(job).encode()) % 10_000))
    if missing := [name for name in _ADDRESS if name not in address]:
        raise UserError(
            f"{found['WORLD_SIZE']} processes were started, {found['LOCAL_SIZE']} of them on this node, but "
            f"{' and '.join(missing)} not set: set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a port that is "
            "free there, the same for all"
        )
    return address


def _first_host() -> str | None:
    """The first node of srun's step, or the host of mpirun, which starts rank 0 itself unless it is told otherwise."""
    if "SLURM_STEP_NODELIST" in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        return next(iter(expanded(os.environ["SLURM_STEP_NODELIST"])), None)
    # such as 7405568.0;tcp://10.0.0.1,192.168.0.1:40581;tcp6://...
    found = re.search(r";tcp://([^:;]+):(\d+)", os.environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found:
        return None
    addresses, port = found[1].split(","), int(found[2])
    return next((address for address in addresses if _answers(address, port)), None)


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


def expanded(nodes: str) -> list[str]:
    """The names in a list of Slurm's, such as `n[01-03,7],login`."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\]([^,\[\]]*))?", nodes):
        for part in ranges.split(",") if ranges else [None]:
            first, _, last = (part or "").partition("-")
            numbers = range(int(first), int(last or first) + 1) if part else [None]
            names += [prefix if n is None else f"{prefix}{n:0{len(first)}d}{suffix}" for n in numbers]
    return names


def host_of_each_rank() -> list[str]:
    """The host on which the launcher has started each rank, in their order; []: it does not say so."""
    if "MEGAKEXUE_HOSTS" in os.environ:  # of launch/cluster.py, such as n1:8,n2:8
        return read_hosts_variable(os.environ["MEGAKEXUE_HOSTS"])
    try:  # DeepSpeed's launcher, which has it as an argument, such as {"n1": [0, 1]}
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        encoded = next(a.partition("=")[2] for a in arguments if a.startswith("--world_info="))
        return [host for host, slots in json.loads(base64.urlsafe_b64decode(encoded)).items() for _ in slots]
    except (OSError, StopIteration, ValueError):
        pass
    nodes = expanded(os.environ.get("SLURM_STEP_NODELIST", ""))
    # mpirun in a job of Slurm starts one helper a node, of which these variables speak
    is_block = os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block") and not _found(_SYSTEMS["Open MPI"])
    return [node for node, count in zip(nodes, _tasks_of_nodes()) for _ in range(int(count))] if is_block else []


def _checked(who: str, variables: dict[str, str]) -> dict[str, str]:
    """Return the variables if their values are possible."""

    def number(name: str, low: int, high: int | None) -> int:
        text = variables[name]
        if re.fullmatch(r"\d{1,9}", text, re.ASCII) and low <= int(text) and (high is None or int(text) <= high):
            return int(text)
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise WrongPlace(f"{who} says {name}={text}, which must be a whole number {limits}: {_REMEDY}")

    world_size = number("WORLD_SIZE", 1, None)
    number("RANK", 0, world_size - 1)
    number("LOCAL_RANK", 0, number("LOCAL_SIZE", 1, world_size) - 1)
    if "MASTER_PORT" in variables:
        number("MASTER_PORT", 1, 65535)
    return variables
