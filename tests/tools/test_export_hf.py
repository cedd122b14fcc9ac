"""tools/export_hf.py as a program: a trained model goes out, is checked, and transformers continues text as we do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.generate import complete, load_decoder
from megakexue.bundle.modeling_megakexue import MegakexueForCausalLM
from megakexue.text.tokenizer import SentencePiece
from tests.conftest import Prepared, stdlib_files
from tests.helpers import ROOT, build, positions_of, tiny
from tests.programs import run_without_torch

TOOL = ROOT / "tools" / "export_hf.py"


def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=ROOT)


def trained_bundle(prepared: Prepared, out: Path) -> Bundle:
    """A small model, trained for some steps on Python's own source."""
    config, tokenizer = tiny(vocab_size=512), SentencePiece(prepared.tokenizer)
    ids = torch.tensor(tokenizer.encode("".join(path.read_text(encoding="utf-8") for path in stdlib_files(2))))
    model = build(config, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        starts = torch.randint(len(ids) - 65, (8, 1), generator=generator)
        rows = ids[starts + torch.arange(65)]
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        loss = model(tokens, positions_of(tokens), targets=targets).objective / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5
    weights = ((name, p.detach()) for name, p in model.named_parameters())
    return Bundle(write_bundle(out, config, weights, prepared.tokenizer, {"from": "a test", "tokens": 30720}))


@pytest.mark.slow
def test_a_trained_model_goes_out(prepared: Prepared, tmp_path: Path) -> None:
    bundle = trained_bundle(prepared, tmp_path / "bundle")
    sample = tmp_path / "sample.txt"
    sample.write_text(stdlib_files(3)[2].read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "deep" / "hf"
    options = ("--dtype", "fp32", "--license", "mit", "--shard-size", "0.0001", "--text", sample, "--device", "cpu")
    done = export(bundle.folder, out, *options)
    assert done.returncode == 0, done.stderr
    assert "MegakexueForCausalLM with its own file, since no plain class has residual=deepnorm" in done.stdout
    found = re.search(r"checked: on 64 tokens in float32, .* by (\S+) of their deviation, .* by (\S+)\n", done.stdout)
    assert found is not None and max(map(float, found.groups())) < 1e-5
    assert json.loads((out / "config.json").read_text())["query_log_floor"] == 16
    assert "| trained on | 30,720 tokens |" in (out / "README.md").read_text()
    assert len(list(out.glob("*.safetensors"))) > 2 and not list(out.parent.glob(".*"))

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = MegakexueForCausalLM.from_pretrained(out, dtype=torch.float32)
    texts = ["import ", "class Error(Exception):\n    ", ""]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ours = ["" for _ in texts]
    for row in complete(load_decoder(bundle), bundle.load_tokenizer(), texts, n_tokens=30, temperature=0):
        ours = [text + (piece or "") for text, piece in zip(ours, row, strict=True)]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ours
    assert len(ours[1]) > 20

    again = export(bundle.folder, out, "--no-check")
    assert again.returncode == 2 and again.stderr == f"error: {out} exists: choose another name, or remove it\n"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    there, out = str(tmp_path), str(tmp_path / "out")
    mistakes = {
        "--license a b must be a short name, such as apache-2.0 or mit": [there, out, "--license", "a b"],
        "--shard-size 0.0 must be positive, in GiB": [there, out, "--shard-size", "0"],
        "--device has no effect with --no-check: drop one of them": [there, out, "--no-check", "--device", "cpu"],
        "cannot read --text nowhere.txt: .*No such file.*": [there, out, "--text", "nowhere.txt"],
        f"{there} exists: choose another name, or remove it": [there, there],
        "no folder nowhere: name a bundle or a run": ["nowhere", out],
        "s3://b/x is in a bucket: copy the bundle to this machine first": ["s3://b/x", out],
        "https://x/y is no bucket that can be read and written: .*": [there, "https://x/y"],
    }
    for message, result in zip(mistakes, run_without_torch(TOOL, list(mistakes.values())), strict=True):
        code, printed, error = result
        assert (code, printed) == (2, "") and re.fullmatch(f"error: {message}\n", error), error
    assert list(tmp_path.iterdir()) == []
