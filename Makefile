PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint ctest clean

demo: $(VENV)/.ready
	$(BIN)/python -m fastroute demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

ctest: $(VENV)/.ready
	cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/cmake --parallel 2
	ctest --test-dir build/cmake --output-on-failure

# The build uses the environment's own torch, so that the compiled kernels match it.
$(VENV)/.ready: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.11,<3" "torchvision>=0.26,<1" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build $(VENV) fastroute/backends/native/*.so
