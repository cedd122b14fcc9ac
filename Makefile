# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Text for the demo: a file, folder or glob; empty: the sources and documentation of the Python installation
TEXT ?=

.PHONY: demo test test-fast check setup
demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh $(TEXT)

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
