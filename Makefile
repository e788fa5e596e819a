# Every target does its own set-up: a clean clone and one Python >= 3.10 are enough.
VENV ?= .venv
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3.10 python3 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo $$candidate; break; fi; done)
JOBS ?= 2
ARGS ?=

IN_VENV := $(VENV)/bin/python
QUICKSTART := $(VENV)/.installed-quickstart
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help quickstart dev test lint format bench matrix clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

quickstart: $(QUICKSTART) ## Train a small GPT on this machine's Python sources; own text: ARGS="--data.path my.txt"
	$(IN_VENV) -m sat_lightning fit --config recipes/gpt2_quickstart.yaml $(ARGS)

dev: $(DEV) ## Set up the environment that test, lint and bench use

test: $(DEV) ## Run the tests; one file: ARGS="tests/test_hooks.py"
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n $(JOBS) $(ARGS)

lint: $(DEV) ## Check style, format and types
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

format: $(DEV) ## Rewrite the sources in the house format
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

bench: $(DEV) ## Time one training step against its peers; for example ARGS="--device cuda --dtype bf16"
	$(IN_VENV) benchmarks/train_step.py $(ARGS)

matrix: $(DEV) ## Run the tests and rewrite the README's tables from their results
	OMP_NUM_THREADS=1 $(IN_VENV) -m tests.family_table
	OMP_NUM_THREADS=1 $(IN_VENV) -m tests.method_table
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n $(JOBS) -q --junitxml=.pytest_cache/results.xml || true
	$(IN_VENV) -m tests.support_matrix .pytest_cache/results.xml

clean: ## Remove the environment and every cache (runs and checkpoints stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, newer than what it was installed from; a failed install leaves none.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) for $* with $(PYTHON): once, some minutes, most of it PyTorch ..."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(IN_VENV) -m pip install -qq --upgrade -c constraints.txt pip
	@$(IN_VENV) -m pip install -qq -c constraints.txt -e ".[$*]"
	@touch $@
