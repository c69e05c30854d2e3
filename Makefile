# Everything runs in .venv, at the versions that constraints.txt pins. Needs Python 3.10+ with venv, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt

.PHONY: demo test fuzz lint types docs bench format clean

demo: $(VENV)/.stamp-run
	$(BIN)/equinorm demo

# Two workers of one thread each; doctests in src are collected too (pyproject.toml).
test: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Random networks for as long as asked; says which is unsound, with its seed.
MINUTES ?= 10
SEED ?= 0
OUTPUT ?=
fuzz: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --minutes $(MINUTES) --first $(SEED) $(if $(OUTPUT),--output $(OUTPUT))

lint: $(VENV)/.stamp-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.stamp-lint
	$(BIN)/pyright

# Tables are in the pages themselves, so that they can be read without a build; this makes them anew.
docs: $(VENV)/.stamp-docs
	$(BIN)/python docs/_tables/fill.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a training step and a balance cost on this machine; about twenty minutes when nothing else runs.
bench: $(VENV)/.stamp-test
	$(BIN)/python benchmarks/step.py --output benchmarks/results/step.jsonl
	$(BIN)/python benchmarks/step.py --norms --output benchmarks/results/norms.jsonl
	$(BIN)/python benchmarks/traffic.py --output benchmarks/results/traffic.jsonl
	$(BIN)/python benchmarks/convergence.py --sizes 1e6 1e7 1e8 --output benchmarks/results/convergence.jsonl

format: $(VENV)/.stamp-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) site dist .pytest_cache .ruff_cache .hypothesis

# ----------------------------------------------------------------------------------------------------- installation

# The pip that comes with Python may be too old for dependency groups.
$(VENV)/.stamp-venv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml
	$(INSTALL) --editable ".[demo]"
	touch $@

# torchvision and timm without dependencies: the tests use the definitions of their models, not compiled operators.
$(VENV)/.stamp-test: $(VENV)/.stamp-run
	$(INSTALL) --group test
	$(INSTALL) --no-deps torchvision timm
	touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-run
	$(INSTALL) --group lint
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	$(INSTALL) --group docs
	touch $@
