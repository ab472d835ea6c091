# Every command first sets up what it needs: the virtual environment .venv and the native engine.
#
#   make demo     train a character language model, torch.nn.LSTM beside fusedrnn.LSTM
#   make test     the whole test suite and the examples in docstrings
#   make bench    fusedrnn against torch.nn; options go through: make bench ARGS=--full
#   make lint     ruff, clang-format, mypy
#   make ctest    in C++: the cells' derivatives against finite differences, the CUDA kernels' plans
#   make asan     the CPU engine's tests under AddressSanitizer and UBSan; make tsan: ThreadSanitizer
#   make sim      the CUDA kernels on a simulator, which needs no GPU but CUDA's headers
#   make cuda     compile the CUDA kernels for three GPUs; what nvcc made of each against a baseline,
#                 which make cuda ARGS=--write makes anew
#   make triton   the same for the Triton kernels, without nvcc and without a GPU
#   make gate     what bench/gpu_gate.sh needs on a machine with a GPU, in build/gate; takes nvcc
#   make wheel    dist/: source archive and wheel, the wheel tried in a fresh environment
#   make clean    remove all of it

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.PHONY: setup demo test bench lint ctest asan tsan simulator sim cuda triton gate wheel clean

USABLE := -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))'
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$name $(USABLE) 2>/dev/null && echo $$name && break; done)
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)

