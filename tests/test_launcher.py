"""What a launcher says is mapped to ranks that train together, or refused in one line: nobody is alone by mistake."""

import base64
import os
import socket
import time

import pytest

from megakexue.config import UserError
from megakexue.launcher import (
    ALONE,
    Ranks,
    WrongPlace,
    expanded,
    host_of_each_rank,
    read_environment,
    read_ranks,
    said_once,
)
from tests.helpers import ROOT
from tests.programs import run_python, run_without_torch

STARTED = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "MEGAKEXUE_")
"""How the names of variables begin by which processes learn of one another."""
Variables = dict[str, str]

SRUN = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_TASKS_PER_NODE": "8",
}  # fmt: skip
SRUN_ON_ONE_NODE = SRUN | {"SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
         "SLURM_TASKS_PER_NODE": "8"}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-host-12@1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
AT = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
LAUNCHER = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"} | AT


def given(monkeypatch: pytest.MonkeyPatch, values: Variables) -> None:
    for name in list(os.environ):
        if name.startswith(STARTED):
            monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def without(variables: Variables, *names: str) -> Variables:
    return {name: value for name, value in variables.items() if name not in names}


def test_neighbouring_ranks_form_a_sequence_group() -> None:
    world = [Ranks(rank=i, world_size=6, local_rank=i, local_world_size=6, sequence_size=2) for i in range(6)]
    assert [(r.data_rank, r.sequence_rank) for r in world] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {r.data_size for r in world} == {3}
    assert (ALONE.data_rank, ALONE.data_size, ALONE.sequence_rank) == (0, 1, 0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        BATCH,
        BATCH | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8"},  # the shell of salloc
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        # a helper of mpirun is task 1 of 2, of which the process knows too
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"} | SRUN,
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"},
    ],
)
def test_a_process_alone(monkeypatch: pytest.MonkeyPatch, values: Variables) -> None:
    given(monkeypatch, values)
    assert read_ranks() == ALONE == Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert read_ranks().is_first and "MASTER_ADDR" not in read_environment()


ON_ONE_NODE = Ranks(rank=3, world_size=4, local_rank=3, local_world_size=4)


@pytest.mark.parametrize(
    ("values", "ranks", "address"),
    [
        (LAUNCHER, Ranks(rank=9, world_size=16, local_rank=1, local_world_size=8), "node1"),
        (
            without(LAUNCHER, "LOCAL_SIZE") | {"LOCAL_WORLD_SIZE": "8"},
            Ranks(rank=9, world_size=16, local_rank=1, local_world_size=8),
            "node1",
        ),
        # `deepspeed` in a batch script, and torchrun as a task of srun
        (
            LAUNCHER | BATCH | {"SLURM_NTASKS": "8"},
            Ranks(rank=9, world_size=16, local_rank=1, local_world_size=8),
            "node1",
        ),
        (LAUNCHER | SRUN, Ranks(rank=9, world_size=16, local_rank=1, local_world_size=8), "node1"),
        (SRUN | AT, Ranks(rank=3, world_size=4, local_rank=1, local_world_size=2), "node1"),
        (
            SRUN | AT | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NODEID": "2"},
            Ranks(rank=3, world_size=5, local_rank=1, local_world_size=2),
            "node1",
        ),
        (SRUN_ON_ONE_NODE, ON_ONE_NODE, "127.0.0.1"),
        # with srun --mpi=pmi2 and --mpi=pmix
        (SRUN_ON_ONE_NODE | {"PMI_RANK": "3", "PMI_SIZE": "4"}, ON_ONE_NODE, "127.0.0.1"),
        (SRUN_ON_ONE_NODE | {"PMIX_RANK": "3"}, ON_ONE_NODE, "127.0.0.1"),
        (OPEN_MPI, ON_ONE_NODE, "127.0.0.1"),
        (OPEN_MPI | SRUN, ON_ONE_NODE, "127.0.0.1"),
        (OPEN_MPI | AT, ON_ONE_NODE, "node1"),
        (HYDRA | {"MASTER_PORT": "29500"}, ON_ONE_NODE, "127.0.0.1"),
        (HYDRA | {"SLURM_JOB_ID": "17"}, ON_ONE_NODE, "127.0.0.1"),
    ],
)
def test_what_started_several_processes_is_understood(
    monkeypatch: pytest.MonkeyPatch, values: Variables, ranks: Ranks, address: str
) -> None:
    given(monkeypatch, values)
    assert read_ranks() == ranks
    variables = read_environment()
    assert variables["MASTER_ADDR"] == address and 0 < int(variables["MASTER_PORT"]) < 2**15
    # what was mapped says the same when it is read again
    given(monkeypatch, values | variables)
    assert read_environment() == variables


def test_each_job_has_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job, step in (("17", "0"), ("17", "1"), ("18", "0")):
        of_ranks = set()
        for rank in range(4):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
            given(monkeypatch, SRUN_ON_ONE_NODE | own)
            of_ranks.add(read_environment()["MASTER_PORT"])
        assert len(of_ranks) == 1
        ports |= of_ranks
    assert len(ports) == 3


def test_the_first_host_and_the_host_of_each_rank_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, SRUN | {"SLURM_STEP_NODELIST": "gpu-a[09-10,12],login"})
    assert read_environment()["MASTER_ADDR"] == "gpu-a09"
    assert host_of_each_rank() == ["gpu-a09", "gpu-a09", "gpu-a10", "gpu-a10"]
    monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
    assert host_of_each_rank() == []
    assert expanded("n1") == ["n1"] and expanded("n[1-2,5]-ib,x[08-11]") == [
        "n1-ib", "n2-ib", "n5-ib", "x08", "x09", "x10", "x11",
    ]  # fmt: skip
    given(monkeypatch, {"MEGAKEXUE_HOSTS": "n1:1,10.0.0.2:2"})
    assert host_of_each_rank() == ["n1", "10.0.0.2", "10.0.0.2"]
    given(monkeypatch, LAUNCHER)
    assert host_of_each_rank() == []
    # mpirun listens where it runs; the address that does not answer is of another network
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"7405568.0;tcp://127.1.2.3,127.0.0.1:{server.getsockname()[1]};tcp6://[fd00::2]:44677"
        given(monkeypatch, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
        with pytest.raises(UserError, match="MASTER_ADDR not set"):
            read_environment()
        monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", uri)
        assert read_environment()["MASTER_ADDR"] == "127.0.0.1"


def test_the_hosts_of_deepspeed_are_an_argument_of_its_launcher() -> None:
    world = base64.urlsafe_b64encode(b'{"n1": [0, 1], "n2": [0]}').decode()
    child = "import megakexue.launcher as l; print(l.host_of_each_rank())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = run_python(parent, f"--world_info={world}")
    assert done.stdout == "['n1', 'n1', 'n2']\n", done.stderr


REFUSED: list[tuple[Variables, str]] = [
    (
        {"RANK": "0"},
        "the launcher set RANK, but not WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT: start",
    ),
    (
        {"WORLD_SIZE": "2"},
        "the launcher set WORLD_SIZE, but not RANK, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT",
    ),
    ({"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}, "set LOCAL_RANK, LOCAL_SIZE, but not RANK, WORLD_SIZE, MASTER_ADDR"),
    (without(LAUNCHER, "LOCAL_RANK"), "but not LOCAL_RANK: start with `deepspeed launch/train.py`, or set RANK, "),
    (without(LAUNCHER, "LOCAL_SIZE"), "but not LOCAL_SIZE"),
    (without(LAUNCHER, *AT), "but not MASTER_ADDR, MASTER_PORT"),
    (
        {"OMPI_COMM_WORLD_SIZE": "8"},
        "Open MPI says that this process has WORLD_SIZE=8, but not RANK and LOCAL_RANK and",
    ),
    (without(OPEN_MPI, "PMIX_NAMESPACE"), "MASTER_PORT not set: set MASTER_ADDR to the host of rank 0"),
    (HYDRA, "4 processes were started, 4 of them on this node, but MASTER_PORT not set"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI says that this process has RANK=0, WORLD_SIZE=2, but not LOCAL_RANK and"),
    # Slurm speaks of a helper, of which there is one
    ({"PMI_RANK": "1", "PMI_SIZE": "2"} | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "PMI says"),
    ({"PMIX_RANK": "0"}, "PMIx says that this process has RANK=0, but not WORLD_SIZE"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "Slurm says that this process has WORLD_SIZE=4, but not RANK and LOCAL_RANK"),
    ({"SLURM_PROCID": "0"}, "Slurm says that this process has RANK=0, but not WORLD_SIZE"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "has RANK=1, WORLD_SIZE=2, but not LOCAL_RANK and LOCAL_SIZE"),
    (BATCH | {"SLURM_NTASKS": "8"}, "start with `srun launch/train.py`; for one process alone, unset SLURM_NTASKS"),
    (BATCH | {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, "`srun launch/train"),
    (SRUN, "4 processes were started, 2 of them on this node, but MASTER_ADDR not set: set MASTER_ADDR to the host"),
    (SRUN | {"SLURM_NODEID": "2"}, "RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, but not LOCAL_SIZE"),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "but not LOCAL_SIZE"),
]
WRONG: list[tuple[Variables, str]] = [
    (LAUNCHER | {"RANK": "16"}, "the launcher says RANK=16, which must be a whole number from 0 to 15"),
    (LAUNCHER | {"RANK": "-1"}, "RANK=-1, which must be a whole number from 0 to 15"),
    (LAUNCHER | {"RANK": "one"}, "RANK=one, which must"),
    (LAUNCHER | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0, which must be a whole number of at least 1"),
    (LAUNCHER | {"WORLD_SIZE": ""}, "WORLD_SIZE=, which must"),
    (LAUNCHER | {"LOCAL_SIZE": "17"}, "LOCAL_SIZE=17, which must be a whole number from 1 to 16"),
    (LAUNCHER | {"LOCAL_RANK": "8"}, "LOCAL_RANK=8, which must be a whole number from 0 to 7"),
    (LAUNCHER | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536, which must be a whole number from 1 to 65535"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "Open MPI says RANK=4, which must be a whole number from 0 to 3"),
    (SRUN | AT | {"SLURM_LOCALID": "2"}, "Slurm says LOCAL_RANK=2, which must be a whole number from 0 to 1"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED + WRONG)
def test_a_start_that_says_too_little_or_what_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: Variables, message: str
) -> None:
    # otherwise each process would be a world of one in the same run folder, or DeepSpeed would look for mpi4py
    given(monkeypatch, values)
    with pytest.raises(UserError) as error:
        read_ranks()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, WrongPlace) == ((values, message) in WRONG)


def test_what_all_find_is_said_by_one_and_what_one_has_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"):
        for local_rank, error, end in (
            ("0", UserError, UserError), ("1", UserError, SystemExit), ("1", WrongPlace, WrongPlace)
        ):  # fmt: skip
            given(monkeypatch, {name: local_rank})
            with pytest.raises(end) as raised, said_once("node"):
                raise error("a mistake")
            assert end is not SystemExit or raised.value.code == 2  # type: ignore[attr-defined]
    given(monkeypatch, {})
    with pytest.raises(UserError), said_once("world"):
        raise UserError("a mistake")


def test_the_first_rank_speaks_for_the_world_and_another_node_only_if_it_is_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, local_rank, end, waits in (("0", "0", UserError, 0), ("1", "1", SystemExit, 0), ("8", "0", UserError, 1)):
        given(monkeypatch, {"RANK": rank, "LOCAL_RANK": local_rank})
        waited.clear()
        with pytest.raises(end), said_once("world"):
            raise UserError("a mistake")
        assert len(waited) == waits


@pytest.mark.parametrize("program", ["launch/train.py", "tools/inject_faults.py"])
def test_programs_refuse_before_torch_is_there(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    for values, lines in (({"RANK": "0"}, 1), (SRUN, 0), (SRUN | {"SLURM_LOCALID": "0"}, 1)):
        given(monkeypatch, values)
        ((code, _, err),) = run_without_torch(ROOT / program, [[str(ROOT / "configs" / "tiny_gqa.yaml")]])
        assert code == 2 and err.count("\n") == lines and (not lines or "error: " in err), err
