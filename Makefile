# Everything works from a bare clone: each target makes the environment it needs.
#   make test TORCH=torch==2.11.0    another torch (in an environment of its own: VENV=path)
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA_TORCH ?= torch==2.11.0
CUDA_VENV ?= .venv-cuda

CPP = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)
TOOLS_CPP = $(wildcard tests/*.cpp trust/*.cpp trust/*.h)
BUILD_INPUTS = setup.py pyproject.toml $(CPP) $(wildcard backend/*.py mhmatmul_ext/*.py mhmatmul_ext/*.pyi)

.PHONY: help demo bench bench-gpu docs test test-cuda-build test-gpu sanitize-gpu trust fuzz accuracy growth sanitize coverage
.PHONY: lint format clean
help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/built  ## the main job on real text, checked and timed; TEXT=file for your own
	$(VENV)/bin/python examples/important_words.py $(TEXT)

bench: $(VENV)/built  ## speed on this CPU against PyTorch and against its limits, a quarter of an hour; BENCH=options
	$(VENV)/bin/python benchmarks/cpu.py $(BENCH)

bench-gpu: $(VENV)/built  ## the same on this GPU, six minutes at most on an H100; BENCH=options
	$(VENV)/bin/python benchmarks/gpu.py $(BENCH)

docs: $(VENV)/built  ## the site, in build/docs/index.html; a warning is an error
	$(VENV)/bin/sphinx-build -W --keep-going -q docs build/docs

test: $(VENV)/built  ## the whole test suite
	$(VENV)/bin/pytest tests

N ?= 2000
fuzz: $(VENV)/built  ## random calls against the specification; N=20000 of them, FUZZ=--seed=1 for others
	$(VENV)/bin/python trust/fuzz.py $(N) $(FUZZ)

accuracy: $(VENV)/built  ## errors against float64, ours and PyTorch's side by side, in build/accuracy.png as well
	mkdir -p build
	$(VENV)/bin/python trust/accuracy.py --output build/accuracy

growth: $(VENV)/built  ## how time and memory grow, and that memory is what was said
	$(VENV)/bin/python trust/growth.py

test-cuda-build: export FORCE_CUDA = 1
test-cuda-build: export TORCH_CUDA_ARCH_LIST = 8.0;9.0
test-cuda-build:  ## compile and link for CUDA (no GPU needed), then the test suite on that build
	$(MAKE) $(CUDA_VENV)/built VENV=$(CUDA_VENV) TORCH=$(CUDA_TORCH)
	$(CUDA_VENV)/bin/pytest tests

test-gpu: export MHMATMUL_DEMAND_GPU = 1
test-gpu: $(VENV)/built  ## the tests that need a GPU; fails where none can run them
	$(VENV)/bin/pytest -m gpu tests

sanitize-gpu: export MHMATMUL_DEMAND_GPU = 1
sanitize-gpu: $(VENV)/built  ## the operators' GPU tests under compute-sanitizer: memory, races, initialisation, barriers
	$(VENV)/bin/python tests/sanitize_gpu.py

trust: $(VENV)/built  ## all that trust rests on, in short forms, as one table, in a quarter of an hour at most; TRUST=options
	$(VENV)/bin/python trust/run.py $(TRUST)

sanitize: $(VENV)/built  ## CPU kernels between guard pages and under three sanitizers; SANITIZE=--valgrind for another
	$(VENV)/bin/python trust/sanitize.py $(SANITIZE)

coverage: $(VENV)/built  ## which branches of Python and lines of C++ the tests reach; fails where one has no reason
	$(VENV)/bin/pip install -q 'coverage>=7.10' 'gcovr>=8' ninja 'pybind11>=2.13' 'setuptools>=77'
	$(VENV)/bin/python trust/lines.py $(COVERAGE)

lint: $(VENV)/built  ## ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP) $(TOOLS_CPP)
	$(VENV)/bin/mypy

format: $(VENV)/built  ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(TOOLS_CPP)

clean:  ## remove everything built and installed
	rm -rf build dist *.egg-info mhmatmul_ext/*.so $(VENV) $(CUDA_VENV)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(TORCH)
	touch $@

# Not editable: what is tested is what users install, and two environments cannot overwrite each other's binaries.
$(VENV)/built: $(VENV)/torch $(BUILD_INPUTS)
	@echo "Building mhmatmul_ext in $(VENV): one to four minutes ..."
	$(VENV)/bin/pip install '.[lint,test]'
	cd $(VENV) && bin/python -m mhmatmul_ext info
	touch $@
