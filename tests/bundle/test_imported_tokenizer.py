"""The tokenizer of an imported model: which file is taken, and the one that is made of a GGUF file's metadata."""

import json
from pathlib import Path
from typing import Any

import pytest

from megakexue.bundle.imported_tokenizer import tokenizer_of, write_gguf_tokenizer
from megakexue.config import UserError


def test_which_file_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither tokenizer.json nor tokenizer.model"):
        tokenizer_of(tmp_path, None, None, tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(UserError, match=r"the GGUF file's tokenizer .* is not supported"):  # one is to be made
        tokenizer_of(gguf, None, {}, tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).touch()
        assert tokenizer_of(tmp_path, None, None, tmp_path) == tmp_path / name
        assert tokenizer_of(gguf, None, {}, tmp_path) == tmp_path / name
    assert tokenizer_of(tmp_path, tmp_path / "tokenizer.model", None, tmp_path) == tmp_path / "tokenizer.model"
    for given, message in (("model.gguf", "must be a file named"), ("nothing", "no such file")):
        with pytest.raises(UserError, match=message):
            tokenizer_of(tmp_path, tmp_path / given, None, tmp_path)


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = Path(tokenizers.__file__).read_text() + " 1234 naïve 你好\n\n\tx"
    original.train_from_iterator([text], trainer)
    model = json.loads(original.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3 if token == "<|end|>" else 1 for token in vocab],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]], "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    made = Tokenizer.from_file(str(write_gguf_tokenizer(metadata, tmp_path)))
    assert made.encode(text + "<|end|>").ids == original.encode(text + "<|end|>").ids
    assert made.decode(made.encode(text).ids) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>" and settings["chat_template"] == "{{ messages }}"
    for key in ("tokens", "token_type", "merges"):
        part = {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}
        with pytest.raises(UserError, match=f"the GGUF file has no tokenizer.ggml.{key}: use --tokenizer"):
            write_gguf_tokenizer(part, tmp_path)
    for key, value in (("pre", "gpt-4o"), ("model", "llama")):
        with pytest.raises(UserError, match=f"{value}.* is not supported: import makes a tokenizer.json for gpt2"):
            write_gguf_tokenizer(metadata | {f"tokenizer.ggml.{key}": value}, tmp_path)
