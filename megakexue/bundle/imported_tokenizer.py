"""The tokenizer of an imported model: the file beside its weights, or one that is made of a GGUF file's metadata."""

import json
from pathlib import Path
from typing import Any

from megakexue.config import require

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""The one that is taken first: a tokenizer.json says what transformers itself would do."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]


BEFORE_BYTES = {
    "smollm": [{"type": "Digits", "individual_digits": True}], "llama-bpe": _split("{1,3}"), "qwen2": _split(""),
}  # fmt: skip
"""By tokenizer.ggml.pre: how the model's own tokenizer.json cuts text before its bytes are looked at."""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Types of tokens in GGUF files."""


def tokenizer_of(path: Path, given: Path | None, metadata: dict[str, Any] | None, made: Path) -> Path:
    """Return the file of the tokenizer that goes into the bundle.

    Args:
        path: a Hugging Face folder or a GGUF file.
        metadata: of the GGUF file.
        made: the folder in which one is made of the metadata, where there is no file.

    Raises:
        UserError: there is none, and none can be made.
    """
    if given is not None:
        require(given.is_file(), f"--tokenizer {given}: no such file")
        require(given.name in TOKENIZERS, f"--tokenizer {given}: it must be a file named {' or '.join(TOKENIZERS)}")
        return given
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    names = " nor ".join(TOKENIZERS)
    require(bool(found) or metadata is not None, f"{folder} has neither {names}: name one with --tokenizer")
    return found[0] if found else write_gguf_tokenizer(metadata or {}, made)


def write_gguf_tokenizer(metadata: dict[str, Any], folder: Path) -> Path:
    """Write the tokenizer.json and tokenizer_config.json of a GGUF file's byte-level BPE; return the first.

    Raises:
        UserError: it is another kind, or cuts text in a way that is not known here.
    """
    kind, pre = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    require(
        kind == "gpt2" and pre in BEFORE_BYTES,
        f"the GGUF file's tokenizer (tokenizer.ggml.model={kind}, pre={pre}) is not supported: import makes a "
        f"tokenizer.json for gpt2 with {', '.join(BEFORE_BYTES)}; name that of the same model with --tokenizer",
    )
    for key in ("tokens", "token_type", "merges"):
        require(f"tokenizer.ggml.{key}" in metadata, f"the GGUF file has no tokenizer.ggml.{key}: use --tokenizer")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre == "smollm"}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": type_ == CONTROL}
        for i, (token, type_) in enumerate(zip(tokens, types)) if type_ in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
        "vocab": {token: i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ != UNUSED},
        "merges": metadata["tokenizer.ggml.merges"],
    }  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*BEFORE_BYTES[str(pre)], byte_level]},
        "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index < len(tokens):
            settings[f"{ {'unknown': 'unk', 'padding': 'pad'}.get(name, name) }_token"] = tokens[index]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder / "tokenizer.json"
