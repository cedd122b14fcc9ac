"""From what a run starts: what a resume refuses or takes when told, and a bundle with a longer context."""

import dataclasses
import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import ResolvedConfig, UserError
from megakexue.core.resolve import resolve_config
from megakexue.run.resume import check_resume
from tests.conftest import Prepared
from tests.helpers import (
    ROOT,
    change_trainer,
    column,
    make_state,
    n_rows,
    outcomes,
    records,
    state_hashes,
    tiny_config,
    train_all,
)
from tests.ranks import run_on_ranks


@pytest.mark.slow
def test_what_a_resume_refuses_and_what_it_takes_when_told(prepared: Prepared, tmp_path: Path) -> None:
    run, file, tokenizer = tmp_path / "run", tmp_path / "file", tmp_path / "tokenizer.model"
    file.write_text("")
    first = tiny_config(prepared, run, "train.steps=2")
    shutil.copyfile(prepared.tokenizer, tokenizer)
    batch = ["train.global_batch_size=12", "train.micro_batch_size=3"]
    cases = [
        (run, ["model.d_ff=64"],
         "holds a checkpoint of another model or optimizer: model.d_ff 48 -> 64: undo the change, or choose another"),
        (run, ["optim.name=adamw"],
         "model.residual_alpha 1.0 -> 2.0; optim.embedding lazy -> None; optim.name tiger -> adamw: undo"),
        (run, ["data.shuffle_seed=1"],
         "at step 2 was made with other settings: data: other rows, weights, data.shuffle or data.shuffle_seed, so its "
         "position means nothing: undo the change, or take it from here on with 'train.accept_changes=[data]'"),
        (run, ["train.steps=5", "optim.lr=1e-3", *batch, "train.accept_changes=[optim.lr]"],
         "other settings: optim.lr 0.02 -> 0.001; train.global_batch_size 16 -> 12; train.steps 2 -> 5: undo the "
         "change, or take it from here on with "
         "'train.accept_changes=[optim.lr,train.global_batch_size,train.steps]'"),
        (run, ["guard.on_nonfinite=rollback", "train.accept_changes=[guard.on_nonfinite]", "checkpoint.every_steps=5"],
         "was made with other settings: guard.on_nonfinite skip -> rollback; checkpoint.every_steps 3 -> 5: "),
        (run, ["optim.accumulate=momentum", "train.micro_batch_size=2"],
         "train.micro_batch_size: 4 rows on 1 ranks -> 2 on 1, and with optim.accumulate=momentum each micro-batch is"),
        (run, ["model.attention.backend=flash"], "flash needs a CUDA device"),
        (file, [], "cannot be written: Not a directory: choose another place"),
        (tmp_path / "new", [f"train.init_from={tmp_path}"], "is no bundle: make one with tools/export_model.py"),
        # where and how it is computed, shown and kept may change without a word
        (run, ["train.micro_batch_size=2", "engine.zero_stage=3", "metrics.every_steps=2", "checkpoint.keep_last=1",
               "evaluate.every_steps=null", f"data.tokenizer={tokenizer}"], ""),
        (run, ["train.steps=5", "optim.lr=1e-3", *batch, "data.shuffle_seed=1",
               "train.accept_changes=[optim.lr,train.global_batch_size,train.steps,data]"], ""),
    ]  # fmt: skip
    configs = [tiny_config(prepared, folder, "train.steps=2", *options) for folder, options, _ in cases]
    (ends,) = run_on_ranks(1, outcomes, [first, *configs])
    for end, (_, _, words) in zip(ends[1:], cases, strict=True):
        assert words in end and bool(words) == bool(end), end
    # the data begins anew, the rest goes on, and the checkpoint knows when that was
    steps = [r for r in records(run) if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert steps[2]["epoch"] == 12 / n_rows(prepared) and steps[1]["epoch"] == 32 / n_rows(prepared)
    lineage = json.loads((run / "checkpoints" / "step_00000005" / "trainer.json").read_text())["lineage"]
    assert lineage[0]["step"] == 0 and lineage[0]["origin"] == "new weights from train.seed=0"
    assert lineage[-1]["step"] == 2 and "data, read from the beginning" in lineage[-1]["changes"]
    assert "optim.lr 0.02 -> 0.001" in lineage[-1]["changes"]


def test_of_the_stages_only_those_to_come_may_change(prepared: Prepared, tmp_path: Path) -> None:
    def config(stages: str, *more: str) -> ResolvedConfig:
        return resolve_config(tiny_config(prepared, tmp_path, f"data.stages=[{stages}]", *more))

    old = make_state(4, config("{until_step: 3, seq_len: 16}, {until_step: 6, seq_len: 32}"))
    others = {
        "{until_step: 3, seq_len: 16}, {until_step: 4, seq_len: 32}": "data.stages [{'until_step': 3, 'seq_len': 16}",
        "{until_step: 3, seq_len: 16}, {until_step: 7, seq_len: 32}": "'train.accept_changes=[data.stages]'",
        "{until_step: 2, seq_len: 16}, {until_step: 6, seq_len: 32}": "up to step 4 it was {3: 16, 4: 32} and would be "
        "{2: 16, 4: 32} (last step: tokens in a row): undo that change; the steps to come may change",
        "{until_step: 3, seq_len: 16}": "gives other rows to steps that are done",
        "": "gives other rows to steps that are done: up to step 4 it was {3: 16, 4: 32} and would be {4: 64}",
    }
    for stages, words in others.items():
        new = config(stages)
        with pytest.raises(UserError) as error:
            check_resume(old, make_state(0, new), new)
        assert words in str(error.value)
        accepting = config(stages, "train.accept_changes=[data.stages]")
        with pytest.raises(UserError) if "done" in words or "would" in words else nullcontext():
            check_resume(old, make_state(0, accepting), accepting)
    # before any step is done, and where the rows are others, stages are no more than another setting
    new = config("", "train.accept_changes=[data.stages]")
    check_resume(dataclasses.replace(old, step=0), make_state(0, new), new)
    new = config("", "train.accept_changes=[data]")
    check_resume(old, make_state(0, new, data="others"), new)
    # a checkpoint of a version without stages
    plain = make_state(4, new)
    del plain.config["data"]["stages"]
    check_resume(plain, make_state(0, new), new)


def test_of_the_weights_only_those_to_come_may_change(prepared: Prepared, tmp_path: Path) -> None:
    def config(stages: str, web: int, made: int, *more: str) -> ResolvedConfig:
        sources = f"data.sources=[{{path: web, weight: {web}}}, {{path: made, weight: {made}}}]"
        return resolve_config(tiny_config(prepared, tmp_path, sources, f"data.stages=[{stages}]", *more))

    first = "{until_step: 4, weights: {web: 2, made: 2}}"
    old = make_state(4, config("", 1, 1))
    with pytest.raises(
        UserError, match=r"weights of what is to come \[\('end', \[0.5, 0.5\]\)\] -> \[\('end', \[0.75, "
    ):
        check_resume(old, make_state(0, new := config(first, 3, 1)), new)
    check_resume(old, make_state(0, new), config(first, 3, 1, "train.accept_changes=[data.stages]"))
    # the same in other words is no change
    check_resume(old, make_state(0, new := config(first, 5, 5)), new)
    # what is done is a matter of the fingerprint, and the message says how to change what is to come
    with pytest.raises(
        UserError, match=r"position means nothing \(to change weights from step 5 on alone, give those be"
    ):
        check_resume(old, make_state(0, new := config("", 3, 1), data="others"), new)


def test_a_trainer_json_of_another_form_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path / "run", "train.steps=2", "evaluate.every_steps=null")
    run_on_ranks(1, train_all, [config])
    guard = json.loads((tmp_path / "run/checkpoints/step_00000002/trainer.json").read_text())["guard"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"position": {"epoch": "0", "sample": 3}}, "is not of the form that this version writes"),
        ({"position": {"epoch": 0, "sample": 10**9}}, "is outside an epoch of"),
        ({"tokens": math.nan}, "is not of the form"),
        ({"guard": guard | {"losses": [1.0, "x"]}}, "is not of the form"),
        ({"guard": guard | {"scales_loss": 3}}, "is not of the form"),
        ({"config": 3}, "is not of the form"),
        ({"tokenizer": "00"}, "was trained with another tokenizer than data.tokenizer"),
    ]
    # a checkpoint of a version that did not have a setting yet, which has its default
    older = json.loads((tmp_path / "run/checkpoints/step_00000002/trainer.json").read_text())["config"]
    for key in ("qkv_bias", "qk_norm"):
        del older["model"]["attention"][key]
    del older["model"]["rope"]["llama3_slow"]
    changes.append(({"config": older}, ""))
    configs = []
    for i, (change, _) in enumerate(changes):
        shutil.copytree(tmp_path / "run", tmp_path / f"{i}")
        change_trainer(tmp_path / f"{i}", 2, change)
        configs.append(dataclasses.replace(config, train=dataclasses.replace(config.train, run=str(tmp_path / f"{i}"))))
    (ends,) = run_on_ranks(1, outcomes, configs)
    for end, (_, words) in zip(ends, changes, strict=True):
        assert words in end and bool(words) == bool(end), end


