# Everything runs in .venv, which the first target that needs it creates. Needs python3 (3.11 to 3.13), g++ and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint check format docs bench findings chaos cluster-local cluster-local-stop wheel clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv and install the tested versions

# torch goes first and alone: resolved together with the rest, pip may settle on another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "dpo-ray needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch -c constraints.txt
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(INSTALLED) ## Run the embedded task end to end
	$(BIN)/dpo-ray demo

test: $(INSTALLED) ## Run every test (those marked gpu skip without one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(INSTALLED) ## Formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## The same, and the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray and not browser"

format: $(INSTALLED) ## Format the code and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## Write docs/recipe.md from the schema
	$(BIN)/python -m dpo_ray.recipe_reference > docs/recipe.md

bench: $(INSTALLED) ## Run every benchmark
	@for file in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

findings: $(INSTALLED) ## Data efficiency, early stopping and active learning in miniature, over seeds
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/findings/early_stopping.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/findings/data_efficiency.py
	@for study in --explore '' --again --long; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/findings/active_learning.py $$study || exit 1; done

chaos: $(INSTALLED) ## Kill parts of runs at random moments, RUNS=20 times
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/chaos.py --runs $(or $(RUNS),20)

cluster-local: $(INSTALLED) ## A Ray cluster of NODES=3 raylets on this machine, with token authentication
	@BIN=$(BIN) cluster/local.sh start $(or $(NODES),3)

cluster-local-stop: ## End that cluster, and nothing else
	@cluster/local.sh stop

wheel: $(INSTALLED) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove build outputs and caches (not .venv, not runs)
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
