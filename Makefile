# Every target does its own set-up: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
export TOKENIZERS_PARALLELISM := false

LOWEST := .venv-lowest
NEWEST := .venv-newest
LOWEST_EXTRAS := demo server gradient
# Without the families' tests, whose pipelines diffusers 0.35 does not have all.
LOWEST_SAMPLE := tests/aggregation tests/diffusion/test_flow_matching.py tests/diffusion/test_transition.py \
	tests/rewards/test_scoring.py tests/rewards/test_clip_rewards.py tests/trainers/test_trainers.py tests/trainers/test_trl_seam.py
empty :=
space := $(empty) $(empty)
comma := ,

.PHONY: demo test test-all test-distributed test-robustness test-lowest test-newest test-matrix gpu-check audit check format wheel docs clean

$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("trl_apex needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing trl_apex[$*] and what it needs into $(VENV): some minutes the first time"
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: $(or $(wildcard $(STAMP)),$(VENV)/.installed-demo)  ## train the tiny pipeline on four rewards, and show what came of it
	$(BIN)/trl-apex demo

test: $(STAMP)  ## the tests that CI runs, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(STAMP)  ## with the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

test-distributed: $(STAMP)  ## every engine with two processes
	$(BIN)/python -m pytest -m 'distributed or not distributed' tests/distributed

test-robustness: $(STAMP)  ## faults, hostile input, long runs
	RELIABILITY_JSON=benchmarks/results/reliability.json $(BIN)/python -m pytest -m '' tests/robustness

gpu-check:  ## tests and measurements on one GPU, in at most 8 minutes; installs nothing (PYTHON=... of your PyTorch)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_check.py

test-lowest:  ## a sample of the tests with the lower bounds of setup.cfg, in an environment of its own
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
		$(addprefix --extra ,$(LOWEST_EXTRAS)) setup.cfg --output-file $(LOWEST)/lowest.txt > /dev/null
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt \
		--editable '.[$(subst $(space),$(comma),$(LOWEST_EXTRAS))]' pytest hypothesis beartype sentencepiece protobuf
	$(LOWEST)/bin/python -m pytest $(LOWEST_SAMPLE)
	$(LOWEST)/bin/python -m pytest tests/robustness/test_hostile_checkpoints.py

test-newest:  ## the same sample with the newest releases that pip finds, in an environment of its own
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[$(subst $(space),$(comma),$(LOWEST_EXTRAS))]' \
		pytest hypothesis beartype sentencepiece protobuf
	$(NEWEST)/bin/python -m pytest $(LOWEST_SAMPLE)

test-matrix: test-lowest $(STAMP) test-newest  ## the sample in three environments: lower bounds, constraints.txt, newest
	$(BIN)/python -m pytest $(LOWEST_SAMPLE)

audit: $(STAMP)  ## known vulnerabilities of the installed dependencies
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/frozen.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/frozen.txt

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trl_apex tools
	$(BIN)/lint-imports

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
