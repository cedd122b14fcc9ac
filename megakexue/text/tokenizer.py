"""What every tokenizer is, and sentencepiece models: text to token ids and back without losing a byte.

`decode_bytes(encode(x)) == x` for every string and every byte string. sentencepiece alone does not give that, even with
the identity normaliser. It writes a space as U+2581, so a U+2581 in the text comes back as a space, and it replaces
invalid UTF-8. Here both are encoded as byte pieces, and decoding joins the bytes of the pieces instead of calling
sentencepiece's decoder. Text never encodes to a control id (BOS, EOS, PAD, unknown): `<s>` in a document is three
characters. A user symbol in the text always becomes its one id. All other text gets the ids that sentencepiece gives.
A model may put a space before each text (Llama 2, Mistral): it is put there here, once, and decoding takes it away.

A long text is cut where no piece of the vocabulary can reach across the cut, so the segmentation of the whole is that
of its parts. Without cuts, sentencepiece adds the scores of the whole text in float32. In megabytes of text, rounding
would then decide between nearly equal segmentations and change the law of sampling.

Sampling draws a segmentation with P(seg) = exp(alpha score(seg)) / Z over all segmentations of the text into pieces
(9811; Kudo 2018), exact up to float32.
"""

import hashlib
import heapq
import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from megakexue.config import UserError, require

SPACE = "▁"  # how sentencepiece writes a space
CUT_CHARS = 4096  # of a part of a long text: the sum of its scores is so small that float32 resolves 0.002
PROBE = " \t a  b\r\nＡﬁ①é\u3000\ufeff\0 " + SPACE  # text that a normaliser or a simple decoder would change

Kind = Literal["unigram", "bpe"]
Piece = ModelProto.SentencePiece
SILENT = (Piece.CONTROL, Piece.UNKNOWN, Piece.BYTE)  # types of pieces whose name is not their text
RESERVED = re.compile(r"\s|[▁▅\0]|^(<unk>|<s>|</s>|<pad>|<0x[0-9A-F]{2}>)$")  # a user symbol must not match
# At most 1000 characters: the rest of the text, or up to a newline, or up to a space, or any.
BLOCK = re.compile(r".{1,1000}\Z|.{0,999}\n|.{1,1000}(?= )|.{1,1000}", re.DOTALL)
HELDOUT = 50  # one block in 50 measures the compression
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")  # Chinese characters


class Marks(NamedTuple):
    """The ids that frame documents. No text encodes to one."""

    bos_id: int
    eos_id: int
    pad_id: int

    @classmethod
    def choose(cls, bos: int | None, eos: int | None, pad: int | None, unused: Sequence[int]) -> "Marks":
        """Take what the tokenizer has. One mark serves for both ends of a document where it has no other.

        `pad` is one of `unused`, the ids that no text encodes to: its own if it has one that is not at an end of
        documents, else the first such id. Where there is none, EOS is also PAD.
        """
        first, last = (bos, eos) if bos is not None else (eos, eos)
        last = first if last is None else last
        assert first is not None and last is not None, "it has one of the two"
        free = [i for i in unused if i not in (first, last)]
        if pad is None or pad not in free:
            pad = free[0] if free else last
        return cls(first, last, pad)


