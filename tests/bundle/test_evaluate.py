"""Losses by position: against one token at a time, the extrapolation table, and the program end to end."""

import dataclasses
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.evaluate import CHUNK, PositionLoss, changed, cut, loss_by_position, loss_when_cut, position_edges
from megakexue.bundle.generate import load_decoder
from megakexue.bundle.needle import RunningText, needles
from megakexue.config import IGNORED, AttentionConfig, DataConfig, ModelConfig, RopeConfig, SourceConfig, UserError
from megakexue.core.axes import parameter_names
from megakexue.core.batch import Batch
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.resolve import resolve
from megakexue.dist import ALONE
from megakexue.run.data import Batches
from megakexue.text.prepare import PrepareArguments, prepare
from megakexue.text.tokenizer import train_tokenizer
from tests.conftest import Prepared, stdlib_files
from tests.helpers import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Random weights with clear preferences, for a context of half a row."""
    config = ModelConfig(
        vocab_size=512, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48,
        rope=RopeConfig(base=1e4), attention=AttentionConfig(scale="constant"),
    )  # fmt: skip
    config = resolve(config, "adamw", prepared.seq_len // 2)
    weights = {name: initial_weight(name, config, seed=0) for name in parameter_names(config)}
    for name in weights:
        if "gain" not in name:
            weights[name] *= 4
    out = tmp_path_factory.mktemp("evaluate") / "bundle"
    return Bundle(write_bundle(out, config, weights.items(), prepared.tokenizer, {"from": "a test"}))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Decoder:
    return load_decoder(bundle, CPU)


def open_batches(prepared: Prepared, micro_batch_size: int = 1, seq_len: int | None = None) -> Batches:
    """The validation rows, as they are prepared or divided."""
    config = DataConfig(
        sources=[SourceConfig(path=str(prepared.data))],
        tokenizer=str(prepared.tokenizer),
        seq_len=seq_len or prepared.seq_len,
    )
    return Batches(
        config, split="valid", global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size,
        ranks=ALONE, cache=prepared.data,
    )  # fmt: skip


def read(prepared: Prepared, micro_batch_size: int, n_rows: int = 10**6, seq_len: int | None = None) -> list[Batch]:
    """The first validation rows."""
    batches = open_batches(prepared, micro_batch_size, seq_len)
    rows = list(batches.first_rows(n_rows))
    batches.close()
    return rows


@torch.no_grad()
def losses_one_by_one(model: Decoder, batch: Batch) -> dict[tuple[int, int, int, bool], float]:
    """Loss by (row, start of the document, position, one document fills the row), of each document alone."""
    losses = {}
    for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets)):
        starts: list[int] = (batch.positions[row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)]):
            logits = model(tokens[None, start:stop], torch.arange(stop - start)[None])[0].double()
            for position, target in enumerate(targets[start:stop].tolist()):
                if target != IGNORED:
                    probability = torch.softmax(logits[position], 0)[target]
                    losses[row, start, position, len(starts) == 1] = -math.log(probability)
    return losses


@pytest.mark.parametrize("one_document", [False, True])
def test_losses_are_those_of_each_document_alone(prepared: Prepared, model: Decoder, one_document: bool) -> None:
    edges = [0, 1, 3, 16, 40, 64]
    batches = read(prepared, micro_batch_size=3, n_rows=40)
    expected: dict[int, list[float]] = defaultdict(list)
    kinds = set()
    for batch in batches:
        for (_, _, position, is_whole), loss in losses_one_by_one(model, batch).items():
            kinds.add(is_whole)
            if is_whole or not one_document:
                expected[max(edge for edge in edges if edge <= position)].append(loss)
    assert kinds == {False, True}, "the rows must be of both kinds, or this test shows nothing"
    found = loss_by_position(model, batches, edges, one_document=one_document)
    assert [(part.start, part.stop) for part in found] == list(pairwise(edges))
    for part in found:
        assert part.n_tokens == len(expected[part.start]) > 0
        assert part.loss_sum == pytest.approx(math.fsum(expected[part.start]), rel=1e-5)
    if one_document:  # every position of the same rows, but for the last, whose target may be another document's BOS
        assert len({part.n_tokens / (part.stop - part.start) for part in found[:-1]}) == 1


def test_neither_the_batches_nor_the_edges_change_the_sum(prepared: Prepared, model: Decoder) -> None:
    n_targets = sum(batch.n_targets for batch in read(prepared, 1, 20))
    sums = []
    for micro_batch_size, edges in ((1, [0, 64]), (7, [0, 64]), (4, position_edges(64))):
        parts = loss_by_position(model, read(prepared, micro_batch_size, 20), edges)
        assert sum(part.n_tokens for part in parts) == n_targets
        sums.append(sum(part.loss_sum for part in parts))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor had that was made."""

    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.n_elements = max([self.n_elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_only_the_logits_of_a_chunk_exist_at_a_time(prepared: Prepared, model: Decoder) -> None:
    (batch,) = read(prepared, micro_batch_size=20, n_rows=20)
    assert batch.tokens.numel() > 2 * CHUNK
    with Largest() as largest:
        loss_by_position(model, [batch], [0, 64])
    assert largest.n_elements == CHUNK * model.config.vocab_size


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [(2, [0, 2]), (16, [0, 16]), (64, [0, 16, 32, 64]), (100, [0, 16, 32, 64, 100])],
)
def test_edges_are_powers_of_two_and_end_with_the_row(seq_len: int, edges: list[int]) -> None:
    assert position_edges(seq_len) == edges


def test_an_interval_without_tokens_has_no_loss() -> None:
    assert math.isnan(PositionLoss(start=0, stop=4, n_tokens=0, loss_sum=0.0).loss)
    assert PositionLoss(start=0, stop=4, n_tokens=4, loss_sum=6.0).loss == 1.5


# -------------------------------------------------------------------------------------------------------- the program


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "evaluate.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_the_program_prints_and_writes_what_the_library_computes(
    prepared: Prepared, bundle: Bundle, model: Decoder, tmp_path: Path
) -> None:
    out = tmp_path / "losses.json"
    done = run(bundle.folder, prepared.data, "--n-rows", "30", "--by-position", "--json", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: these rows are longer than the 32 tokens of the model's RoPE context\n"
    parts = loss_by_position(model, read(prepared, 1, 30), [0, 16, 32, 64])  # the reference backend
    n_tokens = sum(part.n_tokens for part in parts)
    loss = sum(part.loss_sum for part in parts) / n_tokens
    written = json.loads(out.read_text())
    assert written["n_tokens"] == n_tokens and written["loss"] == pytest.approx(loss, rel=1e-5)
    assert written["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    for entry, part in zip(written["by_position"], parts, strict=True):
        assert (entry["start"], entry["stop"], entry["n_tokens"]) == (part.start, part.stop, part.n_tokens)
        assert entry["loss_sum"] == pytest.approx(part.loss_sum, rel=1e-5)
    assert re.search(rf"^tokens +{n_tokens:,}$", done.stdout, re.MULTILINE)
    assert re.search(rf"^loss +{written['loss']:.4f} nats per token$", done.stdout, re.MULTILINE)
    last = written["by_position"][-1]
    row = f"{last['n_tokens']:,} +{last['loss_sum'] / last['n_tokens']:.4f} "
    assert re.search(rf"^ +32-63 +{row}", done.stdout, re.MULTILINE)
    assert not list(tmp_path.glob("*.tmp"))
    again = run(bundle.folder, prepared.data, "--json", out)
    assert again.returncode == 2
    assert again.stderr == f"error: --json {out} exists: choose another name or add --overwrite\n"


def test_set_changes_the_use_of_the_weights(
    prepared: Prepared,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "losses.json"
    options = ["--n-rows", "8", "--one-document", "--by-position", "--json", out, "--device", "cpu"]
    changes = ["--set", "rope.base=100", "--set", "attention.scale=log_n"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [bundle.folder, prepared.data, *options, *changes])])
    runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
    assert "changed     rope.base=100, attention.scale=log_n" in capsys.readouterr().out
    config = ModelConfig(
        vocab_size=512, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, rope=RopeConfig(base=100.0)
    )  # log_n is the default
    other = Decoder(resolve(config, "adamw", 32), "reference")
    other.load_state_dict({name: bundle.weight(name) for name in parameter_names(bundle.config)})
    parts = loss_by_position(other, read(prepared, 1, 8), [0, 64], one_document=True)
    unchanged = loss_by_position(load_decoder(bundle, CPU), read(prepared, 1, 8), [0, 64], one_document=True)
    assert abs(unchanged[0].loss - parts[0].loss) > 1e-3
    assert json.loads(out.read_text())["loss"] == pytest.approx(parts[0].loss, rel=1e-5)


def test_mistakes(prepared: Prepared, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))
    text = stdlib_files(2)
    other = tmp_path / "other.model"
    train_tokenizer((path.read_text(encoding="utf-8") for path in text), other, vocab_size=400, n_threads=1)
    strange, train_only = tmp_path / "strange", tmp_path / "train_only"
    prepare([str(text[0])], other, strange, PrepareArguments(seq_len=64), processes=1)
    prepare([str(text[0])], prepared.tokenizer, train_only, PrepareArguments(seq_len=64, valid_fraction=0), processes=1)
    short, long_rows = tmp_path / "short.txt", tmp_path / "long_rows"
    short.write_text("a few words\n", encoding="utf-8")
    prepare([str(short)], prepared.tokenizer, long_rows, PrepareArguments(seq_len=64, valid_fraction=0), processes=1)
    weights = {name: bundle.weight(name) for name in parameter_names(bundle.config)}
    weights["head.weight"] *= 1e6
    large = write_bundle(tmp_path / "large", bundle.config, weights.items(), prepared.tokenizer, {"from": "a test"})
    good = [str(bundle.folder), str(prepared.data)]
    cases = [
        ([good[0], str(strange)], f"{strange} was prepared with another tokenizer (sha256 "),
        ([good[0], str(train_only)], f"{train_only} has no rows in its valid split: prepare it with a larger "),
        ([good[0], str(tmp_path / "no")], f"no folder {tmp_path}/no: make one with tools/prepare_data.py"),
        ([str(tmp_path / "no"), good[1]], f"no bundle {tmp_path}/no: make one with tools/export_model.py"),
        ([*good, "--n-rows", "0"], "--n-rows 0 must be positive"),
        ([*good, "--json", str(tmp_path / "no" / "x.json")], f"there is no folder {tmp_path}/no"),
        ([*good, "--set", "d_model=64"], "--set d_model=64: it must be attention.NAME=VALUE or rope.NAME=VALUE"),
        ([*good, "--set", "attention.qk_norm=true"], "nothing else can change without other weights"),
        ([*good, "--set", "rope.bose=64"], "--set: rope.bose is no setting: did you mean rope.base?"),
        ([*good, "--set", "rope.context=" + "[" * 10_000], "must be a whole number, such as 1000 or 1e3"),
        ([*good, "--set", "rope.context=64"], "--set rope.context=64 changes nothing that is computed"),
        ([*good, "--set", "rope.rule=infimum"], "--set: model.rope.rule=infimum has no effect with model.rope.base="),
        ([*good, "--set", "rope.extension=ntk"], "--set rope.extension=ntk: the bundle was trained for 32 tokens: "),
        (
            [*good, "--set", "rope.extension=ntk", "--set", "rope.context=64", "--set", "rope.trained_context=16"],
            "--set rope.extension=ntk: the bundle was trained for 32 tokens: add --set rope.context=N, above 32, and",
        ),
        (
            [*good, "--set", "rope.extension=ntk", "--set", "rope.context=16"],
            "--set: model.rope.trained_context=32 must be below model.rope.context=16, the longer one",
        ),
        ([*good, "--set", "rope.extension=base"], "--set rope.extension=base: without training, set rope.base alone"),
        ([*good, "--set", "attention.backend=flash"], "model.attention.backend=flash needs a CUDA device, not cpu"),
        ([*good, "--device", "cuda:99"], "--device cuda:99: "),
        ([good[0], str(long_rows), "--split", "train", "--one-document"], "none of the 1 rows is filled by one docum"),
        ([str(large), good[1], "--n-rows", "1", "--dtype", "fp16"], "the loss is not finite in fp16: evaluate with --"),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *arguments])
        with pytest.raises(UserError, match=re.escape(message)):
            program["main"]()


