"""Curves of recipes: the validation losses of a config's runs with several seeds, and whether another run has them.

A curve is a file of JSON lines: first what was trained (`recipe`, `seeds`, `settings`, the sha256 of the rows), then
for each validation its step and the loss of each seed. The rule: a run is on the curve if each of its validation losses
is within BAND standard deviations of the mean over the seeds. The deviation is that of one new run, from the variance
over the seeds, averaged over the validations around, since three seeds say little about one step.
"""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakexue.config import UserError, build, read_yaml, require
from megakexue.files import parse_json, write_whole
from megakexue.run.records import ValidationRecord, read_metrics
from megakexue.text.manifest import read_manifest

BAND = 4.0
"""In standard deviations, which three seeds only estimate. Of a hundred sound runs of twelve validations with
independent noise, four leave it by chance at some validation; where neighbours have almost the same noise (correlation
0.95), up to seventeen. A run that is off at one validation alone is best trained again with another seed."""
AROUND = 2
"""Validations before and after one whose variances are averaged with its own."""
SETTINGS = ("model.", "loss.", "optim.", "data.seq_len", "data.stages", "train.steps", "train.global_batch_size",
            "engine.dtype")  # fmt: skip
"""Keys that say what was trained."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A validation of each seed's run."""

    step: int
    losses: list[float]
    """Nats per target token, in the order of the seeds."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    recipe: str
    seeds: list[int]
    """`train.seed` of the runs."""
    train_rows: str
    """The sha256 of the index of the training rows."""
    valid_rows: str
    n_tokens: int
    """Of a validation."""
    settings: dict[str, Any]
    """By key, such as optim.lr."""
    points: list[Point]

    def band(self, i: int) -> tuple[float, float]:
        """Return the mean loss at point `i`, and how far from it a run of another seed may be."""
        around = self.points[max(0, i - AROUND) : i + AROUND + 1]
        variance = statistics.fmean(statistics.variance(point.losses) for point in around)
        deviation = math.sqrt(variance * (1 + 1 / len(self.seeds)))  # of a new run from the mean of these
        return statistics.fmean(self.points[i].losses), BAND * deviation


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run folder says of itself that a curve holds too."""

    seed: int
    train_rows: str
    valid_rows: str
    settings: dict[str, Any]
    losses: dict[int, float]
    """Of the validations, by step."""
    n_tokens: int


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_run(run: Path) -> RunFacts:
    """Read the validations and the settings of a run folder, and the manifest of its data.

    Raises:
        UserError: the folder is no run, has no validation or several sources, or its data are not there.
    """
    valid = [record for record in read_metrics(run) if isinstance(record, ValidationRecord)]
    require(
        len(valid) > 0, f"{run}: has no validation yet, and a curve is one of validations: set evaluate.every_steps"
    )
    require((run / "config.yaml").is_file(), f"{run}/config.yaml: no such file: give the folder of a run")
    config = _flat(read_yaml(run / "config.yaml"))
    missing = {"train.seed", "data.sources", *(key for key in SETTINGS if not key.endswith("."))} - config.keys()
    require(not missing, f"{run}/config.yaml lacks {sorted(missing)}: it is not the config of a run")
    sources = config["data.sources"]
    require(len(sources) == 1, f"{run}: data.sources has {len(sources)} folders, and a recipe has one")
    splits = read_manifest(sources[0]["path"]).splits
    hashes = [(splits.get(name) or {}).get("index_sha256") for name in ("train", "valid")]
    require(
        None not in hashes, f"{sources[0]['path']}/manifest.json lacks the hashes of its rows: prepare the data again"
    )
    return RunFacts(
        seed=config["train.seed"],
        train_rows=str(hashes[0]),
        valid_rows=str(hashes[1]),
        settings={key: value for key, value in config.items() if key.startswith(SETTINGS)},
        losses={record.step: record.loss for record in valid},
        n_tokens=valid[-1].n_tokens,
    )


