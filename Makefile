PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) fastroute/ops/schemas.inc
OLDEST := .venv-oldest

.PHONY: demo test test-fast test-thorough test-all test-costs attack sanitize test-oldest test-oldest-fast oldest-libraries lint docs package ctest clean

demo: $(VENV)/.ready
	$(BIN)/python -m fastroute demo

# As many processes as processors, of one thread each. Each begins with tests that lie side by side, which share what they
# compile and train, and takes over tests of another when it has done. What is compiled is kept in build/tests. So is bytecode
# beside its sources, whatever the environment says: to rewrite all assertions takes ten seconds of every process.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist worksteal
ALL := not slow and not gpu and not attack
FAST := not long and not thorough and $(ALL)

test: $(VENV)/.ready
	$(TEST)

# Some two minutes: tests of less than a fifth of a second of a processor, by tests/costs.txt.
test-fast: $(VENV)/.ready
	$(TEST) -m "$(FAST)"

# What `make test` leaves out, which CI runs besides: tests of 0.8 seconds or more.
test-thorough: $(VENV)/.ready
	$(TEST) -m "thorough and not gpu"

# Both in one session, as CI runs them: the tests are collected once.
test-all: $(VENV)/.ready
	$(TEST) -m "$(ALL)"

# Random operators against float64, damaged checkpoints and data, kills: up to 20 minutes.
attack: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m attack tests/attack

# Operators and CPU kernels of this processor compiled with AddressSanitizer, under random and hostile calls. They are built
# in a copy of the sources, beside which the checkout's libraries stay. Leaks are Python's own.
SANITIZED := cd build/sanitized/sources && OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" $(abspath $(BIN))/python

sanitize: $(VENV)/.ready
	rm -rf build/sanitized/sources
	mkdir -p build/sanitized/sources
	tar -c --exclude='*.so' --exclude=__pycache__ csrc fastroute tests pyproject.toml setup.py README.md | tar -x -C build/sanitized/sources
	cd build/sanitized/sources && \
	  FASTROUTE_SANITIZE=address FASTROUTE_BUILD_CPU=native FASTROUTE_BUILD_CUDA=0 \
	  $(abspath $(BIN))/python setup.py --quiet build_ext --inplace --build-temp ../objects
	$(SANITIZED) -m tests.attack.operators 3 200
	$(SANITIZED) -m tests.attack.private 3 500

# What kernels and operators do under the oldest torch and Triton that are supported. The libraries in the checkout belong
# to the newest torch, so those of the oldest are built in a copy of the sources, without optimisation, to save half of the
# time: the operators and the kernels of older processors, since the other tests run those of this one. A second run
# compiles what has changed.
OLDEST_SOURCES := build/oldest/sources
OLDEST_CPU := $(if $(filter x86_64 AMD64,$(shell uname -m)),avx2,native)
TEST_OLDEST := cd $(OLDEST_SOURCES) && OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(abspath $(OLDEST))/bin/python -m pytest -q \
  -n auto --dist worksteal
OLDEST_TESTS := tests/backends tests/ops tests/nn --ignore=tests/backends/test_native_cpu.py

test-oldest: oldest-libraries
	$(TEST_OLDEST) $(OLDEST_TESTS) -m "$(ALL)"

# What CI can afford: what `make test-fast` has of them, and one set of kernels compiled by the oldest Triton, whose
# assembler is another one.
test-oldest-fast: oldest-libraries
	$(TEST_OLDEST) $(OLDEST_TESTS) -m "oldest or $(FAST)"

oldest-libraries: $(OLDEST)/.ready
	mkdir -p $(OLDEST_SOURCES)
	cd $(OLDEST_SOURCES) && find . -path ./build -prune -o -type f ! -name '*.so' ! -name '*.pyc' -exec rm {} +
	tar -c --exclude='*.so' --exclude=__pycache__ benchmarks csrc fastroute tests pyproject.toml setup.py README.md LICENSE | \
	  tar -x -C $(OLDEST_SOURCES)
	cd $(OLDEST_SOURCES) && \
	  FASTROUTE_OPTIMIZE=0 FASTROUTE_BUILD_CPU=$(OLDEST_CPU) FASTROUTE_BUILD_CUDA=0 \
	  $(abspath $(OLDEST))/bin/python setup.py --quiet build_ext --inplace --build-temp ../objects

# Write the CPU seconds of all tests to tests/costs.txt, with nothing kept from earlier runs.
test-costs: $(VENV)/.ready
	rm -rf build/tests
	$(TEST) -m "$(ALL)" --record-costs

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/vermin --quiet --no-tips --violations --eval-annotations --target=3.10- setup.py fastroute tests benchmarks examples
	$(BIN)/mypy

# The site in build/site; warnings are errors. Nothing is fetched from the network.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The source distribution and a wheel, both built and tried.
package: $(VENV)/.ready
	bash .ci/package

ctest: $(VENV)/.ready
	cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/cmake --parallel 2
	ctest --test-dir build/cmake --output-on-failure

# The build uses the environment's own torch, so that the compiled kernels match it.
$(VENV)/.ready: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.11,<3" "torchvision>=0.26,<1" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# Triton 3.6, which belongs to torch 2.11, has an interpreter that fails with NumPy 2.4.
$(OLDEST)/.ready:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet torch==2.11.0 torchvision==0.26.0 "numpy<2.4" "setuptools>=77,<82" wheel ninja \
	  "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100"
	touch $@

clean:
	rm -rf build $(VENV) $(OLDEST) fastroute/backends/native/*.so
