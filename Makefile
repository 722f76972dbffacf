# Every target sets up .venv first; a set-up is repeated only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
SLURM ?= 0
PYTEST ?=
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# DeepSpeed's C++ operators would need a compiler; the engine's Python paths are all we use.
export DS_BUILD_OPS := 0
SHELL := /bin/bash
# A worker takes whole files, in the order of the tree: a file's fixtures are made once, and the last
# files are short.
RUN_TESTS = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

.PHONY: help setup demo test check figures devcluster devcluster-stop constraints clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo
	@echo "  PYTHON=python3.12   interpreter for a new .venv (3.11 to 3.13)"
	@echo "  SLURM=1             make test: with the real Slurm of slurm/devcluster"
	@echo "  PYTEST='-k fit'     make test: further arguments of pytest"
	@echo "  WORKERS=4           make test: processes that share the tests; 0: none, as for --pdb"
	@echo "  PIP_ARGS='...'      further arguments of pip, such as --index-url for another build of torch"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    || { echo "$(PYTHON) is not Python 3.11 to 3.13; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	    || { echo "$(PYTHON) has no venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One pip call with the constraints, so that deepspeed cannot bring in another torch.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(INSTALLED) ## .venv with everything the main job needs

demo: $(INSTALLED) ## the whole way on embedded data: under 5 minutes on 2 cores
	$(BIN)/clue-scaling demo

check: $(INSTALLED_DEV) ## ruff (lint, format), mypy, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ifeq ($(SLURM),1)
# A devcluster that is up already stays up.
test: $(INSTALLED_DEV)
	@slurm/devcluster/status > /dev/null || trap 'slurm/devcluster/stop > /dev/null' EXIT; \
	slurm/devcluster/start --install && CLUE_SLURM=1 $(RUN_TESTS)
else
test: $(INSTALLED_DEV) ## all tests; SLURM=1 also those on a real Slurm (installs Debian packages, as root)
	@$(RUN_TESTS)
endif

figures: $(INSTALLED) ## draw every figure again from the committed tables in results/
	@shopt -s nullglob; for fits in results/*/fits.json; do \
	    $(BIN)/clue-scaling figures "sweeps/$$(basename "$$(dirname "$$fits")").toml" || exit; \
	done

devcluster: ## start a two-node Slurm on this machine (as root)
	slurm/devcluster/start --install

devcluster-stop: ## stop it
	slurm/devcluster/stop

constraints: $(INSTALLED_DEV) ## write the installed versions to constraints.txt
	@{ grep '^#' constraints.txt; \
	   $(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > .constraints.tmp
	mv .constraints.tmp constraints.txt

clean: ## remove .venv and caches; work/ (runs, corpora) and results/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
