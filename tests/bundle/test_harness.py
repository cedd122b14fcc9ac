"""Bundles in lm_eval, in an environment that has it."""

import os
import subprocess

import pytest

from tests.environments import python_with_lm_eval
from tests.helpers import ROOT


@pytest.mark.slow
def test_in_an_environment_of_its_own(request: pytest.FixtureRequest) -> None:
    python = python_with_lm_eval(request.config)
    command = [str(python), "-m", "pytest", "tests/bundle/harness_checks.py", "-q", "-p", "no:cacheprovider"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=variables | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