def test_what_follows_from_a_change_is_chosen_anew(bundle: Bundle) -> None:
    config, backend = changed(bundle.config, [])
    assert backend == "auto" and config == bundle.config
    attention = changed(bundle.config, ["attention.scale=log_n_clipped", "rope.extension=ntk", "rope.context=64"])[0]
    assert (attention.attention.log_n_base, attention.rope.trained_context, attention.rope.context) == (32, 32, 64)
    key_norm = changed(bundle.config, ["attention.similarity=key_norm"])[0].attention
    assert (key_norm.softmax_scale, key_norm.log_n_base) == (1.0, None)
    log_n = changed(bundle.config, ["model.attention.scale=log_n", "attention.log_n_base=100"])[0].attention
    assert (log_n.log_n_base, log_n.log_n_floor, log_n.softmax_scale) == (
        100,
        16,
        bundle.config.attention.softmax_scale,
    )
    assert changed(bundle.config, ["rope.base=auto", "rope.context=256"])[0].rope.base != bundle.config.rope.base
    yarn = changed(bundle.config, ["rope.extension=yarn", "rope.context=64"])[0]
    with pytest.raises(UserError, match="the bundle is already extended, by yarn from 32 to 64 tokens"):
        changed(yarn, ["rope.extension=ntk", "rope.context=128"])


