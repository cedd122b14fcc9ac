#!/usr/bin/env python
"""Prove on your config, data and machine that stopping and resuming changes nothing, and print a certificate.

Each case trains 2K steps straight and, in another run folder, until it is stopped between K and 2K and resumed.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megakexue.config import (
    PREEMPTED,
    Config,
    UserError,
    as_integer,
    as_number,
    load_config,
    require,
    run_program,
    to_yaml,
)
from megakexue.files import parse_json, read_json, require_writable, write_whole, writing
from megakexue.text.manifest import check_inputs

EPILOG = """\
Both runs are those of launch/train.py with your schedule, of which they do the first 2K steps. The program compares
  all records, except what depends on the clock and the machine
  masters, optimizer state and random states of the last checkpoint, each element by the name of its parameter
  the position in the data, the tokens, and the guard
If bits differ, it trains straight a second time. That tells whether resume is at fault, or whether this machine does
not compute the same twice.

--kill kill ends all ranks with SIGKILL, at a moment drawn from --seed after checkpoint K is whole. --kill term and usr1
send that signal to one rank; then all ranks must save and exit with code 75. --moved-to resumes on other ranks or under
another stage. There, the loaded state must be equal, and later losses and gradient norms must be within --bound.

Give settings before --ranks and --stages. The run folders need room for five checkpoints. They are removed if all is
equal; otherwise they are kept, and the program says where.

examples:
  tools/verify_resume.py configs/tiny_mla.yaml                  on the data of `make demo`
  tools/verify_resume.py configs/1b.yaml engine.dtype=bf16 --ranks 8 --stages 1 2 3 --kill term
  tools/verify_resume.py configs/1b.yaml --ranks 8 --moved-to 4:3

exit status: 0 equal, 1 different, 2 a mistake, or nothing could be compared, such as when a run failed
"""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
CLOCK = {"tokens_per_s", "mfu", "memory_gib", "data_wait_s", "step_s", "times"}
TRAINER = ("step", "tokens", "position", "validated", "n_updates", "data", "tokenizer", "init_bundle", "guard")
BOUNDS = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # sums over other ranks have another order
REMEDY = (
    "On GPUs, try model.attention.backend=reference, since other backward kernels add in any order, "
    "CUBLAS_WORKSPACE_CONFIG=:4096:8 and NCCL_ALGO=Ring; on CPUs, set OMP_NUM_THREADS"
)


@dataclasses.dataclass
class Comparison:
    """What was compared, and what differs: a line for each record, trainer value, tensor and random state."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    differences: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By the kinds of `counts`."""
    first_step: float = math.inf
    """Of the records that differ."""
    largest: float = 0.0
    """The largest relative difference among the values that have a bound."""

    @property
    def first(self) -> str:
        return next(iter(self.differences.values()))[0]

    def differs(self, kind: str, line: str) -> None:
        self.differences.setdefault(kind, []).append(line)

    def values(self, kind: str, where: str, a: Any, b: Any, bound: float = 0.0) -> bool:
        """Compare two JSON values. Losses and gradient norms in them may differ by `bound`, relatively."""
        self.counts[kind] += 1
        left, right = flat(a), flat(b)
        for name in [*left, *(name for name in right if name not in left)]:
            x, y = left.get(name, "missing"), right.get(name, "missing")
            if name.partition(".")[0] in CLOCK or repr(x) == repr(y):  # of floats: the same bits, or both NaN
                continue
            if bound and name in ("loss", "grad_norm") and isinstance(x, float) and isinstance(y, float):
                relative = abs(x - y) / (max(abs(x), abs(y)) or 1.0)
                self.largest = max(self.largest, relative)
                if relative <= bound:
                    continue
            self.differs(kind, f"{where}: {name}: {x!r} and {y!r}")
            return False
        return True

    def metrics(self, a: Path, b: Path, *, bound: float = 0.0, exact_until: int = 0) -> None:
        """Compare the records of two runs, those after step `exact_until` within `bound`."""
        left: dict[str, Any]
        right: dict[str, Any]
        for left, right in zip_longest(records(a), records(b), fillvalue={}):
            step, kind = ((left or right)[key] for key in ("step", "kind"))
            is_bounded = bound > 0 and step > exact_until
            if is_bounded and kind == "statistics":
                continue  # the cosine of one tensor has no common bound
            if not self.values("records", f"metrics.jsonl, step {step}, {kind}", left, right, bound * is_bounded):
                self.first_step = min(self.first_step, step)

    def trainer(self, a: Path, b: Path, keys: tuple[str, ...] = TRAINER) -> None:
        left, right = (read_json(folder / "trainer.json", "the trainer's state") for folder in (a, b))
        for key in keys:
            self.values("trainer values", f"{a.name}/trainer.json", {key: left.get(key)}, {key: right.get(key)})

    def tensors(self, a: Path, b: Path, *, with_random: bool = True) -> None:
        """Compare the state in two checkpoints bit for bit, with one tensor of each in memory at a time."""
        import torch

        found = {folder: pieces(folder) for folder in (a, b)}
        for name in sorted(name for name in found[a] | found[b] if with_random or "/rng/" not in name):
            kind, where = "random states" if "/rng/" in name else "tensors", f"{a.name}: {name}"
            self.counts[kind] += 1
            try:
                x, y = whole(name, a, found[a]), whole(name, b, found[b])
                require(x.dtype == y.dtype, f"{x.dtype} and {y.dtype}")
                require(x.shape == y.shape, f"{x.numel()} and {y.numel()} elements")
            except UserError as error:
                self.differs(kind, f"{where}: {error}")
                continue
            self.counts["elements"] += x.numel()
            integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
            unequal = (x.view(integer) != y.view(integer)).nonzero().view(-1)  # NaN is NaN, and -0 is not 0
            if n := unequal.numel():
                i, largest = int(unequal[0]), (x[unequal].double() - y[unequal].double()).abs().max().item()
                extent = f"{n} of {x.numel()} elements differ, by at most {largest:.3g}"
                self.differs(kind, f"{where}[{i}]: {x[i].item()!r} and {y[i].item()!r}; {extent}")


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    try:
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: cannot read the records of a run: {error}") from error


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Name each number inside dicts and lists, such as guard.losses.3."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in flat(inner, f"{name}.{key}" if name else str(key)).items()}


