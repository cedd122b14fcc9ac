"""The made text, the runs, the tables and the picture of the experiment on longer contexts."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import long_context
from common import Run
from long_context import SETTINGS
from megakexue.config import load_config
from megakexue.text.tokenizer_files import load_tokenizer
from tests.helpers import ROOT


def test_most_of_a_made_document_stood_in_it_before() -> None:
    texts = [long_context.document(np.random.default_rng(seed), 128) for seed in range(40)]
    assert texts[0] == long_context.document(np.random.default_rng(0), 128) and len(set(texts)) == 40
    shares = []
    for text in texts:
        assert 128 <= len(text) < 4 * 128 and set(text) <= set(long_context.ALPHABET)
        # eight characters that are there twice by chance: one case of 64^8
        shares.append(sum(text[i : i + 8] in text[: i + 7] for i in range(8, len(text) - 8)) / len(text))
    assert np.mean(shares) > 0.4


def test_each_character_is_a_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(long_context.tokenizer_of_characters(tmp_path))
    text = "a b.ZZ"
    assert tokenizer.vocab_size == 67 and len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def answers(command: list[str], calls: list[list[str]]) -> None:
    """Write what tools/evaluate.py would: a loss that falls with the position, and needles in short rows."""
    calls.append(command)
    if command[0] != "tools/evaluate.py":
        return
    lengths = (
        [int(length) for length in command[command.index("--lengths") + 1].split(",")] if "--needle" in command else []
    )
    cells = [{"length": n, "n_exact": 20 * (n == lengths[0]), "n_cases": 20} for n in lengths for _ in range(3)]
    starts = [0, *(1 << i for i in range(11))]
    parts: list[Any] = [{"start": start, "loss_sum": 2.0 * (8 - start / 512), "n_tokens": 2} for start in starts]
    parts.append({"start": 4096, "loss_sum": 0.0, "n_tokens": 0})
    said = {"needle": cells, "by_position": parts, "short": {"loss": 3.0}}
    Path(command[command.index("--json") + 1]).write_text(json.dumps(said))


def test_runs_tables_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Run] = []
    calls: list[list[str]] = []
    monkeypatch.setattr(long_context, "OUT", tmp_path)
    monkeypatch.setattr(long_context, "train", lambda run, out: trained.append(run))
    monkeypatch.setattr(long_context, "call", lambda command: answers(command, calls))
    monkeypatch.setattr(sys, "argv", ["long_context.py", "--texts", "copies", "--seeds", "0", "1"])
    monkeypatch.chdir(ROOT)
    (tmp_path / "copies" / "data").mkdir(parents=True)
    long_context.main()
    assert [run.name for run in trained] == [
        "short_0",
        "short_1",
        *(f"{k}_{s}" for s in (0, 1) for k in long_context.EXTENSIONS),
    ]
    first = load_config(ROOT / trained[0].config, list(trained[0].overrides))
    assert (first.data.seq_len, first.train.seed, first.optim.name) == (128, 0, "adamw")
    assert f"train.init_from={tmp_path}/copies/bundles/short_1" in trained[-1].overrides
    kinds = [command[0] for command in calls]
    assert kinds.count("tools/export_model.py") == 8 and kinds.count("tools/evaluate.py") == 16
    said = capsys.readouterr().out
    assert "| yarn | 100% (100% .. 100%) | 0% (0% .. 0%) | 0% (0% .. 0%) | 0% (0% .. 0%) |" in said
    assert "| ntk | 7.969 (7.969 .. 7.969) | 7.750 (7.750 .. 7.750) | 7.500 (7.500 .. 7.500) |" in said
    assert (tmp_path / "copies" / "long_context.png").read_bytes().startswith(b"\x89PNG")


def test_the_rows_of_the_needles() -> None:
    assert SETTINGS["copies"].lengths == (128, 256, 512, 1024)
    assert SETTINGS["real"].lengths == (256, 512, 1024, 2048)
