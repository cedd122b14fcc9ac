"""What the program prints and refuses, and that the tables in the documents are what it prints."""

import re

from tests.helpers import ROOT
from tests.programs import run_without_torch

TOOL = ROOT / "tools" / "plan.py"
CONFIG = str(ROOT / "configs" / "1b.yaml")


def test_a_plan() -> None:
    arguments = [CONFIG, "--gpus", "64", "--gpu", "h100", "--budget-tokens", "1e11", "--price", "2"]
    ((code, out, err),) = run_without_torch(TOOL, [arguments])
    assert (code, err) == (0, "")
    assert out.startswith("plan          1,344,372,736 parameters on 64 h100 in 8 nodes\n")
    total, *parts = (float(x) for x in re.findall(r"^(?:memory|  \w+) +([\d.]+)(?: GiB a rank.*)?$", out, re.MULTILINE))
    assert abs(total - sum(parts[:7])) < 0.1, out
    step, *seconds = (float(x) for x in re.findall(r" ([\d.]+) s\b", out))
    assert abs(step - sum(seconds)) < 0.01, out
    assert re.search(r"^speed +[\d,]+ tokens/s a GPU, MFU \d\d\.\d%", out, re.MULTILINE)
    hours, dollars = re.findall(r"([\d,]+) GPU hours, ([\d,]+) USD", out)[0]
    assert abs(int(dollars.replace(",", "")) - 2 * int(hours.replace(",", ""))) <= 1


def test_what_does_not_fit_is_said() -> None:
    config = str(ROOT / "configs" / "7b_from_1b.yaml")
    ((code, out, _),) = run_without_torch(TOOL, [[config, "engine.zero_stage=0", "--gpus", "8", "--gpu", "h100"]])
    assert code == 0 and "DOES NOT FIT" in out and "try engine.recompute=block" in out


def test_the_longest_row_asks_for_no_setting_of_its_own() -> None:
    heads = ["model.n_heads=12", "model.n_kv_heads=3", "model.d_head=128"]
    own = ["engine.recompute=product", "data.stages=[{until_step: 10, seq_len: 2048}]"]
    plain, other = (
        [CONFIG, *heads, *options, "--gpus", "8", "--gpu", "h100", "--longest-row"] for options in ([], own)
    )
    (code, out, _), (_, again, _) = run_without_torch(TOOL, [plain, other])
    assert code == 0 and out == again and "| settings | shared by 1 | on" in out, (out, again)


def test_mistakes_are_one_line() -> None:
    cases = {
        "--gpus 8 --gpu v100": "--gpu v100 is not known: use one of a100, h100, h200, b200",
        "--gpus 0 --gpu h100": "--gpus 0 must be positive",
        "--gpus 8 --gpu h100 --price -1": "--price -1.0 must be positive",
        "--gpus 7 --gpu h100": "train.global_batch_size=512 must be a multiple of train.micro_batch_size=4 times the 7",
        "--gpus 8 --gpu h100 engine.dtype=fp32": "engine.dtype=fp32: rates are known of 16 bits only",
        "--gpus 9 --gpu h100 engine.sequence_ranks=2": "engine.sequence_ranks=2 must divide the 9 ranks",
        "--gpus 8 --gpu h100 model.d_modle=3": "model.d_modle is no setting",
    }
    for (code, out, err), said in zip(run_without_torch(TOOL, [[CONFIG, *c.split()] for c in cases]), cases.values()):
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err


def test_the_tables_of_the_documents_are_what_it_prints() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^tools/plan.py (.* --(?:scaling|longest-row).*)$", text, re.MULTILINE)
    assert len(commands) == 8
    for code, out, _ in run_without_torch(TOOL, [f"{ROOT}/{command}".split() for command in commands]):
        assert code == 0 and out.strip() in text, out
