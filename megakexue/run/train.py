"""The training loop, from the config to the last checkpoint.

What must stay true: everything that the next step depends on is in the checkpoint, so that a run that was stopped and
started again is bit for bit the run that was not; and all ranks leave the loop at the same place, where they meet.
"""

import dataclasses
import logging
import math
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megakexue import dist
from megakexue.bundle.generate import encode_prompt
from megakexue.config import Config, ResolvedConfig, require
from megakexue.core.batch import Batch
from megakexue.core.costs import flops_per_token, n_parameters, product_shapes
from megakexue.core.describe import describe, describe_mixtures
from megakexue.core.device import device_name, memory_gib, peak_flops
from megakexue.core.resolve import resolve_config
from megakexue.core.schedule import lr_factor
from megakexue.facts import host_facts, versions
from megakexue.run import checkpoint
from megakexue.run.by_source import Tally, add_up
from megakexue.run.data import Batches, Interrupted
from megakexue.run.engine import Engine, StepResult, start
from megakexue.run.exporter import Exporter, check_exportable
from megakexue.run.folder import check_not_lost, describe_run, open_run, record_start, source_version, together
from megakexue.run.guard import TrainingStopped
from megakexue.run.metrics import Metrics, is_recorded
from megakexue.run.preemption import Interruption, Preemption
from megakexue.run.profiling import Profiler
from megakexue.run.records import ReadRecord, SourceLoss, SourceRead, StepRecord, statistics_record
from megakexue.run.resume import Start, load_emo_rows, start_run
from megakexue.run.saves import Saves
from megakexue.run.state import StoppedState, TrainerState
from megakexue.run.watch import Watch
from megakexue.text.tokenizer import Tokenizer
from megakexue.text.tokenizer_files import load_tokenizer

log = logging.getLogger("megakexue")
T = TypeVar("T")
EXPORT_WAIT_S = 0.2
"""Between two looks at an export at the end of a run."""


def train(given: Config) -> None:
    """Train until `train.steps` (or `train.stop_at_step`), from the newest checkpoint of the run if there is one.

    Raises:
        UserError: the config, the data or an existing run folder do not fit each other.
        TrainingStopped: the guard ended the run, or its last checkpoint could not be written.
        Preempted: a signal ended it, and it is saved.
        NotAllHere: ranks are missing at the start.
    """
    ranks = start(given.engine, host_facts(given))
    with Watch(ranks, given.engine.stall_s) as watch, ExitStack() as stack:
        checkpoint.seed_random_state(given.train.seed + ranks.rank)
        config = resolve_config(given)
        require(
            ranks.world_size % ranks.sequence_size == 0,
            f"engine.sequence_ranks={ranks.sequence_size} must divide the {ranks.world_size} ranks: start a multiple "
            "of it",
        )
        check_exportable(config)
        config.train.n_micro_batches(ranks.data_size)  # refuses a batch that does not divide, before any folder is made
        run = _open(given, config, ranks, watch, stack)
        stack.push(watch.leaving)  # before anything is closed, which may take its time
        last_step = config.train.stop_at_step or config.train.steps
        if run.state.step >= last_step:
            limit = "train.steps" if last_step == config.train.steps else "train.stop_at_step"
            run.say(f"nothing to do: {run.folder} is at step {run.state.step}; raise {limit} to train on")
        try:
            while True:
                watch.mark("between steps", step=run.state.step)
                _validate_if_due(run)
                if run.state.step >= last_step:
                    break
                _step(run)
                if run.exporter:
                    run.exporter.tend(run.saves.saved)
            _finish_trace(run)
            watch.mark("saving")
            if run.state.step != run.saves.saved:
                _count(run)
                run.saves.save_and_wait(run.state)
            _finish_exports(run)
        except Interruption as interruption:
            step = run.state.step
            watch.mark("saving")
            if step:  # first of all, since a signal grants little time
                _count(run)
                run.saves.save_and_wait(run.state)
            _finish_trace(run)
            kept = f"saved after step {step}" if step else "before the first step"
            run.end(f"stopped: {interruption}; {kept}; the same command goes on")
            interruption.end()
        if run.state.step < config.train.steps:
            run.end(f"stopped at step {run.state.step} by train.stop_at_step; without it, the same command goes on")
        else:
            own = shlex.quote(str(run.folder))
            run.end(
                f"next        tools/plot_run.py {own} --report --out loss.png\n"
                f"            tools/export_model.py {own} --out bundles/{shlex.quote(run.folder.resolve().name)}"
            )


