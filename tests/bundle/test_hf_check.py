"""The check of an export: what transformers loads and computes is what was written and what the bundle computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.hf_check import compare
from megakexue.bundle.hf_export import _weights, export_hf
from megakexue.config import UserError
from tests.bundle.exporting import PLAIN, random_bundle, random_tokens
from tests.conftest import Prepared

IDS = random_tokens()[0].tolist()


@pytest.fixture
def exported(prepared: Prepared, tmp_path: Path) -> tuple[Bundle, Path]:
    """A bundle, and its export in fp32 that nothing has checked."""
    bundle = random_bundle(prepared, tmp_path / "bundle", **PLAIN)
    export_hf(bundle, tmp_path / "hf", dtype="fp32", check=False)
    return bundle, tmp_path / "hf"


def change(folder: Path, name: str, tensor: Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: tensor}, path, {"format": "pt"})


def test_equal_models_agree_with_and_without_a_cache(exported: tuple[Bundle, Path]) -> None:
    bundle, folder = exported
    found = compare(bundle, folder, _weights(bundle, "LlamaForCausalLM"), IDS, torch.device("cpu"))
    assert found.n_tokens == len(IDS) and found.rounded is None
    assert 0 < found.whole < 1e-5 and 0 < found.cached < 1e-5
    assert str(found).startswith(f"on {len(IDS)} tokens in float32, logits differ by ")


@pytest.mark.parametrize(
    ("ids", "name", "message"),
    [
        (IDS[:16], None, "the text of the check has 16 tokens: give more than 16 with --text"),
        (IDS, "model.layers.1.mlp.up_proj.weight", "loads other values of model.layers.1.mlp.up_proj.weight than"),
    ],
)
def test_what_is_wrong_is_named(exported: tuple[Bundle, Path], ids: list[int], name: str, message: str) -> None:
    bundle, folder = exported
    if name:
        change(folder, name, torch.ones(80, 48))
    with pytest.raises(UserError, match=message):
        compare(bundle, folder, _weights(bundle, "LlamaForCausalLM"), ids, torch.device("cpu"))


def test_another_function_is_refused(exported: tuple[Bundle, Path]) -> None:
    bundle, folder = exported
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": ', '"rope_theta": 1'))
    with pytest.raises(UserError, match=r"the exported model is not ours: on 60 tokens .* is rounding"):
        compare(bundle, folder, _weights(bundle, "LlamaForCausalLM"), IDS, torch.device("cpu"))
