"""Golden loss columns: a change that is not meant to change the numbers does not change them.

golden/text.txt is a frozen copy of this project's own prose and code, golden/tokenizer.model was trained on it. The
columns come from `tools/compare_losses.py --write-golden`. Machines differ in the order of float32 sums, hence the
tolerance here; on one machine `tools/compare_losses.py` compares two commits exactly.
"""

from pathlib import Path

import pytest

from megakexue.config import Config, load_config
from megakexue.run.records import StepRecord, read_metrics
from megakexue.text.prepare import PrepareArguments, prepare
from tests.helpers import ROOT
from tests.ranks import run_on_ranks

GOLDEN = Path(__file__).parent / "golden"

SEQ_LEN = 128


def golden_config(name: str, folder: Path) -> Config:
    return load_config(
        ROOT / "configs" / f"{name}.yaml",
        [f"data.sources=[{{path: {folder}/data}}]", f"data.tokenizer={GOLDEN}/tokenizer.model",
         f"data.seq_len={SEQ_LEN}", f"train.run={folder}/run", "model.vocab_size=1024", "train.steps=30",
         "evaluate.every_steps=null", "metrics.tensorboard=false"],
    )  # fmt: skip


def train_golden(config: Config) -> None:
    from megakexue.run.train import train

    train(config)


@pytest.mark.parametrize("name", ["tiny_gqa", "tiny_mla"])
def test_losses_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    # one long document and no validation split: what is under test is the training
    arguments = PrepareArguments(seq_len=SEQ_LEN, valid_fraction=0.0)
    prepare([str(GOLDEN / "text.txt")], GOLDEN / "tokenizer.model", tmp_path / "data", arguments, processes=1)
    run_on_ranks(1, train_golden, golden_config(name, tmp_path))
    losses = [r.loss for r in read_metrics(tmp_path / "run") if isinstance(r, StepRecord)]
    golden = [float(line.split()[1]) for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    assert len(golden) == 30 and golden[-1] < golden[0] - 1
    assert losses == pytest.approx(golden, abs=1e-3)
