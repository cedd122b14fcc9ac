"""Small tokenizers of the kinds that other models have, trained on the spot."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.conftest import stdlib_files

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen split text, but for the number of digits."""
MARKS: dict[str, dict[str, str | None]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "one mark": {"eos_token": "<|endoftext|>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "unigram": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
}


def write(folder: Path, values: dict[str, Any], marks: dict[str, str | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def byte_level(folder: Path, kind: str, texts: Iterable[str], vocab_size: int = 600) -> Path:
    """Train byte-level BPE of a kind: llama3, qwen or "one mark", which has nothing but that."""
    own = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "qwen":
        own.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT % ("{1,3}" if kind == "llama3" else "")), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator(texts, trainer)
    special = {
        "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"],
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }
    own.add_special_tokens(special.get(kind, ["<|endoftext|>"]))
    if kind == "qwen":
        own.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</think>")])
    return write(folder, json.loads(own.to_str()), MARKS[kind])


def from_sentencepiece(folder: Path, model: Path, kind: str) -> Path:
    """Write a sentencepiece model of ours as others do: unigram, or "llama2" with a space before the text."""
    pieces = ModelProto.FromString(model.read_bytes()).pieces
    names, scores = [piece.piece for piece in pieces], {piece.piece: piece.score for piece in pieces}
    special = [piece.piece for piece in pieces if piece.type in (2, 3)]
    ids = {name: i for i, name in enumerate(names)}
    normal = [piece.piece for piece in pieces if piece.type == 1]
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decode: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    if kind == "unigram":
        own: dict[str, Any] = {"type": "Unigram", "unk_id": 0, "vocab": [[n, scores[n]] for n in names]}
    else:
        cuts = ((a[:i], a[i:], a) for a in normal for i in range(1, len(a)))
        merges = sorted(((a, b, whole) for a, b, whole in cuts if a in ids and b in ids), key=lambda m: ids[m[2]])
        own = {"type": "BPE", "unk_token": "<unk>", "vocab": ids, "merges": [[a, b] for a, b, _ in merges]}
        replace = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": replace, "pre_tokenizer": None,
        "added_tokens": [{"id": ids[name], "content": name, **flags} for name in special], "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decode}, "model": own | {"byte_fallback": True, "dropout": None},
    }  # fmt: skip
    return write(folder, values, MARKS[kind])


def foreign_model(folder: Path, **options: Any) -> Path:
    """Train a sentencepiece model that another program could have, on four modules of the standard library."""
    model = io.BytesIO()
    defaults: dict[str, Any] = dict(vocab_size=400, byte_fallback=True, pad_id=3, minloglevel=2)
    defaults |= dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    lines = iter("".join(path.read_text() for path in stdlib_files(4)).splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(defaults | options))
    path = folder / "foreign.model"
    path.write_bytes(model.getvalue())
    return path