# ------------------------------------------------------------------------------------------------- short rows, recall


def test_rows_that_are_cut_have_the_losses_of_shorter_rows(prepared: Prepared, model: Decoder) -> None:
    """The reader divides the same prepared rows for a shorter `data.seq_len`."""
    shorter = loss_by_position(model, read(prepared, 4, 40, seq_len=32), [0, 32])[0]
    cut_rows = loss_when_cut(model, read(prepared, 3, 20), 32)
    assert cut_rows.n_tokens == shorter.n_tokens
    assert cut_rows.loss_sum == pytest.approx(shorter.loss_sum, rel=1e-6)
    whole = loss_by_position(model, read(prepared, 3, 20), [0, 64])[0]
    assert abs(cut_rows.loss - whole.loss) > 1e-3, "context has an effect, or this test shows nothing"
    assert loss_when_cut(model, read(prepared, 3, 20), 64).loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)


def test_a_cut_leaves_a_rest_and_the_choice_of_rows(prepared: Prepared, model: Decoder) -> None:
    (batch,) = read(prepared, micro_batch_size=10, n_rows=10)
    pieces = list(cut(batch, 24))
    assert [tuple(piece.tokens.shape) for piece in pieces] == [(20, 24), (10, 16)]
    assert sum(piece.n_targets for piece in pieces) == batch.n_targets
    for piece in pieces:
        starts = (piece.positions.flatten() == 0).nonzero().flatten().tolist()
        assert piece.cu_seqlens.tolist() == [*starts, piece.tokens.numel()]
    rest = pieces[1].positions
    assert (rest == torch.minimum(batch.positions[:, 48:], torch.arange(16))).all()
    for one_document in (False, True):
        counted = loss_by_position(model, [batch], [0, 64], one_document=one_document)[0].n_tokens
        assert loss_when_cut(model, [batch], 24, one_document=one_document).n_tokens == counted


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the program in this process, which has imported torch."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")


