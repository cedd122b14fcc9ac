"""Losses by source are those of the rows of each source, bits per byte those of their text, and neither costs a bit."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.generate import complete, load_decoder
from megakexue.config import IGNORED, Config
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.resolve import resolve_config
from megakexue.dist import ALONE
from megakexue.run.by_source import RowLosses, add_up
from megakexue.run.data import Batches
from megakexue.run.export import export_run
from megakexue.run.records import ReadRecord, SamplesRecord, SourceLoss, StepRecord, ValidationRecord, read_metrics
from megakexue.text.prepare import PrepareArguments, prepare
from megakexue.text.tokenizer_files import load_tokenizer
from tests.conftest import Prepared, stdlib_files
from tests.helpers import state_hashes, tiny_config, train_all
from tests.ranks import run_on_ranks


def test_sums_by_hand() -> None:
    # id 0 is PAD, 1 EOS, 2 a byte, 3 a piece of five bytes
    targets = torch.tensor([[3, 2, 1], [3, IGNORED, IGNORED], [IGNORED] * 3])
    rows = [RowLosses([1, 0], targets, torch.tensor([6.0, 2.0, 0.0], dtype=torch.float64))]
    rows += [RowLosses([1, 1, 1], targets.flip(0), torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))]
    bits, sources = add_up(rows, ["a", "b", "none"], np.array([0, 0, 1, 5]))
    assert bits == 12 / math.log(2) / 22
    assert sources == {
        "a": SourceLoss(loss=2.0, n_tokens=1, bits_per_byte=2 / math.log(2) / 5),
        "b": SourceLoss(loss=10 / 7, n_tokens=7, bits_per_byte=10 / math.log(2) / 17),
    }


def by_hand(config: Config, records: list[Any]) -> None:
    """Compare the first step of a run with a model of its own, row by row, and with the text of these rows."""
    resolved, tokenizer = resolve_config(config), load_tokenizer(config.data.tokenizer)
    model = Decoder(resolved.model, "reference")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, resolved.model, 0))
    size = config.train.global_batch_size
    data = Batches(config.data, global_batch_size=size, micro_batch_size=size, ranks=ALONE, cache=Path("unused"))
    (batch,) = data.next_step()
    names = [data.locate(sample) for sample in batch.samples]
    data.close()
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, batch.cu_seqlens)
    losses = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(
        batch.targets.shape
    )
    for name, found in records[0].sources.items():
        own = torch.tensor([f"/{name}/train/" in row for row in names])
        targets = batch.targets[own]
        n_bytes = len(tokenizer.decode_bytes(targets[targets != IGNORED].tolist()))
        loss, n = losses[own].sum().item(), int((targets != IGNORED).sum())
        assert found.n_tokens == n and found.loss == pytest.approx(loss / n, rel=1e-5), name
        assert found.bits_per_byte == pytest.approx(loss / math.log(2) / n_bytes, rel=1e-5), name
        assert n_bytes > n  # so that marks, which stand for no byte, are not all that there is


def check_samples(records: list[Any], run: Path, config: Config) -> None:
    """Compare the last samples with the texts of the exported bundle."""
    samples = [record for record in records if isinstance(record, SamplesRecord)]
    assert [record.step for record in samples] == [2, 4]
    prompts = config.evaluate.prompts
    bundle = Bundle(export_run(run, run / "bundle"))
    rows = complete(load_decoder(bundle), bundle.load_tokenizer(), prompts, n_tokens=12, temperature=0)
    texts = ["".join(piece or "" for piece in pieces) for pieces in zip(*rows)]
    # what ends within a character is said of the run alone
    assert [text.rstrip("\ufffd") for text in samples[-1].texts] == texts and all(texts)


@pytest.mark.slow
def test_a_run_of_two_sources(prepared: Prepared, tmp_path: Path) -> None:
    arguments = PrepareArguments(seq_len=prepared.seq_len, packing="best_fit", valid_fraction=0.2)
    files = stdlib_files(18)
    folders = {"first": files[:8], "second": files[8:]}
    for name, some in folders.items():
        prepare([str(path) for path in some], prepared.tokenizer, tmp_path / name, arguments, processes=1)
    sources = f"data.sources=[{{path: {tmp_path}/first, weight: 1}}, {{path: {tmp_path}/second, weight: 2}}]"
    kinds: dict[str, list[str]] = {
        "whole": ["engine.zero_stage=3", "engine.tile_tokens=24"],
        "shared": [
            "engine.sequence_ranks=2",
            "optim.accumulate=momentum",
            "data.stages=[{until_step: 2, seq_len: 32}]",
        ],
    }
    common = [sources, "engine.dtype=fp32", "train.micro_batch_size=4", "train.steps=4", "evaluate.every_steps=2"]
    kinds["seldom"] = [*kinds["whole"], "metrics.every_steps=50"]
    for name in ("whole", "shared"):
        kinds[name] += [
            "evaluate.prompts=['def f(self', '']",
            "evaluate.prompt_tokens=12",
            "metrics.profile_steps=[3, 3]",
        ]
    configs = {name: tiny_config(prepared, tmp_path / name, *common, *own) for name, own in kinds.items()}
    run_on_ranks(2, train_all, list(configs.values()))
    often, seldom = (state_hashes(tmp_path / name, 4) for name in ("whole", "seldom"))
    for file in often.keys() - {"trainer.json"}:  # which has the config
        assert often[file] == seldom[file], file
    for name in ("whole", "shared"):
        records = read_metrics(tmp_path / name)
        by_hand(configs[name], records)
        of_losses = [record for record in records if isinstance(record, (StepRecord, ValidationRecord))]
        assert len(of_losses) == 6
        check_samples(records, tmp_path / name, configs[name])
        (trace,) = (tmp_path / name / "profile").iterdir()  # of one rank
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        n_embeddings = sum(event["name"] == "aten::embedding" for event in events)
        assert (trace.name, n_embeddings) == ("steps_3_3.json.gz", 4 if name == "shared" else 2)
        (read,) = [record for record in records if isinstance(record, ReadRecord)]
        counts = [(source.rows, source.tokens) for source in read.sources.values()]
        n_tokens = max(record.tokens for record in of_losses if isinstance(record, StepRecord))
        assert list(map(sum, zip(*counts))) == [4 * configs[name].train.global_batch_size, n_tokens]
        for record in of_losses:
            assert record.sources.keys() == folders.keys()
            n = sum(source.n_tokens for source in record.sources.values())
            total = sum(source.loss * source.n_tokens for source in record.sources.values())
            assert total / n == pytest.approx(record.loss, rel=1e-6), name
            sizes = [s.loss * s.n_tokens / s.bits_per_byte for s in record.sources.values()]
            assert record.bits_per_byte == pytest.approx(total / sum(sizes), rel=1e-9)
