# Two commands for users: `make demo` and `make test`. Each sets up what it needs in $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= runs

.PHONY: setup demo test test-slow lint types bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup ## both experiments on digits, three seeds
	$(BIN)/renorm run noniid --out $(OUT)/noniid-digits
	$(BIN)/renorm run microbatch --out $(OUT)/microbatch-digits

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/layers.py --csv benchmarks/results/layers.csv

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