@pytest.fixture(scope="module")
def longer(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same weights for the whole row, by a new base."""
    rope = dataclasses.replace(bundle.config.rope, base=9e4, context=64, trained_context=32, extension="base")
    config = dataclasses.replace(bundle.config, rope=rope)
    weights = {name: bundle.weight(name) for name in parameter_names(config)}
    out = tmp_path_factory.mktemp("evaluate") / "longer"
    return Bundle(write_bundle(out, config, weights.items(), bundle.tokenizer, {"from": "a test"}))


def test_bundles_side_by_side_with_the_loss_of_short_rows(
    prepared: Prepared, bundle: Bundle, longer: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, png = tmp_path / "losses.json", tmp_path / "losses.png"
    files = ["--json", out, "--plot", png]
    evaluate(monkeypatch, bundle.folder, longer.folder, prepared.data, "--by-position", "--n-rows", 20, *files)
    written, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert [result["bundle"] for result in written] == [str(bundle.folder), str(longer.folder)]
    for result, opened in zip(written, (bundle, longer)):
        own, batches = load_decoder(opened, CPU), read(prepared, 1, 20)
        short = loss_when_cut(own, batches, 32)  # what both were trained for at first
        assert result["short"]["length"] == 32 and result["short"]["n_tokens"] == short.n_tokens
        assert result["short"]["loss"] == pytest.approx(short.loss, rel=1e-5)
        first = loss_by_position(own, batches, [0, 32, 64])[0]
        assert result["short"]["n_tokens_first"] == first.n_tokens
        assert result["short"]["loss_first"] == pytest.approx(first.loss, rel=1e-5)
    a, b = (result["short"] for result in written)
    for label, n, key in (("first 32", "n_tokens_first", "loss_first"), ("in rows of 32", "n_tokens", "loss")):
        row = rf"^ +{label} +{a[n]:,} +{a[key]:.4f} +{math.exp(a[key]):.4g} +{b[key]:.4f} +{math.exp(b[key]):.4g}$"
        assert re.search(row, shown, re.MULTILINE), shown
    assert png.read_bytes().startswith(b"\x89PNG") and f"wrote {png}\n" in shown


def test_the_program_shows_needles(
    prepared: Prepared, bundle: Bundle, longer: Bundle, model: Decoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, png = tmp_path / "needle.json", tmp_path / "needle.png"
    options = ["--needle", "--lengths", "64,16", "--depths", "0,100", "--seeds", 3, "--json", out, "--plot", png]
    evaluate(monkeypatch, bundle.folder, longer.folder, prepared.data, *options)
    written, shown = json.loads(out.read_text()), capsys.readouterr().out
    batches = open_batches(prepared)
    manifest = batches.sources[0].manifest
    ids = {"bos_id": manifest.bos_id, "eos_id": manifest.eos_id, "pad_id": manifest.pad_id}
    text = RunningText(batches.rows.read, batches.n_rows, **ids)
    expected = [
        cell for length in (16, 64) for cell in needles(model, text, length=length, depths=[0.0, 100.0], seeds=range(3))
    ]
    batches.close()
    for entry, cell in zip(written[0]["needle"], expected, strict=True):
        assert {name: pytest.approx(value, abs=1e-5) for name, value in dataclasses.asdict(cell).items()} == entry
    assert written[0]["context"] == 32 and written[1]["context"] == 64
    gains = [cell.log_prob - cell.log_prob_without for cell in expected[::2]]
    row = (
        r"^ +depth +16 +64\*\n +0 % +\d+% " + rf"{re.escape(f'{gains[0]:+.2f}')} +\d+% {re.escape(f'{gains[1]:+.2f}')}$"
    )
    assert re.search(row, shown, re.MULTILINE), shown
    assert shown.count("* beyond the 32 tokens that the bundle was trained for") == 1  # not of the longer one
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_program_shows_copies(
    prepared: Prepared, bundle: Bundle, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, png = tmp_path / "copy.json", tmp_path / "copy.png"
    evaluate(
        monkeypatch, bundle.folder, prepared.data, "--copy", "--lengths", "100", "--seeds", 2, "--json", out,
        "--plot", png,
    )  # fmt: skip
    cells, shown = json.loads(out.read_text())["copy"], capsys.readouterr().out
    assert [(cell["kind"], cell["distance"]) for cell in cells] == [
        (kind, distance) for kind in ("random", "passage") for distance in (32, 64, 68)
    ]
    numbers = " +".join(f"{cells[i][name]:.3f}" for i in (1, 4) for name in ("first", "again", "without"))
    assert re.search(rf"^ +64 +{numbers}$", shown, re.MULTILINE), shown
    assert "rows of 100* tokens, 2 cases each; nats per token" in shown
    assert png.read_bytes().startswith(b"\x89PNG")


def test_mistakes_of_probes(
    prepared: Prepared, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))
    good = [str(bundle.folder), str(prepared.data)]
    cases = [
        (["--n-rows", "3", "--needle"], "--n-rows has an effect only without --needle and --copy and --tasks: drop it"),
        (["--seeds", "3"], "--seeds has an effect only with --needle or --copy: drop it"),
        (["--depths", "3", "--copy"], "--depths has an effect only with --needle: drop it"),
        (["--short", "3"], "--short has an effect only with --by-position: drop it"),
        (["--plot", "x.png"], "--plot has an effect only with --by-position or --needle or --copy: drop it"),
        (["--short", "64", "--by-position"], "--short 64 must be below the 64 tokens of a row"),
        (["--needle", "--depths", "50,101"], "--depths [50.0, 101.0]: percents must be between 0 and 100"),
        (["--needle", "--lengths", "15,99"], "--lengths 15 is too short: it must be at least 16"),
        (["--copy", "--lengths", "63"], "--lengths 63 is too short: it must be at least 64"),
        (["--needle", "--lengths", "1000000"], "tokens of text in this split, and these rows need 999992: ask for sh"),
        (["--needle", "--seeds", "0"], "--seeds 0 must be positive"),
        (["--needle", "--plot", f"{tmp_path}/x.pdf"], f"--plot {tmp_path}/x.pdf must end in .png"),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *good, *arguments])
        with pytest.raises(UserError, match=re.escape(message)):
            program["main"]()
