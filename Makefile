# Every target but `clean` sets up .venv first, once; `make help` lists them.

PYTHON ?= python3
# Where the CPU build of torch is; another index gives a CUDA build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CONSTRAINTS ?= constraints-cpu.txt
PYTEST_ARGS ?= -n auto -m "not slow"
# What `make bench` measures the quality of; hours for all of them, so it goes on where it stopped.
SUBJECTS ?= $(addprefix examples/subjects.py:,ditmoe finegrained epsilon)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow demo lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment in .venv, package and tools installed

# torch alone from its own index: asking that index for every package would be slow.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --retries 1 --no-deps -c $(CONSTRAINTS) --extra-index-url $(TORCH_INDEX) torch
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

test: $(STAMP) ## tests, on CPU, without the slow ones; PYTEST_ARGS='-k name' for some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP) ## only the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

# Without a cache: which imports are our own depends on other files than the one cached.
lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: $(STAMP) ## sample images eager, with Inductor, with moeca; results in out/demo
	$(BIN)/python examples/demo.py

bench: $(STAMP) ## speed against Inductor, and quality against arithmetic; results in out/bench, out/benchmarks, out/quality
	$(BIN)/python -m moeca_compile bench small --out out/bench
	$(BIN)/python -m moeca_compile bench small --rows --out out/bench
	$(BIN)/python benchmarks/reuse_step.py
	$(BIN)/python -m moeca_compile quality $(SUBJECTS) --out out/quality --resume

clean: ## remove the virtual environment, results and caches
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
