"""From what a run starts: its newest checkpoint, a bundle, or new weights; and what may differ from these.

What must stay true: a change that would make the run wrong is refused, and one that makes it another run is taken only
by name (`train.accept_changes`), before any weight is loaded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakexue.bundle.bundle import Bundle, OptimizerInfo
from megakexue.config import (
    BOUND,
    DataConfig,
    ResolvedConfig,
    ResolvedModel,
    UserError,
    build,
    name_sources,
    require,
)
from megakexue.core.batch import Position
from megakexue.files import sha256
from megakexue.run import checkpoint
from megakexue.run.data import Batches
from megakexue.run.engine import Engine
from megakexue.run.records import SourceRead
from megakexue.run.state import Differences, TrainerState, differences, plain, shown, with_new_settings
from megakexue.text.tokenizer_files import find_tokenizer, tokenizer_sha256

HARMLESS = (
    "train.run", "train.stop_at_step", "train.accept_changes", "train.micro_batch_size", "train.seed",
    "train.init_", "engine.zero_stage", "engine.bucket_elements", "engine.recompute", "engine.sequence_ranks",
    "engine.tile_tokens", "engine.timeout_s", "engine.rendezvous_s", "engine.stall_s", "metrics.", "checkpoint.",
    "evaluate.", "data.", "model.attention.backend",
)  # fmt: skip
"""Keys, or sections, that leave the run what it is: where and how it is computed, shown and kept. What they name (data,
bundle) is compared by its content, and `data.stages` by the steps that it gives to each length and each mixture."""
NOT_TOLD = ("train.run", "train.stop_at_step", "train.accept_changes")
"""Of the changes since the checkpoint, where the run lies and stops: the start does not list them."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins or goes on."""

    state: TrainerState
    origin: str
    """Where its weights come from, for the user."""
    saved: int | None
    """The step of the checkpoint that it goes on from; None: it has none."""


def start_run(folder: Path | None, engine: Engine, config: ResolvedConfig, data: Batches, source: str) -> Start:
    """Load weights, state and place in the data, from the checkpoint `folder` or, without one, as `train` says.

    Args:
        source: the commit of the code, or the version.

    Raises:
        UserError: the checkpoint or the bundle does not fit the config.
    """
    names = config.data.source_names
    reads = {
        name: SourceRead(rows=0, tokens=0, n_rows=source.n_rows, synthetic=given.synthetic)
        for name, source, given in zip(names, data.sources, config.data.sources, strict=True)
    }
    own = TrainerState(
        guard=engine.guard.state, data=data.fingerprint, sources=reads, config=plain(config), source=source,
        tokenizer=tokenizer_sha256(config.data.tokenizer), world_size=engine.ranks.world_size,
    )  # fmt: skip
    if folder is None:
        origin, bundle = _start_weights(engine, config, data)
        start = {"step": 0, "changes": [], "source": source, "origin": origin}
        state = dataclasses.replace(own, init_bundle=bundle, position=data.position, lineage=[start])
        return Start(state=state, origin=origin, saved=None)

    def own_at(old: TrainerState) -> TrainerState:
        return dataclasses.replace(own, data=data.fingerprint_at(old.position, old.step))

    old = checkpoint.load(folder, engine, lambda old: check_resume(old, own_at(old), config))
    own = own_at(old)
    old = dataclasses.replace(old, config=with_new_settings(old.config, config))
    changes = changes_since(old, own)
    data.seek(old.position if old.data == own.data else data.position, old.step)
    lineage = list(old.lineage)
    if changes or not lineage or lineage[-1]["source"] != source:
        lineage.append({"step": old.step, "changes": changes, "source": source})
    state = dataclasses.replace(
        own, step=old.step, tokens=old.tokens, position=data.position, data=data.fingerprint, validated=old.validated,
        sources=_reads(old, own),
        init_bundle=old.init_bundle, lineage=lineage,
    )  # fmt: skip
    origin = f"resumed from {folder}" + (f"; changed since: {', '.join(changes)}" if changes else "")
    return Start(state=state, origin=origin, saved=old.step)


def _reads(old: TrainerState, own: TrainerState) -> dict[str, SourceRead]:
    """Return what the steps of a checkpoint have read, by the names that the sources have now.

    What they have read of data that is another now keeps a line of its own, and so does what an older version has not
    counted by source.
    """
    until, read = f" until step {old.step}", dict(own.sources)
    if not old.sources and old.step:
        n_rows = sum(source.n_rows for source in own.sources.values())
        # an epoch of other data had another number of rows, which nothing says
        rows = old.position.epoch * n_rows + old.position.sample if old.data == own.data else 0
        of_all = SourceRead(rows=rows, tokens=old.tokens, n_rows=n_rows, synthetic=False)
        return read | {f"all{until}": of_all}
    now = dict(zip(name_sources([source["path"] for source in old.config["data"]["sources"]]), own.sources))
    for name, source in old.sources.items():
        if name not in now:
            read[name] = source
        elif old.data == own.data:
            read[now[name]] = dataclasses.replace(own.sources[now[name]], rows=source.rows, tokens=source.tokens)
        elif source.rows:
            read[f"{name}{until}"] = source
    return read