@dataclass(kw_only=True)
class _Run:
    """What a step works with. Where the run is, `state`, is replaced as a whole."""

    config: ResolvedConfig
    folder: Path
    ranks: dist.Ranks
    watch: Watch
    preemption: Preemption
    engine: Engine
    data: Batches
    valid: Batches | None
    """None: no validation."""
    tokenizer: Tokenizer
    prompts: list[list[int]]
    """The tokens of `evaluate.prompts`."""
    n_bytes: npt.NDArray[np.int64]
    """That each token id stands for."""
    metrics: Metrics | None
    """Only on the first rank."""
    peak_flops: float
    """Of a device; nan: not known."""
    profiler: Profiler | None
    """None: nothing is traced, or not by this rank."""
    saves: Saves
    exporter: Exporter | None
    """Only on the first rank, with `checkpoint.export`."""
    tally: Tally
    read: dict[str, SourceRead]
    """What the steps before this start have read."""
    state: TrainerState

    def say(self, text: str) -> None:
        _say(self.metrics, text)

    def end(self, text: str) -> None:
        """Say last, when everything is closed."""
        log.info("%s", text)
        if self.metrics:
            self.metrics.last_words = text

    def met(self, read: Callable[[], T]) -> T | None:
        """Read data where all ranks meet: a signal or a failure on one is one on all, and is seen by who waits.

        Raises:
            Interruption: on all ranks.
        """
        value = error = None
        self.watch.mark("waiting for data")
        try:
            value = read()
        except Interrupted:
            pass  # by the same request as the meeting, which will raise
        except Exception as failure:
            error = failure
        self.watch.mark("meeting the other ranks")
        if self.preemption.meet(error=error, flag=self.saves.has_finished):
            self.saves.settle(self.state.step)
        return value


def _say(metrics: Metrics | None, text: str) -> None:
    log.info("%s", text)
    if metrics:
        metrics.message(text)


# --- the start -------------------------------------------------------------------------------------------------------


def _open(given: Config, config: ResolvedConfig, ranks: dist.Ranks, watch: Watch, stack: ExitStack) -> _Run:
    """Take the run folder, open the data, build the engine, and load what the run starts from."""
    folder = Path(config.train.run)
    preemption = Preemption(ranks, grace_s=config.checkpoint.grace_s, timeout_s=config.engine.timeout_s)
    stack.enter_context(preemption.listening())
    watch.mark("opening the run folder")
    watch.log_to(open_run(folder, ranks, stack))
    source = source_version() if ranks.is_first else ""

    def batches(split: str) -> Batches:
        made = Batches(
            config.data, split=split, global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size, ranks=ranks,
            cache=Path(config.data.cache or folder / "cache"), is_interrupted=preemption.is_requested,
        )  # fmt: skip
        stack.callback(made.close)
        return made

    watch.mark("opening the data")
    data, tokenizer = batches("train"), load_tokenizer(config.data.tokenizer)
    rows = [source.n_rows for source in data.sources]
    config.data.check_synthetic(config.train.steps, rows)  # of remote sources, whose rows nobody knew before
    of_ranks = dist.gather({str(ranks.rank): (socket.gethostname(), data.fingerprint)})
    for rank, (host, fingerprint) in of_ranks.items():
        require(  # what hosts have downloaded; local folders were compared at the start
            fingerprint == of_ranks["0"][1],
            f"rank {rank} on {host} has other data than rank 0 on {of_ranks['0'][0]}: empty data.cache there",
        )
    require(  # for remote sources; local ones were checked before torch was imported
        data.vocab_size <= config.model.vocab_size,
        f"model.vocab_size={config.model.vocab_size} is below the {data.vocab_size} pieces of the sources",
    )
    prompts = _encode_prompts(config, tokenizer)
    valid = batches("valid") if config.evaluate.every_steps else None
    found, warnings = checkpoint.find(folder / "checkpoints", ranks)
    check_not_lost(folder, found, ranks)
    watch.mark("building the model")
    engine = Engine(config, ranks)
    engine.mark = watch.mark
    watch.mark("loading the weights")
    begun = start_run(found, engine, config, data, source)
    load_emo_rows(engine, config, begun.state.init_bundle)
    metrics, peak = None, 0.0
    at = {"resume_step": begun.state.step, "validated": begun.state.validated}
    with together(folder, ranks):
        if ranks.is_first:
            describe_run(folder, config, engine.deepspeed_config, source)
            record_start(folder, _start_facts(config, engine, ranks, begun, source))
            metrics = stack.enter_context(Metrics(folder, config.metrics, n_steps=config.train.steps, **at))
    if metrics:
        watch.say, watch.close_screen = metrics.message, metrics.close
        shapes = product_shapes(
            config.model, config.train.micro_batch_size * config.data.seq_len // ranks.sequence_size
        )
        peak, peak_source = peak_flops(config.metrics, engine.device, engine.dtype, shapes)
        more = {
            "attention": f"{engine.module.backend}: {engine.backend_reason}",
            "compiled": f"{'yes' if engine.is_compiled else 'no'}: {engine.compile_reason}",
            "optimizer": f"{config.optim.name}, {engine.optimizer.kernel_reason}",
            "start": begun.origin,
            "MFU": peak_source,
            "run": f"{folder} (config.yaml, metrics.jsonl, logs/, checkpoints/)",
        }
        screen = describe(given, config, ranks.world_size, more, rows)
        metrics.message("\n".join([screen, *(f"WARNING: {warning}" for warning in [*warnings, *data.warnings])]))
    log.info("step %d of %d: %s", begun.state.step, config.train.steps, begun.origin)
    saves = Saves(
        engine, folder / "checkpoints", begun.saved, say=lambda text: _say(metrics, text),
        sync=metrics.sync if metrics else lambda: None,
    )  # fmt: skip
    watch.saved = lambda: saves.saved
    exporter = None
    if metrics and config.checkpoint.export:
        exporter = stack.enter_context(
            Exporter(folder, config, record=metrics.log_export, say=lambda text: _say(metrics, text))
        )
    profiler = None
    if ranks.is_first and config.metrics.profile_steps:
        first, last = config.metrics.profile_steps
        profiler = Profiler(first, last, folder / "profile")
    return _Run(
        config=config, folder=folder, ranks=ranks, watch=watch, preemption=preemption, engine=engine, data=data,
        valid=valid, tokenizer=tokenizer, prompts=prompts, n_bytes=tokenizer.piece_bytes(), metrics=metrics,
        profiler=profiler, peak_flops=peak, saves=stack.enter_context(saves), exporter=exporter, state=begun.state,
        tally=Tally(len(data.sources), config.data.seq_len, ranks), read=begun.state.sources,
    )  # fmt: skip


