# The two commands a newcomer needs are `make train` and `make test`; both set up .venv by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest

# A file's tests share what they set up, so a file goes to one worker; tests/conftest.py says in which order.
PYTEST_OPTIONS := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# One thread a process: tests run side by side, and a run's two ranks share two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help train test lint format test-oldest clean

help:
	@echo "make train        prepare data, train recipes/tiny_cpu.yaml on two processes, export it and sample from it"
	@echo "make test         run the tests"
	@echo "make lint         ruff and mypy"
	@echo "make test-oldest  run the tests with the oldest supported transformers"
	@echo "make clean        remove environments, runs and prepared data"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed once for each state of the files that say what to install.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# timm is an independent implementation in tests. It may not bring torchvision along: beside torch's CPU build that breaks transformers.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm
	@touch $@

train: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" recipes/tiny_cpu.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-oldest: $(VENV)/.installed-dev
	$(PYTHON) -m venv --clear $(OLDEST)
	sed 's/^transformers==.*/transformers==5.17.0/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --no-deps timm
	$(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) runs data build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
