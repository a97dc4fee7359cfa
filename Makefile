# make train                                     trains the default model
# make train ARGS="--config.train.steps=100"     the same, with flags added
# make test                                      lint, format, types, tests
# make test-fast                                 lint and the quick tests, while you work
# make test-hf                                   tests with PyTorch and transformers, 1 GB
# make test-tpu                                  tests with the TPU compiler, 700 MB (Linux)
# make test-versions                             tests on Python 3.13, with the newest and oldest JAX
# make notebooks                                 makes notebooks/*.ipynb from their sources
# make docs                                      builds the documentation into build/site
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder of the virtual environment,
# PYTHON313 the interpreter of test-versions.

PYTHON ?= python3
PYTHON313 ?= python3.13
VENV ?= .venv
ARGS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: train test test-fast test-hf test-tpu test-versions test-newest test-oldest notebooks docs

ON_TWO_CORES = --numprocesses=2 --dist=loadfile --no-loadscope-reorder
INSTALL = -m pip install --quiet --constraint constraints/newest.txt --editable

train: $(VENV)/.installed
	python -m moejax.main --config=configs/mot.py $(ARGS)

test: $(VENV)/.installed-test
	ruff check
	ruff format --check
	pyright
	pytest $(ON_TWO_CORES)

test-fast: $(VENV)/.installed-test
	ruff check
	pytest -m "not slow and not heavy" $(ON_TWO_CORES)

test-tpu: $(VENV)/.installed-test $(VENV)/.installed-tpu-aot
	XLA_FLAGS= pytest -m slow --numprocesses=2 tests/aot tests/layers/mamba_mesh_test.py

test-hf: $(VENV)/.installed-test $(VENV)/.installed-test-hf
	pytest --numprocesses=2 tests/hf_package_test.py

notebooks: $(VENV)/.installed-test
	python notebooks/build.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

# Reinstalled only when the dependencies change.
$(VENV)/.installed: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(VENV)
	python $(INSTALL) .
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(VENV)
	python $(INSTALL) '.[$*]'
	touch $(VENV)/.installed $@

test-versions: test-newest test-oldest

test-newest test-oldest: test-%: $(VENV)/%/.installed
	$(VENV)/$*/bin/python -m pytest -m "not slow and not heavy or versions" $(ON_TWO_CORES)

# PYENV_VERSION, for pyenv's python3.13 runs only if that version is selected.
$(VENV)/%/.installed: pyproject.toml constraints/%.txt
	PYENV_VERSION=3.13 $(PYTHON313) -m venv $(VENV)/$* || uv venv --seed --python 3.13 $(VENV)/$*
	$(VENV)/$*/bin/python -m pip install --quiet --constraint constraints/$*.txt --editable '.[test-core]'
	touch $@