def _start_facts(
    config: ResolvedConfig, engine: Engine, ranks: dist.Ranks, begun: Start, source: str
) -> dict[str, Any]:  # fmt: skip
    """What a report says of a start."""
    return {
        "step": begun.state.step, "origin": begun.origin, "source": source, "ranks": ranks.world_size,
        "device": device_name(engine.device), "parameters": n_parameters(config.model), "versions": versions(),
    }  # fmt: skip


def _encode_prompts(config: ResolvedConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of `evaluate.prompts`. Raises UserError: one is too long."""
    found = [encode_prompt(tokenizer, text) for text in config.evaluate.prompts]
    for text, ids in zip(config.evaluate.prompts, found):
        n_tokens = len(ids) + config.evaluate.prompt_tokens
        require(
            n_tokens <= config.data.seq_len,
            f"evaluate.prompts: {text[:40]!r} and evaluate.prompt_tokens are {n_tokens} tokens, more than data.seq_len="
            f"{config.data.seq_len}: shorten one of them",
        )
    return found


def _finish_trace(run: _Run) -> None:
    """Write the trace of a run that ends within the steps of its profiler."""
    if run.profiler and (said := run.profiler.after(run.state.step, is_end=True)):
        run.say(said)


def _finish_exports(run: _Run) -> None:
    """Wait for the exports of what is saved. All ranks wait, so that none ends the run of the others.

    Raises:
        Interruption: on all ranks. The next start writes what is missing.
    """
    if run.config.checkpoint.export is None:
        return
    is_said = False
    run.watch.mark("waiting for an export")  # once, so that one without an end is named after engine.stall_s
    while True:
        is_done = run.exporter is None or run.exporter.tend(run.saves.saved)
        if run.preemption.meet(flag=is_done):
            return
        if not is_said:
            run.say("waiting for an export (checkpoint.export); a signal ends the wait, and the next start writes it")
        is_said = True
        time.sleep(EXPORT_WAIT_S)


# --- one round of the loop -------------------------------------------------------------------------------------------


def _validate_if_due(run: _Run) -> None:
    every, step = run.config.evaluate.every_steps, run.state.step
    if run.valid is None or every is None or run.state.validated == step or not step:
        return
    if step % every == 0 or step == run.config.train.steps:
        loss, n_tokens = run.engine.validation_loss(_validation_rows(run, run.valid))
        run.state = dataclasses.replace(run.state, validated=step)
        by_source = _by_source(run, run.valid)
        if run.metrics:
            run.metrics.log_validation(step, loss, n_tokens, *by_source)
        if run.prompts:
            _sample(run, step)


def _sample(run: _Run, step: int) -> None:
    """Continue the prompts, on all ranks, and record the texts up to their end."""
    config, tokenizer = run.config.evaluate, run.tokenizer
    texts = []
    for ids in run.engine.continued(run.prompts, config.prompt_tokens, tokenizer.vocab_size):
        end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
        texts.append(b"".join(tokenizer.piece(i) for i in ids[:end]).decode(errors="replace"))
    if run.metrics:
        run.metrics.log_samples(step, config.prompts, texts)


def _by_source(run: _Run, data: Batches) -> tuple[float, dict[str, SourceLoss]]:
    """Bits per byte and losses by source of what the engine has just computed, a collective."""
    config = run.config.data
    names = dict(zip([source.path for source in config.sources], config.source_names))
    return add_up(run.engine.row_losses, [names[source.path] for source in data.sources], run.n_bytes)


def _validation_rows(run: _Run, valid: Batches) -> Iterator[Batch]:
    rows = valid.first_rows(run.config.evaluate.n_rows)
    while batch := run.met(lambda: next(rows, None)):
        run.watch.mark("validation")
        yield batch


def _save_if_due(run: _Run) -> None:
    if run.saves.is_due(run.state.step):
        run.watch.mark("beginning a save")
        with run.engine.clock.within("saving"):
            _count(run)
            run.saves.begin(run.state)


def _step(run: _Run) -> None:
    """Take one optimizer step, record it, and do what the guard asks for."""
    config, engine, data, clock = run.config, run.engine, run.data, run.engine.clock
    began = time.perf_counter()
    clock.begin()
    _save_if_due(run)
    step = run.state.step + 1
    run.watch.mark("the step", step=step)
    if run.profiler:
        run.profiler.before(step)
    _say_border(run, step)
    with clock.within("data"):
        batches = run.met(data.next_step)
    assert batches is not None
    lr = config.optim.lr * lr_factor(config.optim, step, config.train.steps)
    loss_scale, every = engine.guard.loss_scale, config.metrics.statistics_every_steps
    has_statistics = every is not None and step % every == 0
    result = engine.train_step(batches, lr, step, statistics=has_statistics, between=run.preemption.meet)
    n_tokens = run.state.tokens + result.n_targets
    run.state = dataclasses.replace(run.state, step=step, position=data.position, tokens=n_tokens)
    run.tally.add(batches)
    remarks = [] if result.note is None else [f"{result.note}{_culprits(result)}"]
    if result.status == "rolled back":
        remarks = _roll_back(run, result)
    is_shown = is_recorded(step, result.status, config.metrics.every_steps, config.train.steps)
    by_source = _by_source(run, data) if is_shown else (math.nan, {})  # waits for the device, which is time of the step
    times, step_s = clock.read(), time.perf_counter() - began
    rows = []
    if result.note or result.reason_to_stop:
        rows = [data.names(batch) for batch in batches]
        log.warning("%s%s; rows of this rank: %s", result.note or result.reason_to_stop, _culprits(result), rows)
    if run.metrics:
        _record(run, run.metrics, result, batches, lr, step_s, times, by_source)
        for remark in remarks:
            run.metrics.message(f"WARNING: {remark}")
        if result.statistics is not None:
            logits = result.attention, math.nan if result.largest_logit is None else result.largest_logit
            run.metrics.log_statistics(statistics_record(step, result.statistics, result.n_drifting_rows, *logits))
    if run.profiler and (said := run.profiler.after(step)):
        run.say(said)
    if result.reason_to_stop:
        _stop(run, result, batches, rows, loss_scale)


def _say_border(run: _Run, step: int) -> None:
    """Say what is new where a stage begins."""
    data, begins = run.config.data, f"step {step}: from here on"
    if step > 1 and data.seq_len_at(step) != data.seq_len_at(step - 1):
        run.say(f"{begins} rows of {data.seq_len_at(step)} tokens (data.stages)")
    if any(mixture.until_step == step - 1 for mixture in data.mixtures):
        rows = [source.n_rows for source in run.data.sources]
        run.say(f"{begins} {describe_mixtures(data, step, rows, from_step=step)} (data.stages)")


def _count(run: _Run) -> None:
    """Bring what `state` says of the data read so far up to its step: a collective before each save."""
    read = dict(run.read)
    counts = run.tally.over_ranks(run.engine.device)
    for name, (rows, tokens) in zip(run.config.data.source_names, counts, strict=True):
        read[name] = dataclasses.replace(read[name], rows=read[name].rows + rows, tokens=read[name].tokens + tokens)
    # data may have been read ahead of the last step
    fingerprint = run.data.fingerprint_at(run.state.position, run.state.step)
    run.state = dataclasses.replace(run.state, sources=read, data=fingerprint)
    if run.metrics:
        run.metrics.log_read(ReadRecord(step=run.state.step, sources=read))


def _record(
    run: _Run, metrics: Metrics, result: StepResult, batches: list[Batch], lr: float, step_s: float,
    times: dict[str, float], by_source: tuple[float, dict[str, SourceLoss]],
) -> None:  # fmt: skip
    config, data = run.config, run.data
    # what attention really computes in packed rows
    n_keys = sum(float(batch.positions.double().mean()) + 1 for batch in batches) / len(batches)
    flops = flops_per_token(config.model, n_keys) * config.batch_tokens
    metrics.log_step(
        StepRecord(
            step=run.state.step, loss=result.loss, grad_norm=result.grad_norm, lr=lr, tokens=run.state.tokens,
            tokens_per_s=result.n_targets / step_s, mfu=flops / step_s / (run.peak_flops * run.ranks.world_size),
            memory_gib=memory_gib(run.engine.device), status=result.status, loss_scale=run.engine.guard.loss_scale,
            data_wait_s=data.wait_s, step_s=step_s, epoch=data.position.epoch + data.position.sample / data.n_rows,
            bits_per_byte=by_source[0], sources=by_source[1], times=times,
        )
    )  # fmt: skip


def _roll_back(run: _Run, result: StepResult) -> list[str]:
    """Go back to the weights of the last regular checkpoint; return lines for the user. Data and steps go on."""
    step = run.state.step
    run.watch.mark("rolling back")
    run.saves.settle(step)
    # a regular one, so that interruptions, which leave others, do not decide which batches are left out
    folder, warnings = checkpoint.find(run.folder / "checkpoints", run.ranks, run.config.checkpoint.every_steps)
    if folder is None:
        raise TrainingStopped(f"{result.note}: and no checkpoint could be written to roll back to")
    checkpoint.restore(folder, run.engine)
    left_out = f"the batches of steps {checkpoint.step_of(folder) + 1} to {step} are left out"
    return [*warnings, f"{result.note}{_culprits(result)}: back to the weights of {folder}; {left_out}"]


def _stop(run: _Run, result: StepResult, batches: list[Batch], rows: list[list[str]], loss_scale: float) -> None:
    """Keep the step for tools/replay_step.py, and end the run. Raises TrainingStopped."""
    run.watch.mark("stopping")
    reason = f"{result.reason_to_stop}{_culprits(result)}"
    of_ranks = dist.gather({str(run.ranks.rank): rows})
    facts: dict[str, Any] = {
        "loss_scale": loss_scale,
        "reason": reason,
        "rows": of_ranks,
        "is_finite": result.is_finite,
    }
    stopped = StoppedState(**vars(run.state), **facts)
    finds = "looks for numbers that are not finite" if result.is_finite else "finds the module in which they appear"
    run.saves.settle(run.state.step)
    dumps = run.folder / "dumps"
    try:
        run.saves.dump(dumps, stopped, _tensors(batches))
        kept = f"`tools/replay_step.py {dumps / f'step_{run.state.step:08d}'}` {finds}"
    except Exception as error:  # of any kind: the reason of the stop matters more
        kept = f"the step is not kept for tools/replay_step.py: {error}"
    raise TrainingStopped(f"{reason}; the rows are in {run.folder / 'logs'}; {kept}")


def _culprits(result: StepResult) -> str:
    """Where the numbers that are not finite were, as far as one step shows it."""
    if result.is_finite:
        return ""
    origins = [
        f"the {part} of {_few('rank' if len(ranks) == 1 else 'ranks', ranks)}"
        for part, ranks in (("loss", result.bad_loss_ranks), ("backward pass", result.bad_gradient_ranks)) if ranks
    ]  # fmt: skip
    origin = " and ".join(origins) or "the sum over ranks, for the numbers of each rank are finite"
    return f"; {_few('gradients that are not finite:', result.bad_tensors, shown=1)}; this began in {origin}"


def _few(what: str, values: Sequence[Any], shown: int = 8) -> str:
    """Say `what` and the first values, and how many more there are: of a thousand ranks, or of all parameters."""
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return f"{what} {', '.join(map(str, values[:shown])) or 'none'}{more}"


def _tensors(batches: list[Batch]) -> dict[str, Tensor]:
    """The micro-batches of a dump, by names that cannot be those of parameters."""
    fields = ("tokens", "targets", "positions", "cu_seqlens")
    return {f"batch.{i}.{name}": getattr(batch, name) for i, batch in enumerate(batches) for name in fields}
