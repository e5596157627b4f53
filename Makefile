# Two commands for users: `make demo` and `make test`. Each sets up what it needs in $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BASE ?= HEAD
OUT ?= runs

.PHONY: setup demo test test-slow test-oldest sanitize lint types docs bench bench-regression gpu gpu-packages clean

# uv installs, from PATH or else the registry; pip where uv is not to be had, or knows less than pip of where packages are.
UV = $(shell PATH="$$PATH:$(BIN)"; command -v uv)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL = install() { $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt $(AFRESH) "$$@" || )\
	$(PIP) "$$@"; }; install

# The environment in two parts: what a user needs, and what tests, checks and documents need besides.
setup: $(VENV)/.tools

$(VENV)/.empty:
	$(PYTHON) -m venv $(VENV)
	command -v uv > /dev/null || $(PIP) uv || true
	touch $@

# The kernels are built against the torch of this environment, so it comes first.
$(VENV)/.lab: AFRESH = --reinstall-package renorm  # uv would take what it built before
$(VENV)/.lab: pyproject.toml lab/pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h) | $(VENV)/.empty
	$(INSTALL) torch setuptools ninja
	$(INSTALL) --no-build-isolation -e . -e ./lab
	touch $@

$(VENV)/.tools: $(VENV)/.lab
	$(INSTALL) "renorm[dev]"
	touch $@

demo: $(VENV)/.lab ## two experiments on digits, three seeds: what batch norm does to workers with classes of their own, and to few examples
	$(BIN)/renorm run workers --methods '[batch_norm, batch_renorm_unlimited, group_norm]' --classes-per-worker '[1]' \
		--frozen-shares '[0.5]' --out $(OUT)/workers-digits
	$(BIN)/renorm run microbatch --out $(OUT)/microbatch-digits

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

test-oldest: ## the core with the oldest Python and torch, in .venv-oldest; passed over where that Python is not to be had
	tests/oldest.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: setup
	$(BIN)/mypy

docs: setup ## the documentation's site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

sanitize: ## the C++ kernels' own tests, plain and under the address, undefined-behaviour and thread sanitizers
	$(MAKE) -s -C csrc/tests all

bench: setup ## about an hour; then the tables and figures of docs/benchmarks.md
	-$(INSTALL) onednn-cpu-gomp # to compare with, where it is to be had
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/crossq.py
	$(BIN)/python benchmarks/small.py
	$(BIN)/python benchmarks/report.py

bench-regression: setup ## ratio of times to another commit: make bench-regression BASE=main
	$(BIN)/python benchmarks/regression.py $(BASE)

gpu: ## correctness and times on this machine's GPU, with the Python, torch and Triton that are there; DRY=1 without one
	$(or $(PYTHON),python3) benchmarks/gpu.py $(if $(DRY),--dry)

gpu-packages: setup ## what the machine with the GPU may lack, in a folder to take along
	$(BIN)/python -m pip install --quiet --target build/gpu-packages --no-deps -c constraints.txt \
		pytest pluggy iniconfig hypothesis sortedcontainers timm huggingface-hub safetensors

clean:
	rm -rf $(VENV) .venv-oldest build dist lab/build src/renorm/_kernels.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
