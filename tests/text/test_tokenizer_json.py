"""tokenizer.json: the ids of the library, no control ids from text, and what decides the hash."""

import glob
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import UserError
from megakexue.text.tokenizer import train_tokenizer
from megakexue.text.tokenizer_files import load_tokenizer
from megakexue.text.tokenizer_json import TokenizerJson, byte_alphabet, read_spec
from tests.foreign import MARKS, byte_level, from_sentencepiece
from tests.text.helpers import stdlib_texts
from tests.text.test_tokenizer import CHINESE, NASTY

SCRIPTS = [
    "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.",
    "चलो, घर चलें। कल बारिश होगी १२३", "السلام عليكم ورحمة الله، كيف حالك اليوم؟", "나는 학교에 간다. 안녕하세요",
    "Ὀδυσσεύς, ἄνδρα μοι ἔννεπε, Μοῦσα", "ข้าพเจ้าไม่เข้าใจ", "吾輩は猫である。名前はまだ無い。",
]  # fmt: skip
DECOMPOSED = "cafe\u0301"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, texts = tmp_path_factory.mktemp("json"), [*stdlib_texts(8), CHINESE * 20, *SCRIPTS * 5]
    found = {kind: byte_level(folder / kind, kind, texts) for kind in ("llama3", "qwen", "one mark")}
    train_tokenizer(texts, folder / "unigram.model", vocab_size=700, kind="unigram", n_threads=1)
    train_tokenizer(texts, folder / "bpe.model", vocab_size=700, kind="bpe", n_threads=1)
    found["unigram"] = from_sentencepiece(folder / "unigram", folder / "unigram.model", "unigram")
    found["llama2"] = from_sentencepiece(folder / "llama2", folder / "bpe.model", "llama2")
    return found


@pytest.fixture(scope="module")
def opened(paths: dict[str, Path]) -> dict[str, TokenizerJson]:
    return {kind: TokenizerJson(path) for kind, path in paths.items()}


def library(path: Path, *, as_text: bool = True) -> tokenizers.Tokenizer:
    own = tokenizers.Tokenizer.from_file(str(path))
    own.encode_special_tokens = as_text
    return own


def test_ids_are_those_of_the_library(paths: dict[str, Path], opened: dict[str, TokenizerJson]) -> None:
    texts = [*NASTY, *SCRIPTS, *stdlib_texts(2), f"a <think> {DECOMPOSED}</think>\n"]
    for kind, path in paths.items():
        reference = library(path)
        for text in texts:
            if kind == "unigram" and "<s>" in text:
                continue  # the library takes it for the control token that it is a piece of
            assert opened[kind].encode(text) == reference.encode(text, add_special_tokens=False).ids, (kind, text)
            assert opened[kind].encode(text.encode()) == opened[kind].encode(text)


def test_special_tokens_in_text_are_characters(paths: dict[str, Path], opened: dict[str, TokenizerJson]) -> None:
    for kind, path in paths.items():
        spec = read_spec(path)
        assert len(spec.special) == {"llama3": 4, "qwen": 3, "one mark": 1, "llama2": 4, "unigram": 4}[kind]
        plain = library(path, as_text=False)
        for name, index in spec.special.items():
            text = f"x = '{name}' {name}{name}\n{name}"
            ids = opened[kind].encode(text)
            assert not set(ids) & set(spec.special.values()) and opened[kind].decode(ids) == text
            assert index in plain.encode(text, add_special_tokens=False).ids  # what others would train on
            assert opened[kind].piece(index) == b""
        framed = [spec.marks.bos_id, *opened[kind].encode("a b"), spec.marks.eos_id, spec.marks.pad_id]
        assert opened[kind].decode(framed) == "a b"
    ids = library(paths["unigram"]).encode("<s>", add_special_tokens=False).ids
    assert ids == [1]  # the library alone cannot avoid it


def test_added_tokens_that_are_not_special_are_text(opened: dict[str, TokenizerJson]) -> None:
    own = opened["qwen"]
    assert [own.piece(i) for i in own.encode("<think>a</think>")] == [b"<think>", b"a", b"</think>"]


