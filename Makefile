# make train                                     trains the default model
# make train ARGS="--config.train.steps=100"     the same, with flags added
# make test                                      lint, format, types, tests
# make test-fast                                 lint and the quick tests, while you work
# make test-tpu                                  tests with the TPU compiler, 700 MB (Linux)
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder of the virtual environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: train test test-fast test-tpu

train: $(VENV)/.installed
	python -m moejax.main --config=configs/mot.py $(ARGS)

test: $(VENV)/.installed-test
	ruff check
	ruff format --check
	pyright
	pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed-test
	ruff check
	pytest -m "not slow and not heavy" --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-tpu: $(VENV)/.installed-test
	python -m pip install --quiet --editable '.[tpu-aot]'
	XLA_FLAGS= pytest -m slow --numprocesses=2 tests/aot tests/layers/mamba_mesh_test.py

# Reinstalled only when setup.py changes.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: setup.py
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --editable '.[test]'
	touch $(VENV)/.installed $@