def pieces(checkpoint: Path) -> dict[str, list[tuple[int, Any, str]]]:
    """Return the pieces of each tensor of a checkpoint, from the files of all ranks: (start, file, key) by name."""
    from safetensors import safe_open

    found: dict[str, list[tuple[int, Any, str]]] = {}
    for path in sorted(checkpoint.glob("rank_*.safetensors")):
        file = safe_open(path, framework="pt")
        for key in file.keys():
            if key.startswith("rng/"):
                found[f"{path.stem}/{key}"] = [(0, file, key)]
            else:
                name, _, start = key.rpartition("/")
                found.setdefault(name, []).append((int(start), file, key))
    return found


def whole(name: str, checkpoint: Path, found: dict[str, list[tuple[int, Any, str]]]) -> Any:
    """Join the pieces of a flat tensor. Raises UserError: it is missing, or elements are missing or there twice."""
    import torch

    require(name in found, f"missing in {checkpoint}")
    parts, stop = [], 0
    for start, file, key in sorted(found[name], key=lambda piece: piece[0]):
        require(start == stop, f"one piece ends at element {stop} and the next starts at {start} in {checkpoint}")
        parts.append(file.get_tensor(key).reshape(-1))
        stop += parts[-1].numel()
    return torch.cat(parts)


@contextmanager
def launched(title: str, program: list[str], n_ranks: int, log: Path, code: int | None = 0) -> Iterator[Any]:
    """Run a program under `deepspeed` beside the block, then wait until it exits with `code`.

    With None, it is killed at the end of the block. In any case no process of it is left.

    Raises:
        UserError: it exits with another code; the message has the end of its output.
    """
    import psutil  # DeepSpeed depends on it

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    print(f"{title} ... ", end="", flush=True)
    began, family = time.monotonic(), []
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["deepspeed", "--num_accelerators", str(n_ranks), "--master_port", port, *program]
    with open(log, "w", encoding="utf-8") as out:
        process = psutil.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
        if code is not None:
            process.wait()
    finally:
        with suppress(psutil.Error):
            family = process.children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for child in family:  # the next run needs their memory; a zombie has given it back
            with suppress(psutil.Error):
                while child.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.05)
        print(f"{time.monotonic() - began:.1f} s", flush=True)
    if code not in (None, process.returncode):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        hint = ", saved when told to stop (too fast? raise --steps)" if code == PREEMPTED else ""
        what = f"exit code {process.returncode} instead of {code}{hint}; the end of {log}:"
        raise UserError("\n".join([what, *lines]))


