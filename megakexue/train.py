"""The training loop: one readable function, from the config to the last checkpoint.

    run/
      config.yaml        the merged config as used, scales resolved
      source.txt         commit and hash of the uncommitted difference
      deepspeed.json     what DeepSpeed was given
      tokenizer.model    a copy
      metrics.jsonl      a record for each step (megakexue/metrics.py)
      tensorboard/
      checkpoints/       megakexue/checkpoint.py
      dumps/             the step at which the guard stopped the run, for tools/replay_step.py
      logs/rank_N.log    what each rank did, and its traceback if it failed
      cache/             shards of remote sources

What must stay true: everything that the next step depends on is in the checkpoint, so that a run that was stopped and
started again is bit for bit the run that was not; and all ranks leave the loop at the same place, where they `meet`.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megakexue import __version__, checkpoint, dist
from megakexue.config import Config, ModelConfig, UserError, require, sha256, to_yaml
from megakexue.data import Batch, Batches, Interrupted, Position
from megakexue.describe import describe, flops_per_token
from megakexue.engine import Engine, StepResult, start
from megakexue.evaluate import validation_loss
from megakexue.export import Bundle, family
from megakexue.guard import TrainingStopped
from megakexue.loss import emo_rows
from megakexue.metrics import (
    Metrics,
    StatisticsRecord,
    StepRecord,
    TensorStatistics,
    memory_gib,
    peak_flops,
    read_metrics,
)
from megakexue.model import resolve
from megakexue.optim import lr_factor
from megakexue.preemption import Interruption, Preemption
from megakexue.rope import base_notes

log = logging.getLogger("megakexue")
T = TypeVar("T")

RETRY_S = (1.0, 10.0)
"""Waits before the last save of a run is tried again; earlier ones are tried again some steps later."""


@dataclass(kw_only=True)
class Progress:
    """Where a run is, beside weights, optimizer and guard; part of trainer.json."""

    step: int = 0
    tokens: int = 0
    position: Position = field(default_factory=Position)
    """Of the first sample that no step up to `step` has used."""
    validated: int = 0
    """The last step whose validation loss is on record."""
    init_bundle: str | None = None
    """Fingerprint of `train.init_from`."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The starts at which something changed: step, changes, origin and source."""


