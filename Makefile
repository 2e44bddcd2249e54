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

# What needs a GPU: nine minutes of it, the most telling first; each step also runs by its name. In .venv's environment where there is one, else
# in any with torch, triton, numpy, pytest and pytest-benchmark; peft, transformers, safetensors and pydantic for more than the kernels.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_STEPS := gpu-look gpu-tests gpu-memcheck gpu-racecheck gpu-bench gpu-sweep gpu-iteration
# make gpu-bench GPU_ARGS="--operator attention nft"; make gpu-iteration GPU_ARGS="--part engine-p1"; make gpu GPU_ARGS="--within 900"
GPU_ARGS ?=
# What `make gpu-wheels` fetches where there is a network, for the Python of a machine without one: whatever such an environment may lack.
# `make gpu` uses the folder where there is one and no .venv, and installs nothing but a copy of it, $(GPU_SITE).
GPU_WHEELS ?= .gpu-wheels
GPU_WHEELS_PYTHON ?= 3.12
GPU_WHEELS_FOR := pydantic pydantic-core annotated-types typing-inspection typing-extensions diffusers importlib-metadata lazy-importer
GPU_SITE ?= /tmp/arcopo-gpu-site
CARRIED := $(if $(wildcard $(BIN)/python),,$(wildcard $(GPU_WHEELS)))
PLATFORMS := $(foreach version,28 27 17,--platform manylinux_2_$(version)_x86_64) --platform manylinux2014_x86_64 --platform manylinux1_x86_64
RUN_GPU = PYTHONPATH="kernels:.:$(if $(CARRIED),$(GPU_SITE):)$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu

.PHONY: train test test-fresh test-newest test-alignment clean gpu gpu-dry-run gpu-wheels gpu-site $(GPU_STEPS)

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
gpu: gpu-site
	$(RUN_GPU) $(GPU_ARGS)

$(GPU_STEPS): gpu-site
	$(RUN_GPU) $(@:gpu-%=%) $(GPU_ARGS)

# The same without a GPU, at sizes that take no time: it finds what would waste a machine's minutes.
gpu-dry-run: gpu-site
	CUDA_VISIBLE_DEVICES= $(RUN_GPU) --dry-run $(GPU_ARGS)

gpu-wheels:
	rm -rf $(GPU_WHEELS)
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_WHEELS_PYTHON) $(PLATFORMS) \
		--dest $(GPU_WHEELS) $(foreach name,$(GPU_WHEELS_FOR),$(firstword $(shell grep '^$(name)==' constraints.txt)))
	@du -sh $(GPU_WHEELS)

gpu-site:
ifneq ($(CARRIED),)
	@rm -rf $(GPU_SITE)
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target $(GPU_SITE) $(GPU_WHEELS)/*.whl
endif

clean:
	rm -rf $(VENV) .venv-newest $(GPU_WHEELS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

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