def steps_done(run: Path) -> int:
    """Return the last step in the records of a run, which may still be writing them. 0 means that there is none."""
    with suppress(OSError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return max(map(int, re.findall(r'"kind": "train", "step": (\d+),.*\n', lines)), default=0)
    return 0


def save_again(config: Config, checkpoint: Path) -> None:
    """Load a checkpoint on these ranks as a resumed run does, and save what was loaded into the working folder."""
    import torch

    from megakexue.core.resolve import resolve_config
    from megakexue.run.checkpoint import load
    from megakexue.run.engine import Engine, start
    from megakexue.run.saves import Saver

    ranks = start(config.engine)
    engine = Engine(resolve_config(config), ranks)
    saver = Saver(engine, config.checkpoint)
    saver.start(Path(config.train.run), load(checkpoint, engine, lambda state: None))
    saver.finish()
    torch.distributed.destroy_process_group()


class Case:
    """One ZeRO stage on one number of ranks: its runs in `folder`, and their comparison."""

    def __init__(self, args: argparse.Namespace, config: Config, stage: int, n_ranks: int) -> None:
        self.args, self.config, self.stage, self.n_ranks = args, config, stage, n_ranks
        self.name = f"stage {stage}, {n_ranks} ranks, {config.engine.dtype}"
        self.folder = args.out / f"stage{stage}_ranks{n_ranks}"
        self.random = random.Random(f"{args.seed} {stage} {n_ranks}")
        self.signal = f"SIG{args.kill.upper()}"

    def checkpoint(self, run: str, step: int | None = None) -> Path:
        return self.folder / run / "checkpoints" / f"step_{step or 2 * self.args.steps:08d}"

    def launch(self, title: str, run: str, log: str, *, moved: bool = False, code: int | None = 0,
               program: tuple[str, ...] = ()) -> Any:  # fmt: skip
        """Start launch/train.py, or `program` with its arguments, with other settings of what is saved and shown."""
        k, n_ranks, stage = self.args.steps, self.n_ranks, self.stage
        if moved:
            n_ranks, stage = self.args.moved_to
            title += f" on {n_ranks} ranks under stage {stage}"
        own = [f"train.run={self.folder / run}", f"train.stop_at_step={2 * k}", f"checkpoint.every_steps={k}",
               "checkpoint.keep_last=3", "checkpoint.keep_every=null", "checkpoint.export=null",
               "metrics.every_steps=1", "metrics.tensorboard=false", f"engine.zero_stage={stage}"]  # fmt: skip
        every = {
            "evaluate.every_steps": self.config.evaluate.every_steps,
            "metrics.statistics_every_steps": self.config.metrics.statistics_every_steps,
        }
        own += [f"{key}={k}" for key, value in every.items() if value is not None]
        program = program or (str(Path(__file__).resolve().parents[1] / "launch" / "train.py"),)
        command = [program[0], self.args.config, *self.args.overrides, *own, *program[1:]]
        return launched(f"{self.name}: {title}", command, n_ranks, self.folder / log, code)

    def stop(self, process: Any, run: Path) -> None:
        """Wait for a random moment between K and 2K. Send the signal to one rank; SIGKILL is left to the caller."""
        k, how = self.args.steps, self.args.kill
        step, share = self.random.randint(k, 2 * k - 2), self.random.random()
        while steps_done(run) < step or not self.checkpoint("stopped", k).exists():
            if process.poll() is not None:
                return  # it failed or was too fast: the caller says so
            time.sleep(0.005)
        step_s = min(record.get("step_s", math.inf) for record in records(self.folder / "straight"))
        time.sleep(share * step_s)
        if how != "kill":
            ranks = [child for launcher in process.children() for child in launcher.children()]
            self.random.choice(ranks).send_signal(SIGNALS[how])

    def compare(self, found: Comparison, other: str, *, bound: float = 0.0, exact_until: int = 0) -> None:
        """Compare the straight run with another one. A bound is for runs on other ranks, whose bits may differ."""
        found.metrics(self.folder / "straight", self.folder / other, bound=bound, exact_until=exact_until)
        checkpoints = self.checkpoint("straight"), self.checkpoint(other)
        found.trainer(*checkpoints, TRAINER if bound == 0 else TRAINER[:-1])
        if bound == 0:
            found.tensors(*checkpoints)

    def train_and_stop(self) -> tuple[int, int]:
        """Train straight, and until a stop. Return the last step before the stop, and that of the newest checkpoint."""
        k, stopped = self.args.steps, self.folder / "stopped"
        self.folder.mkdir(parents=True)
        with self.launch(f"{2 * k} steps straight", "straight", "straight.log"):
            pass
        code = None if self.args.kill == "kill" else PREEMPTED
        with self.launch(f"until {self.signal}", "stopped", "stopped.log", code=code) as process:
            self.stop(process, stopped)
        steps = [int(path.name[5:]) for path in (stopped / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
        step = max(steps, default=0)
        require(
            k <= step < 2 * k,
            f"a run should stop between steps {k} and {2 * k}, and its newest checkpoint is of step {step}: see "
            f"{self.folder / 'stopped.log'}, or raise --steps if it was too fast",
        )
        return steps_done(stopped), step

    def compare_as_loaded(self, found: Comparison, step: int) -> None:
        """Compare the checkpoint of the stopped run with what the ranks of --moved-to load of it."""
        source = self.checkpoint("stopped", step)
        again = (str(Path(__file__).resolve()), "--save-again", str(source))
        with self.launch("loaded", "again", "again.log", moved=True, program=again):
            pass
        found.tensors(source, self.folder / "again" / source.name, with_random=False)

    def resume(self, step: int) -> None:
        """Go on with the stopped run, which must do so from the checkpoint of `step`."""
        with self.launch("resumed", "stopped", "resumed.log", moved=bool(self.args.moved_to)):
            pass
        resumed = re.search(r"resumed from\s+\S*step_(\d+)", (self.folder / "resumed.log").read_text(encoding="utf-8"))
        require(resumed is not None and int(resumed[1]) == step, f"it did not resume at step {step}: see {self.folder}")

    def cause(self) -> str:
        """Train straight once more, and return what the difference between two straight runs says."""
        with self.launch("straight again, to find the cause", "straight_again", "straight_again.log"):
            pass
        twice = Comparison()
        self.compare(twice, "straight_again")
        if not twice.differences:
            return "two straight runs are equal: resume is at fault. Keep the folders and report it"
        cause = "training itself is not deterministic here: two straight runs differ first in "
        return f"{cause}{twice.first}. {REMEDY}"

    def run(self) -> tuple[bool, list[str]]:
        """Return whether all was equal, and the lines of the certificate."""
        moved, found = self.args.moved_to, Comparison()
        last, step = self.train_and_stop()
        if moved:
            self.compare_as_loaded(found, step)
        self.resume(step)
        bound = (self.args.bound or BOUNDS[self.config.engine.dtype]) if moved else 0.0
        self.compare(found, "stopped", bound=bound, exact_until=step)
        require(found.counts["tensors"] > 0, f"{self.checkpoint('straight')} holds no tensor")
        where = f" on {moved[0]} ranks under stage {moved[1]}" if moved else ""
        lines = [
            self.name,
            f"  {self.signal} after step {last}, resumed from step {step}{where}",
            "  compared: " + ", ".join(f"{n:,} {what}" for what, n in found.counts.items()),
        ]
        if moved:
            lines.append(f"  later losses and gradient norms within {bound:g}, relatively: at most {found.largest:.2g}")
        if not found.differences:
            return True, [*lines, f"  equal bit for bit{', as loaded' if moved else ''}"]
        for kind, differing in found.differences.items():
            lines.append(f"  DIFFERENT: {len(differing)} of {found.counts[kind]} {kind}, the first: {differing[0]}")
        if found.first_step <= step:
            lines.append(f"  before it was resumed: training itself is not deterministic here. {REMEDY}")
        elif not moved:
            lines.append(f"  {self.cause()}")
        return False, lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/tiny_mla.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
    parser.add_argument(
        "--steps", type=as_integer, default=5, metavar="K", help="half the steps (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=as_integer, nargs="+", metavar="N", help="cases (default: the GPUs, or 2 on CPU)"
    )
    parser.add_argument("--stages", type=as_integer, nargs="+", metavar="S", help="cases (default: engine.zero_stage)")
    parser.add_argument("--kill", choices=SIGNALS, default="kill", help="how the run is stopped (default: %(default)s)")
    parser.add_argument("--moved-to", metavar="RANKS:STAGE", help="where it is resumed (default: where it was)")
    bounds = ", ".join(f"{dtype} {bound:g}" for dtype, bound in BOUNDS.items())
    parser.add_argument("--bound", type=as_number, metavar="X", help=f"of --moved-to, relative (default: {bounds})")
    parser.add_argument("--seed", type=as_integer, default=0, help="of the moment (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new one (default: in runs/verify_resume)")
    parser.add_argument("--keep", action="store_true", help="keep the folders in any case, with certificate.txt")
    parser.add_argument("--save-again", type=Path, help=argparse.SUPPRESS)  # what --moved-to starts on its ranks
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    require(args.steps >= 2, f"--steps {args.steps} must be 2 or more, so that a run can be stopped between K and 2K")
    require(args.bound is None or args.bound > 0, f"--bound {args.bound} must be positive")
    require(args.bound is None or args.moved_to is not None, f"--bound {args.bound} has no effect without --moved-to")
    if args.moved_to is not None:
        match = re.fullmatch(r"(\d+):(\d+)", args.moved_to)
        if match is None:
            raise UserError(f"--moved-to {args.moved_to} is not of the form RANKS:STAGE, such as 4:3")
        args.moved_to = (int(match[1]), int(match[2]))
    name = f"{Path(args.config).stem}_{time.strftime('%Y%m%d_%H%M%S')}"
    args.out = args.out or Path("runs", "verify_resume", name)
    require(args.save_again or not args.out.exists(), f"--out {args.out} exists: choose another name")
    require_writable(f"--out {args.out}", args.out)
    return args


def make_cases(args: argparse.Namespace, config: Config) -> list[Case]:
    """Return a case for each stage and number of ranks. Raises UserError: there is no such stage or number."""
    moved = [args.moved_to] if args.moved_to else []
    for stage in [*(args.stages or []), *(stage for _, stage in moved)]:
        require(stage in range(4), f"stage {stage} must be 0, 1, 2 or 3")
    for n_ranks in [*(args.ranks or []), *(n_ranks for n_ranks, _ in moved)]:
        require(n_ranks > 0, f"{n_ranks} ranks: there must be one or more")
        config.train.n_micro_batches(n_ranks)

    import torch

    ranks = args.ranks or [torch.cuda.device_count() or 2]
    for n_ranks in ranks:
        config.train.n_micro_batches(n_ranks)
    return [Case(args, config, stage, n) for stage in args.stages or [config.engine.zero_stage] for n in ranks]


def certificate(args: argparse.Namespace, config: Config, sources: set[str], lines: list[str], verdict: str) -> str:
    """Return the certificate: what was tried, with which code and on which machine, and what came out."""
    import torch

    merged = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    devices = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "\n".join(
        [
            "certificate of resume, " + time.strftime("%Y-%m-%d %H:%M:%S"),
            f"config    {' '.join([args.config, *args.overrides])}; sha256 of it merged: {merged}",
            f"code      {' and then '.join(sorted(sources))}",
            f"software  torch {version('torch')}, deepspeed {version('deepspeed')}, Python {platform.python_version()}",
            f"device    {', '.join(f'{n} x {name}' for name, n in devices.items()) or f'CPU, {os.cpu_count()} cores'}; "
            f"{platform.node()}",
            f"steps     {args.steps} and {args.steps} of {config.train.steps}, stopped at a moment by seed {args.seed}",
            *lines,
            f"verdict   {verdict}",
        ]
    )


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config, args.overrides)
    n_steps = config.train.steps
    require(2 * args.steps <= n_steps, f"--steps {args.steps}: twice that is above train.steps={n_steps}")
    check_inputs(config)
    if args.save_again:
        return save_again(config, args.save_again)
    cases = make_cases(args, config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # otherwise the runs would outlive this program
    lines: list[str] = []
    are_equal, sources = True, set()
    for case in cases:
        try:
            with writing(f"--out {args.out}", args.out):
                is_equal, said = case.run()
        except UserError as error:
            kept = f"; the folders are kept in {args.out}" if args.out.exists() else ""
            raise UserError(f"{case.name}: {error}\nnothing was proved{kept}") from error
        are_equal, lines = are_equal and is_equal, [*lines, *said]
        sources |= {(case.folder / run / "source.txt").read_text().strip() for run in ("straight", "stopped")}
        if is_equal and not args.keep:
            shutil.rmtree(case.folder)
    text = certificate(args, config, sources, lines, "EQUAL" if are_equal else "DIFFERENT")
    print(f"\n{text}")
    if are_equal and not args.keep:
        shutil.rmtree(args.out)
        return
    write_whole(args.out / "certificate.txt", text + "\n")
    print(f"kept in {args.out}")
    if not are_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