def train(config: Config) -> None:
    """Train until `train.steps` (or `train.stop_at_step`), from the newest checkpoint of the run if there is one.

    Raises:
        UserError: the config, the data or an existing run folder do not fit each other.
        TrainingStopped: the guard ended the run, or its last checkpoint could not be written.
        Preempted: a signal ended it, and it is saved.
    """
    ranks = start(config.engine)
    checkpoint.seed_random_state(config.train.seed + ranks.rank)
    model_config = resolve(config.model, config.optim.name, config.data.seq_len)
    config = dataclasses.replace(config, model=model_config, optim=config.optim.resolved(model_config.tie_embeddings))
    assert config.optim.lr is not None
    config.train.n_micro_batches(ranks.world_size)  # refuses a batch that does not divide, before any folder is made
    run = Path(config.train.run)
    with ExitStack() as stack:
        preemption = Preemption(ranks, grace_s=config.checkpoint.grace_s, timeout_s=config.engine.timeout_s)
        stack.enter_context(preemption.listening())
        _open_run(run, ranks, stack)
        source = _source() if ranks.is_first else ""

        def batches(split: str) -> Batches:
            made = Batches(
                config.data, split=split, global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.train.micro_batch_size, cache=Path(config.data.cache or run / "cache"),
                **dataclasses.asdict(ranks),
            )  # fmt: skip
            stack.callback(made.close)
            made.is_interrupted = preemption.is_requested
            return made

        data = batches("train")
        require(  # for remote sources; local ones were checked before torch was imported
            data.vocab_size <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} is below the {data.vocab_size} pieces of the sources",
        )
        valid = batches("valid") if config.evaluate.every_steps else None
        checkpoints = run / "checkpoints"
        folder, warnings = checkpoint.find(checkpoints, ranks)
        _check_not_lost(run, folder, ranks)
        engine = Engine(config, ranks)
        saver = stack.enter_context(checkpoint.Saver(engine, config.checkpoint))
        progress = Progress()
        hashes = {"data": data.fingerprint, "tokenizer": sha256(config.data.tokenizer)}

        def trainer() -> dict[str, Any]:
            return dataclasses.asdict(progress) | {
                "n_updates": engine.optimizer.n_updates, "guard": engine.guard.state_dict(), **hashes,
                "config": _plain(config), "source": source, "world_size": ranks.world_size,
            }  # fmt: skip

        if folder is not None:
            state = checkpoint.load(folder, engine, lambda state: _check_resume(state, trainer(), config))
            values = {name: state[name] for name in dataclasses.asdict(progress)}
            position = Position(epoch=state["position"]["epoch"], sample=state["position"]["sample"])
            progress = Progress(**values | {"position": position})
            changes = _changes(state, trainer())
            if state["data"] == hashes["data"]:
                data.seek(progress.position)
            else:
                progress.position = data.position  # the beginning
            origin = f"resumed from {folder}" + (f"; changed since: {', '.join(changes)}" if changes else "")
            saved: int | None = progress.step
        else:
            origin, progress.init_bundle = _start_weights(engine, config, data)
            progress.position = data.position
            changes, saved = [], None
        if changes or not progress.lineage or progress.lineage[-1]["source"] != source:
            start_ = {"step": progress.step, "changes": changes, "source": source}
            progress.lineage.append(start_ | ({} if folder else {"origin": origin}))
        _load_emo_rows(engine, config, progress.init_bundle)
        n_steps, every = config.train.steps, config.checkpoint.every_steps
        last_step = config.train.stop_at_step or n_steps

        metrics: Metrics | None = None
        if ranks.is_first:
            _describe_run(run, config, engine, source)
            opened = Metrics(
                run, config.metrics, n_steps=n_steps, resume_step=progress.step, validated=progress.validated
            )
            metrics = stack.enter_context(opened)
            peak, peak_source = peak_flops(config.metrics, engine.device, engine.dtype)
            notes = [
                *(f"WARNING: {warning}" for warning in warnings),
                describe(config, ranks.world_size),
                *base_notes(config.model),
                f"attention   {engine.module.backend}: {engine.backend_reason}",
                f"optimizer   {config.optim.name}, {engine.optimizer.kernel_reason}",
                f"start       {origin}\n{peak_source}",
            ]
            metrics.message("\n".join(notes))
        log.info("step %d of %d: %s", progress.step, n_steps, origin)

        def say(text: str) -> None:
            log.info("%s", text)
            if metrics:
                metrics.message(text)

        if progress.step >= last_step:
            limit = "train.steps" if last_step == n_steps else "train.stop_at_step"
            say(f"nothing to do: {run} is at step {progress.step}; raise {limit} to train on")

        # ----- saving: begun at a step, taken note of where all ranks meet next ---------------------------------------
        begun = saved
        n_failures, retry_at = 0, n_steps + 1

        def settle(*, is_last: bool = False) -> None:
            """Take note of how a save has ended, on all ranks alike."""
            nonlocal begun, saved, n_failures, retry_at
            error: Exception | None = None
            try:
                if not saver.finish():
                    return
            except Exception as failure:
                error = failure
            ends = dist.gather({str(ranks.rank): (str(error), isinstance(error, OSError))} if error else {})
            if not ends:
                saved, n_failures, retry_at = begun, 0, n_steps + 1
                return
            for rank, (text, is_agreed) in ends.items():
                if not is_agreed or len(ends) < ranks.world_size:
                    raise TrainingStopped(
                        f"the ranks cannot agree on a checkpoint any more (rank {rank}: {text}): run the same command "
                        "again"
                    )
            begun, retry_at = saved, progress.step + min(2**n_failures, every)
            n_failures += 1
            then = "" if is_last else f"; training goes on, and tries again at step {retry_at}"
            say(f"WARNING: {error}{then}; if the disk is full, make room")

        def save() -> None:
            nonlocal begun, retry_at
            settle()
            begun, retry_at = progress.step, n_steps + 1
            if metrics:
                metrics.sync()
            saver.start(checkpoints, trainer(), step=progress.step)

        def save_and_wait() -> None:
            """Have a checkpoint of this step, before the program ends."""
            settle()
            for wait_s in (0.0, *RETRY_S):
                if saved == progress.step:
                    return
                time.sleep(wait_s)
                save()
                settle(is_last=True)
            if saved != progress.step:
                raise TrainingStopped(
                    f"the checkpoint of step {progress.step} cannot be written to {checkpoints}: make room, then run "
                    f"the same command again: it goes on from {f'step {saved}' if saved is not None else 'the start'}"
                )

        def met(read: Callable[[], T]) -> T | None:
            """Read data where all ranks meet: a signal or a failure on one is one on all, and is seen by who waits."""
            value = error = None
            try:
                value = read()
            except Interrupted:
                pass  # for the same reason the meeting will not let us go on
            except Exception as failure:
                error = failure
            if preemption.meet(error=error, flag=saver.has_finished):
                settle()
            return value

        def validation_rows(valid: Batches) -> Iterator[Batch]:
            rows = valid.first_rows(config.evaluate.n_rows)
            while batch := met(lambda: next(rows, None)):
                yield batch

        may_roll_back = "rollback" in (config.guard.on_nonfinite, config.guard.on_spike)
        try:
            while True:
                if valid and progress.validated != progress.step and _is_due(config, progress.step):
                    loss, n_tokens = validation_loss(engine, validation_rows(valid))
                    progress.validated = progress.step
                    if metrics:
                        metrics.log_validation(progress.step, loss, n_tokens)
                if progress.step >= last_step:
                    break
                # at the start there must be something to go back to
                is_due = progress.step % every == 0 if progress.step else may_roll_back
                if begun != progress.step and (is_due or progress.step >= retry_at):
                    save()

                # ----- one optimizer step -------------------------------------------------------------------------
                began = time.perf_counter()
                micro_batches = met(data.next_step)
                assert micro_batches is not None
                step = progress.step + 1
                lr = config.optim.lr * lr_factor(config.optim, step, n_steps)
                loss_scale = engine.guard.loss_scale
                statistics_every = config.metrics.statistics_every_steps
                result = engine.train_step(
                    micro_batches, lr, step, statistics=statistics_every is not None and step % statistics_every == 0,
                    between=preemption.meet,
                )  # fmt: skip
                progress.step, progress.position = step, data.position
                progress.tokens += result.n_targets
                # ----------------------------------------------------------------------------------------------------

                remarks: list[str] = []
                if result.status == "rolled back":
                    settle()
                    # not one that an interruption has left, so that interruptions do not decide what is left out
                    folder, remarks = checkpoint.find(checkpoints, ranks, every)
                    if folder is None:
                        raise TrainingStopped(f"{result.note}: and no checkpoint could be written to roll back to")
                    checkpoint.restore(folder, engine)
                    remarks.append(
                        f"{result.note}{_culprits(result)}: back to the weights of {folder}; the batches of steps "
                        f"{checkpoint.step_of(folder) + 1} to {step} are left out"
                    )
                elif result.note is not None:
                    remarks.append(f"{result.note}{_culprits(result)}")
                step_s = time.perf_counter() - began
                if result.note is not None:
                    rows = [[data.locate(sample) for sample in batch.samples] for batch in micro_batches]
                    log.warning("%s%s; rows of this rank: %s", result.note, _culprits(result), rows)
                if metrics:
                    flops = flops_per_token(config.model, _mean_visible_keys(micro_batches)) * config.batch_tokens
                    metrics.log_step(
                        StepRecord(
                            step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr, tokens=progress.tokens,
                            tokens_per_s=result.n_targets / step_s, mfu=flops / step_s / (peak * ranks.world_size),
                            memory_gib=memory_gib(engine.device), status=result.status,
                            loss_scale=engine.guard.loss_scale, data_wait_s=data.wait_s, step_s=step_s,
                            epoch=data.position.epoch + data.position.sample / data.n_rows,
                        )
                    )  # fmt: skip
                    for remark in remarks:
                        metrics.message(f"WARNING: {remark}")
                    if result.statistics is not None:
                        metrics.log_statistics(_statistics(step, result))
                if engine.guard.reason_to_stop:
                    reason = f"{engine.guard.reason_to_stop}{_culprits(result)}"
                    of_ranks = dist.gather({str(ranks.rank): rows})
                    is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
                    facts = {"loss_scale": loss_scale, "reason": reason, "rows": of_ranks, "is_finite": is_finite}
                    finds = (
                        "looks for numbers that are not finite"
                        if is_finite
                        else "finds the module in which they appear"
                    )
                    settle()
                    dumps = run / "dumps"
                    try:
                        saver.start(dumps, trainer() | facts, _tensors(micro_batches), step=step, keep_last=1)
                        saver.finish()
                        kept = f"`tools/replay_step.py {dumps / f'step_{step:08d}'}` {finds}"
                    except Exception as error:  # of any kind: the reason of the stop matters more
                        kept = f"the step is not kept for tools/replay_step.py: {error}"
                    raise TrainingStopped(f"{reason}; the rows are in {run / 'logs'}; {kept}")
        except Interruption as interruption:
            if progress.step:
                save_and_wait()
            kept = f"saved after step {progress.step}" if progress.step else "before the first step"
            say(f"stopped: {interruption}; {kept}; the same command goes on")
            interruption.end()
        if progress.step != saved:
            save_and_wait()
        if progress.step < n_steps:
            say(f"stopped at step {progress.step}, as train.stop_at_step says; the same command without it goes on")


