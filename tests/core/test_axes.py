"""The axis table against the parameters of the decoder."""

from typing import Any

import pytest

from megakexue.core.axes import AXES, axes, parameter_names, shape
from megakexue.core.decoder import Decoder
from tests.helpers import VARIANTS, tiny


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_axis_table_covers_every_parameter_and_matches_its_shape(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    parameters = dict(Decoder(config, "reference").named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        name: shape(name, config) for name in parameters
    }
    assert sorted(parameters) == sorted(parameter_names(config))
    roles = {axes(name).role for name in parameters}
    assert roles == {"matrix", "embedding", "gain"} | ({"bias"} if config.attention.qkv_bias else set()) | (
        set() if config.tie_embeddings else {"head"}
    )
    assert all(letter in "vmhgdefrpncq" for table in AXES.values() for letter in table.out + table.contracted)
