"""Exports for Hugging Face of a run's checkpoints (`checkpoint.export`), written while the run trains on.

    run/exports/
      step_00000500/     as tools/export_hf.py writes it, in bf16

A program of its own, `python -m megakexue.run.exporter RUN STEP`, writes one. It reads the checkpoint on the disk,
which is free of ranks and stages, so only the first rank starts it, and no rank waits for it before the end of the run.
It runs at a low priority, on the CPU. What happens to it happens to nothing else: it has no part in the run's
memory, random state, collectives or lock.

What must stay true: a run is the same bit for bit with and without exports, and none of them can end it. A folder with
its final name is whole. Each checkpoint of a step at which one is due has an export, but for those that failed; one
without its checkpoint is removed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from megakexue.config import ResolvedConfig, UserError, require, run_program
from megakexue.core.costs import n_parameters
from megakexue.run.checkpoint import step_folders, step_of
from megakexue.run.export import RunCheckpoint
from megakexue.run.records import ExportRecord

CHECK_BYTES = 10
"""Of memory for each parameter, for two models in float32 and what loading takes."""
NICENESS = 10
"""A tenth of what training gets, where both want a core."""
_NAME = re.compile(r"step_\d{8,}|\.step_\d{8,}\.(partial|old)")
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_exportable(config: ResolvedConfig) -> None:
    """Refuse a run whose exports would all fail. Raises UserError."""
    if config.checkpoint.export is None:
        return
    from megakexue.bundle.hf_export import choose_class  # which needs a second that other runs save

    has_transformers = importlib.util.find_spec("transformers") is not None
    require(has_transformers, "checkpoint.export=hf needs transformers: pip install 'megakexue[hf]', or set it to null")
    try:
        choose_class(config.model)
    except UserError as error:
        raise UserError(f"checkpoint.export=hf: {error}: set it to null") from error


def folder_of(run: Path, step: int) -> Path:
    """Where the export of a step is."""
    return run / "exports" / f"step_{step:08d}"


class Exporter:
    """Starts the program for one checkpoint after another, the newest first. On the first rank of a run alone."""

    def __init__(
        self, run: Path, config: ResolvedConfig, *, record: Callable[[ExportRecord], None], say: Callable[[str], None]
    ) -> None:
        """
        Args:
            record: takes what came of each export.
            say: takes a line for the user.
        """
        self._run, self._record, self._say = run, record, say
        self._every = config.checkpoint.every_steps
        self._last = config.train.stop_at_step or config.train.steps
        self._log = run / "logs" / "export.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._step, self._began, self._log_size = 0, 0.0, 0
        self._tried: set[int] = set()
        """What has failed is tried again at the next start, not for ever."""
        self._looked_at: int | None = -1
        """The newest checkpoint at the last look at the folder."""

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *_: object) -> None:
        """End a program that is still at work; it leaves no folder with a final name."""
        if self._process is not None:
            self._end_process(self._process)
            self._missing()

    def tend(self, saved: int | None) -> bool:
        """Take note of a program that has ended, and start the next one; return whether all is done. Waits for nothing.

        Args:
            saved: the newest checkpoint, by its step.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return False
            self._note(self._process)
        elif saved == self._looked_at:
            return True
        self._looked_at = saved
        missing = self._missing()
        if not missing:
            return True
        try:
            self._start(missing[0])
        except OSError as error:
            self._failed(str(error))
        return False

    def _missing(self) -> list[int]:
        """Return the steps to export, newest first, and remove what has no checkpoint or is half-written.

        No program is at work.
        """
        steps = [step_of(folder) for folder in step_folders(self._run / "checkpoints")]
        whole = {folder_of(self._run, step).name for step in steps}
        for path in (self._run / "exports").glob("*step_*"):
            if _NAME.fullmatch(path.name) and path.name not in whole:
                shutil.rmtree(path, ignore_errors=True)
        due = [step for step in steps if step and (step % self._every == 0 or step == self._last)]
        return [step for step in due if step not in self._tried and not folder_of(self._run, step).exists()]

    def _start(self, step: int) -> None:
        self._tried.add(step)
        self._step, self._began = step, time.monotonic()
        root = str(Path(__file__).resolve().parents[2])
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(self._log, "ab") as log:
            self._log_size = log.tell()
            # its stdin is this process: it ends with it. A session of its own, as Ctrl-C is for the run
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megakexue.run.exporter", str(self._run), str(step)], stdin=subprocess.PIPE,
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        with suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)

    def _note(self, process: subprocess.Popen[bytes]) -> None:
        """Take note of how a program has ended."""
        self._end_process(process)
        said = [""]
        with suppress(OSError), open(self._log, "rb") as log:
            log.seek(self._log_size)
            said += log.read().decode(errors="replace").strip().splitlines()
        if process.returncode == 0:
            self._record(ExportRecord(step=self._step, seconds=time.monotonic() - self._began, error=None))
            self._say(f"exported {folder_of(self._run, self._step)}: {said[-1]}")
        elif process.returncode < 0:
            self._failed(f"signal {-process.returncode} has killed it, as it does where memory is short")
        else:
            self._failed(said[-1].removeprefix("error: "))

    def _failed(self, error: str) -> None:
        self._record(ExportRecord(step=self._step, seconds=time.monotonic() - self._began, error=error))
        self._say(
            f"WARNING: the export of step {self._step} has failed: {error}; training goes on. {self._log} has more; by "
            f"hand: tools/export_hf.py {self._run} OUT --step {self._step}"
        )

    def _end_process(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()  # what is half-written is removed here
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    run, step = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    from megakexue.bundle.hf_export import export_hf

    model = RunCheckpoint(run, step)
    n = n_parameters(model.config)
    checkpoint = sum(path.stat().st_size for path in (run / "checkpoints" / f"step_{step:08d}").iterdir())
    (run / "exports").mkdir(exist_ok=True)
    check_room(run / "exports", 2 * n, checkpoint)
    memory = free_memory()
    is_checked = CHECK_BYTES * n < memory / 2
    out = folder_of(run, step)
    kind, _, found = export_hf(model, out, check=is_checked, device=torch.device("cpu") if is_checked else None)
    why = f"not checked: that takes {CHECK_BYTES * n / 2**30:.1f} GiB, more than half of the {memory / 2**30:.1f} free"
    print(f"{kind}, {f'checked: {found}' if found else why}")


def check_room(folder: Path, export: int, checkpoint: int) -> None:
    """Refuse an export of so many bytes after which the next checkpoint would have no room. Raises UserError."""
    free = shutil.disk_usage(folder).free
    require(
        free > export + checkpoint,
        f"{folder} has {free:,} bytes of room, and with the export's {export:,} too few would be left for the "
        f"{checkpoint:,} of the next checkpoint",
    )


def _end_with_the_run() -> None:
    """End when the other end of stdin is closed, as it is when the run ends, however it does."""
    with suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(1)


def free_memory() -> int:
    """Return the bytes that this host, and the cgroup of this process, may still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError, StopIteration):  # "max", or no cgroup of the second version
        own = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
        folder = Path("/sys/fs/cgroup", own.removeprefix("0::/"))
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat["inactive_file"]))
    return min(found)


if __name__ == "__main__":
    run_program(main)
