"""Who is behind is named, and what failed first is what every screen ends with, whatever becomes of the ranks."""

import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import Config, UserError
from megakexue.dist import Ranks
from megakexue.run.guard import TrainingStopped
from megakexue.run.watch import ENDED, Failure, Seen, Watch, find_stall, is_of_others, name_ranks, own_host
from tests.conftest import Prepared
from tests.helpers import column, tiny_config, train_all
from tests.ranks import run_on_ranks, start_on_ranks

# --- what there is to say --------------------------------------------------------------------------------------------


def seen(
    count: int, *, heard: float = 100.0, moved: float = 50.0, phase: str = "the optimizer", host: str = ""
) -> Seen:
    return Seen(heard=heard, moved=moved, count=count, phase=phase, place=f"step 12, {phase}", host=host)


KNOWN = {"the optimizer": 2.0, "waiting for data": 1.0, "saving": 8.0}


def stall(ranks: dict[int, Seen], now: float = 101.0, known: dict[str, float] = KNOWN) -> str:
    found = find_stall(ranks, now, 30.0, known)
    return re.sub(r"\d\d:\d\d:\d\d", "TIME", found[1]) if found else ""


def test_who_is_behind_is_named() -> None:
    late = seen(7, phase="waiting for data", host="n2", moved=49.0)
    words = "no progress for 51 s: rank 1 on n2: behind the others, at step 12, waiting for data, since TIME"
    assert stall({0: seen(8, host="n1"), 1: late}) == words
    assert (
        stall({0: seen(8), 1: seen(8)}) == "no progress for 51 s: all ranks are at step 12, the optimizer, since TIME"
    )
    assert stall({0: seen(8)}) == "no progress for 51 s: it is at step 12, the optimizer, since TIME"
    # somebody moves; a phase that takes 8 s as a rule may take 40; one that has never ended yet may compile
    assert stall({0: seen(8, moved=80.0), 1: late}) == ""
    assert stall({0: seen(8, moved=62.0, phase="saving")}) == "" != stall({0: seen(8, moved=60.0, phase="saving")})
    assert stall({0: seen(8, moved=-198.0, phase="validation")}) == ""
    assert "for 302 s" in stall({0: seen(8, moved=-201.0, phase="validation")})


def test_who_gives_no_sign_of_life_is_named_before_who_is_behind() -> None:
    ranks = {0: seen(9), 1: seen(8, heard=70.5, host="n2"), 2: seen(7)}
    assert stall(ranks) == (
        "no sign of life for 30 s from rank 1 on n2 (last at step 12, the optimizer, TIME): stopped, swapped out, or a "
        "lost host or network"
    )
    # of a whole host, and of many; one that has come to its end is silent for a reason
    assert "from ranks 1, 2 on n2 (" in stall(ranks | {2: seen(7, heard=70.0, host="n2")})
    assert stall({0: seen(9, moved=80.0), 1: seen(9, heard=0.0, phase=ENDED)}) == ""
    hosts = {8 * host + rank: f"n{host}" for host in range(6) for rank in range(8)}
    shown = [f"ranks {8 * i}, {8 * i + 1}, {8 * i + 2}, {8 * i + 3} and 4 more on n{i}" for i in range(4)]
    assert name_ranks(hosts) == "; ".join([*shown, "2 more hosts"])
    assert name_ranks({3: ""}) == "rank 3"


def test_a_host_has_the_name_that_its_user_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(rank=2, world_size=3, local_rank=0, local_world_size=1)
    monkeypatch.setenv("MEGAKEXUE_HOSTS", "n1:2,n2:1")
    assert own_host(ranks) == "n2"
    monkeypatch.setenv("MEGAKEXUE_HOSTS", "n1:2")  # of another launch
    assert own_host(ranks) == os.uname().nodename


def test_a_failure_in_words() -> None:
    failure = Failure(rank=1, host="n2", kind="error", text="no shard", code=2)
    assert failure.words() == "error: rank 1 on n2: no shard"
    assert failure.words("no shard") == "error: no shard"  # said by a rank that has the same to say
    failure = Failure(rank=3, host="", kind="stopped", text="a spike", code=1, remedy="go on")
    assert failure.words("no room") == "stopped: rank 3: a spike\ngo on"