def _is_due(config: Config, step: int) -> bool:
    """Whether the validation loss belongs to this step."""
    assert config.evaluate.every_steps is not None
    return step > 0 and (step % config.evaluate.every_steps == 0 or step == config.train.steps)


def _culprits(result: StepResult) -> str:
    """Where the numbers that are not finite were, as far as one step shows it."""
    tensors = result.bad_tensors
    if not tensors and not result.bad_ranks:
        return ""
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return (
        f"; gradients that are not finite: {tensors[0] + more if tensors else 'none'}; ranks whose own loss is not: "
        f"{result.bad_ranks or 'none'}"
    )


def _statistics(step: int, result: StepResult) -> StatisticsRecord:
    assert result.statistics is not None

    def of(sums: Iterable[float]) -> TensorStatistics:
        weight2, update2, gradient2, product, n_with_gradient, n_against, n = sums
        norms = math.sqrt(update2 * gradient2)
        return TensorStatistics(
            weight_rms=math.sqrt(weight2 / n),
            update_rms=math.sqrt(update2 / n),
            gradient_rms=math.sqrt(gradient2 / n),
            cosine=product / norms if norms else math.nan,
            sign_agreement=n_against / n_with_gradient if n_with_gradient else math.nan,
        )

    return StatisticsRecord(
        step=step,
        whole=of(map(sum, zip(*result.statistics.values()))),
        tensors={name: of(sums) for name, sums in result.statistics.items()},
        n_drifting_rows=result.n_drifting_rows,
    )


