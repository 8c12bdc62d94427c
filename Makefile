# Everything runs in .venv, which is made on the first call and refreshed when the two files it depends on change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMFYUI_STAMP := $(VENV)/.installed-comfyui-test
REGISTRY_STAMP := .venv-registry/.installed

.PHONY: demo test test-comfyui test-registry test-gpu fuzz lint clean

demo: $(STAMP)
	$(BIN)/longcat generate "a red circle moves right on a blue background" \
		--seed 1 --output demo.mp4 --contact-sheet demo.png

# One thread a worker: two pools of threads on the same cores slow each other down several times.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal --durations=12 --ignore=tests/comfyui

# In the real ComfyUI program and, where there is a Chromium, its web page; -rs prints why a test does not run. One
# thread here as well, beside the browser: a third less time on two cores. The tests of the program and those of the
# page share no server, so each file has a worker and a server of its own.
test-comfyui: $(COMFYUI_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n 2 --dist loadfile --durations=8 tests/comfyui

# The package and what the registry reads of it, with the registry's own tools. They have an environment of their own,
# because their dependencies differ from ours.
test-registry: $(STAMP) $(REGISTRY_STAMP)
	$(BIN)/python -m pytest -q -rs tests/registry

# On a machine with a CUDA GPU and ComfyUI, without network: the tests, the nodes' own tests and the matrix of the real
# server. PART names some of them. GPU_PYTHON is a Python that has PyTorch for CUDA already; .venv is not made then.
GPU_PYTHON ?=
PART :=
test-gpu: $(if $(GPU_PYTHON),,$(STAMP))
	$(or $(GPU_PYTHON),$(BIN)/python) -m tests.gpu $(PART) $(GPU_OPTIONS)

# Mutated files of every kind for SECONDS; what is found is kept in fuzz-findings/.
SECONDS := 3600
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.fuzz --seconds $(SECONDS) --keep fuzz-findings 2>fuzz.log

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The stamp is written last: an install that broke off is begun again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[headless,test,dev]' -c constraints.txt
	touch $@

$(COMFYUI_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[comfyui-test]' -c constraints.txt
	touch $@

$(REGISTRY_STAMP): tests/registry/tools.txt
	$(PYTHON) -m venv .venv-registry
	.venv-registry/bin/python -m pip install --quiet --disable-pip-version-check -r tests/registry/tools.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-registry build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache demo.mp4 demo.png fuzz-findings fuzz.log
	find longcat_core nodes tests -name __pycache__ -type d -prune -exec rm -rf {} +
