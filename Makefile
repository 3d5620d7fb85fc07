# Sets itself up and runs the checks: `make` lists the targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
OUT ?= runs/demo
DEMO_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= -n logical --maxprocesses=4 --dist=loadfile
BENCH_ARGS ?= --compare

SHELL := /bin/sh
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV_ABS := $(abspath $(VENV))
BIN := $(VENV_ABS)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV_ABS)/.stamps
# The native build must find the venv's cmake and ninja before the system's.
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

NATIVE := $(shell find csrc -type f 2>/dev/null) $(wildcard CMakeLists.txt setup.py MANIFEST.in) pyproject.toml
# How a triton that torch requires itself is told from one that must come from requirements/dev.txt.
TORCH_HAS_TRITON := import sys, importlib.metadata as m; \
  sys.exit(not any(r.startswith("triton") for r in m.requires("torch") or ()))
# What holds the torch that is there: where it and a pin exclude each other, pip would take another torch, and say nothing.
TORCH_AS_INSTALLED := import importlib.metadata as m; print("torch==" + m.version("torch"))
MAJOR_MINOR := import sys; print("%d.%d" % sys.version_info[:2])

.PHONY: help setup demo test coverage lint types docs docs-examples bench bench-each clean python-matches FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=$(PYTHON)  TORCH=$(TORCH)  PIP_ARGS=$(PIP_ARGS)  VENV=$(VENV)  WORKERS=$(WORKERS)  PYTEST_ARGS=$(PYTEST_ARGS)  BENCH_ARGS=$(BENCH_ARGS)"

setup: $(STAMPS)/built  ## create .venv, install what is pinned, build the extension

demo: setup  ## train a small GPT with and without teleportation
	@$(BIN)/python -m teleport_fast train --out $(OUT) $(DEMO_ARGS)

test: setup  ## run every test, the documentation's examples included
	@$(BIN)/pytest $(WORKERS) $(PYTEST_ARGS)

coverage: setup  ## run every test and say which lines and branches of teleport_fast/ none of them took
	@$(BIN)/pytest $(WORKERS) --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

lint: setup  ## ruff
	@$(BIN)/ruff check .

types: setup  ## mypy
	@$(BIN)/mypy

docs-examples: setup  ## run the code blocks of README.md and docs/, and the docstrings' examples
	@$(BIN)/pytest tests/test_docs_examples.py $(PYTEST_ARGS)

docs: $(STAMPS)/docs  ## build the documentation's site into site/; a warning or a broken link fails
# Not --quiet, which hides from --strict the warnings that it counts.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: setup  ## time every op beside torch, a copy and the BLAS; say what changed
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.ratios $(BENCH_ARGS)

bench-each: setup  ## pytest-benchmark, each route of each op by itself
	@$(BIN)/pytest bench $(PYTEST_ARGS)

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build dist site ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find teleport_fast kernels tests bench examples -name __pycache__ -type d -exec rm -rf {} + 2>/dev/null || true
	find teleport_fast -name '*.so' -delete
	rm -f $(STAMPS)/built

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than Python 3.10; pass PYTHON=python3.12, for example" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_ABS) || \
	  { rm -rf $(VENV_ABS); echo "make: could not create $(VENV); install your system's python3-venv package" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# An explicit PYTHON= that an existing environment does not run is an error, not a silent no-op.
python-matches: | $(STAMPS)/venv
ifneq ($(origin PYTHON),file)
	@want=$$($(PYTHON) -c '$(MAJOR_MINOR)') && have=$$($(BIN)/python -c '$(MAJOR_MINOR)') && \
	  if [ "$$want" != "$$have" ]; then \
	    echo "make: $(VENV) runs Python $$have, PYTHON=$(PYTHON) is $$want; remove $(VENV) or pass VENV=.venv-$$want" >&2; \
	    exit 1; fi
endif

# Rewritten only when TORCH= names another requirement, so that the installation below runs only then.
$(STAMPS)/torch.wanted: FORCE | python-matches
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/torch.wanted
	@if test -e $@ || ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "==> $(TORCH)"; $(PIP) install $(PIP_ARGS) '$(TORCH)'; fi
	@touch $@

$(STAMPS)/requirements: requirements/dev.txt $(STAMPS)/torch
	@echo "==> requirements/dev.txt"
	@if $(BIN)/python -c '$(TORCH_HAS_TRITON)'; then grep -v '^triton' requirements/dev.txt; \
	  else cat requirements/dev.txt; fi > $(STAMPS)/dev.txt
	@$(BIN)/python -c '$(TORCH_AS_INSTALLED)' > $(STAMPS)/torch.txt
	@$(PIP) install --quiet $(PIP_ARGS) -r $(STAMPS)/dev.txt -c $(STAMPS)/torch.txt
	@touch $@

# Needs no torch: the API's pages are read from the sources.
$(STAMPS)/docs: requirements/docs.txt | $(STAMPS)/venv
	@echo "==> requirements/docs.txt"
	@$(PIP) install --quiet $(PIP_ARGS) -r requirements/docs.txt
	@touch $@

# Rewritten only when the compiler changes: one that is installed after a pure-Python set-up is then used.
$(STAMPS)/compiler: FORCE | $(STAMPS)/venv
	@found="$$(for name in $$CXX c++ g++ clang++; do command -v $$name; done)"; \
	  echo "$$found" | cmp -s - $@ || echo "$$found" > $@

$(STAMPS)/built: $(STAMPS)/requirements $(STAMPS)/compiler $(NATIVE)
	@echo "==> teleport_fast"
	@$(PIP) install --quiet $(PIP_ARGS) --no-build-isolation --no-deps -e .
	@$(BIN)/python -m teleport_fast.doctor --summary
	@touch $@

FORCE:
