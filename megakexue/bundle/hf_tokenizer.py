"""A sentencepiece model as the `tokenizer.json` of the `tokenizers` library.

Exact: decoding of any ids, but for bytes that are not UTF-8, which show as U+FFFD. Encoding is exact up to these:

- a U+2581 in text is taken for a space, which sentencepiece writes so; ours spells it in bytes;
- a control piece such as `<s>` that is typed in text becomes its id; in ours it is three characters;
- of segmentations of equal score the two libraries may take different ones: such are orders of pieces in a run of
  spaces, in one line of code in 150;
- where a space stands before each text (Llama 2), the library puts one behind each user-defined piece too.

What must stay true: ids are those of the model; nothing is read but the model.
"""

from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from megakexue.text.tokenizer import SPACE, SentencePiece

Piece = ModelProto.SentencePiece


def tokenizer_json(tokenizer: SentencePiece) -> dict[str, Any]:
    """Return the content of tokenizer.json for a model. Encoding puts BOS before a text."""
    model = ModelProto.FromString(tokenizer.path.read_bytes())
    bos_id = tokenizer.bos_id
    bos = model.pieces[bos_id].piece
    space, mark = {"String": " "}, {"String": SPACE}
    normalizers = [{"type": "Replace", "pattern": space, "content": SPACE}]
    decoders = [{"type": "Replace", "pattern": mark, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.normalizer_spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = [{kind: value | {"type_id": 1} for kind, value in part.items()} for part in (first, text)]
    second[1]["Sequence"]["id"] = "B"
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(i, piece) for i, piece in enumerate(model.pieces) if piece.type in ADDED],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, *second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": (_unigram if model.trainer_spec.model_type == TrainerSpec.UNIGRAM else _bpe)(model),
    }  # fmt: skip


ADDED = (Piece.CONTROL, Piece.UNKNOWN, Piece.USER_DEFINED)
"""Types of pieces that are cut out of the text before it is segmented."""


def _added(i: int, piece: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece.piece, **plain, "special": piece.type != Piece.USER_DEFINED}


def _unigram(model: Any) -> dict[str, Any]:
    vocabulary = [[piece.piece, piece.score] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": model.trainer_spec.unk_id, "vocab": vocabulary, "byte_fallback": True}


def _bpe(model: Any) -> dict[str, Any]:
    """Every way to put a piece together from two others is a merge, the piece of the best score first."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE", "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)}, "merges": merges,
        "unk_token": model.trainer_spec.unk_piece, "byte_fallback": True, "fuse_unk": True, "ignore_merges": False,
        "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    }  # fmt: skip
