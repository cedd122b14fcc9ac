"""Tokenizers of others as a `tokenizer.json`, by the library `tokenizers`, with the ids that the library gives.

The file does not say which tokens frame a document. `tokenizer_config.json` beside it does, as for transformers:
`bos_token`, `eos_token` and `pad_token`. One of the first two is enough (Qwen has no BOS).

Special tokens in text are characters, never their ids: those that the file calls special, and those that frame
documents. Added tokens that it does not call special (Qwen's `<think>`) are text, and become their id.

The library's decoder is not used, since it drops spaces: each id has bytes, by the rules of the file's decoder. What
does not come back then is due to the file's normaliser (such as NFC) or its rules for spaces, and is measured.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from megakexue.config import UserError, require
from megakexue.files import read_json
from megakexue.text.tokenizer import Marks, Tokenizer

CONFIG = "tokenizer_config.json"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
MARKS = ("bos_token", "eos_token", "pad_token")


class Spec(NamedTuple):
    """What a tokenizer.json and the tokenizer_config.json beside it say."""

    path: Path
    values: dict[str, Any]
    """The file, whole."""
    ids: dict[str, int]
    """Of all tokens."""
    special: dict[str, int]
    """Of those that no text becomes."""
    marks: Marks

    @property
    def sha256(self) -> str:
        """Hex digest of what decides the ids of a text and of a document, whatever way the files are written in."""
        model = {key: value for key, value in self.values["model"].items() if value not in (None, False, "")}
        if "merges" in model:  # older files join the two with a space
            model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        decisive = {
            "normalizer": self.values.get("normalizer"), "pre_tokenizer": self.values.get("pre_tokenizer"),
            "model": model, "added_tokens": sorted(self.values["added_tokens"], key=lambda token: token["id"]),
            "marks": self.marks,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_spec(path: Path) -> Spec:
    """Read a tokenizer.json.

    Raises:
        UserError: it is something else, of a kind that cannot give back the text, or nothing says which token ends a
            document.
    """
    values = read_json(path, "the tokenizer")
    what = _other_kind(values)
    require(what is None, f"{path} is {what}: name a tokenizer.json or a tokenizer.model")
    try:
        model, added = values["model"], values.get("added_tokens") or []
        values["added_tokens"] = added
        vocab = model["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in added}
        special = {token["content"]: token["id"] for token in added if token["special"]}
        unknown = model.get("unk_token") if isinstance(vocab, dict) else vocab[model["unk_id"] or 0][0]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no tokenizer.json that can be read ({error!r}): copy it again") from error
    if not model.get("byte_fallback"):
        special.pop(unknown, None)  # text becomes it
    named = _named_marks(path, ids)
    special |= {content: ids[content] for content in named[:2] if content is not None}
    bos, eos, pad = (None if content is None else ids[content] for content in named)
    return Spec(path, values, ids, special, Marks.choose(bos, eos, pad, sorted(special.values())))


def _other_kind(values: dict[str, Any]) -> str | None:
    """Say what a JSON file is that we cannot use; None: a tokenizer.json that we can."""
    model = values.get("model")
    if isinstance(model, dict) and "vocab" in model:
        # the first files name no type
        kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
        if kind not in ("BPE", "Unigram"):
            return f"a {kind} tokenizer, which does not give back the text; only BPE and Unigram do"
        return "one with dropout, which draws other ids each time" if model.get("dropout") else None
    if "config" in values and isinstance(values.get("vocab"), list):
        return "a tekken file"
    if "bytes_per_token" in values:
        return "what tools/train_tokenizer.py says of the .model beside it, which is the tokenizer"
    if values.keys() & {"tokenizer_class", "added_tokens_decoder", *MARKS}:
        return f"a {CONFIG}"
    if values and all(isinstance(value, int) for value in values.values()):
        return "a vocab.json, which lacks the merges"
    return "some other JSON"


def _named_marks(path: Path, ids: dict[str, int]) -> list[str | None]:
    """Return the tokens that tokenizer_config.json names as BOS, EOS and PAD. Raises UserError."""
    config = path.with_name(CONFIG)
    values = read_json(config, "which tokens frame a document") if config.is_file() else {}
    tokens = [values.get(name) for name in MARKS]
    named = [token["content"] if isinstance(token, dict) else token for token in tokens]
    require(
        named[:2] != [None, None],
        f"{path} does not say which token ends a document: write eos_token, and bos_token if it has one, into "
        f'{config}, as in {{"eos_token": "<|endoftext|>"}}',
    )
    for name, content in zip(MARKS[:2], named):
        require(content is None or content in ids, f"{config}: {name} {content!r} is no token of {path}")
    return [content if content in ids else None for content in named]


class TokenizerJson(Tokenizer):
    """A `tokenizer.json` whose model is BPE or Unigram. Raises UserError: as `read_spec`, or it cannot be opened."""

    is_exact = False  # it is not known, and so it is measured
    is_unigram = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        spec = read_spec(self.path)
        self.sha256, to_bytes = spec.sha256, _byte_rule(spec)
        # One text at a time has no work for the library's threads, and a process that has them must not fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._library = _open(spec)
        self._is_special = np.zeros(1 + max(spec.ids.values()), bool)
        self._is_special[list(spec.special.values())] = True
        pieces = [b""] * len(self._is_special)
        added = {token["content"] for token in spec.values["added_tokens"]}
        for content, index in spec.ids.items():
            if not self._is_special[index]:
                pieces[index] = content.encode() if content in added else to_bytes(content)
        self._set(pieces, spec.marks, has_prefix=False)
        self.has_prefix = self.decode_bytes(self.encode("a")).startswith(b" ")

    def __reduce__(self) -> tuple[type["TokenizerJson"], tuple[Path]]:
        return TokenizerJson, (self.path,)  # the library's own pickle forgets its settings

    def encode_array(
        self, text: str | bytes, alpha: float | None = None, *, is_start: bool = True
    ) -> npt.NDArray[np.int32]:
        """Return the ids of the library, but for special tokens in the text.

        Args:
            is_start: without effect: a file that puts a space before a text puts it before each part.

        Raises:
            UserError: the text is not Unicode.
        """
        assert alpha is None, "only SentencePiece draws segmentations"
        try:
            text = text.decode() if isinstance(text, bytes) else text
            text.encode()
        except UnicodeError as error:
            raise UserError(f"the text is not UTF-8, and {self.path} takes no other bytes: {error}") from error
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        require(
            not self._is_special[ids].any(),
            f"{self.path} writes what it does not know as a token that frames documents: take another tokenizer",
        )
        return ids


def _open(spec: Spec) -> tokenizers.Tokenizer:
    """Give the file to the library so that text becomes no special token. Raises UserError."""
    model, added = spec.values["model"], spec.values["added_tokens"]
    # The model itself may find a special token in a text (Unigram does). It finds none with a space in its name, since
    # byte-level BPE and sentencepiece write spaces as other characters.
    vocab = dict(model["vocab"])  # Unigram lists its pieces with their scores
    hidden = {content: f" {content}" for content in spec.special if content in vocab}
    if hidden:
        vocab = {hidden.get(piece, piece): value for piece, value in vocab.items()}
        model = model | {"vocab": vocab if isinstance(model["vocab"], dict) else list(vocab.items())}
        if "unk_token" in model:
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    tokens = [
        token | {"content": hidden.get(token["content"], token["content"]), "special": token["content"] in spec.special}
        for token in added
    ]
    values = spec.values | {"model": model, "added_tokens": tokens}
    values |= {"truncation": None, "padding": None, "post_processor": None}  # they would cut text, and add to it
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises no other
        raise UserError(f"{spec.path} cannot be opened: {' '.join(str(error).split())}") from error
    library.encode_special_tokens = True  # as the characters that they are
    for token in tokens:
        found = library.token_to_id(token["content"])
        require(found == token["id"], f"{spec.path}: {token['content']!r} gets the id {found} instead of {token['id']}")
    return library


def _byte_rule(spec: Spec) -> Callable[[str], bytes]:
    """Return what makes bytes of a piece, by the decoder. Raises UserError: it is of another kind."""
    decoder = spec.values.get("decoder") or {"type": "no decoder"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    require(
        not unknown, f"{spec.path} writes pieces in a way that is not known here ({', '.join(sorted(unknown))}): take "
        "the tokenizer of another model, or its tokenizer.model if it has one",
    )  # fmt: skip
    if "ByteLevel" in kinds:
        table = byte_alphabet()

        def from_alphabet(piece: str) -> bytes:
            try:
                return bytes([table[character] for character in piece])
            except KeyError:
                return piece.encode()

        return from_alphabet
    replaced = [(step.get("replacement", "▁"), " ") for step in steps if step["type"] == "Metaspace"]
    replaced += [(s["pattern"].get("String", ""), s["content"]) for s in steps if s["type"] == "Replace"]

    def to_bytes(piece: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new) if old else piece
        return piece.encode()

    return to_bytes


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (GPT-2): itself where it is visible, else one above."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