def curve_of(recipe: str, runs: list[Path]) -> Curve:
    """Make the curve of finished runs that differ in their seeds alone. Raises UserError: they do not."""
    require(len(runs) >= 3, f"a curve takes three runs or more, which differ in train.seed, not {len(runs)}")
    facts = [read_run(run) for run in runs]
    first = facts[0]
    for run, other in zip(runs, facts, strict=True):
        same = dataclasses.replace(other, seed=first.seed, losses=first.losses) == first
        require(
            same, f"{run} and {runs[0]} differ in more than seeds, such as {differing(first, other) or 'their data'}"
        )
        require(other.losses.keys() == first.losses.keys(), f"{run} and {runs[0]} have validations at other steps")
        steps = other.settings["train.steps"]
        is_whole = max(other.losses) == steps and all(map(math.isfinite, other.losses.values()))
        require(is_whole, f"{run} has no finite validation loss at its last step, {steps}: let it come to its end")
    seeds = [other.seed for other in facts]
    require(len(set(seeds)) == len(seeds), f"two of the runs have the same train.seed: {seeds}")
    return Curve(
        recipe=recipe, seeds=seeds, train_rows=first.train_rows, valid_rows=first.valid_rows, n_tokens=first.n_tokens,
        settings=first.settings,
        points=[Point(step=step, losses=[other.losses[step] for other in facts]) for step in first.losses],
    )  # fmt: skip


def differing(a: RunFacts | Curve, b: RunFacts | Curve) -> list[str]:
    """Name the settings that both know and that differ, such as `optim.lr 0.02 -> 0.01`."""
    common = a.settings.keys() & b.settings.keys()  # versions add settings
    return [f"{key} {a.settings[key]} -> {b.settings[key]}" for key in sorted(common)
            if a.settings[key] != b.settings[key]]  # fmt: skip


def write_curve(path: Path, curve: Curve) -> None:
    head = dataclasses.asdict(curve)
    points = head.pop("points")
    write_whole(path, "".join(f"{json.dumps(line)}\n" for line in [head, *points]))


def read_curve(path: Path) -> Curve:
    """Read a curve. Raises UserError: there is none, or it is damaged."""
    try:
        head, *points = map(parse_json, path.read_text(encoding="utf-8").splitlines())
        curve = build(Curve, head | {"points": points}, where=str(path))
        whole = len(curve.points) > 0 and all(len(point.losses) == len(curve.seeds) >= 2 for point in curve.points)
        require(whole, "it must have validations, each with a loss for each seed")
    except FileNotFoundError as error:
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.jsonl"))) or "none"
        raise UserError(f"{path}: no such curve; there are: {others}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no curve of a recipe ({error}): write it with --write-curve") from error
    return curve


def off_curve(curve: Curve, run: RunFacts) -> list[int]:
    """Return the steps at which a run's validation loss is outside the band.

    Raises:
        UserError: the run was validated on other rows, or at none of the curve's steps.
    """
    require(
        run.valid_rows == curve.valid_rows and run.n_tokens == curve.n_tokens,
        f"the run was validated on other rows than recipe {curve.recipe} ({run.n_tokens:,} tokens of "
        f"{run.valid_rows[:12]}, not {curve.n_tokens:,} of {curve.valid_rows[:12]}), so their losses cannot be "
        "compared: prepare the recipe's data as docs/recipes.md says, and keep its evaluate section",
    )
    steps = {point.step for point in curve.points}
    require(
        not steps.isdisjoint(run.losses),
        f"the run has no validation at a step of the curve, which are {min(steps)} to {max(steps)}: "
        "keep evaluate.every_steps of the recipe",
    )
    bands = {point.step: curve.band(i) for i, point in enumerate(curve.points)}
    return [
        step for step, (mean, width) in bands.items()
        if step in run.losses and not abs(run.losses[step] - mean) <= width  # also where it is nan
    ]  # fmt: skip
