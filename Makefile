# Everything runs in .venv, whatever environment is active. `make help` lists the targets.
#
# Options:
#   PYTHON=python3.12       the interpreter that .venv is made with (3.11 or newer)
#   PYTEST_ARGS='-k data'   passed on to pytest by `make test`, `make slow` and `make cluster`
#   COVERAGE=1              `make test` reports line coverage; tracing takes half as long again
#   JOBS=4                  how many tests run at once (default 2; 0: in one process, for --pdb)
#   TORCH_INDEX=...         the index for torch at the first set-up (see constraints.txt)

PYTHON ?= python3
PYTEST_ARGS ?=
COVERAGE ?=
JOBS ?= 2
TORCH_INDEX ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# -qq: quiet, but errors still show.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
TRACED := $(if $(COVERAGE),--cov=btu --cov=orchestrator --cov-report=term)
# Neighbouring tests stay together, since they share fixtures; an idle process takes over tests.
PARALLEL = -n $(JOBS) --dist worksteal

# They would make .venv import code from outside.
unexport PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test check slow cluster clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## Create .venv and install the pinned packages (all other targets do it too)

quickstart: $(INSTALLED) ## Run the demo sweep, print its table and how to see its runs
	$(BIN)/btu launch sweeps/quickstart.yaml
	$(BIN)/btu report quickstart
	@echo
	@echo "The runs, with their curves and flagged tokens, in the MLflow UI:  $(BIN)/btu ui"

test: $(INSTALLED) ## Run the fast tests
	$(BIN)/pytest $(PARALLEL) $(TRACED) $(PYTEST_ARGS)

check: $(INSTALLED) ## Check format, lint, types and the import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(INSTALLED) ## Run the slow tests: real Ray, real MLflow, real training
	$(BIN)/pytest -v -n $(JOBS) --dist loadscope -m 'slow and not gpu' --durations=15 $(PYTEST_ARGS)

cluster: $(INSTALLED) ## Run the cluster tests: hosts as network namespaces (Linux, root)
	$(BIN)/pytest -v -n 0 -m cluster --durations=0 --durations-min=1 tests/cluster $(PYTEST_ARGS)

clean: ## Remove .venv, caches and build output; results in runs/ stay
	rm -rf .venv build dist *.egg-info .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): interpreter. $(2): the fix, if the interpreter is missing or too old.
define require_python
	@command -v '$(1)' >/dev/null || { echo "error: '$(1)' was not found. $(2)" >&2; exit 1; }
	@'$(1)' -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Python 3.11 or newer is needed, but $(1) is Python %d.%d.%d. $(2)" % v[:3])'
endef

# venv writes pip last: if it is missing, an earlier attempt was interrupted.
$(BIN)/pip:
	$(call require_python,$(PYTHON),Install Python 3.11 or newer and name it: make PYTHON=python3.11)
	@echo "Creating .venv with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv .venv

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(call require_python,$(BIN)/python,Remove .venv and run make again.)
	@echo "Installing the pinned packages into .venv (some minutes the first time)"
	$(if $(TORCH_INDEX),@$(PIP) "$$(grep '^torch==' constraints.txt)" --index-url '$(TORCH_INDEX)')
	@$(PIP) -c constraints.txt -e '.[offline,postgres,dev]'
	@touch $@
