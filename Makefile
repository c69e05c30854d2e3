# The package runs in .venv; tests and tools have .venv-test, so that what they need does not come into the user's; .venv-bare
# holds what the library alone needs. Versions are those of constraints.txt. Needs Python 3.10+ with venv, git and make.

PYTHON ?= python3
VENV := .venv
TEST := .venv-test
BARE := .venv-bare
INSTALL := -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt

.PHONY: demo test test-all fuzz lint types docs dist bench gpu-dry format clean

demo: $(VENV)/.stamp-run
	$(VENV)/bin/equinorm demo

# Two workers of one thread each; doctests in src are collected too (pyproject.toml).
test: $(TEST)/.stamp-test
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n 2 -m "not slow"

# Also what takes a minute by itself.
test-all: $(TEST)/.stamp-test
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n 2

# Random networks for as long as asked; says which is unsound, with its seed.
MINUTES ?= 10
SEED ?= 0
OUTPUT ?=
fuzz: $(TEST)/.stamp-test
	OMP_NUM_THREADS=1 $(TEST)/bin/python tests/support/fuzz.py --minutes $(MINUTES) --first $(SEED) $(if $(OUTPUT),--output $(OUTPUT))

lint: $(TEST)/.stamp-lint
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check

types: $(TEST)/.stamp-test $(TEST)/.stamp-lint
	$(TEST)/bin/pyright

# Tables are in the pages themselves, so that they can be read without a build; this makes them anew.
docs: $(TEST)/.stamp-docs
	$(TEST)/bin/python docs/_tables/fill.py
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict
	$(TEST)/bin/python docs/_tables/check.py site
	$(TEST)/bin/python docs/_check/pages.py site

# The sdist, the wheel that it makes, and the wheel at work where nothing but torch and numpy is installed.
dist: $(TEST)/.stamp-dist $(BARE)/.stamp-bare
	rm -rf dist
	$(TEST)/bin/python -m hatchling build --target sdist --directory dist
	$(TEST)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/equinorm-*.tar.gz
	$(BARE)/bin/python -m pip uninstall --quiet --yes equinorm
	$(BARE)/bin/python $(INSTALL) dist/equinorm-*.whl
	cd dist && ../$(BARE)/bin/python ../tests/support/distribution.py

# What a training step and a balance cost on this machine; about twenty minutes when nothing else runs.
bench: $(TEST)/.stamp-test
	$(TEST)/bin/python benchmarks/training_step.py --output benchmarks/results/step.jsonl
	$(TEST)/bin/python benchmarks/training_step.py --norms --output benchmarks/results/norms.jsonl
	$(TEST)/bin/python benchmarks/memory_traffic.py --output benchmarks/results/traffic.jsonl
	$(TEST)/bin/python benchmarks/balancing.py --sizes 1e6 1e7 1e8 --output benchmarks/results/convergence.jsonl

# Every script that measures on a GPU, on a CPU and on the smallest networks.
gpu-dry: $(TEST)/.stamp-test
	rm -rf gpu-results/dry
	OMP_NUM_THREADS=1 PYTHON=$(TEST)/bin/python benchmarks/gpu.sh --dry --output gpu-results/dry

format: $(TEST)/.stamp-lint
	$(TEST)/bin/ruff check --fix
	$(TEST)/bin/ruff format

clean:
	rm -rf $(VENV) $(TEST) $(BARE) site dist .pytest_cache .ruff_cache .hypothesis

# ----------------------------------------------------------------------------------------------------- installation

# The pip that comes with Python may be too old for dependency groups.
%/.stamp-venv: constraints.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	touch $@

%/.stamp-run: %/.stamp-venv pyproject.toml
	$*/bin/python $(INSTALL) --editable ".[demo]"
	touch $@

# torchvision and timm without dependencies: the tests use the definitions of their models, not compiled operators.
$(TEST)/.stamp-test: $(TEST)/.stamp-run
	$(TEST)/bin/python $(INSTALL) --group test
	$(TEST)/bin/python $(INSTALL) --no-deps torchvision timm
	touch $@

$(TEST)/.stamp-lint: $(TEST)/.stamp-run
	$(TEST)/bin/python $(INSTALL) --group lint
	touch $@

$(TEST)/.stamp-docs: $(TEST)/.stamp-run
	$(TEST)/bin/python $(INSTALL) --group docs
	touch $@

$(TEST)/.stamp-dist: $(TEST)/.stamp-run
	$(TEST)/bin/python $(INSTALL) --group dist
	touch $@

$(BARE)/.stamp-bare: $(BARE)/.stamp-venv
	$(BARE)/bin/python $(INSTALL) torch numpy
	touch $@

.SECONDARY:
