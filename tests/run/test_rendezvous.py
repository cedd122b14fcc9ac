"""The start of several ranks: they are compared before anything is built, and nobody waits for long or in silence."""

import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest import mock

import pytest
import torch

from megakexue import launcher
from megakexue.config import EngineConfig
from megakexue.dist import gather
from megakexue.run import rendezvous
from megakexue.run.engine import start
from tests.ranks import free_port, run_on_ranks

CONFIG, PATIENCE_S = EngineConfig(rendezvous_s=4.0), 1.0


def outcome(facts: dict[str, str], port: int, **environment: str) -> tuple[str, str, float]:
    """How the start of this rank ends, in words, what it has printed, and after how long."""
    began, printed = time.monotonic(), StringIO()
    patience = mock.patch.object(launcher, "PATIENCE_S", PATIENCE_S)
    with mock.patch.dict(os.environ, {"MASTER_PORT": str(port)} | environment), redirect_stdout(printed), patience:
        try:
            start(CONFIG, facts)
            said = f"{torch.get_num_threads()} threads, {len(gather({os.environ['RANK']: 1}))} ranks"
            torch.distributed.destroy_process_group()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
    return said, printed.getvalue(), time.monotonic() - began


def starts(ports: list[int]) -> list[tuple[str, str, float]]:
    """Of two ranks on hosts of their own, one case after another."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MEGAKEXUE_HOSTS": "n1:1,n2:1"}
    torch.set_num_threads(rank + 1)
    told = [outcome({"config optim.lr": "0.02"}, ports[0])]
    torch.set_num_threads(1)
    told.append(outcome({"config optim.lr": f"{rank}"}, ports[1]))
    told.append(outcome({}, ports[2], **({"GLOO_SOCKET_IFNAME": "eth99"} if rank else {})))
    told.append(outcome({}, ports[3], WORLD_SIZE=str(2 + rank)))
    if rank:
        time.sleep(5.5)  # after the first one has given up
    with mock.patch.object(rendezvous, "QUIET_S", 1.0):
        told.append(outcome({}, ports[4]))
    return told


@pytest.mark.slow
def test_ranks_start_together_or_not_at_all() -> None:
    first, second = run_on_ranks(2, starts, [free_port() for _ in range(5)])
    # the second rank had two threads, the first one, which the others follow
    assert [said for said, _, _ in (first[0], second[0])] == ["1 threads, 2 ranks"] * 2
    for said, _, _ in (first[1], second[1]):
        words = " ".join(said.split())
        assert "config optim.lr 0 1" in words and "rank 0" in words and "rank 1" in words, said
        assert said.startswith("UserError: the hosts are not equal") and "give all hosts the same config" in said
    assert second[1][2] > PATIENCE_S  # the first rank speaks before a launcher ends it
    for said, _, _ in (first[2], second[2]):
        assert "GLOO_SOCKET_IFNAME=eth99 is no network interface: choose of lo" in said and "rank 1 on " in said
    assert "place world size" in first[3][0] and "start all ranks with one launcher" in second[3][0]
    said, printed, took = first[4]
    assert said.startswith("NotAllHere: rank 1 on n2 did not come within engine.rendezvous_s=4: look whether")
    assert printed == "waiting for rank 1 on n2\n" and took < 15
    said, _, took = second[4]
    assert said.startswith("NotAllHere: rank 1 on ") and "could not reach rank 0 at 127.0.0.1:" in said and took < 20


def alone_in_a_world_of_two(port: int) -> tuple[str, str]:
    os.environ["WORLD_SIZE"] = "2"
    address = outcome({}, port, MASTER_ADDR="192.0.2.77")[0]
    holder = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    # in a process of its own, since one process may use its port twice
    environment = os.environ | {"MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from megakexue.config import EngineConfig; from megakexue.run.engine import start; start(EngineConfig())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    del holder
    return address, done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_an_address_or_a_port_that_is_not_its_own_is_said_at_once() -> None:
    ((address, port),) = run_on_ranks(1, alone_in_a_world_of_two, free_port())
    assert address.startswith("UserError: MASTER_ADDR=192.0.2.77 is no address of ")
    assert "is in use on " in port and "--master_port" in port


def test_missing_ranks_are_named_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAKEXUE_HOSTS", ",".join(f"n{i}:8" for i in range(1, 20)))
    assert rendezvous._names([9]) == "rank 9 on n2"
    assert rendezvous._names([9, 11, *range(16, 24)]) == "ranks 9, 11 on n2, 16 to 23 on n3"
    everybody = rendezvous._names(list(range(8, 152)))
    assert everybody == "ranks 8 to 15 on n2, 16 to 23 on n3, 24 to 31 on n4, 32 to 39 on n5 and those of 14 more hosts"
    monkeypatch.setenv("MEGAKEXUE_HOSTS", "n1:2")
    assert rendezvous._names([1, 2]) == "ranks 1 on n1, 2"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    entry: dict[str, Any] = {"host": "n1", "error": None, "gpu": "GPU-1"}
    assert rendezvous._first_error({0: entry, 1: entry | {"gpu": "GPU-2"}}) is None
    said = rendezvous._first_error({0: entry, 1: entry | {"gpu": "GPU-2"}, 2: entry})
    assert said is not None and said.startswith("ranks 0 and 2 use one GPU of n1: start one process for each GPU")
