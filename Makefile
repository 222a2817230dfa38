# One environment in $(VENV), made on the first call of any target and left alone until pyproject.toml or
# constraints.txt change. Settings: make PYTHON=python3.12 VENV=/tmp/vico-venv test

PYTHON ?= python3
VENV ?= .venv

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

venv := $(abspath $(VENV))
bin := $(venv)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --no-input install --quiet --progress-bar off

# DeepSpeed calls ninja by name when it loads an extension, so the environment comes first on the path.
export PATH := $(bin):$(PATH)
export TORCH_EXTENSIONS_DIR := $(venv)/torch_extensions
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS := 1
# The tests start thousands of Python processes; without this some environments would compile every module in each.
export PYTHONDONTWRITEBYTECODE :=

# Tests of CPU code see no CUDA device where there is one: torch would take it.
test test-slow drill: export CUDA_VISIBLE_DEVICES :=

# Where `make sbom` writes, and which service `make advisories` asks.
SBOM ?= build/sbom.json
ADVISORIES ?= https://api.osv.dev/v1/query

.PHONY: help venv quickstart test test-slow test-cuda drill fuzz load lint sbom advisories docs figures clean

help:
	@echo "make quickstart   set up, then every stage of configs/quickstart.yaml on this machine"
	@echo "make test         set up, then the fast tests and lint"
	@echo "make test-slow    set up, then the slow tests; keeps the result in docs/measurements"
	@echo "make test-cuda    set up, then the tests that need a CUDA device"
	@echo "make drill        set up, then 20 trainings with kills on a 3-node Ray cluster; keeps the report"
	@echo "make lint         set up, then ruff, mypy, codespell and whether generated docs are up to date"
	@echo "make sbom         set up, then write a CycloneDX list of all packages and licences to $(SBOM)"
	@echo "make advisories   set up, then look for published advisories about the pinned packages (network)"
	@echo "make fuzz         set up, then 30 minutes of hostile files for every reader; keeps the result"
	@echo "make load         set up, then 20,000 hostile requests to a server; keeps the figures"
	@echo "make docs         set up, then write docs/settings.md and docs/models.md from the code"
	@echo "make figures      set up, run what README and docs quote, and write their tables and pictures"
	@echo "make venv         set up only: environment and DeepSpeed extensions in $(VENV)"
	@echo "make clean        remove caches and build leftovers; $(VENV) and runs stay"

venv: $(venv)/.extensions

# torch comes first and with its pin: DeepSpeed has only a source distribution, whose build imports torch, and
# an unpinned torch would be the newest one. DS_BUILD_OPS=0 leaves DeepSpeed's extensions to the next rule.
$(venv)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "PYTHON=$(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	@echo "Installing into $(VENV) (some minutes on the first call) ..."
	@$(PYTHON) -m venv $(venv)
	@$(pip) --constraint constraints.txt setuptools wheel ninja torch
	@DS_BUILD_OPS=0 $(pip) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(venv)/.extensions: $(venv)/.installed
	@command -v g++ > /dev/null \
	  || { echo "g++ is missing, DeepSpeed's extensions need it; install it: apt install g++"; exit 2; }
	@echo "Building DeepSpeed's extensions into $(VENV)/torch_extensions (about two minutes) ..."
	@$(bin)/python -c 'from stages.training.engine import prebuild_extensions; prebuild_extensions()'
	@touch $@

$(venv)/sbom/.installed: constraints.txt
	@$(PYTHON) -m venv $(venv)/sbom
	@$(subst $(bin),$(venv)/sbom/bin,$(pip)) --constraint constraints.txt cyclonedx-bom
	@touch $@

quickstart: venv
	$(bin)/vico run configs/quickstart.yaml

# Two processes side by side, each with whole files, in the order of their names: the long ones come first.
# pytest ends with an error when it collects nothing, so an empty selection cannot pass.
test: venv
	$(bin)/python -m pytest -q -m "not slow and not cuda" -n 2 --dist loadgroup --no-loadscope-reorder
	$(MAKE) --no-print-directory lint

test-slow: venv
	mkdir -p docs/measurements
	$(bin)/python -m pytest -q -m "slow and not cuda" 2>&1 \
	  | tee "docs/measurements/test-slow-$$(date -u +%Y-%m-%d)-$$(git rev-parse --short HEAD).txt"

# The environment holds the torch of the package index: one of CUDA on Linux, unless a CPU build was named.
test-cuda: venv
	DS_ACCELERATOR=cuda $(bin)/python -m pytest -q -m "cuda and not slow"

drill: venv
	mkdir -p docs/measurements
	$(bin)/python -m tests.drill \
	  --report "docs/measurements/drill-$$(date -u +%Y-%m-%d)-$$(git rev-parse --short HEAD).md"

lint: venv
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/codespell
	$(bin)/python docs/make_settings.py --check
	$(bin)/python docs/make_models.py --check
	$(bin)/mypy

# Of the environment in $(VENV), with a CUDA build of torch its CUDA packages too. The tool has an environment of
# its own, because one of its packages makes every import of Ray seconds slower (docs/dependencies.md).
sbom: venv $(venv)/sbom/.installed
	@mkdir -p $(dir $(SBOM))
	$(venv)/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --of JSON -o $(SBOM) $(bin)/python

# Sends names and versions of constraints.txt to the service. ADVISORIES names a mirror.
advisories: venv
	$(bin)/pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv \
	  --osv-url $(ADVISORIES) --progress-spinner off

fuzz: venv
	mkdir -p docs/measurements
	$(bin)/python -m tests.fuzz --minutes 30 \
	  --report "docs/measurements/fuzz-$$(date -u +%Y-%m-%d)-$$(git rev-parse --short HEAD).jsonl"

# Both end with an error after a 5xx, or if the server takes more memory than it announced.
load: venv
	mkdir -p docs/measurements
	{ $(bin)/python -m benchmarks.hostile_load --requests 10000; \
	  $(bin)/python -m benchmarks.schema_load --requests 10000; } \
	  | tee "docs/measurements/load-$$(date -u +%Y-%m-%d)-$$(git rev-parse --short HEAD).jsonl"

docs: venv
	$(bin)/python docs/make_settings.py
	$(bin)/python docs/make_models.py

# The stages' records name the commit, so the results of uncommitted changes are refused.
figures: venv
	$(bin)/python docs/make_figures.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path '*/.venv*/*' -prune -exec rm -rf {} +