def _tensors(batches: list[Batch]) -> dict[str, Tensor]:
    """The micro-batches of a dump, by names that cannot be those of parameters."""
    fields = ("tokens", "targets", "positions", "cu_seqlens")
    return {f"batch.{i}.{name}": getattr(batch, name) for i, batch in enumerate(batches) for name in fields}


def _start_weights(engine: Engine, config: Config, data: Batches) -> tuple[str, str | None]:
    """Fill the masters of a run that has no checkpoint; return where they come from, and the bundle's fingerprint.

    As the config says, the optimizer's state and the place in the data come from the bundle too.
    """
    if config.train.init_from is None:
        engine.load_new(config.train.seed)
        return f"new weights from train.seed={config.train.seed}", None
    bundle = Bundle(config.train.init_from, check_hashes=engine.ranks.is_first)
    _check_init(bundle, config.model)
    require(
        sha256(bundle.tokenizer) == sha256(config.data.tokenizer),
        f"data.tokenizer={config.data.tokenizer} is not the tokenizer of train.init_from={bundle.folder}, so its ids "
        f"mean other text: prepare the data with {bundle.tokenizer}",
    )
    origin, keeps = f"weights of {bundle.folder}", config.train.init_optimizer == "keep"
    if keeps:
        state = bundle.optimizer
        require(
            state is not None,
            f"train.init_optimizer=keep: train.init_from={bundle.folder} has no state of an optimizer: write it with "
            "--optimizer, or set train.init_optimizer=reset",
        )
        assert state is not None
        require(
            family(state) == family(dataclasses.asdict(config.optim)),
            f"train.init_optimizer=keep: train.init_from={bundle.folder} has the state of optim.name={state['name']} "
            f"with optim.embedding={state['embedding']}: use these, or set train.init_optimizer=reset",
        )
        engine.optimizer.n_updates = state["n_updates"]
        origin += f", with the state of its {state['name']} after {state['n_updates']} updates"
    engine.load(bundle.read, with_state=keeps)
    if config.train.init_data == "continue":
        place = bundle.lineage.get("data") or {}
        require(
            place.get("fingerprint") == data.fingerprint,
            f"train.init_data=continue: train.init_from={bundle.folder} was trained on other rows, weights or order "
            "than data.sources, so its place means nothing here: use its data, or set train.init_data=start",
        )
        data.seek(Position(epoch=place["epoch"], sample=place["sample"]))
        origin += f", data from epoch {place['epoch']}, sample {place['sample']} on"
    return origin, _fingerprint(bundle)


