# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up .venv when it is missing.
# .venv gets the versions of constraints.txt, which were tested together.
PYTHON ?= python3
BIN := .venv/bin
# Text for the demo: one file, folder or glob, also with spaces (make demo TEXT='my texts'); empty: the sources and
# documentation of the Python installation. It goes through the environment, where no shell splits it
export TEXT ?=
# Tests that run side by side; each may start several processes of its own
WORKERS ?= 2
SHELL_FILES := launch/*.sh launch/*.sbatch .ci/run

.PHONY: demo test test-fast check docs setup
demo: setup
	@bash launch/demo.sh

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(SHELL_FILES); \
	else echo "shell scripts are not checked: install shellcheck"; fi

# docs/ as a site in build/site; a link that leads nowhere is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
