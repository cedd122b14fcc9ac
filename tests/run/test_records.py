"""The records of metrics.jsonl: bit for bit, strict JSON, and what damage is said."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import UserError
from megakexue.run.metrics import Metrics
from megakexue.run.records import (
    AttentionStatistics,
    SamplesRecord,
    SourceLoss,
    StatisticsRecord,
    StepRecord,
    TensorStatistics,
    ValidationRecord,
    read_metrics,
)
from tests.helpers import QUIET, make_record, make_statistics, make_tensor, write_run
from tests.programs import run_python

finite_or_not = st.floats(width=64)  # nan, infinities, subnormals and -0.0 included
layer_statistics = st.builds(
    AttentionStatistics, **{field.name: finite_or_not for field in dataclasses.fields(AttentionStatistics)}
)
tensor_statistics = st.builds(
    TensorStatistics, **{field.name: finite_or_not for field in dataclasses.fields(TensorStatistics)}
)


@settings(deadline=None)  # it writes files
@given(
    loss=finite_or_not,
    grad_norm=finite_or_not,
    lr=finite_or_not,
    valid=finite_or_not,
    tensor=tensor_statistics,
    layer=layer_statistics,
)
def test_floats_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    loss: float,
    grad_norm: float,
    lr: float,
    valid: float,
    tensor: TensorStatistics,
    layer: AttentionStatistics,
) -> None:
    run = tmp_path_factory.mktemp("run")
    record = make_record(1, loss=loss, grad_norm=grad_norm, lr=lr, times={"data": grad_norm, "other": 0.5})
    logits = {"attention": [layer, layer], "largest_logit": lr}
    statistics = make_statistics(1, whole=tensor, tensors={'词表 "a".b': tensor}, n_drifting_rows=3, **logits)
    with Metrics(run, QUIET, n_steps=1, resume_step=0) as metrics:
        metrics.log_step(record)
        metrics.log_statistics(statistics)
        metrics.log_validation(1, valid, 7)
        metrics.log_samples(1, ["第一\n", ""], ["\ufffd", "\x00"])
    # repr tells -0.0 from 0.0 and takes nan for nan
    samples = SamplesRecord(step=1, prompts=["第一\n", ""], texts=["\ufffd", "\x00"])
    validation = ValidationRecord(step=1, loss=valid, n_tokens=7)
    assert repr(read_metrics(run)) == repr([record, statistics, validation, samples])


def test_lines_are_strict_json(tmp_path: Path) -> None:
    with Metrics(tmp_path, QUIET, n_steps=3, resume_step=0) as metrics:
        for step, loss in enumerate([math.nan, math.inf, -math.inf], start=1):
            metrics.log_step(make_record(step, loss=loss))
        metrics.log_statistics(make_statistics(3, tensors={"gain": make_tensor(cosine=math.nan)}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    objects = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert [o["loss"] for o in objects[:3]] == ["nan", "inf", "-inf"]
    assert objects[0].keys() == {"kind"} | {field.name for field in dataclasses.fields(StepRecord)}
    assert objects[0]["kind"] == "train"
    assert objects[3] == {
        "kind": "statistics",
        "step": 3,
        "whole": {"weight_rms": 0.02, "update_rms": 2e-5, "gradient_rms": 3e-4, "cosine": 0.31, "sign_agreement": 0.62},
        "tensors": {"gain": {**objects[3]["whole"], "cosine": "nan"}},
        "n_drifting_rows": 0,
        "attention": [],
        "largest_logit": "nan",
    }


def test_what_newer_versions_know_comes_back_and_older_records_are_without(tmp_path: Path) -> None:
    sources = {"网页": SourceLoss(loss=2.5, n_tokens=7, bits_per_byte=math.inf)}
    record = make_record(1, sources=sources, bits_per_byte=0.75, times={"forward": 0.25})
    layer = AttentionStatistics(entropy=1.5, relative_entropy=0.5, largest_logit=7.0)
    statistics = make_statistics(1, attention=[layer], largest_logit=9.0)
    with Metrics(tmp_path, QUIET, n_steps=1, resume_step=0) as metrics:
        metrics.log_step(record)
        metrics.log_statistics(statistics)
        metrics.log_validation(1, 2.5, 7, 0.75, sources)
    valid = ValidationRecord(step=1, loss=2.5, n_tokens=7, bits_per_byte=0.75, sources=sources)
    assert read_metrics(tmp_path) == [record, statistics, valid]
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    new = "bits_per_byte", "sources", "times", "attention", "largest_logit"
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in new}) + "\n" for line in lines))
    step, of_logits, validation = read_metrics(tmp_path)
    for found in (step, validation):
        assert isinstance(found, (StepRecord, ValidationRecord))
        assert found.sources == {} and math.isnan(found.bits_per_byte)
    assert isinstance(step, StepRecord) and step.times == {}
    assert isinstance(of_logits, StatisticsRecord)
    assert of_logits.attention == [] and math.isnan(of_logits.largest_logit)


@pytest.mark.parametrize(
    "damage",
    [
        '{"kind": "train", "step": 2, "lo',
        "[]",
        '{"kind": "test"}',
        '{"kind": "valid", "step": 2}',
        '{"kind": "statistics", "step": 2, "whole": {}, "tensors": {}, "n_drifting_rows": 0}',
        '{"kind": "statistics", "step": 2, "whole": [], "tensors": [], "n_drifting_rows": 0}',
        "\x00\x00",
        "",
        '{"kind": "valid", "step": Infinity, "loss": 1, "n_tokens": 1}',
        '{"kind": ' + "[" * 100_000,
    ],
    ids=lambda damage: damage[:40],
)
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, damage: str) -> None:
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().split("\n")
    lines[1] = damage
    path.write_text("\n".join(lines))
    message = rf"{path}:2: no record of a run \(.*\): repair the line or move the file away"
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=message):
        Metrics(tmp_path, QUIET, n_steps=9, resume_step=3)
    assert path.read_text() == "\n".join(lines)  # untouched, for the user to look at


def test_two_runs_in_one_folder_are_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match=r":4: step 1 comes after step 3: two runs have written into this folder; move"):
        read_metrics(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file: give a run folder that launch/train.py has wri"):
        read_metrics(tmp_path)


def test_reading_records_needs_no_torch() -> None:
    code = "import sys, megakexue.run.metrics; sys.exit('torch' in sys.modules or 'omegaconf' not in sys.modules)"
    assert run_python(code).returncode == 0
