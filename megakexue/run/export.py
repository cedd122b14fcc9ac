"""From a run to a bundle: the weights of a checkpoint, whatever the ranks and the ZeRO stage that wrote it.

What must stay true: weights are the fp32 masters, rounded once; each tensor is read by mmap when it is asked for.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakexue import __version__
from megakexue.bundle.bundle import Bundle, OptimizerInfo, check_out, is_bundle, write_bundle
from megakexue.config import ResolvedModel, UserError, build, require
from megakexue.core.axes import axes, parameter_names, shape
from megakexue.core.segments import Segment
from megakexue.files import verify
from megakexue.run import checkpoint
from megakexue.run.records import StepRecord, ValidationRecord, read_metrics
from megakexue.run.state import TRAINER, TrainerState
from megakexue.text.tokenizer_files import find_tokenizer


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32, overwrite: bool = False,
    with_optimizer: bool = False,
) -> Path:  # fmt: skip
    """Write the bundle of a run's checkpoint (default: the newest) from its fp32 masters.

    Args:
        with_optimizer: its state too, float32, so that training can go on from the bundle with it.

    Raises:
        UserError: no such run or step, a damaged checkpoint, weights that `dtype` cannot hold, or `out` exists.
    """
    check_out(out, overwrite)
    source = RunCheckpoint(run, step)
    names = parameter_names(source.config)
    weights = ((name, source.tensor("master", name).to(dtype)) for name in names)
    optimizer, state = (source.optimizer, optimizer_state(source)) if with_optimizer else (None, ())
    return write_bundle(
        out, source.config, weights, source.tokenizer, source.lineage, overwrite=overwrite, optimizer=optimizer,
        state=state,
    )  # fmt: skip


def optimizer_state(source: "RunCheckpoint | Bundle") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state, as `write_bundle` takes them."""
    for name in parameter_names(source.config):
        for kind in source.optimizer.kinds(name) if source.optimizer else ():
            yield f"{kind}/{name}", source.tensor(kind, name)


class RunCheckpoint:
    """The weights and the optimizer's state of a run's checkpoint (default: the newest), read by mmap.

    Raises:
        UserError: no such run or step, or a damaged checkpoint.
    """

    def __init__(self, run: Path, step: int | None = None) -> None:
        self.tokenizer = find_tokenizer(run)
        for path in (run / "config.yaml", self.tokenizer):
            require(path.is_file(), f"{run} is no run folder: it has no {path.name}")
        folders = checkpoint.step_folders(run / "checkpoints")
        require(bool(folders), f"{run} has no checkpoint yet: train on, or lower checkpoint.every_steps")
        if step is not None:
            steps = [checkpoint.step_of(folder) for folder in folders]
            require(step in steps, f"{run} has no checkpoint of step {step}: it has {sorted(steps)}")
            folders = [folders[steps.index(step)]]
        folder = folders[0]
        try:
            verify(folder, checkpoint.FORMAT)
        except UserError as error:
            raise UserError(f"{error}; or export an earlier checkpoint with --step") from error
        state = TrainerState.read(folder)
        where = str(folder / TRAINER)
        self.config = build(ResolvedModel, state.config["model"], where=where)
        optim = {key: state.config["optim"].get(key) for key in ("name", "embedding")}
        self.optimizer: OptimizerInfo | None = build(OptimizerInfo, optim | {"n_updates": state.n_updates}, where)
        self.lineage: dict[str, Any] = {
            "from": "run", "run": str(run), "step": state.step, "tokens": state.tokens,
            "init_from": state.config["train"].get("init_from"), "source": state.source,
            "data": {"fingerprint": state.data, **vars(state.position)}, "losses": _losses(run, state.step),
            "megakexue": __version__,
        }  # fmt: skip
        self._folder, self._reader = folder, checkpoint.Reader(folder)

    def weight(self, name: str) -> Tensor:
        """Return a whole parameter, float32."""
        return self.tensor("master", name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """Return a whole parameter (kind master) or a tensor of its optimizer's state, float32."""
        size = shape(name, self.config)
        whole = Segment.whole(name, axes(name).role, size)
        try:
            return self._reader.read(kind, whole).view(size)
        except FileNotFoundError as error:
            raise UserError(
                f"{self._folder} was removed while it was read, since its run goes on: keep it with "
                "checkpoint.keep_every, or take a newer one"
            ) from error


def _losses(run: Path, step: int) -> dict[str, float]:
    """Return the loss of a step and the last validation loss up to it, in nats a token, as far as they are recorded."""
    losses: dict[str, float] = {}
    with suppress(UserError):  # without a record, or with a damaged one, the weights are as good
        for record in read_metrics(run):
            if isinstance(record, StepRecord) and record.step == step:
                losses["train"] = record.loss
            elif isinstance(record, ValidationRecord) and record.step <= step:
                losses["validation"] = record.loss
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def open_source(path: Path, step: int | None = None) -> "RunCheckpoint | Bundle":
    """Open a run's checkpoint or a bundle. Raises UserError: it is neither, or damaged."""
    if is_bundle(path):
        require(step is None, f"--step {step} has no effect: {path} is a bundle, which holds one step")
        return Bundle(path)
    require(
        (path / "checkpoints").is_dir(),
        f"{path} is neither a run nor a bundle: it has no checkpoints/ and no manifest.json",
    )
    return RunCheckpoint(path, step)