@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.lists(st.sampled_from([*NASTY[:-1], *SCRIPTS])).map("".join))
def test_any_text_comes_back_where_nothing_normalises_it(opened: dict[str, TokenizerJson], text: str) -> None:
    for kind in ("llama3", "one mark"):
        assert opened[kind].decode_bytes(opened[kind].encode(text)) == text.encode()
    for kind in ("llama2", "unigram"):  # their spaces are U+2581, and Unigram takes the name of a byte for the byte
        if "▁" not in text and not (kind == "unigram" and "<0x" in text):
            assert opened[kind].decode_bytes(opened[kind].encode(text)) == text.encode()


def test_what_a_normaliser_changes_is_seen(opened: dict[str, TokenizerJson]) -> None:
    own = opened["qwen"]
    assert own.decode(own.encode(DECOMPOSED)) == "café" != DECOMPOSED
    assert not own.is_exact


def test_marks(paths: dict[str, Path], opened: dict[str, TokenizerJson]) -> None:
    def named(kind: str) -> list[str]:
        own = opened[kind]
        ids = read_spec(paths[kind]).ids
        names = {index: name for name, index in ids.items()}
        assert own.vocab_size == max(ids.values()) + 1
        return [names[i] for i in (own.bos_id, own.eos_id, own.pad_id)]

    assert named("llama3") == ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    assert named("qwen") == ["<|endoftext|>", "<|endoftext|>", "<|im_start|>"]  # PAD must not be EOS
    assert named("one mark") == ["<|endoftext|>"] * 3
    assert named("llama2") == ["<s>", "</s>", "<unk>"]
    assert named("unigram") == ["<s>", "</s>", "<pad>"]


def test_a_mark_that_the_file_does_not_call_special_is_none_in_text(paths: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads(paths["qwen"].read_text())
    for token in values["added_tokens"]:
        token["special"] = False
    path = rewritten(tmp_path, values, {"eos_token": {"content": "<|endoftext|>", "special": True}})
    own = TokenizerJson(path)
    assert (
        own.eos_id not in own.encode("a<|endoftext|>b") and own.decode(own.encode("<|endoftext|>")) == "<|endoftext|>"
    )
    assert own.encode("<|im_end|>") == [own.eos_id + 2]


def rewritten(folder: Path, values: Any, marks: Any = MARKS["qwen"], **options: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values, **options))
    return path


def test_the_hash_covers_what_decides_the_ids_and_no_more(paths: dict[str, Path], tmp_path: Path) -> None:
    text, before = paths["qwen"].read_text(), read_spec(paths["qwen"]).sha256

    def after(edit: Callable[[dict[str, Any]], Any], marks: Any = MARKS["qwen"], **options: Any) -> str:
        values = json.loads(text)
        edit(values)
        return read_spec(rewritten(tmp_path, values, marks, **options)).sha256

    def old_style(values: dict[str, Any]) -> None:
        model = values["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        for key in ("dropout", "unk_token", "fuse_unk", "ignore_merges", "byte_fallback"):
            model.pop(key, None)
        model["vocab"] = dict(reversed(model["vocab"].items()))
        values["added_tokens"].reverse()

    same: list[Callable[[dict[str, Any]], Any]] = [
        lambda v: None, old_style, lambda v: v.update(truncation={"max_length": 5}, version="2.0", decoder=None),
        lambda v: v.pop("post_processor"),
    ]  # fmt: skip
    assert {after(edit, indent=4) for edit in same} == {before}
    marks = MARKS["qwen"] | {"chat_template": "{{ x }}", "eos_token": {"content": "<|endoftext|>"}}
    assert after(lambda v: None, marks) == before
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda v: v.update(normalizer={"type": "NFKC"}),
        lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"),
        lambda v: v["model"]["merges"].pop(), lambda v: v["model"].update(ignore_merges=True),
        lambda v: v["model"]["vocab"].update(new=9999), lambda v: v["added_tokens"].pop(),
        lambda v: v["added_tokens"][-1].update(special=True), lambda v: v["added_tokens"][-1].update(lstrip=True),
    ]  # fmt: skip
    hashes = [after(edit) for edit in changes] + [after(lambda v: None, {"eos_token": "<|im_end|>"})]
    assert len({before, *hashes}) == len(hashes) + 1


def test_a_file_cannot_cut_or_frame_a_text(
    paths: dict[str, Path], opened: dict[str, TokenizerJson], tmp_path: Path
) -> None:
    own = library(paths["llama3"])
    own.enable_truncation(3)
    own.enable_padding(length=8)
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", own.token_to_id("<|begin_of_text|>"))]
    )
    path = rewritten(tmp_path, json.loads(own.to_str()), MARKS["llama3"])
    assert TokenizerJson(path).encode("a b c d e f g") == opened["llama3"].encode("a b c d e f g")
    assert len(opened["llama3"].encode("a")) == 1


def test_pickles_and_refuses_other_text(opened: dict[str, TokenizerJson]) -> None:
    for own in opened.values():
        copy = pickle.loads(pickle.dumps(own))
        assert copy.encode("<s><|endoftext|>") == own.encode("<s><|endoftext|>")
        for text in (b"a\xff", "a\ud800"):
            with pytest.raises(UserError, match=r"the text is not UTF-8, and .* takes no other bytes"):
                own.encode(text)
        with pytest.raises(IndexError, match="is negative"):
            own.decode_bytes([-1])
    assert len(set(byte_alphabet().values())) == len(byte_alphabet()) == 256


def test_what_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    def refused(message: str, edit: Callable[[dict[str, Any]], Any], marks: Any = MARKS["qwen"]) -> None:
        values = json.loads(paths["qwen"].read_text())
        path = rewritten(tmp_path, edit(values) or values, marks)
        with pytest.raises(UserError, match=message) as raised:
            load_tokenizer(path)
        assert "\n" not in str(raised.value)

    nothing = lambda v: None  # noqa: E731
    word_piece = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0}}
    refused("is a WordPiece tokenizer, which does not give back the text", lambda v: v.update(model=word_piece))
    refused("is one with dropout, which draws other ids each time", lambda v: v["model"].update(dropout=0.1))
    refused(r"does not say which token ends a document: write eos_token", nothing, {})
    refused(r"tokenizer_config\.json: eos_token '<x>' is no token of", nothing, {"eos_token": "<x>"})
    refused(r"writes pieces in a way that is not known here \(CTC\)", lambda v: v.update(decoder={"type": "CTC"}))
    refused(r"not known here \(no decoder\)", lambda v: v.update(decoder=None))
    refused("cannot be opened: ", lambda v: v["model"]["merges"].append(["no", "piece"]))
    refused(r"'<\|endoftext\|>' gets the id \d+ instead of 7777", lambda v: v["added_tokens"][0].update(id=7777))
    refused("is a tekken file: name a tokenizer.json", lambda v: {"config": {}, "vocab": [{"token_bytes": "YQ=="}]})
    refused(r"is a tokenizer_config\.json: name", lambda v: {"eos_token": "</s>", "tokenizer_class": "X"})
    refused(r"is a vocab\.json, which lacks the merges", lambda v: {"a": 0, "b": 1})
    refused("is what tools/train_tokenizer.py says of the .model beside it", lambda v: {"bytes_per_token": 4.0})
    refused("is some other JSON", lambda v: {"a": "b"})
    refused(r"is no tokenizer\.json that can be read", lambda v: v["added_tokens"].append({}))
    path = tmp_path / "tokenizer.json"
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"cannot read the tokenizer: Expecting value"):
        load_tokenizer(path)


@pytest.mark.skipif("MEGAKEXUE_TOKENIZERS" not in os.environ, reason="MEGAKEXUE_TOKENIZERS names no folder")
def test_real_tokenizers_have_the_ids_of_their_own_libraries() -> None:
    """Of each tokenizer.json and tokenizer.model below the folder, on its texts.json (a list of strings)."""
    folder = Path(os.environ["MEGAKEXUE_TOKENIZERS"])
    texts = [*json.loads((folder / "texts.json").read_text()), *stdlib_texts(20)]
    found = [Path(name) for name in sorted(glob.glob(f"{folder}/*/tokenizer.*"))]
    assert found
    for path in found:
        own = load_tokenizer(path)
        encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode if path.suffix == ".model" else None
        reference = None if encode else library(path)
        for text in texts:
            ids = encode(text) if encode else reference and reference.encode(text, add_special_tokens=False).ids
            assert own.encode(text) == ids, (path, text)