@pytest.mark.slow
def test_finetuning_for_a_longer_context_with_other_losses(prepared: Prepared, tmp_path: Path) -> None:
    from megakexue.bundle.bundle import Bundle, write_bundle
    from megakexue.core.axes import parameter_names
    from megakexue.run.export import export_run

    options = ["model.attention.scale=constant", "evaluate.every_steps=null", "train.steps=6", "optim.warmup_steps=1"]
    run_on_ranks(1, train_all, [tiny_config(prepared, tmp_path / "run", *options)])
    bundle = export_run(tmp_path / "run", tmp_path / "bundle")
    export_run(tmp_path / "run", tmp_path / "other", step=3)
    later, trained_config = tmp_path / "later", Bundle(bundle).config
    weights = ((name, Bundle(bundle).weight(name)) for name in parameter_names(trained_config))
    golden = ROOT / "tests" / "golden" / "tokenizer.model"
    foreign = write_bundle(tmp_path / "foreign", trained_config, weights, golden, {})
    start = [*options, f"train.init_from={bundle}", "model.rope.context=256"]
    old = ["model.rope.trained_context=64", "model.attention.backend=sdpa"]
    n_pairs = trained_config.rotary_width // 2
    factors = f"model.rope.longrope_factors={[1 + i / 2 for i in range(n_pairs)]}"
    cases = {
        "base": ["model.rope.extension=base", *old],
        "longrope": ["model.rope.extension=longrope", *old, factors],
        "interpolate": ["model.rope.extension=interpolate", *old],
        "ntk": ["model.rope.extension=ntk", *old, "model.attention.scale=log_n_clipped"],
        "ntk_exact": ["model.rope.extension=ntk_exact", *old],
        "ntk_mixed": ["model.rope.extension=ntk_mixed", *old, "loss.z_loss=1e-3"],
        "yarn": ["model.rope.extension=yarn", *old, "loss.emo=true", "loss.z_loss=1e-4", "train.stop_at_step=3"],
        "yarn_resumed": ["model.rope.extension=yarn", *old, "loss.emo=true", "loss.z_loss=1e-4"],
        "yarn_straight": ["model.rope.extension=yarn", *old, "loss.emo=true", "loss.z_loss=1e-4"],
    }
    runs = {name: tmp_path / name.removesuffix("_resumed") for name in cases}
    refused = {
        r"rope.context 64 -> 256: write model: {from: bundle}, .*; for a longer context set model.rope.extension": [],
        r"model.rope.base=\d+ is that of train.init_from=.*, so model.rope.extension=base changes nothing": [
            *cases["base"], f"model.rope.base={trained_config.rope.base}"],
        "data.tokenizer=.* is not the tokenizer of train.init_from=.*foreign, so its ids mean other text": [
            f"train.init_from={foreign}", "model.rope.context=null"],
        "model.rope.trained_context=100, but train.init_from=.* was trained for 64 tokens": [
            "model.rope.extension=ntk", "model.rope.trained_context=100"],
        r"rope.base \d+.0 -> 9000.0; rope.context 64 -> 256: write .*; for a longer context set model.rope.extension": [
            "model.rope.base=9000"],
        r"rope.base \d+.0 -> 9000.0: write model: {from: bundle}, with nothing of that$": [
            "model.rope.base=9000", "model.rope.extension=ntk", *old],
        "attention.scale constant -> log_n": ["model.rope.extension=ntk", *old, "model.attention.scale=log_n"],
        r"attention.log_n_base None -> 100.0; attention.scale constant -> log_n_clipped": [
            "model.rope.extension=ntk", *old, "model.attention.scale=log_n_clipped", "model.attention.log_n_base=100"],
        "later is already extended, by yarn from 64 to 256 tokens: keep its model.rope, or start from the bundle": [
            "model.rope.extension=yarn", *old, "model.rope.context=512", f"train.init_from={later}"],
        "later is already extended, by yarn from 64 to 256": [
            "model.rope.base=60600", "model.rope.context=512", f"train.init_from={later}"],
        "is not the bundle that this run started from, whose head loss.emo needs": [
            *cases["yarn"], f"train.init_from={tmp_path}/other", f"train.run={tmp_path}/yarn"],
    }  # fmt: skip
    configs = [tiny_config(prepared, runs[name], *start, *extra) for name, extra in cases.items()]
    assert run_on_ranks(1, outcomes, configs)[0] == [""] * len(cases)
    # and a bundle with an extension goes on with it
    export_run(tmp_path / "yarn", later)
    again = tiny_config(prepared, tmp_path / "again", *start, *cases["yarn"], f"train.init_from={later}")
    configs = [tiny_config(prepared, tmp_path / "refused", *start, *extra) for extra in refused.values()]
    ends = run_on_ranks(1, outcomes, [again, *configs])[0]
    assert ends[0] == ""
    for message, end in zip(refused, ends[1:], strict=True):
        assert re.search(message, end), end
    # each is another model from the first step on, with the trained weights; EMO's run resumes to the same numbers
    losses = {name: [r["loss"] for r in records(runs[name])] for name in cases}
    trained = records(tmp_path / "run")[-1]["loss"]
    assert all(abs(loss[0] - trained) < 0.6 for loss in losses.values()), losses
    names = [name for name in cases if not name.startswith("yarn_")]
    assert len({losses[name][0] for name in names}) == len(names) == 7
    assert column(tmp_path / "yarn") == column(tmp_path / "yarn_straight")
    a, b = state_hashes(tmp_path / "yarn", 6), state_hashes(tmp_path / "yarn_straight", 6)
    assert a["rank_00000.safetensors"] == b["rank_00000.safetensors"]
    # what is logged is the cross-entropy alone: the same first loss, whatever is added to it
    plain = tiny_config(prepared, tmp_path / "plain", *start, *cases["yarn"], "loss.emo=false", "loss.z_loss=0")
    run_on_ranks(1, train_all, [plain])
    first, second = records(tmp_path / "plain"), records(tmp_path / "yarn")
    assert first[0]["loss"] == second[0]["loss"] and first[0]["grad_norm"] != second[0]["grad_norm"]
