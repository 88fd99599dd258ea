# make quickstart | test | test-all | check | lock.  Each makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# The fast tests run in as many processes as there are cores, file by file; the slow ones, which start ranks of
# their own, one after the other.
WORKERS ?= auto
PYTEST_FAST := -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist loadscope

# ninja counts for DeepSpeed only if it is on PATH, and `deepspeed` starts the ranks.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install quickstart test test-all check lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/project.stamp  ## the virtual environment with everything in it

quickstart: install  ## train a small mixture on 12 built-in tasks with two ranks
	$(BIN)/taskmoe train configs/quickstart.yaml --num_ranks 2

test: install  ## the fast tests: no GPU, no network
	$(BIN)/python -m pytest $(PYTEST_FAST) $(PYTEST_ARGS)

test-all: install $(VENV)/triton36.stamp  ## every test, with the slow ones
	TASKMOE_OLDEST_TRITON=$(abspath $(VENV)/triton36) $(BIN)/python -m pytest $(PYTEST_FAST) $(PYTEST_ARGS)
	TASKMOE_OLDEST_TRITON=$(abspath $(VENV)/triton36) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# The lock goes in first and alone: the project itself then brings nothing that it does not name.
$(VENV)/lock.stamp: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "taskmoe needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/project.stamp: $(VENV)/lock.stamp pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The oldest triton that the kernels are tested with, beside the installed one; its interpreter cannot loop over
# the arrays of numpy 2.4. There are wheels for Linux on x86_64 alone: elsewhere those tests are skipped.
$(VENV)/triton36.stamp: $(VENV)/lock.stamp
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install --disable-pip-version-check --no-deps \
	  --upgrade --target $(VENV)/triton36 triton==3.6.0 "numpy<2.4"
	@touch $@

# torch 2.13 names this triton as its own; a CPU build of torch brings none.
TORCH := 2.13.0
TRITON := 3.7.1

lock:  ## resolve pyproject.toml anew and write requirements.lock
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install torch==$(TORCH) triton==$(TRITON) setuptools
	.venv-lock/bin/python -m pip install -e '.[test,bench,dev]'
	{ sed -n '/^#/p;/^[^#]/q' requirements.lock; \
	  echo 'torch==$(TORCH)'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude-editable \
	    | grep -viE '^(pip|wheel|torch|nvidia-[a-z0-9-]*|cuda-[a-z]*)==' \
	    | sed -E "s/^(triton==.*)/\1 ; sys_platform == 'linux' and platform_machine == 'x86_64'/"; \
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:  ## remove the virtual environment and caches, keep runs/
	rm -rf $(VENV) .venv-lock .pytest_cache .mypy_cache .ruff_cache *.egg-info
