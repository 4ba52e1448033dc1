# Each command makes .venv with what it needs, once, and again only when setup.py or pyproject.toml change.
#   PYTHON=python3.13   the interpreter to make .venv from (default: the one .venv has, else python3);
#                       of make gpu, which neither makes nor takes .venv, the one to run (default: python3)
#   PART="verify bench" parts of make gpu: compile, verify, repeat, sanitize, bench
#   ARGS="..."          passed on to the command: make test ARGS="-k winograd", make bench ARGS=--help

GPU_PYTHON := $(or $(PYTHON),python3)
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
ARGS ?=
PART ?=

.PHONY: help bench gpu test lint clean FORCE

help:
	@echo "make bench   convolve a photograph, run real networks with every algorithm, write a report"
	@echo "make gpu     compile, verify and time CUDA kernels (PART=\"verify bench\"); python3 needs CuPy, pytest"
	@echo "make test    run the tests"
	@echo "make lint    ruff (rules and format) and mypy"
	@echo "make clean   remove .venv and all that is built or cached; bench-results/, your results, stay"
	@echo "ARGS=\"...\" is passed on (make bench ARGS=--help); PYTHON=python3.13 picks the interpreter"

bench: .venv/installed-bench
	.venv/bin/python -m bench $(ARGS)

# With the packages that python3 has: .venv has no CuPy, and a machine with a GPU may have no network.
gpu:
	$(GPU_PYTHON) -m bench gpu $(PART) $(ARGS)

test: .venv/installed-test
	.venv/bin/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: .venv/installed-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/installed-%: setup.py pyproject.toml .venv/pyvenv.cfg
	@echo "installing fastconv[$*] into .venv"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

CHECK_PYTHON = import sys; sys.version_info >= (3, 10) or sys.exit("fastconv needs Python 3.10 or newer")
PRINT_PYTHON = import pip, sys; print(sys.version)

# Looked at every time, written only when .venv is missing, unfinished, or made from another Python than PYTHON.
.venv/pyvenv.cfg: FORCE
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@if [ "$$(.venv/bin/python -c '$(PRINT_PYTHON)' 2>&1)" != "$$($(PYTHON) -c 'import sys; print(sys.version)')" ]; then \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	        echo "$(PYTHON) cannot make a virtual environment: it lacks venv or ensurepip." >&2; \
	        echo "Install them (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=..." >&2; \
	        exit 1; }; \
	    echo "making .venv with $(PYTHON)"; \
	    $(PYTHON) -m venv --clear .venv; \
	fi

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
