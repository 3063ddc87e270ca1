# The two commands a newcomer needs are `make train` and `make test`; both set up .venv by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest

# A file's tests share what they set up, so a file goes to one worker; tests/conftest.py says in
# which order.
PYTEST_OPTIONS := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

# What `make test-fast` runs: many tests in little time.
FAST := data layers optim $(addprefix kernels/,test_attention.py test_sdpa.py test_poly_norm.py test_flops.py) \
	$(addprefix models/,test_configuration.py test_modeling.py test_packing.py test_released.py test_saving.py) \
	growth/test_width.py train/test_read_recipe.py test_cli.py

# One thread a process: tests run side by side, and a run's two ranks share two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help train test test-fast test-slow test-nightly test-oldest test-newest lint format docs docs-look dist clean

help:
	@echo "make train        prepare data, train recipes/tiny_cpu.yaml on two processes, export it and sample from it"
	@echo "make test         all tests but the slow ones, in half an hour on two cores; ARGS='tests/optim -k muon' for some"
	@echo "make test-fast    a quick subset of them, in 2 minutes"
	@echo "make test-slow    the slow ones: restarts, interruptions, transformers' own; in 25 minutes"
	@echo "make test-nightly the slowest: every compiled configuration, planted faults, layouts of four ranks, exports; in 75"
	@echo "make test-oldest  make test with each dependency's lower bound, torch 2.11 too; see below"
	@echo "make test-newest  make test with the newest release of everything; see below"
	@echo "make lint         formats, types, import contracts, Markdown, schemas of workflows"
	@echo "make format       mend what ruff and mdformat can"
	@echo "make docs         build the site in build/site"
	@echo "make docs-look    open all of its pages in a browser: errors, broken links, pages that scroll sideways"
	@echo "make dist         build the wheel and the source distribution in dist"
	@echo "make clean        remove environments, runs and prepared data"
	@echo
	@echo "test-oldest and test-newest bring a torch of their own, by default the CUDA build of several gigabytes;"
	@echo "UV_TORCH_BACKEND=cpu before make takes the CPU build, where the index of those can be reached."

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed once for each state of the files that say what to install.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# timm, whose attention tests compare with and replace, may not bring torchvision along: beside
# torch's CPU build that breaks transformers.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm
	@touch $@

train: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" recipes/tiny_cpu.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not slow" $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not slow" $(addprefix tests/,$(FAST)) $(ARGS)

# Without the package index, the tests that are downloaded are skipped.
test-slow: $(VENV)/.installed-dev
	-$(BIN)/python tests/transformers_suite/download.py
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "slow and not nightly" $(ARGS)

test-nightly: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m nightly $(ARGS)

# All but the reports that `motifarch benchmark report` writes.
MARKDOWN := git ls-files '*.md' ':!benchmarks/results/*/report.md' ':!benchmarks/results/compiled.md'

SCHEMA := $(BIN)/check-jsonschema --builtin-schema vendor.

# mdformat breaks no line of code and no row of a table.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q -k 'imports_itself or triton' tests/test_architecture.py
	$(SCHEMA)github-workflows .github/workflows/*.yml
	$(SCHEMA)github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(SCHEMA)citation-file-format CITATION.cff
	$(MARKDOWN) | xargs $(BIN)/mdformat --check
	! $(MARKDOWN) | LC_ALL=C.UTF-8 xargs grep -nE '^.{101,}' /dev/null

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(MARKDOWN) | xargs $(BIN)/mdformat

# Neither is pinned by constraints.txt. Each is made anew, for what it should hold changes without a
# change here. All of a set is resolved at once: a second step would bring newer releases of what the
# first chose, and they may not go together.
UV := $(BIN)/uv pip install --quiet

test-oldest: $(VENV)/.installed-dev
	$(PYTHON) -m venv --clear $(OLDEST)
	$(UV) --python $(OLDEST) --resolution lowest-direct --editable '.[dev]'
	$(UV) --python $(OLDEST) --no-deps timm
	$(OLDEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow" $(ARGS)

test-newest: $(VENV)/.installed-dev
	$(PYTHON) -m venv --clear $(NEWEST)
	$(UV) --python $(NEWEST) --editable '.[dev]'
	$(UV) --python $(NEWEST) --no-deps timm
	$(NEWEST)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow" $(ARGS)

# The site, in build/site.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# It needs a browser: an installed one, or playwright's (docs/tools/look.py).
docs-look: docs
	$(BIN)/pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python docs/tools/look.py

# The wheel is built from the source distribution, so that both hold what they need.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) runs data build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