def _check_init(bundle: Bundle, model: ModelConfig) -> None:
    """Refuse to start from the weights of another model; a longer context is a difference that is asked for."""
    trained, rope, old = bundle.config, model.rope, bundle.config.rope
    differing = _differences(_plain(trained), _plain(model))
    # none of these changes what the weights compute
    harmless = ["attention.backend", "branch_gain"]
    is_plain = old.extension in (None, "base")  # the base alone says what the angles are
    assert rope.context is not None and old.context is not None
    if rope.extension is None and is_plain:
        harmless += ["rope.extension", "rope.trained_context"]
        if rope.context <= old.context:
            harmless.append("rope.context")
    elif rope != old:
        require(
            is_plain,
            f"train.init_from={bundle.folder} is already extended, by {old.extension} from {old.trained_context} to "
            f"{old.context} tokens: keep its model.rope, or start from the bundle before the extension",
        )
        require(
            rope.trained_context == old.context,
            f"model.rope.trained_context={rope.trained_context}, but train.init_from={bundle.folder} was trained for "
            f"{old.context} tokens: set model.rope.trained_context={old.context}",
        )
        require(
            rope.extension != "base" or rope.base != old.base,
            f"model.rope.base={rope.base:g} is that of train.init_from={bundle.folder}, so model.rope.extension=base "
            "changes nothing: set model.rope.base=auto, or another number",
        )
        harmless += ["rope.context", "rope.extension", "rope.trained_context", "rope.yarn_temperature",
                     "rope.ntk_mixed_exponent"]  # fmt: skip
        if rope.extension == "base":
            harmless.append("rope.base")
    if (
        (trained.attention.scale, model.attention.scale) == ("constant", "log_n_clipped")
        and model.attention.log_n_base == old.context
    ):  # fmt: skip
        harmless += ["attention.scale", "attention.log_n_base"]  # the factor is 1 in the context that was trained
    differing = [line for line in differing if line.split(" ")[0] not in harmless]
    is_longer = rope.extension is None and any(line.startswith("rope.") for line in differing)
    hint = "; for a longer context set model.rope.extension" if is_longer else ""
    require(
        not differing,
        f"train.init_from={bundle.folder}: its model differs from `model`: {'; '.join(differing)}: "
        f"copy the model section of {bundle.folder}/config.yaml{hint}",
    )


def _load_emo_rows(engine: Engine, config: Config, init_bundle: str | None) -> None:
    """Give the engine the frozen rows that EMO compares tokens by, those of the bundle that the run started from.

    Raises:
        UserError: the bundle is not there any more, or is another one.
    """
    if not config.loss.emo:
        return
    assert config.train.init_from is not None
    bundle = Bundle(config.train.init_from, check_hashes=engine.ranks.is_first)
    require(
        _fingerprint(bundle) == init_bundle,
        f"train.init_from={bundle.folder} is not the bundle that this run started from, whose head loss.emo needs: "
        "put that one back, or set loss.emo=false",
    )
    name = "embedding.weight" if config.model.tie_embeddings else "head.weight"
    engine.emo_rows = emo_rows(bundle.weight(name)).to(engine.device, engine.dtype)


def _fingerprint(bundle: Bundle) -> str:
    return sha256(bundle.folder / "manifest.json")


