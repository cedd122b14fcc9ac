"""The tokenizer loses nothing, samples by the exact law, and trains the same file from the same text."""

import itertools
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import UserError
from megakexue.files import sha256
from megakexue.text import tokenizer as module
from megakexue.text.tokenizer import (
    BLOCK,
    CUT_CHARS,
    SPACE,
    Kind,
    ModelProto,
    Sample,
    SentencePiece,
    set_sample_seed,
    train_tokenizer,
)
from tests.foreign import foreign_model
from tests.helpers import ROOT
from tests.text.helpers import stdlib_texts

CHINESE = "科学空间：我们可以无损放大一个模型吗？从零开始训练语言模型，词表越大越好吗？\n"
SYMBOLS = ["<|user|>", "<|user|>x", "qq"]
NASTY = [
    "",
    "The quick brown fox.",
    CHINESE,
    "def f(x):\n    return {'a': [x]}\n\n\n",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\r\n",
    "\r",
    "a\r\rb\r\n\nc\n\r",
    "\t\ttabs\t",
    " leading, trailing  and   multiple    spaces  ",
    " ",
    " " * 100,
    "a\0b\0",
    "▁",
    "a▁b ▁ ▁▁c",
    "▁▅▆ ⁇  ⁇ ",
    "\ufffd\ufffd",
    "<s></s><unk><pad><0x41><0xFF>",
    "<s>a</s>",
    "<|user|>hello<|user|>x<|user",
    "qqqqq",
    "\ufeffBOM",
    "ﬁ Ａ ① é é \u3000\xa0\u2028\u2029\x85\x1c\x0b\x0c\u200b\u00ad",
    "0123456789 ٣ ４",
    "\U0010ffff\ue000\ufdd0",
    "a" * 5000 + " " * 5000 + "中" * 5000 + "\n" * 5000,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SentencePiece]:
    folder, texts = tmp_path_factory.mktemp("models"), [*stdlib_texts(16), CHINESE * 20]
    kinds: tuple[Kind, ...] = ("unigram", "bpe")
    for kind in kinds:
        path = folder / f"{kind}.model"
        train_tokenizer(texts, path, vocab_size=1000, kind=kind, user_symbols=SYMBOLS, n_threads=2)
    return {kind: SentencePiece(folder / f"{kind}.model") for kind in ("unigram", "bpe")}


@pytest.fixture(scope="module")
def unigram(models: dict[str, SentencePiece]) -> SentencePiece:
    return models["unigram"]