def check_resume(old: TrainerState, own: TrainerState, config: ResolvedConfig) -> None:
    """Refuse a checkpoint of another model, optimizer or tokenizer, or one that differs in what is not accepted.

    Args:
        old, own: the state of the checkpoint, and that which this run would write.
    """
    where = f"train.run={config.train.run}"
    found = differences(with_new_settings(old.config, config), own.config)
    families = [(c["optim"].get("name"), c["optim"].get("embedding") == "adamw") for c in (old.config, own.config)]
    of_family = () if families[0] == families[1] else ("optim.name", "optim.embedding")
    is_model = {key: key.startswith("model.") and not key.startswith(HARMLESS) for key in found}
    of_model = {key: values for key, values in found.items() if is_model[key] or key in of_family}
    require(
        not of_model,
        f"{where} holds a checkpoint of another model or optimizer: {'; '.join(shown(of_model))}: "
        "undo the change, or choose another train.run",
    )
    require(
        old.tokenizer == own.tokenizer,
        f"{where}: its checkpoint was trained with another tokenizer than data.tokenizer={config.data.tokenizer}, so "
        f"the ids mean other text: use {find_tokenizer(Path(config.train.run))} and data made with it",
    )
    of_steps = [_row_lengths(state.config["data"], old.step) for state in (old, own)]
    require(
        old.data != own.data or of_steps[0] == of_steps[1],
        f"{where}: data.stages gives other rows to steps that are done: up to step {old.step} it was {of_steps[0]} and "
        f"would be {of_steps[1]} (last step: tokens in a row): undo that change; the steps to come may change",
    )
    asked = _asked(old, own, found, config)
    accepted = config.train.accept_changes
    require(
        asked.keys() <= set(accepted),
        f"{where}: its checkpoint at step {old.step} was made with other settings: {'; '.join(asked.values())}: undo "
        f"the change, or take it from here on with 'train.accept_changes=[{','.join(sorted({*asked, *accepted}))}]'",
    )


def _asked(old: TrainerState, own: TrainerState, found: Differences, config: ResolvedConfig) -> dict[str, str]:
    """Return the keys that must be in `train.accept_changes`, each with what has changed."""
    asked = {key: values for key, values in found.items() if not key.startswith(HARMLESS)}
    every = "checkpoint.every_steps"
    if every in found and "rollback" in (config.guard.on_nonfinite, config.guard.on_spike):  # it goes back to that one
        asked[every] = found[every]
    lines = dict(zip(asked, shown(asked)))
    cuts = [(state.config["train"].get("micro_batch_size"), _n_data_ranks(state)) for state in (old, own)]
    if config.optim.accumulate == "momentum" and cuts[0] != cuts[1]:
        lines["train.micro_batch_size"] = (
            f"train.micro_batch_size: {cuts[0][0]} rows on {cuts[0][1]} ranks -> {cuts[1][0]} on {cuts[1][1]}, and "
            "with optim.accumulate=momentum each micro-batch is clipped and judged by itself"
        )
    to_come = [_row_lengths(state.config["data"], BOUND) for state in (old, own)]
    weights = [_weights_after(state.config["data"], old.step) for state in (old, own)]
    if old.data != own.data:
        lines["data"] = "data: other rows, weights, data.shuffle or data.shuffle_seed, so its position means nothing"
        if weights[0] != weights[1]:
            lines["data"] += f" (to change weights from step {old.step + 1} on alone, give those before to data.stages)"
        if old.config["data"].get("stages") and "train.global_batch_size" in found:
            lines["data"] += " (train.global_batch_size must stay after a change of weights by data.stages)"
    elif to_come[0] != to_come[1]:
        stages = [
            [
                {key: value for key, value in stage.items() if value is not None}
                for stage in state.config["data"].get("stages", [])
            ]
            for state in (old, own)
        ]
        lines["data.stages"] = f"data.stages {stages[0]} -> {stages[1]}"
    elif weights[0] != weights[1]:
        lines["data.stages"] = f"data.stages: last step and weights of what is to come {weights[0]} -> {weights[1]}"
    return lines


def _row_lengths(data: dict[str, Any], steps: int) -> dict[int, int]:
    """Tokens in a row of the first `steps` steps: for each length in turn, by the last step that has it."""
    found: dict[int, int] = {}
    begin, last = 0, 0
    stages = [(stage["until_step"], stage["seq_len"] or data["seq_len"]) for stage in data.get("stages", [])]
    for end, seq_len in [*stages, (BOUND, data["seq_len"])]:
        if begin < steps:
            if found.get(last) == seq_len:
                del found[last]
            last = min(end, steps)
            found[last] = seq_len
        begin = end
    return found