HARMLESS = (
    "train.run", "train.stop_at_step", "train.accept_changes", "train.micro_batch_size", "train.seed",
    "train.init_", "engine.zero_stage", "engine.bucket_elements", "engine.timeout_s", "metrics.", "checkpoint.",
    "evaluate.", "data.", "model.attention.backend",
)  # fmt: skip
"""Keys, or sections, that leave the run what it is: where and how it is computed, shown and kept. What they name (data,
bundle) is compared by its content."""


def _check_resume(state: dict[str, Any], own: dict[str, Any], config: Config) -> None:
    """Refuse a checkpoint that is none, is of another model, or differs in what the config does not accept.

    Args:
        state, own: the trainer.json of the checkpoint, and that which this run would write.
    """
    where = f"train.run={config.train.run}"
    form = {key: value for key, value in own.items() if key not in ("config", "lineage")}
    lineage, sections = state.get("lineage"), state.get("config")
    require(
        _fits(form, state)
        and isinstance(lineage, list)
        and all(isinstance(start, dict) and "source" in start for start in lineage)
        and isinstance(sections, dict)
        and all(isinstance(sections.get(name), dict) for name in own["config"]),
        f"{where}: the trainer.json of its checkpoint at step {state.get('step')} is not of the form that this version "
        "writes: use the version of megakexue that wrote it, or remove that folder to go on from the one before",
    )
    old, new = state["config"], own["config"]
    differing = _differences(old, new)
    of_model = [line for line in differing if line.startswith("model.") and not line.startswith(HARMLESS)]
    families = [(c["optim"].get("name"), c["optim"].get("embedding") == "adamw") for c in (old, new)]
    if families[0] != families[1]:
        of_model += [line for line in differing if line.split()[0] in ("optim.name", "optim.embedding")]
    require(
        not of_model,
        f"{where} holds a checkpoint of another model or optimizer: {'; '.join(of_model)}: "
        "undo the change, or choose another train.run",
    )
    require(
        state["tokenizer"] == own["tokenizer"],
        f"{where}: its checkpoint was trained with another tokenizer than data.tokenizer={config.data.tokenizer}, so "
        f"the ids mean other text: use {config.train.run}/tokenizer.model and data made with it",
    )
    asked = [line for line in differing if not line.startswith(HARMLESS)]
    if "rollback" in (config.guard.on_nonfinite, config.guard.on_spike):  # which goes back to the one before
        asked += [line for line in differing if line.startswith("checkpoint.every_steps ")]
    cuts = [
        (c["train"].get("micro_batch_size"), world)
        for c, world in ((old, state["world_size"]), (new, own["world_size"]))
    ]
    if config.optim.accumulate == "momentum" and cuts[0] != cuts[1]:
        asked.append(
            f"train.micro_batch_size: {cuts[0][0]} rows on {cuts[0][1]} ranks -> {cuts[1][0]} on {cuts[1][1]}, and "
            "with optim.accumulate=momentum each micro-batch is clipped and judged by itself"
        )
    if state["data"] != own["data"]:
        asked.append("data: other rows, weights, data.shuffle or data.shuffle_seed, so its position means nothing")
    keys = [line.split()[0].rstrip(":") for line in asked]
    accepted = config.train.accept_changes
    require(
        set(keys) <= set(accepted),
        f"{where}: its checkpoint at step {state['step']} was made with other settings: {'; '.join(asked)}: undo the "
        f"change, or take it from here on with 'train.accept_changes=[{','.join(sorted({*keys, *accepted}))}]'",
    )