def check_lossless(tokenizer: SentencePiece, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    drawn = [tokenizer.sample(text, alpha) for alpha in (0.0, 0.2)] if tokenizer.is_unigram else []
    array, encode = tokenizer.encode_array(text), tokenizer._processor.encode
    assert array.dtype == np.int32 and array.ndim == 1
    parts = tokenizer._parts(data.decode("utf-8", "surrogateescape"))
    assert array.tolist() == [i for part in parts for i in (encode(part) if isinstance(part, str) else part)]
    for ids in [tokenizer.encode(text), array.tolist(), *drawn]:
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
        assert not {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_nasty_text(models: dict[str, SentencePiece], kind: str, text: str) -> None:
    check_lossless(models[kind], text)
    check_lossless(models[kind], text.encode())
    assert models[kind].encode(text) == models[kind].encode(text.encode())


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.lists(st.sampled_from(NASTY[:-1])).map("".join))
def test_round_trip_of_any_text(models: dict[str, SentencePiece], text: str) -> None:
    for tokenizer in models.values():
        check_lossless(tokenizer, text)


@settings(deadline=None, max_examples=300)
@given(
    data=st.binary()
    | st.lists(st.sampled_from([b"\xe2\x96", b"\x81", b" ", b"\xed\xa0\x80", b"\xf0\x9f", b"a"])).map(b"".join)
)
def test_round_trip_of_any_bytes(models: dict[str, SentencePiece], data: bytes) -> None:
    for tokenizer in models.values():
        check_lossless(tokenizer, data)


def test_round_trip_of_source_code(models: dict[str, SentencePiece]) -> None:
    for text in stdlib_texts(60)[40:]:
        for tokenizer in models.values():
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_of_control_pieces_in_text_are_characters(models: dict[str, SentencePiece]) -> None:
    for tokenizer in models.values():
        assert len(tokenizer.encode("<s>")) > 1
        assert tokenizer.encode("<0x41>") != tokenizer.encode("A")
        assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [1, 2, 3]
        assert tokenizer.decode([1, *tokenizer.encode("a b"), 2, 3, 0]) == "a b"


def test_a_user_symbol_is_always_its_one_id(models: dict[str, SentencePiece]) -> None:
    for tokenizer in models.values():
        user, longer, qq = (tokenizer.encode(symbol) for symbol in SYMBOLS)
        assert (user, longer, qq) == ([4], [5], [6])
        assert tokenizer.encode("a<|user|>xb<|user|>") == [*tokenizer.encode("a"), 5, *tokenizer.encode("b"), 4]
    for _ in range(200):  # sentencepiece alone splits a symbol when it samples
        assert models["unigram"].sample("qqqq<|user|>", 0.0) == [6, 6, 4]


def test_lone_surrogates(unigram: SentencePiece) -> None:
    assert unigram.decode_bytes(unigram.encode("a\udcff")) == b"a\xff"
    with pytest.raises(UserError, match=r"not Unicode: lone surrogate '\\ud800'"):
        unigram.encode("a\ud800")


def test_decode_shows_half_a_character_and_refuses_ids_outside(unigram: SentencePiece) -> None:
    ids = unigram.encode("\U0001f600")
    assert len(ids) == 4 and unigram.decode(ids[:2] + unigram.encode("a")) == "\ufffda"
    with pytest.raises(IndexError):
        unigram.decode([unigram.vocab_size])
    with pytest.raises(IndexError, match="token id -100 is negative"):
        unigram.decode([5, -100])


def test_cuts_do_not_change_the_segmentation(models: dict[str, SentencePiece]) -> None:
    text = "".join(stdlib_texts(20)[18:])[:20_000] + CHINESE * 200 + " " * 10_000
    for tokenizer in models.values():
        parts = list(tokenizer._cut(text))
        assert "".join(parts) == text and len(parts) > 5 and all(parts)
        assert all(len(part) >= CUT_CHARS for part in parts[:-1])
        assert tokenizer.encode(text) == tokenizer._processor.encode(text)
        assert not {a[-1] + b[0] for a, b in itertools.pairwise(parts)} & tokenizer._bonds


def lattice_law(tokenizer: SentencePiece, text: str, alpha: float) -> dict[tuple[int, ...], float]:
    """P(seg) = exp(alpha score) / Z by listing every segmentation, in float64."""
    processor = tokenizer._processor
    ids = {processor.id_to_piece(i): i for i in range(4 + len(SYMBOLS) + 256, tokenizer.vocab_size)}
    text = text.replace(" ", "▁")

    def segmentations(start: int) -> list[tuple[int, ...]]:
        if start == len(text):
            return [()]
        ends = [end for end in range(start + 1, len(text) + 1) if text[start:end] in ids]
        return [(ids[text[start:end]], *rest) for end in ends for rest in segmentations(end)]

    weights = {seg: math.exp(alpha * math.fsum(map(processor.get_score, seg))) for seg in segmentations(0)}
    total = math.fsum(weights.values())
    return {seg: weight / total for seg, weight in weights.items()}


@pytest.mark.parametrize("cut_chars", [CUT_CHARS, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_sampling_law(unigram: SentencePiece, alpha: float, cut_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square against the enumeration, the rare segmentations pooled. A cut must not change the law."""
    monkeypatch.setattr(module, "CUT_CHARS", cut_chars)
    text, n = " return default in list:\n", 10_000
    law = lattice_law(unigram, text, alpha)
    assert len(law) > 50
    counts = Counter(tuple(unigram.sample(text, alpha)) for _ in range(n))
    assert counts.keys() <= law.keys()
    common = [seg for seg in law if n * law[seg] >= 5]
    cells = [(counts[seg], n * law[seg]) for seg in common]
    rare = n - sum(count for count, _ in cells), n - sum(mean for _, mean in cells)
    cells += [rare] if rare[1] >= 5 else []
    chi2, degrees = sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1
    assert degrees >= 5
    # Wilson and Hilferty: this is normal. 5 deviations, once in a million runs, since each process draws anew.
    variance = 2 / (9 * degrees)
    assert abs((chi2 / degrees) ** (1 / 3) - (1 - variance)) < 5 * math.sqrt(variance)


def test_sampling_tends_to_the_best_segmentation(unigram: SentencePiece) -> None:
    text = stdlib_texts(20)[19][:3000]
    assert unigram.sample(text, 1e4) == unigram.encode(text)
    assert len({tuple(unigram.sample(text, 0.1)) for _ in range(5)}) == 5
    law = lattice_law(unigram, " self is", 1.0)
    assert max(law, key=law.__getitem__) == tuple(unigram.encode(" self is"))


def test_sample_seed(unigram: SentencePiece) -> None:
    def draw(seed: int) -> list[list[int]]:
        set_sample_seed(seed)
        return [unigram.sample("return self.value", 0.1) for _ in range(5)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(2**32 - 1) == draw(0)  # sentencepiece itself would ignore this seed
    assert draw(-1) == draw(2**32 - 2)


def test_another_process_draws_differently_from_the_same_seed(unigram: SentencePiece) -> None:
    code = (
        "import sys; from megakexue.text.tokenizer import SentencePiece, set_sample_seed; set_sample_seed(7); "
        "print(SentencePiece(sys.argv[1]).sample('return self.value' * 20, 0.1))"
    )
    command = [sys.executable, "-c", code, str(unigram.path)]
    drawn = [subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_sample_errors(models: dict[str, SentencePiece]) -> None:
    with pytest.raises(UserError, match="BPE model, which has no segmentation lattice: sample needs unigram"):
        models["bpe"].sample("a", 0.1)
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"alpha=.* must be finite and not negative"):
            models["unigram"].sample("a", alpha)


def test_what_a_tokenizer_says_of_itself(models: dict[str, SentencePiece]) -> None:
    for kind, tokenizer in models.items():
        assert tokenizer.sha256 == sha256(tokenizer.path)
        assert tokenizer.vocab_size == 1000
        assert tokenizer.is_unigram == (kind == "unigram")
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(NASTY[14]) == tokenizer.encode(NASTY[14])


def test_needs_no_torch() -> None:
    code = "import megakexue.text.tokenizer, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos_id": -1, "eos_id": -1}, r"has no BOS and no EOS: take the tokenizer\.json of the same model, or train"),
        ({"byte_fallback": False}, "has no byte pieces: take the"),
        ({"normalization_rule_name": "nfkc"}, "changes text"),
        ({"add_dummy_prefix": True, "treat_whitespace_as_suffix": True}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
    ],
)
def test_refuses_a_model_that_cannot_be_exact(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SentencePiece(foreign_model(tmp_path, **options))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_without_spaces_gives_a_tokenizer_for_all_text(tmp_path: Path, kind: Kind) -> None:
    texts = ["".join(text.split()) for text in stdlib_texts(3)]
    train_tokenizer(texts, tmp_path / "t.model", vocab_size=500, kind=kind)
    for text in NASTY:
        check_lossless(SentencePiece(tmp_path / "t.model"), text)
    # a model of others has no piece for a space then
    model = ModelProto.FromString((tmp_path / "t.model").read_bytes())
    next(piece for piece in model.pieces if piece.piece == SPACE).piece = "zebra"
    (tmp_path / "t.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"has no piece for a space, which would come back as U\+2581: take the "):
        SentencePiece(tmp_path / "t.model")


def test_reads_a_foreign_model_that_can(tmp_path: Path) -> None:
    tokenizer = SentencePiece(foreign_model(tmp_path, user_defined_symbols=["<a>", "▁b c"], split_by_whitespace=False))
    for text in [*NASTY, "x b c▁b c b▁c<a>"]:
        check_lossless(tokenizer, text)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_model_with_a_dummy_prefix_and_few_marks_is_exact_and_has_the_ids_of_the_library(
    tmp_path: Path, kind: str
) -> None:
    """As Llama 2 and Mistral have it."""
    options = dict(model_type=kind, add_dummy_prefix=True, pad_id=-1, user_defined_symbols=["<a>"], vocab_size=500)
    tokenizer = SentencePiece(foreign_model(tmp_path, **options))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    long = "".join(stdlib_texts(3))[: 3 * CUT_CHARS]
    for text in [*NASTY, "a<a>b", "<a> <a>", "x", " x", "  x", "\nx", long, *stdlib_texts(2)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode() and not {0, 1, 2} & set(ids)
        if SPACE not in text:  # which it takes for a space
            assert ids == reference.encode(text)
    first, then = tokenizer.encode("def f"), tokenizer.encode_array("(x):", is_start=False).tolist()
    assert tokenizer.decode_bytes(first + then) == b"def f(x):"
    assert b"".join(map(tokenizer.piece, first)) == b" def f" and tokenizer.piece(1) == b""


def test_one_mark_serves_for_both_ends(tmp_path: Path) -> None:
    tokenizer = SentencePiece(foreign_model(tmp_path, bos_id=-1, pad_id=-1))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 0)
    tokenizer = SentencePiece(foreign_model(tmp_path, eos_id=-1, pad_id=3))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, 3)


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match=r"no tokenizer .*t\.model: train one with tools/train_tokenizer\.py"):
        SentencePiece(path)
    for junk in (b"", b"junk", random.Random(0).randbytes(1000)):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="is not a sentencepiece model"):
            SentencePiece(path)


# Training


def test_sample_is_the_smallest_keys_in_any_order() -> None:
    rng = random.Random(0)
    blocks = [(rng.randrange(2**64), rng.randbytes(rng.randrange(1, 40))) for _ in range(500)]
    expected, total = [], 0
    for _, block in sorted(blocks):
        if (total := total + len(block)) > 1000:
            break
        expected.append(block)
    for _ in range(5):
        rng.shuffle(blocks)
        sample = Sample(1000)
        for key, block in blocks:
            sample.add(key, block)
        assert sample.blocks() == expected
        assert sample.n_bytes == sum(map(len, expected)) <= 1000


def test_blocks_are_the_text() -> None:
    for text in [*NASTY, "".join(stdlib_texts(3)), "x" * 3333, "word " * 999]:
        blocks = BLOCK.findall(text)
        assert "".join(blocks) == text
        assert all(len(block) <= 1000 for block in blocks)
    assert BLOCK.findall("a" * 600 + "\n" + "b" * 600) == ["a" * 600 + "\n", "b" * 600]


def test_training_is_deterministic_and_ignores_the_order(tmp_path: Path) -> None:
    texts = stdlib_texts(30)
    options: dict[str, Any] = dict(vocab_size=600, n_threads=2, sample_bytes=100_000)
    first = train_tokenizer(texts, tmp_path / "a.model", **options)
    second = train_tokenizer(texts[::-1], tmp_path / "b.model", **options)
    assert first == second and first["sha256"] == sha256(tmp_path / "a.model") == sha256(tmp_path / "b.model")
    assert train_tokenizer(texts, tmp_path / "c.model", seed=1, **options)["sha256"] != first["sha256"]
    assert 90_000 < first["train_bytes"] <= 100_000 and 0 < first["heldout_bytes"] <= 2000
    assert first["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_compression_is_measured_on_text_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[bytes] = []
    make_trainable = module.make_trainable

    def note(block: bytes) -> bytes:
        trained.append(block)
        return make_trainable(block)

    monkeypatch.setattr(module, "make_trainable", note)
    texts = stdlib_texts(8)
    facts = train_tokenizer(texts, tmp_path / "a.model", vocab_size=600, kind="bpe")
    blocks = Counter(block.encode() for text in texts for block in BLOCK.findall(text))
    heldout = blocks - Counter(trained)
    assert not set(heldout) & set(trained)
    assert facts["train_bytes"] == sum(map(len, trained))
    assert facts["heldout_bytes"] == sum(len(block) * n for block, n in heldout.items())
    tokenizer = SentencePiece(tmp_path / "a.model")
    n_tokens = sum(n * len(tokenizer.encode(block)) for block, n in heldout.items())
    assert facts["bytes_per_token"] == facts["heldout_bytes"] / n_tokens > 1.5


def test_training_drops_nothing(tmp_path: Path) -> None:
    """sentencepiece alone drops lines that are long or hold U+2585 or NUL, and takes U+2581 for a space."""
    for mark in ["▅", "\0", "▁", ""]:
        text = f"{mark} zebraquux" * 5000  # one line
        train_tokenizer([text, *stdlib_texts(2)], tmp_path / "t.model", vocab_size=500, kind="bpe")
        tokenizer = SentencePiece(tmp_path / "t.model")
        assert len(tokenizer.encode(" zebraquux")) == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text
    surrogate = ["\ud800 " + text for text in stdlib_texts(2)]
    train_tokenizer(surrogate, tmp_path / "t.model", vocab_size=400, kind="bpe")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_stay_within_chinese_words(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rjieba = pytest.importorskip("rjieba")
    text = "".join(f"{who}的时候，{who}的研究\n" for who in ("我", "你", "我们"))
    options: dict[str, Any] = {"kind": kind, "n_threads": 1}
    texts = [text * 40]
    plain = train_tokenizer(texts, tmp_path / "plain.model", vocab_size=275, **options)
    options |= {"vocab_size": 273, "chinese_words": True}
    facts = train_tokenizer(texts, tmp_path / "words.model", **options)
    assert plain["chinese_words"] is None and facts["chinese_words"].startswith("rjieba ")
    monkeypatch.setitem(sys.modules, "rjieba", None)  # from here on it is not needed
    pieces = {}
    for name in ("plain", "words"):
        tokenizer = SentencePiece(tmp_path / f"{name}.model")
        for nasty in [*NASTY, text]:
            check_lossless(tokenizer, nasty)
        pieces[name] = {tokenizer.piece(i).decode("utf-8", "replace") for i in range(tokenizer.vocab_size)}
    words = {word for run in module.HAN.findall(text) for word in rjieba.cut(run, False)}
    assert {"研究", "时候"} <= words
    whole = {piece for piece in pieces["words"] if len(piece) > 1 and module.HAN.fullmatch(piece)}
    assert whole and all(any(piece in word for word in words) for piece in whole)
    assert any(not any(p in word for word in words) for p in pieces["plain"] if module.HAN.fullmatch(p))
    with pytest.raises(UserError, match=r"--chinese-words needs rjieba: pip install 'megakexue\[chinese\]'"):
        train_tokenizer(texts, tmp_path / "none.model", **options)
    assert not (tmp_path / "none.model").exists()


def test_newlines_and_indentation_have_pieces(unigram: SentencePiece) -> None:
    assert len(unigram.encode("):\n" + " " * 8)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 10**6}, r"vocab_size=1000000 is more than the text can fill: use at most \d+, or give more"),
        ({"vocab_size": 270}, r"vocab_size=270 cannot hold .* use at least \d+, or lower character_coverage"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"sample_bytes": 0}, "sample_bytes=0 must be positive"),
        ({"sample_bytes": 10}, r"\d+ bytes of text \(sample_bytes=10\) are too little to train on"),
        ({"character_coverage": 0.5}, r"character_coverage=0\.5 must be in \[0\.98, 1\]"),
        ({"n_threads": 0}, r"n_threads=0 must be in \[1, 128\]"),
        ({"user_symbols": ["<s>"]}, "user symbol '<s>' must be non-empty"),
        ({"user_symbols": ["<0x41>"]}, "user symbol '<0x41>' must be non-empty"),
        ({"user_symbols": ["a b"]}, "user symbol 'a b' must be non-empty, without whitespace"),
        ({"user_symbols": [""]}, "user symbol '' must be non-empty"),
        ({"user_symbols": ["<a>", "<a>"]}, "a user symbol is given twice"),
    ],
)
def test_training_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"vocab_size": 400, "kind": "bpe", "n_threads": 2} | options
    with pytest.raises(UserError, match=message):
        train_tokenizer(stdlib_texts(2), tmp_path / "t.model", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_limits_that_errors_name_are_right(tmp_path: Path) -> None:
    def limit(vocab_size: int, kind: Kind) -> int:
        with pytest.raises(UserError, match=r"use at (most|least) \d+") as raised:
            train_tokenizer(stdlib_texts(2), tmp_path / "t.model", vocab_size=vocab_size, kind=kind, n_threads=2)
        return int(str(raised.value).split("use at ")[1].split()[1].rstrip(","))

    kinds: tuple[Kind, ...] = ("unigram", "bpe")
    for kind in kinds:
        for vocab_size in (270, 10**6):
            train_tokenizer(
                stdlib_texts(2), tmp_path / "t.model", vocab_size=limit(vocab_size, kind), kind=kind, n_threads=2
            )
