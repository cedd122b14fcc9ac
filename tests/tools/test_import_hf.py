"""The program: a folder becomes a bundle that is compared, trains, and grows; where it differs, nothing is left."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.families import their_names, their_weight
from megakexue.bundle.hf_config import read_config
from megakexue.config import Config, UserError, load_config, read_yaml, to_yaml
from megakexue.core.resolve import resolve
from tests.conftest import Prepared
from tests.helpers import ROOT, build, outcomes, records, tiny_run
from tests.hf import MINICPM, SIZES, save_model
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

PROGRAM = ROOT / "tools" / "import_hf.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any, program: Path = PROGRAM) -> None:
    """Run the program in this process. Raises UserError, as its `main` does."""
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
    runpy.run_path(str(program))["main"]()


def config_of(bundle: Path, prepared: Prepared, folder: Path, *overrides: str) -> Path:
    """Write a config with the model section of a bundle, as a user copies it."""
    settings = [x for x in tiny_run(prepared, folder / "run") if not x.startswith("model.")]
    values = read_yaml(ROOT / "configs" / "tiny_gqa.yaml") | {"model": read_yaml(bundle / "config.yaml")["model"]}
    path = folder / "config.yaml"
    path.write_text(to_yaml(values))
    path.write_text(to_yaml(load_config(path, [*settings, *overrides])))
    return path


ADAMW = ["optim.name=adamw", "optim.lr=1e-2", "train.steps=6", "optim.warmup_steps=0", "evaluate.every_steps=null"]


@pytest.mark.slow
def test_imported_models_train_and_grow(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[Config] = []
    for i, name in enumerate(("Qwen2", "Qwen3", "Llama 3")):
        source, bundle = tmp_path / name, tmp_path / f"{name} bundle"
        save_model(name, source, prepared.tokenizer)
        run(monkeypatch, source, "--out", bundle)
        said = capsys.readouterr().out
        found = re.search(r"512 tokens' float32 logits .* at most: whole (\S+), cached (\S+) \(bound", said)
        assert found and max(map(float, found.groups())) < 1e-5 and "same for 100.00%" in said, said
        opened = Bundle(bundle)
        assert opened.lineage["family"] in ("qwen2", "qwen3", "llama") and opened.lineage["verified"]["tokens"] == 512
        assert opened.load_tokenizer().vocab_size == 512
        folder = tmp_path / f"train {i}"
        folder.mkdir()
        stage = f"engine.zero_stage={i + 1}"
        configs.append(load_config(config_of(bundle, prepared, folder, *ADAMW, stage, f"train.init_from={bundle}")))
    assert run_on_ranks(2, outcomes, configs) == [[""] * 3] * 2
    for config in configs:
        losses = [r["loss"] for r in records(Path(config.train.run)) if r["kind"] == "train"]
        assert losses[-1] < losses[0] - 0.3, losses

    # AdamW's state starts fresh, and the function is the old one
    bundle, folder = tmp_path / "Qwen2 bundle", tmp_path / "grown"
    folder.mkdir()
    target = config_of(bundle, prepared, folder, *ADAMW)
    wider = ["model.d_model=48", "model.n_heads=6", "model.n_kv_heads=3", "model.d_ff=64", "model.n_layers=3"]
    scale = Bundle(bundle).config.d_model / 48
    grow = [tmp_path / "Qwen2", "--config", target, "--out", folder / "bundle", f"model.logit_scale={scale}", *wider]
    program = ROOT / "tools" / "grow_model.py"
    with pytest.raises(UserError, match=r"below that of the weights: set model.d_ff=48"):  # before the import
        run(monkeypatch, *grow, "model.d_ff=32", program=program)
    run(monkeypatch, *grow, program=program)  # from the folder itself
    said = capsys.readouterr().out
    assert "optimizer        no state in the source\n" in said and "float32   norm_eps 1e-05: 512 tokens'" in said
    assert "tokens' float32 logits differ from transformers' by at most: whole" in said
    grown = Bundle(folder / "bundle")
    assert grown.weight("blocks.0.attention.bq").shape == (48,) and not list(folder.glob(".*"))
    assert grown.lineage["source"] == str(tmp_path / "Qwen2") and grown.lineage["of"]["family"] == "qwen2"


def test_what_differs_is_not_written(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megakexue.bundle import hf_import

    source, out = tmp_path / "model", tmp_path / "bundle"
    save_model("Granite", source, prepared.tokenizer)
    wrong = hf_import.weights

    def a_little_wrong(*arguments: Any) -> Any:
        for name, weight in wrong(*arguments):
            yield name, weight * 1.001 if name == "blocks.1.attention.wv" else weight

    monkeypatch.setattr(hf_import, "weights", a_little_wrong)
    with pytest.raises(UserError, match=r"the imported model is not the one of .*; nothing is written"):
        run(monkeypatch, source, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    run(monkeypatch, source, "--out", out, "--no-check", "--dtype", "bf16")
    assert Bundle(out).weight("blocks.1.attention.wv").dtype == torch.bfloat16
    monkeypatch.undo()
    # what is compared is not rounded yet; and its card knows no number of tokens
    run(monkeypatch, source, "--out", out, "--overwrite", "--dtype", "bf16")
    assert {Bundle(out).weight(f"blocks.1.{name}").dtype for name in ("attention.wv", "attention.wo")} == {
        torch.bfloat16
    }
    run(monkeypatch, out, tmp_path / "hf", "--no-check", program=ROOT / "tools" / "export_hf.py")
    assert "| trained on | not known |" in (tmp_path / "hf" / "README.md").read_text()
    model = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(model | {"vocab_size": 511}))
    with pytest.raises(UserError, match=r"tokenizer.model has 512 ids, and the embedding 511 rows"):
        run(monkeypatch, source, "--out", tmp_path / "other", "--no-check")
    (source / "config.json").write_text(json.dumps(model))
    text = tmp_path / "text"
    text.write_text("too short")
    with pytest.raises(UserError, match=r"--text .* tokens, too few for a comparison"):
        run(monkeypatch, source, "--out", out, "--overwrite", "--text", text)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    with pytest.raises(UserError, match=r"mlp_bias=True is not supported"):
        run(monkeypatch, source, "--out", out, "--overwrite")
    assert Bundle(out).config.embed_scale == 12  # what was there is still there
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has neither tokenizer.json nor tokenizer.model: name one with --tokenizer"):
        run(monkeypatch, source, "--out", out, "--overwrite")
    run(monkeypatch, source, "--out", out, "--overwrite", "--tokenizer", prepared.tokenizer)
    assert "granite, " in capsys.readouterr().out


def test_a_class_that_transformers_lacks(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = pytest.importorskip("transformers.models.auto.configuration_auto")
    monkeypatch.delitem(configs.CONFIG_MAPPING._mapping, "minicpm3", raising=False)  # version 5 has it
    values = SIZES | MINICPM | {"model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]}
    source, out, config = tmp_path / "model", tmp_path / "bundle", resolve(read_config(values, "x").model, "adamw", 256)
    own = {name: p.detach() for name, p in build(config).named_parameters()}
    tensors = {name: their_weight(name, config, own.__getitem__).contiguous() for name in their_names(config)}
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModelForCausalLM": "modeling.X"}}))
    (source / "modeling.py").write_text("raise SystemExit('code of the folder was run')")
    shutil.copyfile(prepared.tokenizer, source / "tokenizer.model")
    with pytest.raises(UserError, match=r"^transformers \d\.\S+ has no class for minicpm3, .* that has transformers 5"):
        run(monkeypatch, source, "--out", out)
    assert not out.exists()
    run(monkeypatch, source, "--out", out, "--no-check")
    assert "minicpm3, " in capsys.readouterr().out
    opened, factor = Bundle(out), 1.4 / 2**0.5 * 0.1**0.5
    assert opened.config == config and torch.equal(opened.weight("embedding.weight"), own["embedding.weight"])
    assert torch.allclose(opened.weight("blocks.1.attention.wo"), own["blocks.1.attention.wo"] * factor)


def test_mistakes_in_the_arguments_cost_no_imports(tmp_path: Path) -> None:
    cases = {
        "error: no file or folder nowhere": ["nowhere", "--out", "x"],
        "exists: choose another name, or add --overwrite": [str(tmp_path), "--out", str(tmp_path)],
        "error: --text none: no such file": [str(tmp_path), "--out", "x", "--text", "none"],
    }
    results = run_without_torch(PROGRAM, [*cases.values(), ["--help"]])
    for message, (code, _, err) in zip(cases, results):
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert results[-1][0] == 0 and "bundles/qwen3" in results[-1][1]
