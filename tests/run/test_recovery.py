"""The kill drill: a run that is killed anywhere is, at its end, bit for bit the run that was not.

Two ranks train at ZeRO stages 1, 2 and 3. They are killed with SIGKILL and started again, over and over; a run that
comes to its end is compared and another one begins, until there were enough kills. Compared with a run that nobody
killed: every record of metrics.jsonl, and of the last checkpoint the masters, optimizer and random state of both ranks
and the trainer's values. In each attempt at it a step must have held the same samples, and all steps together each
sample of each epoch once.

Every run is first killed in its first save. Then kills are in turn two of a rank's own, at one of PLACES after another,
and one from outside, after a random time: of both ranks at once, or of one, and of the other a moment later, as by a
launcher.

What is drawn is drawn from a seed. A longer drill, an hour on two cores:

    MEGAKEXUE_KILLS=1500 MEGAKEXUE_SEED=1 pytest -s tests/run/test_recovery.py
"""

import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import Config
from megakexue.text import prepare, shards
from tests.conftest import Prepared, stdlib_files
from tests.helpers import column, state_hashes, tiny_config
from tests.ranks import run_on_ranks, start_on_ranks

N_KILLS = int(os.environ.get("MEGAKEXUE_KILLS", "84"))
SEED = int(os.environ.get("MEGAKEXUE_SEED", "0"))
N_STEPS, BATCH = 36, 32
# the stages differ in all that a checkpoint holds: optimizer state, loss scale, masters beside the weights
STAGES = {
    1: ["engine.dtype=fp32", "optim.name=tiger", "optim.accumulate=momentum"],
    2: ["engine.dtype=fp16", "optim.name=tiger", "guard.loss_scale_window=5"],
    # without an accumulation, which is slow here; the others have two micro-batches
    3: [
        "engine.dtype=bf16",
        "optim.name=adamw",
        "guard.on_spike=skip",
        "guard.spike_window=16",
        "train.micro_batch_size=16",
    ],
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Calls of a function, before or after one of which, or half-way, a rank kills itself."""

    target: str
    n_calls: int
    """As many happen in the first steps after a start; one of them is chosen."""
    path: str = ""
    """What a path among the arguments must match."""
    written: Callable[..., Path] | None = None
    """From the arguments, the file or folder that it writes or removes: one kill more leaves half of it."""
    ranks: tuple[int, ...] = (0, 1)


PLACES = {
    "tensors of a checkpoint": Place(
        target="megakexue.run.checkpoint:save_file", n_calls=2, written=lambda tensors, path: path
    ),
    "JSON of a checkpoint": Place(
        target="pathlib:Path.write_text", n_calls=6, path="/checkpoints/", written=lambda path, *_, **__: path,
        ranks=(0,),
    ),
    "sync of a checkpoint": Place(target="os:fsync", n_calls=5, path="/checkpoints"),
    "rename of a checkpoint": Place(target="os:rename", n_calls=2, path=r"/checkpoints/step_\d+$", ranks=(0,)),
    "pointer to the latest": Place(target="os:replace", n_calls=2, path="/checkpoints/latest$", ranks=(0,)),
    "removal of a checkpoint": Place(
        target="shutil:rmtree", n_calls=2, path=r"/checkpoints/", written=lambda path, **_: path, ranks=(0,)
    ),
    "restoring": Place(target="megakexue.run.checkpoint:Reader.read", n_calls=10),
    "rewriting the metrics": Place(target="os:replace", n_calls=1, path=r"/metrics\.jsonl$", ranks=(0,)),
    "recording a step": Place(target="megakexue.run.metrics:Metrics.log_step", n_calls=8, ranks=(0,)),
    "describing the run": Place(
        target="pathlib:Path.write_bytes", n_calls=4, path=r"(yaml|txt|deepspeed\.json|tokenizer\.model)\.tmp$",
        written=lambda path, *_, **__: path, ranks=(0,),
    ),
    "downloading a shard": Place(
        target="streaming.base.stream:Stream.prepare_shard", n_calls=2,
        written=lambda stream, shard: Path(stream.local, stream.split, shard.raw_data.basename),
    ),
    "caching a shard": Place(target="os:replace", n_calls=2, path=r"/cache/shards/.*\.mds$"),
    "reading a row": Place(target="megakexue.run.rows:Rows.read", n_calls=150),
    "evaluation": Place(target="megakexue.run.engine:Engine.evaluation_loss", n_calls=4),
    "backward": Place(target="megakexue.run.engine:Engine._backward", n_calls=8),
    "optimizer step": Place(target="megakexue.core.optim:Optimizer.step", n_calls=8),
    "talk of the ranks": Place(target="torch.distributed:all_gather_object", n_calls=20),
}  # fmt: skip
KILLS = [
    (name, moment)
    for name, place in PLACES.items()
    for moment in ("before", "after", *(["half-way"] if place.written else []))
]
OUTSIDE = "from outside"
COLD = ("downloading a shard", "caching a shard")
"""Places that are only visited with an empty cache."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    place: str
    """One of PLACES, or OUTSIDE."""
    moment: str
    rank: int
    n: int
    """The n-th call of the place."""
    after_s: float
    """From outside: since the start."""
    pause_s: float
    """Until the other rank is killed too."""


# --- in the ranks ----------------------------------------------------------------------------------------------------


def train_until_killed(config: Config, folder: Path, kill: Kill | None) -> None:
    from megakexue.run import checkpoint
    from megakexue.run.engine import Engine
    from megakexue.run.train import train

    rank = os.environ["RANK"]
    output = os.open(folder / f"output_{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    steps = os.open(folder / f"steps_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    take_step, save_file = Engine.train_step, checkpoint.save_file

    def noted(self: Engine, batches: list[Any], lr: float, step: int, **options: Any) -> Any:
        samples = [(position.epoch, position.sample) for batch in batches for position in batch.samples]
        rows = zlib.crc32(b"".join(batch.tokens.numpy().tobytes() for batch in batches))
        os.write(steps, (json.dumps([step, samples, rows]) + "\n").encode())  # whole lines, in spite of kills
        return take_step(self, batches, lr, step, **options)

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)  # so that a save goes on beside some steps, as that of a large model does
        save_file(*arguments)

    Engine.train_step = noted  # type: ignore[method-assign]
    checkpoint.save_file = slow  # type: ignore[assignment]
    if kill is not None and kill.place != OUTSIDE and rank == str(kill.rank):
        arrange(kill)
    train(config)


def arrange(kill: Kill) -> None:
    """Replace the function of a place by one that kills this process, in whatever thread it is called."""
    place = PLACES[kill.place]
    module, _, names = place.target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args: Any, **options: Any) -> Any:
        is_place = place.path == "" or any(re.search(place.path, path) for path in map(path_of, args))
        if not is_place or next(calls) != kill.n:
            return original(*args, **options)
        if kill.moment == "half-way":
            assert place.written is not None
            written = place.written(*args, **options)
            if not written.is_dir():
                original(*args, **options)
            leave_half(written)
        elif kill.moment == "after":
            original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def path_of(argument: Any) -> str:
    """The path that an argument is or, an open file, has."""
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)