def test_what_a_collective_says_is_the_failure_of_others() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3"
    assert is_of_others(RuntimeError(gloo)) and is_of_others(SystemExit(2))
    own = [RuntimeError("shape"), UserError("lr"), TrainingStopped("nan"), KeyboardInterrupt()]
    assert [is_of_others(error) for error in own] == [False] * 4


# --- one process -----------------------------------------------------------------------------------------------------


def test_a_process_alone_reports_its_stalls(tmp_path: Path) -> None:
    said: list[str] = []
    with Watch(Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1), 1.0) as watch:
        watch.say = said.append
        watch.log_to(tmp_path / "log")
        for phase in ("waiting for data", "the optimizer", "waiting for data"):
            watch.mark(phase, step=3)
        deadline = time.monotonic() + 30
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        watch.mark("the optimizer")
        while len(said) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    stacks = rf"it is at step 3, waiting for data, since [\d:]+; stacks are in {tmp_path}"
    assert re.fullmatch(rf"WARNING: no progress for \d s: {stacks}", said[0])
    assert re.fullmatch(r"goes on after \d s", said[1]) and len(said) == 2
    log = (tmp_path / "log").read_text()
    assert "stalled at step 3, waiting for data; the stacks of all threads:" in log
    assert "test_a_process_alone_reports_its_stalls" in log


def test_a_mark_costs_nothing() -> None:
    with Watch(Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1), 30.0) as watch:
        took = []
        for _ in range(10):  # in the best of ten nothing else is on the machine
            began = time.perf_counter()
            for _ in range(2_000):
                watch.mark("micro-batch", " 1 of 2")
            took.append((time.perf_counter() - began) / 2_000)
        assert min(took) < 50e-6  # it takes 1, and a step of the smallest model 10,000


# --- real ranks ------------------------------------------------------------------------------------------------------

SLOW = ["train.steps=400", "checkpoint.every_steps=5", "evaluate.every_steps=null", "engine.stall_s=3"]


def train_hindered(config: Config, folder: Path, place: str) -> None:
    """Train as launch/train.py does, with each rank's screen in a file, while something happens to rank 1 at step 7."""
    from megakexue.core.decoder import Decoder
    from megakexue.run.engine import Engine
    from megakexue.run.rows import Rows
    from megakexue.run.train import train
    from megakexue.run.watch import ending

    rank = os.environ["RANK"]
    output = os.open(folder / f"screen_{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    take_step, forward, read = Engine.train_step, Decoder.forward, Rows.read
    now = {"step": 0}

    def slow_step(self: Any, batches: Any, lr: float, step: int, **options: Any) -> Any:
        now["step"] = step
        time.sleep(0.1)
        return take_step(self, batches, lr, step, **options)

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        if rank == "1" and now["step"] == 7:
            raise ValueError("a wrong shape")
        return forward(self, *args, **options)

    def late(self: Any, row: int) -> Any:
        if rank == "1" and now["step"] == 7:
            now["step"] = -100
            time.sleep(7)
        return read(self, row)

    Engine.train_step = slow_step  # type: ignore[method-assign]
    if place == "forward":
        Decoder.forward = broken  # type: ignore[method-assign]
    if place == "data":
        Rows.read = late  # type: ignore[method-assign]
    with ending():
        train(config)


def screen(folder: Path, rank: int) -> str:
    path = folder / f"screen_{rank}"
    return path.read_text() if path.exists() else ""


def until(condition: Callable[[], Any], processes: list[BaseProcess], folder: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        codes = [process.exitcode for process in processes]
        screens = "\n".join(screen(folder, rank) for rank in range(len(processes)))
        assert codes == [None] * len(codes) and time.monotonic() < deadline, f"{codes}\n{screens}"
        time.sleep(0.05)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def codes_within(processes: list[BaseProcess], timeout_s: float) -> list[int | None]:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_others_and_is_the_last_word(victim: int, prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path / "run", *SLOW, "train.global_batch_size=24", "train.steps=4000")
    processes = start_on_ranks(3, train_hindered, config, tmp_path, "")
    until(lambda: steps(tmp_path / "run") >= 8, processes, tmp_path)
    # eight steps take less than a second, after which a rank says again where it is, and another one reads it
    told = time.monotonic() + 4
    until(lambda: time.monotonic() > told, processes, tmp_path)
    processes[victim].kill()
    expected: list[int | None] = [1, 1, 1]
    expected[victim] = -signal.SIGKILL
    assert codes_within(processes, 30) == expected
    host = os.uname().nodename
    speaker = 1 - victim
    *_, cause, remedy = screen(tmp_path, speaker).splitlines()
    words = (
        rf"error: rank {victim} on {host}: ended without a word \(last sign of life at [\d:]+, step \d+, .*\): killed"
    )
    assert re.match(words, cause)
    assert re.fullmatch(r"the same command goes on from step \d+" if victim else "the same command .*", remedy)
    screens = [screen(tmp_path, rank) for rank in range(3)]
    assert "".join(screens).count("ended without a word") == 1
    assert not any(re.search("Traceback|gloo|frame #", text) for text in screens), screens
    # what each rank has met is in its log
    assert "Traceback" in (tmp_path / "run" / "logs" / f"rank_{speaker}.log").read_text()


@pytest.mark.slow
def test_a_failure_of_one_rank_is_the_last_word_of_all(prepared: Prepared, tmp_path: Path) -> None:
    processes = start_on_ranks(2, train_hindered, tiny_config(prepared, tmp_path / "run", *SLOW), tmp_path, "forward")
    until(lambda: steps(tmp_path / "run") >= 5, processes, tmp_path)
    assert codes_within(processes, 30) == [1, 1]
    log = tmp_path / "run" / "logs" / "rank_1.log"
    text = f"error: rank 1 on {os.uname().nodename}: ValueError: a wrong shape, at step 7, micro-batch 1 of 2; "
    text += f"the traceback is in {log}"
    assert screen(tmp_path, 0).splitlines()[-2:] == [text, "the same command goes on from step 5"]
    assert "wrong shape" not in screen(tmp_path, 1) and "Traceback" not in screen(tmp_path, 0) + screen(tmp_path, 1)
    assert "steps       6 of 400" in screen(tmp_path, 0)  # also where the main thread hangs
    assert re.search(r"failed at step 7, .*\nTraceback[\s\S]*ValueError: a wrong shape", log.read_text())


def test_what_all_ranks_say_is_said_once(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path / "run")
    processes = start_on_ranks(3, train_hindered, config, tmp_path, "")
    assert codes_within(processes, 60) == [2, 2, 2]
    text = "error: train.global_batch_size=16 must be a multiple of train.micro_batch_size=4 times the 3 ranks = 12"
    assert [screen(tmp_path, rank).strip() for rank in range(3)] == [text, "", ""]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_waits_or_is_stopped_is_named_and_the_run_goes_on(prepared: Prepared, tmp_path: Path) -> None:
    options = [*SLOW[1:], "train.steps=60", "data.n_prefetch=1"]
    config = tiny_config(prepared, tmp_path / "run", *options)
    processes = start_on_ranks(2, train_hindered, config, tmp_path, "data")
    until(lambda: screen(tmp_path, 0).count("goes on after") == 1, processes, tmp_path)
    for victim, witness in ((1, 0), (0, 1)):
        said = screen(tmp_path, witness).count("goes on after")
        before = steps(tmp_path / "run")
        until(lambda: steps(tmp_path / "run") >= before + 5, processes, tmp_path)  # noqa: B023
        pid = processes[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        name = f"from rank {victim} on {os.uname().nodename} (last at step "
        until(lambda: name in screen(tmp_path, witness), processes, tmp_path, 15)  # noqa: B023
        os.kill(pid, signal.SIGCONT)
        until(lambda: screen(tmp_path, witness).count("goes on after") > said, processes, tmp_path)  # noqa: B023
    assert codes_within(processes, 60) == [0, 0]
    lines = [line for line in screen(tmp_path, 0).splitlines() if "WARNING" in line or "goes on after" in line]
    host = os.uname().nodename
    assert len(lines) == 4, lines
    assert re.match(
        rf"WARNING: no progress for \d s: rank 1 on {host}: behind the others, at step \d+, waiting", lines[0]
    )
    assert re.match(r"goes on after \d s", lines[1])
    assert re.match(rf"WARNING: no sign of life for \d s from rank 1 on {host}", lines[2])
    log = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert "waiting for data; the stacks of all threads:" in log and "in late" in log
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert log.count("; the stacks of all threads:") >= 2 and "in train" in log
    run_on_ranks(2, train_all, [tiny_config(prepared, tmp_path / "straight", *options)])
    assert column(tmp_path / "run") == column(tmp_path / "straight")