class Tokenizer(ABC):
    """Text to ids and back; `load_tokenizer` of megakexue/text/tokenizer_files.py opens one.

    Attributes:
        sha256: hex digest of what decides the ids; prepared data and bundles name their tokenizer by it.
        vocab_size: number of ids, which are 0 to vocab_size - 1.
        bos_id, eos_id, pad_id: as `Marks`.
        is_exact: whether all text comes back byte for byte; else it must be measured.
        is_unigram: whether it can draw segmentations.
        has_prefix: whether a space stands before each text, which decoding takes away.
    """

    path: Path
    sha256: str
    is_exact: bool
    is_unigram: bool
    has_prefix: bool

    def _set(self, pieces: list[bytes], marks: Marks, *, has_prefix: bool) -> None:
        """Keep the bytes of each id, none for a control id. `has_prefix`: a space stands before each text."""
        self._bytes, self.has_prefix = pieces, has_prefix
        self.vocab_size = len(pieces)
        self.bos_id, self.eos_id, self.pad_id = marks

    @abstractmethod
    def encode_array(
        self, text: str | bytes, alpha: float | None = None, *, is_start: bool = True
    ) -> npt.NDArray[np.int32]:
        """Return the ids of a text, never BOS, EOS or PAD.

        Args:
            alpha: draws a segmentation, as `SentencePiece.sample` says.
            is_start: False: the text goes on from another, so nothing is put before it.

        Raises:
            UserError: a string has a lone surrogate that does not stand for a byte (PEP 383).
        """

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of the best segmentation, never BOS, EOS or PAD. `decode_bytes` is the inverse.

        Raises:
            UserError: as `encode_array`.
        """
        return self.encode_array(text).tolist()

    def piece(self, index: int) -> bytes:
        """Return the bytes of one id inside a text, none for a control id."""
        return self._bytes[index]

    def piece_bytes(self) -> npt.NDArray[np.int64]:
        """Return how many bytes each id stands for: 0 for a control id, 1 for a byte piece."""
        return np.array([len(piece) for piece in self._bytes], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of a text, none for a control id. Raises IndexError for an id out of range."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise IndexError(f"token id {min(ids)} is negative")
        data = b"".join([self._bytes[i] for i in ids])
        return data.removeprefix(b" ") if self.has_prefix else data

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text. Bytes that are not UTF-8, such as half of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class SentencePiece(Tokenizer):
    """A sentencepiece model: our own, or one of others that changes no text.

    Raises:
        UserError: the file is missing or not a sentencepiece model; the model has neither BOS nor EOS, lacks byte
            pieces, or changes text.
    """

    is_exact = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require(self.path.is_file(), f"no tokenizer {path}: train one with tools/train_tokenizer.py")
        data = self.path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            model = ModelProto.FromString(data)
            require(len(model.pieces) > 0, f"{path} is not a sentencepiece model: it has no pieces")
            has_prefix = model.normalizer_spec.add_dummy_prefix
            model.normalizer_spec.add_dummy_prefix = False  # it would come before each part of a text
            processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise UserError(f"{path} is not a sentencepiece model: {' '.join(str(error).split())}") from error
        self._processor = processor
        self.is_unigram = model.trainer_spec.model_type == TrainerSpec.UNIGRAM
        bos, eos, pad = (None if i < 0 else i for i in (processor.bos_id(), processor.eos_id(), processor.pad_id()))
        missing = ["BOS and no EOS"] if bos is None and eos is None else []
        self._byte_ids = {int(p.piece[3:5], 16): i for i, p in enumerate(model.pieces) if p.type == Piece.BYTE}
        if len(self._byte_ids) < 256:
            missing.append("byte pieces")
        if not any(p.piece == SPACE and p.type not in SILENT for p in model.pieces):
            missing.append("piece for a space, which would come back as U+2581")
        advice = "take the tokenizer.json of the same model, or train one with tools/train_tokenizer.py"
        require(not missing, f"{path} has no {', no '.join(missing)}: {advice}")
        # no text becomes the unknown piece, because there are bytes
        unused = [i for i, p in enumerate(model.pieces) if p.type in (Piece.UNKNOWN, Piece.CONTROL)]

        texts = ["" if p.type in SILENT else p.piece.replace(SPACE, " ") for p in model.pieces]
        pieces = [text.encode() for text in texts]
        for byte, i in self._byte_ids.items():
            pieces[i] = bytes([byte])
        self._set(pieces, Marks.choose(bos, eos, pad, unused), has_prefix=has_prefix)
        # A cut between two characters is free when no piece contains them side by side.
        self._bonds = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
        symbols = {p.piece: i for i, p in enumerate(model.pieces) if p.type == Piece.USER_DEFINED}
        self._symbol_ids = {symbol: i for symbol, i in symbols.items() if SPACE not in symbol and " " not in symbol}
        self._marks = [SPACE, *sorted(self._symbol_ids, key=len, reverse=True)]
        self._special = re.compile("(" + "|".join(map(re.escape, self._marks)) + "|[\ud800-\udfff]+)")
        at_end = has_prefix and model.trainer_spec.treat_whitespace_as_suffix  # the space would come there
        exact = self.decode_bytes(self.encode(PROBE)) == PROBE.encode() and not at_end
        require(exact, f"{path} changes text (a normaliser, or whitespace rules): {advice}")

    def sample(self, text: str | bytes, alpha: float) -> list[int]:
        """Draw a segmentation of the text with probability proportional to exp(alpha * score) (9811).

        With alpha 0 all segmentations are equally likely; with a large alpha the result is that of `encode`. Only
        characters that the vocabulary lacks are spelt in byte pieces, and they have no other spelling.

        Raises:
            UserError: the model is not unigram, or alpha is negative or not finite.
        """
        return self.encode_array(text, alpha).tolist()

    def encode_array(
        self, text: str | bytes, alpha: float | None = None, *, is_start: bool = True
    ) -> npt.NDArray[np.int32]:
        """Return the ids of `encode` or, with alpha, of `sample` as an array, without a Python integer for each.

        Bytes may be any.
        """
        options: dict[str, Any] = {"return_type": "numpy"}
        if alpha is not None:
            require(
                self.is_unigram, f"{self.path} is a BPE model, which has no segmentation lattice: sample needs unigram"
            )
            require(math.isfinite(alpha) and alpha >= 0, f"alpha={alpha} must be finite and not negative")
            options |= {"enable_sampling": True, "nbest_size": -1, "alpha": alpha}
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if self.has_prefix and is_start and text:
            text = " " + text
        parts = [np.empty(0, np.int32)]
        for part in self._parts(text):
            ids = self._processor.encode(part, **options) if isinstance(part, str) else np.array(part, np.int32)
            parts.append(ids)
        return np.concatenate(parts)

    def _parts(self, text: str) -> Iterator[str | list[int]]:
        """Yield text that sentencepiece encodes exactly, and the ids of the text that it does not."""
        if self._is_plain(text):
            yield from self._cut(text)
            return
        for i, part in enumerate(self._special.split(text)):
            if i % 2 == 0:
                yield from self._cut(part)
            elif part in self._symbol_ids:
                yield [self._symbol_ids[part]]
            else:
                try:
                    data = part.encode("utf-8", "surrogateescape")
                except UnicodeEncodeError as error:
                    raise UserError(f"the text is not Unicode: lone surrogate {part[error.start]!r}") from error
                yield [self._byte_ids[byte] for byte in data]

    def _is_plain(self, text: str) -> bool:
        """Return whether sentencepiece alone is exact for this text. (This reads 1 GB/s, sentencepiece 0.01 GB/s.)"""
        if any(mark in text for mark in self._marks):
            return False
        try:
            return text.isascii() or text.encode() != b""
        except UnicodeEncodeError:  # a lone surrogate
            return False

    def _cut(self, text: str) -> Iterator[str]:
        """Yield the parts of a long text, cut where no piece reaches across."""
        start = 0
        while len(text) - start > CUT_CHARS:
            end = start + CUT_CHARS
            while end < len(text) and text[end - 1 : end + 1] in self._bonds:
                end += 1
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]


def set_sample_seed(seed: int) -> None:
    """Seed the generator of `sample`, so that draws repeat within this thread.

    Another process draws other segmentations from the same seed, since sentencepiece mixes a salt of the process into
    it. A fork copies salt and generator: forks must be seeded differently, or they draw the same segmentations.
    """
    sentencepiece.set_random_generator_seed(seed % (2**32 - 1))  # sentencepiece ignores 2^32 - 1


class Sample:
    """A uniform sample of blocks of text: those with the smallest keys, `max_bytes` in all at most.

    The key is a hash of the block. So the sample does not depend on the order of the blocks or on the files they are
    in, and the memory is bounded for a corpus of any size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._limit = math.inf  # the smallest key that was ever removed
        self._heap: list[tuple[int, bytes]] = []  # (-key, block): the largest key comes first

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: int, block: bytes) -> None:
        """Add a block, and remove those with the largest keys until the rest fits."""
        if key < self._limit:
            heapq.heappush(self._heap, (-key, block))
            self.n_bytes += len(block)
            while self.n_bytes > self.max_bytes:
                self._limit, _ = self.pop()

    def pop(self) -> tuple[int, bytes]:
        """Remove the block with the largest key and return (key, block)."""
        negative, block = heapq.heappop(self._heap)
        self.n_bytes -= len(block)
        return -negative, block

    def blocks(self) -> list[bytes]:
        """Return the blocks in the order of their keys, which is random."""
        return [block for _, block in sorted(self._heap, reverse=True)]


