# `make train` and `make test` do the whole set-up themselves: a virtual environment in .venv, the install, then the job.

PYTHON ?= python3
VENV ?= .venv
# What `make train` hands on: make train ARGS="toy optimizer.lr=5e-4 seed=1"
ARGS ?=
# Processes of `make test`; each computes on one thread.
JOBS ?= 2

BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py constraints.txt
# What versions are installed: those that the tests are known to pass with.
VERSIONS ?= --constraint constraints.txt
INSTALL = -m pip install --quiet --disable-pip-version-check $(VERSIONS) --editable

# What needs a GPU, in steps of under ten minutes, each of which also runs by its name. They install nothing: .venv's environment where there is
# one, else any with torch, triton, numpy, pytest and pytest-benchmark; peft, transformers, safetensors and pydantic for more than the kernels.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_STEPS := gpu-tests gpu-memcheck gpu-racecheck gpu-bench gpu-sweep gpu-iteration
# make gpu-bench GPU_ARGS="--operator attention nft"; make gpu-iteration GPU_ARGS="--part engine-p1"; make gpu GPU_ARGS="bench --within 300"
GPU_ARGS ?=

.PHONY: train test test-fresh test-newest test-alignment clean gpu $(GPU_STEPS)

train: $(VENV)/.installed
	$(BIN)/python -m arcopo_fast.train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

# The same with new random numbers; a failure says how to repeat it.
test-fresh:
	ARCOPO_TEST_SEED=$$(date +%s) $(MAKE) test

# The same on the newest releases that resolve, in an environment of its own that is upgraded first.
test-newest:
	rm -f .venv-newest/.installed-test
	$(MAKE) test VENV=.venv-newest VERSIONS="--upgrade --upgrade-strategy eager"

# The promise of `make train`, measured: three seeds of the default recipe, a quarter of an hour.
test-alignment: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -s -m slow tests/commands/test_alignment.py

# Results go to $OUT when it is set, else to benchmarks/results/<device>/.
gpu:
	PYTHONPATH="kernels:.:$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

$(GPU_STEPS):
	PYTHONPATH="kernels:.:$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(GPU_ARGS)

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: arcopo_fast needs Python 3.10 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.installed: $(BIN)/python $(SETUP)
	$(BIN)/python $(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python $(SETUP)
	$(BIN)/python $(INSTALL) '.[test]'
	@touch $(VENV)/.installed $@