def _changes(state: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """One line for each thing that is not as it was at the checkpoint, but where the run lies and stops."""
    lines = _differences(state["config"], own["config"])
    lines = [line for line in lines if not line.startswith(("train.run ", "train.stop_at_step ", "train.accept_"))]
    if state["data"] != own["data"]:
        lines.append("data, read from the beginning")
    old, new = state["world_size"], own["world_size"]
    if old != new:
        fresh = f" (from rank {old} on with random states of their own)" if new > old else ""
        lines.append(f"ranks {old} -> {new}{fresh}")
    return lines


def _check_not_lost(run: Path, folder: Path | None, ranks: dist.Ranks) -> None:
    """Refuse to start over where checkpoints have been; a run that was killed before its first one has none."""
    checkpoints, fault = run / "checkpoints", None
    if ranks.is_first and folder is None:
        try:
            had_some = not checkpoints.is_dir() or (checkpoints / "latest").exists()
            records = read_metrics(run) if had_some and (run / "metrics.jsonl").exists() else []
            if records:
                fault = (
                    f"train.run={run} has metrics up to step {max(r.step for r in records)} but no checkpoint: restore "
                    f"{checkpoints}, or choose another train.run"
                )
            else:
                checkpoints.mkdir(exist_ok=True)
        except (UserError, OSError) as error:  # the others must not be left waiting
            fault = str(error)
    fault = dist.gather({"fault": fault} if ranks.is_first else {})["fault"]
    require(fault is None, str(fault))


def _fits(like: Any, value: Any) -> bool:
    """Whether a JSON value has the keys of `like`, and strings, flags and finite numbers where it has them."""
    if isinstance(like, dict):
        return isinstance(value, dict) and all(key in value and _fits(like[key], value[key]) for key in like)
    if isinstance(like, list):
        return isinstance(value, list) and all(_fits(0.0, x) for x in value)
    if like is None or isinstance(like, str):
        return value is None or isinstance(value, str)
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    return isinstance(value, int if isinstance(like, int) else int | float) and math.isfinite(value)


def _plain(section: Any) -> dict[str, Any]:
    """A config dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each field that differs, such as `rope.base 10000.0 -> 59000.0`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} {a} -> {b}")
    return lines


def _mean_visible_keys(batches: list[Batch]) -> float:
    """Keys that a query sees on average: what attention really computes in packed rows."""
    return sum(float(batch.positions.double().mean()) + 1 for batch in batches) / len(batches)


def _source() -> str:
    """The commit of this code and a hash of what is not committed; outside its own repository, the version."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        is_own = Path(git("rev-parse", "--show-toplevel").strip()) == root
        commit, difference = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
        new_files = git("ls-files", "--others", "--exclude-standard").splitlines()
    except (OSError, subprocess.CalledProcessError):
        is_own = False
    if not is_own:
        return f"megakexue {__version__}"
    difference += "".join(f"{name} {sha256(root / name)}" for name in new_files)
    if difference:
        commit += f" with uncommitted changes {hashlib.sha256(difference.encode()).hexdigest()[:12]}"
    return commit


def _describe_run(run: Path, config: Config, engine: Engine, source: str) -> None:
    """Write what this run is into its folder; the newest start counts."""
    for name, text in {
        "config.yaml": to_yaml(config),
        "source.txt": source + "\n",
        "deepspeed.json": json.dumps(engine.deepspeed_config, indent=1) + "\n",
    }.items():
        (run / name).write_text(text, encoding="utf-8")
    shutil.copyfile(config.data.tokenizer, run / "tokenizer.model")


def _open_run(run: Path, ranks: dist.Ranks, stack: ExitStack) -> None:
    """Take the run folder for this run alone, and send this rank's log and traceback to it.

    Raises:
        UserError: the folder cannot be made, another run is using it, or the nodes do not share it.
    """
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.run={run}: cannot make the run folder: {error}") from error
    token = ""
    if ranks.is_first:
        lock = stack.enter_context(open(run / "lock", "a+", encoding="utf-8"))
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel frees it when the process ends, however it ends
        except BlockingIOError:
            lock.seek(0)
            token = f"in use by {lock.read().strip()}"
        else:
            token = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
            lock.truncate(0)
            lock.write(token + "\n")
            lock.flush()
    token = dist.gather({"token": token} if ranks.is_first else {})["token"]
    require(not token.startswith("in use"), f"train.run={run} is {token}: end that run first, or choose another folder")
    own = (run / "lock").read_text(encoding="utf-8").strip() if (run / "lock").exists() else ""
    strangers = dist.gather({socket.gethostname(): True} if own != token else {})
    require(
        not strangers,
        f"train.run={run} is not the same folder on {sorted(strangers)} as on the first node: put it on a file system "
        "that all nodes share",
    )
    handler = logging.FileHandler(run / "logs" / f"rank_{ranks.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    log.info("pid %d: %s", os.getpid(), " ".join(sys.argv))

    def record(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        log.error("failed", exc_info=(kind, error, trace))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = record
