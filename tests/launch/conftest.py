from pathlib import Path

import pytest

from tests.conftest import Prepared
from tests.helpers import tiny_config, train_all
from tests.ranks import run_on_ranks

N_STEPS = 40


@pytest.fixture(scope="session")
def reference(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of N_STEPS by two local ranks, whose losses every way of starting must give."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run_on_ranks(2, train_all, [tiny_config(prepared, run, f"train.steps={N_STEPS}")])
    return run
