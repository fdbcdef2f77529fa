# Every target does its own set-up: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-distributed test-robustness check format wheel docs clean

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("trl_apex needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train the tiny pipeline on four rewards, and show what came of it
	$(BIN)/trl-apex demo

test: $(STAMP)  ## the tests that CI runs
	$(BIN)/python -m pytest

test-all: $(STAMP)  ## with the slow ones
	$(BIN)/python -m pytest -m ''

test-distributed: $(STAMP)  ## every engine with two processes
	$(BIN)/python -m pytest -m 'distributed or not distributed' tests/distributed

test-robustness: $(STAMP)  ## faults, hostile input, long runs
	$(BIN)/python -m pytest -m '' tests/robustness

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trl_apex

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist runs site *.egg-info
