"""Curves of recipes: what one is made of, the rule, and the curves that are kept with the configs."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megakexue.config import UserError, load_config, to_yaml
from megakexue.core.resolve import resolve_config
from megakexue.run.curves import Curve, curve_of, differing, off_curve, read_curve, read_run, write_curve
from megakexue.run.metrics import Metrics
from tests.conftest import Prepared
from tests.helpers import QUIET, ROOT, tiny_config

STEPS = range(10, 130, 10)
SPREAD = 0.01
"""Standard deviation of the losses over seeds."""


def make_run(folder: Path, prepared: Prepared, seed: int, *overrides: str, worse: float = 0.0) -> Path:
    """A run folder whose validation losses fall with the steps, and differ at random by seed."""
    noise = random.Random(seed)
    with Metrics(folder, QUIET, n_steps=max(STEPS), resume_step=0) as metrics:
        for step in STEPS:
            metrics.log_validation(step, 3 + 60 / (step + 10) + worse + noise.gauss(0, SPREAD), 1000)
    config = tiny_config(prepared, folder, f"train.steps={max(STEPS)}", f"train.seed={seed}", *overrides)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def curve(prepared: Prepared, tmp_path: Path) -> Curve:
    return curve_of("tiny", [make_run(tmp_path / f"seed_{seed}", prepared, seed) for seed in range(4)])


def test_the_rule_by_hand(curve: Curve) -> None:
    """The mean at a step, and four deviations of a new run, by the variances of the five validations around."""
    losses = [point.losses for point in curve.points]
    mean, width = curve.band(5)
    assert mean == pytest.approx(sum(losses[5]) / 4)
    variances = [sum((x - sum(row) / 4) ** 2 for x in row) / 3 for row in losses[3:8]]
    assert width == pytest.approx(4 * math.sqrt(sum(variances) / 5 * 1.25))
    assert curve.band(0)[1] == pytest.approx(
        4 * math.sqrt(sum(sum((x - sum(row) / 4) ** 2 for x in row) / 3 for row in losses[:3]) / 3 * 1.25)
    )


def test_sound_runs_are_on_it_and_others_are_not(curve: Curve, prepared: Prepared, tmp_path: Path) -> None:
    n_off = 0
    for seed in range(100, 140):
        n_off += bool(off_curve(curve, read_run(make_run(tmp_path / f"sound_{seed}", prepared, seed))))
    assert n_off <= 2
    worse = read_run(make_run(tmp_path / "worse", prepared, 7, "optim.lr=0.01", worse=8 * SPREAD))
    assert len(off_curve(curve, worse)) >= 10
    assert differing(curve, worse) == ["optim.lr 0.02 -> 0.01"]
    better = read_run(make_run(tmp_path / "better", prepared, 8, worse=-8 * SPREAD))
    assert len(off_curve(curve, better)) >= 10  # so much better is another task
    broken = dataclasses.replace(worse, losses={20: math.nan})
    assert off_curve(curve, broken) == [20]


def test_it_is_read_as_it_was_written(curve: Curve, tmp_path: Path) -> None:
    write_curve(tmp_path / "tiny.jsonl", curve)
    assert read_curve(tmp_path / "tiny.jsonl") == curve
    head, first, *_ = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert json.loads(head)["settings"]["optim.lr"] == 0.02 and json.loads(first)["step"] == 10


def test_what_makes_no_curve(prepared: Prepared, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed_{seed}", prepared, seed) for seed in range(3)]
    again = make_run(tmp_path / "again", prepared, 1)
    other = make_run(tmp_path / "other", prepared, 9, "optim.lr=0.01")
    with pytest.raises(UserError, match=r"three runs or more, which differ in train.seed, not 2"):
        curve_of("tiny", runs[:2])
    with pytest.raises(UserError, match=r"the same train.seed: \[0, 1, 2, 1\]"):
        curve_of("tiny", [*runs, again])
    with pytest.raises(UserError, match=r"differ in more than seeds, such as \['optim.lr 0.02 -> 0.01'\]"):
        curve_of("tiny", [*runs, other])
    lines = (runs[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[2] / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="validations at other steps"):
        curve_of("tiny", runs)
    for run in runs:
        (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="no finite validation loss at its last step, 120: let it come to its end"):
        curve_of("tiny", runs)
    (other / "config.yaml").write_text("train: {seed: 1}\n")
    with pytest.raises(UserError, match=r"config.yaml lacks \['data.seq_len', .*: it is not the config of a run"):
        read_run(other)
    (other / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no validation yet"):
        read_run(other)


def test_what_cannot_be_compared(curve: Curve, prepared: Prepared, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", prepared, 5))
    for other in (dataclasses.replace(run, valid_rows="0" * 64), dataclasses.replace(run, n_tokens=999)):
        with pytest.raises(UserError, match=r"validated on other rows than recipe tiny .* as docs/recipes.md says"):
            off_curve(curve, other)
    with pytest.raises(UserError, match="no validation at a step of the curve, which are 10 to 120"):
        off_curve(curve, dataclasses.replace(run, losses={15: 3.0}))
    write_curve(tmp_path / "tiny.jsonl", curve)
    with pytest.raises(UserError, match=r"none.jsonl: no such curve; there are: tiny"):
        read_curve(tmp_path / "none.jsonl")
    whole = (tmp_path / "tiny.jsonl").read_text()
    for damaged in (
        whole[:-40],
        "",
        whole.replace('"losses": [', '"losses": ["x", '),
        "[]\n",
        whole.partition("\n")[0],
    ):
        (tmp_path / "tiny.jsonl").write_text(damaged)
        with pytest.raises(UserError, match=r"is no curve of a recipe .*: write it with --write-curve"):
            read_curve(tmp_path / "tiny.jsonl")


def test_the_program(curve: Curve, prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    program = [sys.executable, str(ROOT / "tools" / "compare_losses.py")]
    seeds = [str(tmp_path / f"seed_{seed}") for seed in range(4)]
    ends = []
    for arguments in (
        [*seeds, "--write-curve", str(path)],
        [str(make_run(tmp_path / "sound", prepared, 5)), "--recipe", str(path)],
        [str(make_run(tmp_path / "worse", prepared, 6, "optim.lr=0.01", worse=0.1)), "--recipe", str(path)],
        [seeds[0], "--recipe", "none"],
    ):
        done = subprocess.run([*program, *arguments], text=True, capture_output=True)
        ends.append((done.returncode, (done.stdout + done.stderr).splitlines()))
    wrote, sound, worse, none = ends
    assert wrote == (0, [f"wrote the curve of 4 runs to {path}"])
    assert sound[0] == 0 and len(sound[1]) == 14
    assert sound[1][-1] == (
        "on the curve of curve at all of 12 validations, the last at step 120: the curve has the seeds 0, 1, 2, 3"
    )
    assert worse[0] == 1 and "not as in the recipe: optim.lr 0.02 -> 0.01" in worse[1]
    assert worse[1][-1].startswith("OFF the curve of curve at ") and "   off" in worse[1][5]
    assert none[0] == 2 and "none.jsonl: no such curve; there are: " in none[1][0]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "curves").glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_curve_that_is_kept_is_one_of_its_config(path: Path) -> None:
    """So that a changed default or config is noticed: the curve must then be made again."""
    curve = read_curve(path)
    config = resolve_config(load_config(ROOT / "configs" / f"{path.stem}.yaml"))
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    for key, value in curve.settings.items():
        found = settings
        for part in key.split("."):
            found = found[part]
        assert found == value, key
