"""The certificate: real runs that are stopped and resumed; every planted difference is found where it was planted."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakexue.config import to_yaml
from tests.conftest import Prepared
from tests.helpers import ROOT, tiny_config, tiny_run, train_all
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

PROGRAM = ROOT / "tools" / "verify_resume.py"
TOOL = runpy.run_path(str(PROGRAM))


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation and statistics at step 4, its last."""
    folder = tmp_path_factory.mktemp("verify") / "run"
    options = [
        "train.steps=4",
        "checkpoint.every_steps=4",
        "metrics.statistics_every_steps=4",
        "optim.momentum_dtype=bf16",
    ]
    run_on_ranks(1, train_all, [tiny_config(prepared, folder, *options)])
    return folder


def compare(a: Path, b: Path, **bounds: Any) -> Any:
    found = TOOL["Comparison"]()
    found.metrics(a, b, **bounds)
    checkpoints = [folder / "checkpoints" / "step_00000004" for folder in (a, b)]
    found.trainer(*checkpoints)
    found.tensors(*checkpoints)
    return found


def change_records(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        file = run / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        change(records)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    return edit


def of_kind(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(record for record in records if record["kind"] == kind)


def change_trainer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        file = run / "checkpoints" / "step_00000004" / "trainer.json"
        trainer = json.loads(file.read_text())
        change(trainer)
        file.write_text(json.dumps(trainer))

    return edit


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        file = run / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return edit


def cut_anew(run: Path) -> None:
    """Make three ranks of the one that wrote the checkpoint, with a cut through each tensor."""
    folder = run / "checkpoints" / "step_00000004"
    files: list[dict[str, Tensor]] = [{}, {}, {}]
    for i, (key, tensor) in enumerate(load_file(folder / "rank_00000.safetensors").items()):
        name, _, start = key.rpartition("/")
        cut = 0 if name == "rng" else tensor.numel() // 3
        if cut:
            files[(i + 1) % 3][f"{name}/{int(start) + cut}"] = tensor[cut:].clone()
            tensor = tensor[:cut].clone()
        files[i % 3 if cut else 0][key] = tensor
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"rank_{number:05d}.safetensors")


def test_clocks_names_and_cuts_do_not_count(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    change_records(lambda records: [r.update(step_s=1.0, mfu=0.5) for r in records if r["kind"] == "train"])(other)
    change_trainer(lambda trainer: trainer.update(lineage=["elsewhere"], source="another"))(other)
    cut_anew(other)
    found = compare(run, other)
    assert found.differences == {} and found.first_step == math.inf and found.largest == 0
    tensors = load_file(run / "checkpoints" / "step_00000004" / "rank_00000.safetensors")
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith("rng/")}
    assert found.counts == {
        "records": 4 + 1 + 1 + 1,
        "random states": len(tensors) - len(state),
        "tensors": len(state),
        "elements": sum(tensor.numel() for tensor in tensors.values()),
        "trainer values": 9,
    }
    assert {key.split("/")[0] for key in state} == {"master", "momentum"}


NAME = "blocks.1.attention.wq"
KEY = f"master/{NAME}/0"


def loss_up(records: list[dict[str, Any]]) -> None:
    records[2]["loss"] = math.nextafter(records[2]["loss"], math.inf)


def lose_half(tensors: dict[str, Tensor]) -> None:
    whole = tensors.pop(KEY)
    tensors |= {f"master/{NAME}/0": whole[:100].clone(), f"master/{NAME}/200": whole[200:].clone()}


def ulps(tensors: dict[str, Tensor]) -> None:
    tensors[KEY].view(torch.int32)[[70, 90]] += 1


def minus_zero(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][3] = -0.0


PLANTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "loss": (change_records(loss_up), r"metrics.jsonl, step 3, train: loss: (6\.\d+) and (?!\1)6\.\d+"),
    "status": (
        change_records(lambda records: records[1].update(status="skipped")),
        "metrics.jsonl, step 2, train: status: 'applied' and 'skipped'",
    ),
    "validation": (
        change_records(lambda records: of_kind(records, "valid").update(n_tokens=1)),
        r"metrics.jsonl, step 4, valid: n_tokens: \d+ and 1",
    ),
    "statistics": (
        change_records(lambda records: of_kind(records, "statistics")["tensors"][NAME].update(cosine="nan")),
        rf"metrics.jsonl, step 4, statistics: tensors.{NAME}.cosine: 0\.\d+ and 'nan'",
    ),
    "lost record": (change_records(lambda records: records.pop()), "step 4, read: kind: 'read' and 'missing'"),
    "what was read": (
        change_records(lambda records: of_kind(records, "read")["sources"]["data"].update(rows=63)),
        "metrics.jsonl, step 4, read: sources.data.rows: 64 and 63",
    ),
    "position": (
        change_trainer(lambda trainer: trainer["position"].update(sample=65)),
        "step_00000004/trainer.json: position.sample: 64 and 65",
    ),
    "guard": (
        change_trainer(lambda trainer: trainer["guard"]["losses"].pop()),
        r"trainer.json: guard.losses.3: 6\.\d+ and 'missing'",
    ),
    "data": (change_trainer(lambda trainer: trainer.update(data="x")), r"trainer.json: data: '[0-9a-f]+' and 'x'$"),
    "element": (
        change_tensors(ulps),
        rf"step_00000004: master/{NAME}\[70\]: (\S+) and (?!\1)\S+; 2 of 1024 elements differ, by at most \d\S*e-\d+",
    ),
    "sign of zero": (
        change_tensors(minus_zero),
        rf"master/{NAME}\[3\]: 0.0 and -0.0; 1 of 1024 elements differ, by at most 0",
    ),
    "missing tensor": (
        change_tensors(lambda tensors: tensors.pop(KEY)),
        f"step_00000004: master/{NAME}: missing in .*other",
    ),
    "missing piece": (
        change_tensors(lose_half),
        f"master/{NAME}: one piece ends at element 100 and the next starts at 200 in .*other",
    ),
    "shorter": (
        change_tensors(lambda tensors: tensors.update({KEY: tensors[KEY][:-1].clone()})),
        f"master/{NAME}: 1024 and 1023 elements",
    ),
    "dtype": (
        change_tensors(lambda tensors: tensors.update({KEY: tensors[KEY].bfloat16()})),
        f"master/{NAME}: torch.float32 and torch.bfloat16",
    ),
    "momentum": (
        change_tensors(lambda tensors: tensors[f"momentum/{NAME}/0"].mul_(2)),
        rf"momentum/{NAME}\[\d+\]: .* of 1024 elements differ",
    ),
    "random state": (
        change_tensors(lambda tensors: tensors["rng/torch"].view(-1)[9:10].add_(1)),
        r"step_00000004: rank_00000/rng/torch\[9\]: \d+ and \d+; 1 of 5056 elements differ, by at most (1|255)$",
    ),
}