def _weights_after(data: dict[str, Any], step: int) -> list[tuple[str, list[float] | None]]:
    """The mixtures of the steps after `step`: the last step of each, and the weight of each source out of 1."""
    known = {name: data.get(name, []) for name in ("sources", "stages", "tokenizer", "seq_len")}
    mixtures = build(DataConfig, known, "data").mixtures
    ends = ["end" if mixture.until_step == BOUND else str(mixture.until_step) for mixture in mixtures]
    return [(end, mixture.shares()) for end, mixture in zip(ends, mixtures) if mixture.until_step > step]


def _n_data_ranks(state: TrainerState) -> int:
    return state.world_size // state.config["engine"].get("sequence_ranks", 1)


def changes_since(old: TrainerState, own: TrainerState) -> list[str]:
    """One line for each thing that is not as it was at the checkpoint, but where the run lies and stops."""
    found = differences(old.config, own.config)
    lines = shown({key: values for key, values in found.items() if not key.startswith(NOT_TOLD)})
    if old.data != own.data:
        lines.append("data, read from the beginning")
    before, now = old.world_size, own.world_size
    if before != now:
        fresh = f" (from rank {before} on with random states of their own)" if now > before else ""
        lines.append(f"ranks {before} -> {now}{fresh}")
    return lines


def _start_weights(engine: Engine, config: ResolvedConfig, data: Batches) -> tuple[str, str | None]:
    """Fill the masters of a run that has no checkpoint; return where they come from, and the bundle's fingerprint.

    As the config says, the optimizer's state and the place in the data come from the bundle too.
    """
    if config.train.init_from is None:
        engine.load_new(config.train.seed)
        return f"new weights from train.seed={config.train.seed}", None
    bundle = Bundle(config.train.init_from, check_hashes=engine.ranks.is_first)
    _check_init(bundle, config.model)
    require(
        tokenizer_sha256(bundle.tokenizer) == tokenizer_sha256(config.data.tokenizer),
        f"data.tokenizer={config.data.tokenizer} is not the tokenizer of train.init_from={bundle.folder}, so its ids "
        f"mean other text: prepare the data with {bundle.tokenizer}",
    )
    origin, keeps = f"weights of {bundle.folder}", config.train.init_optimizer == "keep"
    if keeps:
        state = bundle.optimizer
        if state is None:
            raise UserError(
                f"train.init_optimizer=keep: train.init_from={bundle.folder} has no state of an optimizer: write it "
                "with --optimizer, or set train.init_optimizer=reset"
            )
        require(
            state.family == OptimizerInfo.of(config.optim).family,
            f"train.init_optimizer=keep: train.init_from={bundle.folder} has the state of optim.name={state.name} "
            f"with optim.embedding={state.embedding}: use these, or set train.init_optimizer=reset",
        )
        engine.optimizer.resume(state.n_updates)
        origin += f", with the state of its {state.name} after {state.n_updates} updates"
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


def _check_init(bundle: Bundle, model: ResolvedModel) -> None:
    """Refuse to start from the weights of another model; a longer context is a difference that is asked for."""
    trained, rope, old = bundle.config, model.rope, bundle.config.rope
    found = differences(plain(trained), plain(model))
    # none of these changes what the weights compute
    harmless = ["attention.backend", "branch_gain"]
    is_plain = old.extension in (None, "base")  # the base alone says what the angles are
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
        names = "context", "extension", "trained_context", "yarn_temperature", "ntk_mixed_exponent", "llama3_factor"
        harmless += [f"rope.{name}" for name in (*names, "llama3_slow", "llama3_fast", "longrope_factors")]
        if rope.extension == "base":
            harmless.append("rope.base")
    if (trained.attention.scale, model.attention.scale) == (
        "constant",
        "log_n_clipped",
    ) and model.attention.log_n_base == old.context:
        harmless += ["attention.scale", "attention.log_n_base"]  # the factor is 1 in the context that was trained
    found = {key: values for key, values in found.items() if key not in harmless}
    is_longer = rope.extension is None and any(key.startswith("rope.") for key in found)
    hint = "; for a longer context set model.rope.extension" if is_longer else ""
    require(
        not found,
        f"train.init_from={bundle.folder}: its model differs from `model`: {'; '.join(shown(found))}: "
        f"write model: {{from: bundle}}, with nothing of that{hint}",
    )


def load_emo_rows(engine: Engine, config: ResolvedConfig, init_bundle: str | None) -> None:
    """Give the engine the frozen rows that EMO compares tokens by, those of the bundle that the run started from.

    Raises:
        UserError: the bundle is not there any more, or is another one.
    """
    if not config.loss.emo or config.train.init_from is None:  # which loss.emo needs
        return
    bundle = Bundle(config.train.init_from, check_hashes=engine.ranks.is_first)
    require(
        _fingerprint(bundle) == init_bundle,
        f"train.init_from={bundle.folder} is not the bundle that this run started from, whose head loss.emo needs: "
        "put that one back, or set loss.emo=false",
    )
    name = "embedding.weight" if config.model.tie_embeddings else "head.weight"
    engine.compare_tokens_by(bundle.weight(name))


def _fingerprint(bundle: Bundle) -> str:
    return sha256(bundle.folder / "manifest.json")