# Installs packages beside torch: its CPU build, from where pip is set up to look or else from
# PyTorch's index, unless there is an NVIDIA device (or the system has no other build); beside the
# CPU build setup.py leaves the CUDA kernels out. Of pip's output only the names of the pinned
# packages remain, to show progress.
#   $(call install,ENVIRONMENT,PACKAGES)
names := sed -u -n 's/^Collecting \([^ ;]*==[^ ;]*\).*/  \1/p'
define install
	@if [ "$$(uname)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
		$(1)/bin/pip install torch==$(TORCH) $(2) | $(names); \
	else \
		$(1)/bin/pip install torch==$(TORCH)+cpu $(2) 2>/dev/null | $(names) || \
		$(1)/bin/pip install torch==$(TORCH)+cpu $(2) \
			--extra-index-url https://download.pytorch.org/whl/cpu | $(names); \
	fi
endef

.venv/ready: requirements.txt
	@$(PYTHON) $(USABLE) 2>/dev/null || { \
		echo "fusedrnn needs Python >= 3.10 with venv; name one with make PYTHON=..."; exit 1; }
	@echo "setting up .venv, once"
	@$(PYTHON) -m venv .venv
	$(call install,.venv,-r requirements.txt)
	@touch $@

.venv/engine: .venv/ready setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	@echo "building the engine"
	@.venv/bin/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

setup: .venv/engine

demo: .venv/engine
	@.venv/bin/python bench/tasks/charlm.py $(ARGS)

test: .venv/engine
	@.venv/bin/pytest --doctest-modules tests fusedrnn $(ARGS)

bench: .venv/engine
	@.venv/bin/python bench/run.py $(ARGS)

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $$(find csrc tests bench -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.c' \
		-o -name '*.cu' -o -name '*.cuh')
	.venv/bin/mypy

# A build beside the installed one, in build/TARGET.
configure = .venv/bin/cmake -S . -B build/$@ -G Ninja --log-level=WARNING \
	-DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
	-DFUSEDRNN_TORCH_INCLUDE=$(CURDIR)/$(wildcard .venv/lib/python3*/site-packages/torch/include)

ctest: .venv/ready
	@$(configure) -DFUSEDRNN_BUILD_TESTS=ON
	@.venv/bin/cmake --build build/$@ --target test_cells test_plan
	@.venv/bin/ctest --test-dir build/$@ --output-on-failure

runtime = $(shell $(CXX) -print-file-name=$(1))
asan: sanitizer = address,undefined
asan: preload = $(call runtime,libasan.so) $(call runtime,libstdc++.so)
asan: sets = (cpu-base or cpu-$$best or cpu and (shapes or threads or weights or few_rows))
asan: options = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
tsan: sanitizer = thread
tsan: preload = $(call runtime,libtsan.so) $(CURDIR)/build/tsan/openmp.so
tsan: sets = (cpu-$$best or cpu-base and threads)
tsan: options = TSAN_OPTIONS=halt_on_error=1
tsan: build/tsan/openmp.so

build/tsan/openmp.so: tests/cpp/tsan_openmp.c
	@mkdir -p $(@D)
	@$(CC) -shared -fPIC $< -o $@

# The instrumented engine in a copy of the package. Addresses depend on the size of vectors: everything
# on the plainest and the best instruction set of the machine, on those between what asks for all
# shapes. Threads do not: the best one, and on the plainest, with more blocks to divide, what is about
# them. What has 16 bits on AMX tiles only, since it is float32
# inside elsewhere, and of the LSTM's variants the one that is all of them. The sanitizer's runtime
# must be the first library of the process, before Python's own; pytest must not capture what it
# writes before it aborts.
asan tsan: .venv/ready
	@$(configure) -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 \
		-DFUSEDRNN_SANITIZE=$(sanitizer) -DFUSEDRNN_OUTPUT_DIR=$(CURDIR)/build/$@/engine
	@.venv/bin/cmake --build build/$@ --target _C
	@rm -rf build/$@/fusedrnn && cp -r fusedrnn build/$@/ && cp build/$@/engine/_C.so build/$@/fusedrnn/
	@export $(options) PYTHONPATH=build/$@ LD_PRELOAD="$(preload)"; \
		best=$$(.venv/bin/python -c "from fusedrnn.backends import native; print(native.isas()[-1])") && \
		.venv/bin/pytest --capture=sys tests/test_recurrence.py tests/test_parts.py tests/test_cells.py tests/test_regularisers.py \
		-k "(test_recurrence and $(sets) and (amx or not float16) \
		and not (lstm_peephole or lstm_coupled-)) \
		or (test_parts and not as_exact) or cell_update_on_the_cpu or engine_s_masks" $(ARGS)

CUDA_HOME ?= /usr/local/cuda
simulator: .venv/ready
	@test -e $(CUDA_HOME)/include/cuda_runtime.h || { \
		echo "the simulator needs CUDA's headers; name their folder with make CUDA_HOME=..."; exit 1; }
	@.venv/bin/cmake -S tests/sim -B build/sim -G Ninja --log-level=WARNING \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DPython3_EXECUTABLE=$(CURDIR)/.venv/bin/python \
		-DFUSEDRNN_CUDA_INCLUDE=$(CUDA_HOME)/include

sim: .venv/engine simulator
	@.venv/bin/cmake --build build/sim
	@.venv/bin/pytest tests/sim $(ARGS)

# A build of its own, from nothing, as only what is compiled is reported.
cuda: .venv/engine
	@$(configure) -DFUSEDRNN_CUDA=ON -DCMAKE_CUDA_COMPILER=$(CUDA_HOME)/bin/nvcc \
		-DCMAKE_CUDA_FLAGS=-Xptxas=-v "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real;100-real"
	@$(CUDA_HOME)/bin/nvcc --version >build/$@/log
	@.venv/bin/cmake --build build/$@ --clean-first --target _C_cuda >>build/$@/log || { \
		grep -v ptxas build/$@/log; exit 1; }
	@.venv/bin/python tests/cuda_gate.py build/$@/_C_cuda.so build/$@/log $(ARGS)
	@.venv/bin/pytest -q tests/test_cuda.py -k library

triton: .venv/engine
	@.venv/bin/python tests/triton_launches.py
	@.venv/bin/python tests/triton_gate.py $(ARGS)

# The checks and toys for every architecture they can be compiled for, the simulator's answers, the
# wheel and the test tools that a machine without a network may lack.
nvcc = $(CUDA_HOME)/bin/nvcc -std=c++20 -O3 -Werror all-warnings -Xcompiler=-Wall,-Wextra \
	-Icsrc -Itests/sim $(foreach arch,$(1),-gencode=arch=compute_$(arch),code=sm_$(arch))
gate: simulator
	@test -x $(CUDA_HOME)/bin/nvcc || { \
		echo "make gate needs nvcc; name CUDA's folder with make CUDA_HOME=..."; exit 1; }
	@rm -rf build/gate && mkdir -p build/gate
	@.venv/bin/cmake --build build/sim --target answers
	build/sim/answers >build/gate/simulated.txt
	$(call nvcc,80 90a 100) -o build/gate/answers \
		$(addprefix tests/sim/,checks.cu exchange_checks.cu toys.cu answers.cpp)
	$(call nvcc,90a 100) -o build/gate/micro bench/gpu/micro.cu
	@FUSEDRNN_CUDA=1 .venv/bin/python -m build --wheel --no-isolation -o build/gate >build/gate.log 2>&1 || { \
		cat build/gate.log; exit 1; }
	@.venv/bin/pip download -qq --no-deps --only-binary=:all: -d build/gate \
		$$(sed -n '/^pytest==/p; /^expecttest==/p' requirements.txt)
	@{ echo "commit: $$(git describe --always --dirty --exclude='*')"; \
		echo "nvcc: $$($(CUDA_HOME)/bin/nvcc --version | sed -n 's/.*, V//p')"; } >build/gate/built
	@ls -s build/gate

wheel: .venv/ready
	@rm -rf dist build/$@ && mkdir -p build
	@.venv/bin/python -m build --no-isolation >build/$@.log 2>&1 || { cat build/$@.log; exit 1; }
	@.venv/bin/python -m venv build/$@
	$(call install,build/$@,dist/*.whl)
	@build/$@/bin/python -I -m fusedrnn info
	@ls -s dist

clean:
	rm -rf .venv build dist *.egg-info fusedrnn/*.so .*_cache .hypothesis