def test_each_planted_difference_is_found(run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run, tmp_path / "base"))
    change_tensors(lambda tensors: tensors[KEY][3:5].copy_(torch.tensor([0.0, torch.nan])))(base)  # NaN is NaN
    for name, (plant, message) in PLANTED.items():
        other = Path(shutil.copytree(base, tmp_path / "other"))
        plant(other)
        found = compare(base, other)
        (lines,) = found.differences.values()
        assert lines == [found.first] and re.search(message, found.first), (name, lines)
        step = re.search(r"^(?:metrics.jsonl, )?step (\d)", message)
        assert found.first_step == (int(step[1]) if step else math.inf), name
        shutil.rmtree(other)


def test_a_bound_is_for_later_losses_alone(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    change_records(lambda records: [r.update(loss=r["loss"] * 1.001) for r in records if "loss" in r])(other)
    found = compare(run, other, bound=2e-3)
    assert (
        found.differences == {}
        and found.largest == pytest.approx(1e-3, rel=1e-2)
        and found.counts["records"] == 4 + 1 + 1
    )
    assert compare(run, other, bound=2e-3, exact_until=1).first_step == 1
    assert compare(run, other, bound=5e-4, exact_until=0).first_step == 1
    change_records(lambda records: records[2].update(lr=1.0))(other)
    assert compare(run, other, bound=2e-3).first_step == 3
    change_records(lambda records: records[1].update(loss="nan"))(other)
    assert compare(run, other, bound=2e-3).first_step == 2


def test_mistakes(prepared: Prepared, tmp_path: Path) -> None:
    config = [str(ROOT / "configs" / "tiny_gqa.yaml"), *tiny_run(prepared, tmp_path / "unused")]  # 8 steps of 16 rows
    cases = [
        (["--steps", "1"], "--steps 1 must be 2 or more, so that a run can be stopped between K and 2K"),
        (["--steps", "5"], "--steps 5: twice that is above train.steps=8"),
        (["--steps", "2", "--stages", "1", "4"], "stage 4 must be 0, 1, 2 or 3"),
        (["--steps", "2", "--ranks", "2", "3"], "train.micro_batch_size=4 times the 3 ranks = 12"),
        (["--steps", "2", "--ranks", "0"], "0 ranks: there must be one or more"),
        (["--steps", "2", "--moved-to", "2"], "--moved-to 2 is not of the form RANKS:STAGE, such as 4:3"),
        (["--steps", "2", "--moved-to", "3:1"], "times the 3 ranks = 12"),
        (["--steps", "2", "--moved-to", "2:7"], "stage 7 must be 0, 1, 2 or 3"),
        (["--bound", "1e-3"], "--bound 0.001 has no effect without --moved-to"),
        (["--bound", "0", "--moved-to", "2:1"], "--bound 0.0 must be positive"),
        (["--steps", "2", "--out", str(tmp_path)], f"--out {tmp_path} exists: choose another name"),
        (["--steps", "2", "data.tokenizer=nowhere"], "nowhere: no such file; train one with tools/train_tokenizer.py"),
        (["model.d_modle=3"], "did you mean model.d_model?"),
    ]
    lines = [
        [*config, *(a for a in arguments if "=" in a), *(a for a in arguments if "=" not in a)]
        for arguments, _ in cases
    ]
    for (code, _, err), (_, message) in zip(run_without_torch(PROGRAM, lines), cases, strict=True):
        assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, (message, err)
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_a_run_that_a_signal_stopped_is_certified(prepared: Prepared, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    # steps of a few tenths of a second: the signal must come before the last of them on a busy machine too
    slow = ["model.d_model=128", "model.d_ff=384", "train.global_batch_size=64", "train.micro_batch_size=1"]
    options = [*slow, "metrics.statistics_every_steps=100", "checkpoint.keep_every=6"]
    config.write_text(to_yaml(tiny_config(prepared, tmp_path / "unused", *options)))
    arguments = ["--steps", "4", "--ranks", "2", "--kill", "term", "--out", str(out)]
    command = [sys.executable, str(PROGRAM), str(config), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"stage 1, 2 ranks, fp32: 8 steps straight \.\.\. \d+\.\d s",
        r"stage 1, 2 ranks, fp32: until SIGTERM \.\.\. \d+\.\d s",
        r"stage 1, 2 ranks, fp32: resumed \.\.\. \d+\.\d s",
        r"config +\S+config\.yaml; sha256 of it merged: [0-9a-f]{64}",
        r"code +\w.*",
        r"software +torch \d\S*, deepspeed \d\S*, Python 3\.\S+",
        r"device +CPU, \d+ cores; \S+",
        r"steps +4 and 4 of 8, stopped at a moment by seed 0",
        r"  SIGTERM after step [4567], resumed from step [4567]",
        r"  compared: 13 records, 9 trainer values, \d+ tensors, [\d,]+ elements, 6 random states",
        r"  equal bit for bit",
        r"verdict +EQUAL",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), (line, done.stdout)
    assert not out.exists() and not (tmp_path / "unused").exists()
