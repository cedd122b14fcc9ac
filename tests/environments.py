"""Pythons with packages that the environment of the tests cannot have."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megakexue.files import lock


def python_with_transformers5(config: pytest.Config) -> Path:
    """mosaicml-streaming wants transformers 4."""
    return _python_with(config, "transformers5", "transformers>=5,<6")


def python_with_lm_eval(config: pytest.Config) -> Path:
    """Streaming imports transformers, which imports what lm_eval brings: that takes seconds, and starts a thread."""
    # transformers 4 refuses a newer hub, which nothing else keeps pip from taking
    return _python_with(config, "lm_eval", "lm_eval>=0.4.13,<0.5", "accelerate>=1", "huggingface-hub<1")


def python_with_sinks(config: pytest.Config) -> Path:
    """Services that few users have, and a hundred megabytes: 40 s to install, which no start of a test should take."""
    return _python_with(config, "sinks", "wandb>=0.19", "mlflow-skinny>=2.20")


def _python_with(config: pytest.Config, name: str, *packages: str) -> Path:
    """Return the Python that MEGAKEXUE_NAME names, or that of an environment in pytest's cache, made at the first call.

    It sees the packages of this environment behind its own. Where the packages cannot be had, the test is skipped.
    """
    variable = f"MEGAKEXUE_{name.upper()}"
    if variable in os.environ:
        return Path(os.environ[variable])
    assert config.cache is not None
    cache = config.cache.mkdir(name)
    folder, done = cache / "environment", cache / "done"
    with open(cache / "lock", "w") as file:
        lock(file, wait=True)
        if not done.exists():
            _run(name, variable, sys.executable, "-m", "venv", "--clear", str(folder))
            (places,) = folder.glob("lib/python*/site-packages")
            (places / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
            options = ["--quiet", "--no-warn-conflicts", "--retries", "1", "--timeout", "10"]
            _run(name, variable, str(folder / "bin" / "python"), "-m", "pip", "install", *options, *packages)
            done.touch()
    return folder / "bin" / "python"


def _run(name: str, variable: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"{name} cannot be installed here ({lines[-1]}): name a Python that has it in {variable}")
