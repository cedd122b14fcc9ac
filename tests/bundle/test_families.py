"""Names and layouts of transformers' tensors: both ways, without a bit lost, and against its own classes."""

import pytest
import torch

from megakexue.bundle.families import head_rows, is_rotated, our_weight, permuted, their_names, their_weight, unpermuted
from megakexue.config import ResolvedModel
from megakexue.core.axes import parameter_names, shape
from tests.helpers import KINDS, tiny
from tests.hf import MODELS, make_model

CONFIGS = {
    f"{kind}, {'tied' if tied else 'untied'}": tiny(residual="prenorm", tie_embeddings=tied, **values)
    for kind, values in KINDS.items()
    for tied in (False, True)
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_changes_no_bit(config: ResolvedModel) -> None:
    ours = {name: torch.randn(shape(name, config)) for name in parameter_names(config)}
    theirs = {name: their_weight(name, config, ours.__getitem__) for name in their_names(config)}
    assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in ours.values())
    for name, weight in ours.items():
        assert torch.equal(our_weight(name, config, theirs.__getitem__), weight), name


def test_interleaved_pairs_are_another_order_of_rows() -> None:
    heads = torch.arange(2 * 10)[:, None]
    # the last 6 of 10 rows: pairs (4, 5), (6, 7), (8, 9) become (4, 7), (5, 8), (6, 9)
    order = unpermuted(heads, 10, 6).flatten().tolist()
    assert order[:10] == [0, 1, 2, 3, 4, 6, 8, 5, 7, 9] and order[10:] == [10 + i for i in order[:10]]
    assert torch.equal(permuted(unpermuted(heads, 10, 6), 10, 6), heads)
    config = CONFIGS["mla, untied"]
    rotated = {name.rpartition(".")[2]: head_rows(name, config) for name in parameter_names(config) if is_rotated(name)}
    assert rotated == {"wq_up": (16, 6), "wk_rope": (6, 6)}


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_transformers(name: str) -> None:
    from megakexue.bundle.hf_config import read_config
    from megakexue.core.resolve import resolve

    model = make_model(name)
    values = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    config = resolve(read_config(values, "config.json").model, "adamw", 256)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(their_names(config)) == set(model.state_dict()) - tied