def train_tokenizer(
    texts: Iterable[str], out: str | Path, *, vocab_size: int, kind: Kind = "unigram", user_symbols: Sequence[str] = (),
    sample_bytes: int = 100_000_000, character_coverage: float = 0.9995, seed: int = 0, n_threads: int = 16,
    chinese_words: bool = False, verbose: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a sentencepiece model on a random sample of the texts, write it to `out`, and return the facts about it.

    Ids: unknown 0, BOS 1, EOS 2, PAD 3, the user symbols, 256 bytes, then the pieces. The same texts, in any order, and
    the same arguments give the same file. The number of threads is such an argument, because it decides the order in
    which unigram training adds floats. One block in fifty is held out of the training, to measure bytes per token.

    With `chinese_words` no piece reaches from one Chinese word into the next (8209). Only the training splits words:
    the model is one like any other.

    Raises:
        UserError: an argument is wrong, rjieba is missing, there is too little text, or the vocabulary does not fit the
            text.
    """
    require(vocab_size > 0, f"vocab_size={vocab_size} must be positive")
    require(sample_bytes > 0, f"sample_bytes={sample_bytes} must be positive")
    require(0.98 <= character_coverage <= 1, f"character_coverage={character_coverage} must be in [0.98, 1]")
    require(1 <= n_threads <= 128, f"n_threads={n_threads} must be in [1, 128]")
    for symbol in user_symbols:
        require(
            symbol != "" and not RESERVED.search(symbol),
            f"user symbol {symbol!r} must be non-empty, without whitespace or U+2581, and not a built-in piece",
        )
    require(len(set(user_symbols)) == len(user_symbols), f"a user symbol is given twice in {list(user_symbols)}")

    split_words = chinese_splitter() if chinese_words else bytes
    train, heldout, n_bytes = draw_samples(texts, sample_bytes, seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(split_words(make_trainable(block)) for block in train.blocks()), model_writer=model,
            model_type=kind, vocab_size=vocab_size, character_coverage=character_coverage,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, user_defined_symbols=list(user_symbols), byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            split_digits=True,
            required_chars=SPACE,  # also where the text has no space, or few: no other piece can stand for it
            allow_whitespace_only_pieces=True,  # indentation
            max_sentence_length=2**20,  # above any block: sentencepiece drops longer ones
            num_threads=n_threads, minloglevel=0 if verbose else 2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(explain_failure(str(error), vocab_size)) from error
    Path(out).write_bytes(model.getvalue())
    tokenizer = SentencePiece(out)
    n_tokens = sum(len(tokenizer.encode(block)) for block in heldout.blocks())
    return {
        "sha256": tokenizer.sha256, "vocab_size": vocab_size, "kind": kind,
        "bytes_per_token": heldout.n_bytes / n_tokens,
        "heldout_bytes": heldout.n_bytes, "train_bytes": train.n_bytes, "text_bytes": n_bytes,
        "user_symbols": list(user_symbols), "sample_bytes": sample_bytes, "character_coverage": character_coverage,
        "seed": seed, "n_threads": n_threads, "sentencepiece": sentencepiece.__version__,
        "chinese_words": f"rjieba {version('rjieba')}" if chinese_words else None,
    }  # fmt: skip


def draw_samples(texts: Iterable[str], sample_bytes: int, seed: int) -> tuple[Sample, Sample, int]:
    """Return a sample to train on, a sample held out of it, and the bytes of all texts.

    Raises:
        UserError: there are fewer than two blocks of text.
    """
    train, heldout, n_bytes = Sample(sample_bytes), Sample(sample_bytes // HELDOUT), 0
    for text in texts:
        for match in BLOCK.finditer(text):
            block = match.group().encode("utf-8", "ignore")  # lone surrogates are not text
            key = int.from_bytes(hashlib.blake2b(block, digest_size=8, key=str(seed).encode()).digest(), "little")
            (heldout if key % HELDOUT == 0 else train).add(key, block)
            n_bytes += len(block)
    if len(heldout) == 0 and len(train) > 1:
        heldout.max_bytes = sample_bytes
        heldout.add(*train.pop())
    require(len(heldout) > 0, f"{n_bytes} bytes of text (sample_bytes={sample_bytes}) are too little to train on")
    return train, heldout, n_bytes


def make_trainable(block: bytes) -> bytes:
    """Replace the characters that sentencepiece does not train on as they are by a tab, which no piece can contain.

    It drops a whole block for a U+2585 or a NUL, and takes a U+2581 for a space.
    """
    return re.sub("▁|▅|\0".encode(), b"\t", block)


def chinese_splitter() -> Callable[[bytes], bytes]:
    """Return a function that puts a tab, which no longer piece can contain, between the words of Chinese text.

    The words are those of jieba's dictionary. Its guesses at unknown words (an HMM) are left out, as WoBERT and
    T5-PEGASUS do.

    Raises:
        UserError: rjieba is not installed.
    """
    try:
        import rjieba
    except ImportError as error:
        raise UserError("--chinese-words needs rjieba: pip install 'megakexue[chinese]'") from error

    def split(block: bytes) -> bytes:
        return HAN.sub(lambda run: "\t".join(rjieba.cut(run[0], False)), block.decode()).encode()

    return split


def explain_failure(error: str, vocab_size: int) -> str:
    """Return sentencepiece's message in terms of our arguments."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return f"vocab_size={vocab_size} is more than the text can fill: use at most {found[1]}, or give more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size} cannot hold the bytes, the special pieces and the characters of the text: "
            f"use at least {found[1]}, or lower character_coverage"
        )
    return f"sentencepiece cannot train on this text: {' '.join(error.split())}"
