"""A Python with transformers 5, which the environment of the tests cannot have beside mosaicml-streaming."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megakexue.files import lock

VARIABLE = "MEGAKEXUE_TRANSFORMERS5"


def python_with_transformers5(cache: Path) -> Path:
    """Return the Python that the variable names, or that of an environment in `cache`, made at the first call.

    It sees the packages of this environment behind its own. Where the packages cannot be had, the test is skipped.
    """
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    folder, done = cache / "environment", cache / "done"
    with open(cache / "lock", "w") as file:
        lock(file, wait=True)
        if not done.exists():
            run(sys.executable, "-m", "venv", "--clear", str(folder))
            (places,) = folder.glob("lib/python*/site-packages")
            (places / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
            options = ["--quiet", "--no-warn-conflicts", "--retries", "1", "--timeout", "10"]
            run(str(folder / "bin" / "python"), "-m", "pip", "install", *options, "transformers>=5,<6")
            done.touch()
    return folder / "bin" / "python"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"transformers 5 cannot be installed here ({lines[-1]}): name a Python that has it in {VARIABLE}")
