# `make demo` and `make test` need Python, git, make and a C compiler, and set up the rest in .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# The first Python that runs, is new enough and can make virtual environments. PYTHON=... chooses another.
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3
PROBE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $p -c '$(PROBE)' 2>/dev/null && echo $p)))

.PHONY: setup demo test test-slow check-kernels lint format clean

setup: $(STAMP)

# An existing .venv is used as it is; pip is the last thing a new one gets, so one cut short is made again.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 with venv and ensurepip found among: $(CANDIDATES)."; \
	  echo "Install one (on Debian also python3-venv), or name one: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt setup.py | $(BIN)/pip
	@echo "Installing patchattn and what it needs into $(VENV): a few minutes the first time."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/patchattn demo

test: setup
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/pytest -n 2

# Compiled for three GPU generations; needs no GPU, and some minutes.
check-kernels: setup
	$(BIN)/python -m patchattn_kernels.check --static

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