def leave_half(path: Path) -> None:
    """Leave what a kill leaves that comes while a file is written, or a folder removed."""
    if path.is_dir():
        for file in sorted(path.iterdir())[::2]:
            file.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)


# --- in the parent ---------------------------------------------------------------------------------------------------


class Drill:
    """Which kill comes next at one stage, and which there have been."""

    def __init__(self, stage: int, straight_s: float) -> None:
        self.rng, self.straight_s = random.Random(f"seed {SEED}, ZeRO-{stage}"), straight_s
        # the same order for all stages, each of which begins at another third
        order, first = random.Random(SEED).sample(KILLS, len(KILLS)), (stage - 1) * len(KILLS) // 3
        self.places = order[first:] + order[:first]
        self.own = order[first : stage * len(KILLS) // 3]
        self.n_kills, self.n_vain, self.done = N_KILLS // 3, 0, Counter[tuple[str, str]]()

    def next(self, n_before: int) -> Kill | None:
        """Return the kill of a run that was started `n_before` times, or None if there were enough."""
        if self.done.total() == self.n_kills:
            return None
        if n_before == 0:  # the first save, before which there is nothing to go back to
            return self.draw("sync of a checkpoint", "before")
        if n_before % 3:
            return self.draw(*self.places[0])
        return self.draw(OUTSIDE, self.rng.choice(["both ranks", "one rank"]))

    def draw(self, place: str, moment: str) -> Kill:
        ranks, n_calls = ((0, 1), 1) if place == OUTSIDE else (PLACES[place].ranks, PLACES[place].n_calls)
        return Kill(
            place=place, moment=moment, rank=self.rng.choice(ranks), n=self.rng.randint(1, n_calls),
            after_s=self.rng.uniform(0, self.straight_s / 2), pause_s=self.rng.uniform(0.05, 0.3),
        )  # fmt: skip

    def is_with_empty_cache(self, kill: Kill) -> bool:
        return kill.place in COLD or self.rng.random() < 0.3

    def note(self, kill: Kill, is_finished: bool) -> None:
        """Take note of whether a run came to its end before it came to the kill."""
        if is_finished:
            self.n_vain += 1
            assert self.n_vain <= self.n_kills, f"no rank comes to {kill}"
            return
        self.done[kill.place, kill.moment] += 1
        if (kill.place, kill.moment) == self.places[0]:
            self.places.append(self.places.pop(0))


def has_finished(processes: list[BaseProcess], kill: Kill | None, folder: Path) -> bool:
    """Wait until the ranks have come to their end; or for the kill, and then end the others, as a launcher does."""
    is_outside = kill is not None and kill.place == OUTSIDE
    ended = wait([process.sentinel for process in processes], kill.after_s if kill and is_outside else 120)
    if kill and is_outside and not ended:
        victims = processes if kill.moment == "both ranks" else [processes[kill.rank]]
        for process in victims:
            process.kill()
        for process in victims:
            process.join()
    # the second rank may need a while for its end, but not for that of a killed run
    is_end = any(process.exitcode == 0 for process in processes)
    deadline = time.monotonic() + (60 if is_end or kill is None else kill.pause_s)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if codes != [0, 0] and not (kill and -signal.SIGKILL in codes):
        outputs = "".join(f"\n{path.name}: {path.read_text()[-6000:]}" for path in sorted(folder.glob("output_*")))
        pytest.fail(f"the ranks failed or hang, {codes} with {kill}:{outputs}")
    return codes == [0, 0]


def result(folder: Path) -> dict[str, Any]:
    """What a finished run must have in common with any other."""
    run = folder / "run"
    steps: dict[tuple[int, str], list[Any]] = {}
    for path in sorted(folder.glob("steps_*")):
        for line in path.read_text().splitlines():
            step, *noted = json.loads(line)
            assert steps.setdefault((step, path.name), noted) == noted, f"attempts at step {step} differ: {path}"
    trainer = json.loads((run / "checkpoints" / f"step_{N_STEPS:08d}" / "trainer.json").read_text())
    assert trainer["config"]["train"].pop("run") == str(run)
    for name in ("source", "lineage"):  # with the commit, which may move under a test
        trainer.pop(name, None)
    states = {name: value for name, value in state_hashes(run, N_STEPS).items() if name != "trainer.json"}
    assert len(states) == 2 and not list((run / "checkpoints").glob("*.damaged"))
    return {"metrics": column(run), "state": states, "trainer": trainer, "samples": dict(sorted(steps.items()))}


def check_order(expected: dict[str, Any], n_rows: int) -> None:
    """Assert that there were all steps, which took each sample of each of more than two epochs once."""
    assert N_STEPS * BATCH > 2 * n_rows and len([r for r in expected["metrics"] if r["kind"] == "train"]) == N_STEPS
    for step in range(1, N_STEPS + 1):
        samples = [sample for rank in (0, 1) for sample in expected["samples"][step, f"steps_{rank}"][0]]
        numbers = sorted(epoch * n_rows + sample for epoch, sample in samples)
        assert numbers == list(range((step - 1) * BATCH, step * BATCH))


@pytest.fixture(scope="module")
def data(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of `prepared`, in shards so small that there are five."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    arguments = prepare.PrepareArguments(seq_len=prepared.seq_len, packing="best_fit", valid_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 2**14)
        prepare.prepare([str(path) for path in stdlib_files(8)], prepared.tokenizer, folder, arguments, processes=1)
    assert len(list((folder / "train").glob("*.mds"))) == 5
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_anywhere_is_one_that_never_was(
    stage: int, prepared: Prepared, data: Path, tmp_path: Path
) -> None:
    def start(folder: Path, kill: Kill | None) -> list[BaseProcess]:
        folder.mkdir(exist_ok=True)
        config = tiny_config(
            prepared, folder / "run", f"data.sources=[{{path: file://{data}}}]", f"train.steps={N_STEPS}",
            f"train.global_batch_size={BATCH}", "train.micro_batch_size=8", "model.n_layers=1",
            "checkpoint.keep_last=2", "metrics.statistics_every_steps=5", f"engine.zero_stage={stage}", *STAGES[stage],
        )  # fmt: skip
        return start_on_ranks(2, train_until_killed, config, folder, kill)

    run_on_ranks(1, os.getpid)  # starts the server that ranks are forked from
    began = time.monotonic()
    straight = tmp_path / "straight"
    assert has_finished(start(straight, None), None, straight)
    straight_s = time.monotonic() - began
    expected = result(straight)
    check_order(expected, n_rows=json.loads((data / "manifest.json").read_text())["splits"]["train"]["rows"])
    drill = Drill(stage, straight_s)
    for n_runs in itertools.count(1):
        folder, is_finished = tmp_path / f"killed_{n_runs}", False
        kills: list[Kill | None] = []
        while not is_finished:
            kill = drill.next(len(kills))
            if kill and drill.is_with_empty_cache(kill):
                shutil.rmtree(folder / "run" / "cache", ignore_errors=True)
            kills.append(kill)
            is_finished = has_finished(start(folder, kill), kill, folder)
            if kill:
                drill.note(kill, is_finished)
        found = result(folder)
        for what in expected:
            assert found[what] == expected[what], f"{what} differs after {kills}"
        if drill.done.total() == drill.n_kills:
            break
    assert N_KILLS < 84 or drill.done.keys() >= set(drill.own), "some place has had no kill"
    lines = [f"{n:4d}  {place}, {moment}" for (place, moment), n in sorted(drill.done.items())]
    print(f"\nZeRO-{stage}: {drill.n_kills} kills in {n_runs} runs, {time.monotonic() - began:.0f} s", *lines, sep="\n")
