# SPDX-License-Identifier: BSD-3-Clause
# The project's commands; CI runs the same ones.
PYTHON ?= python
CXX ?= g++
CPP_SOURCES := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.cpp' 'tests/cpp/*.h' \
  'tests/simt/*.cpp' 'tests/simt/*.h' 'benchmarks/*.cpp' 'benchmarks/*.h' 'benchmarks/*.cu')
ISAS := $(wildcard csrc/cpu/isa/*.cpp)
KERNELS := $(ISAS) csrc/cpu/dispatch.cpp csrc/cpu/plan.cpp
VECTOR_KERNELS := -include tests/cpp/vector_table.h -DFFN_OPS_KERNELS="\"../../../tests/cpp/vector_kernels.h\""
KERNEL_FLAGS := -std=c++20 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas
SANITIZERS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
TMP := build/kernels

.PHONY: build test isas lint bench against docs coverage-transformers coverage-dense sanitize aarch64 simt simt-operators cuda products kernels format

build:
	$(PYTHON) -m pip install -e ".[compare,test,lint]"

test:
	$(PYTHON) -m pytest

# The test suite on each instruction set of this machine, with torch's own kernels, MKL's and oneDNN's held to it.
isas:
	for isa in $$($(PYTHON) -c "import torch, ffn_ops; print(torch.ops.ffn_ops._isas())"); do \
	  case $$isa in baseline) torch=default;; avx512*) torch=avx512;; *) torch=$$isa;; esac; \
	  case $$isa in baseline) mkl=SSE4_2; onednn=SSE41;; avx2) mkl=AVX2; onednn=AVX2;; *) mkl=AVX512; onednn=ALL;; esac; \
	  echo "== $$isa"; FFN_OPS_ISA=$$isa ATEN_CPU_CAPABILITY=$$torch MKL_ENABLE_INSTRUCTIONS=$$mkl \
	  ONEDNN_MAX_CPU_ISA=$$onednn $(PYTHON) -m pytest || exit 1; \
	done

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m clang_format --dry-run -Werror $(CPP_SOURCES) 2>/dev/null || clang-format --dry-run -Werror $(CPP_SOURCES)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CPP_SOURCES)

# The documentation site, into docs/_build/html; needs the extra `docs` and no network.
docs:
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs docs/_build/html

# Pages of the documentation: every class of experts of transformers against its own code, in three minutes; and what
# replace() does with the dense layers of the model libraries that are installed, in half an hour.
coverage-transformers:
	$(PYTHON) -m docs.coverage

coverage-dense:
	$(PYTHON) -m docs.coverage_dense

bench:
	$(PYTHON) -m benchmarks.dense
	$(PYTHON) -m benchmarks.moe

# Before a release: fails where a row is slower than with the library of COMMIT, which is built for it.
against:
	$(PYTHON) -m benchmarks.dense --targets --against $(COMMIT)
	$(PYTHON) -m benchmarks.moe --targets --against $(COMMIT)

# The kernel tests need no torch: plain, under the sanitizers, and for aarch64 under an emulator.
define kernel_tests
	rm -rf $(TMP)/$(1)
	mkdir -p $(TMP)/$(1)
	for f in $(KERNELS) tests/cpp/emulated_pairs.cpp tests/cpp/kernel_test.cpp; do echo $$f; done | xargs -P 2 -I{} sh -c \
	  '$(2) $(KERNEL_FLAGS) $(3) -c {} -o $(TMP)/$(1)/$$(basename {} .cpp).o'
	$(2) $(3) -o $(TMP)/$(1)/kernel_test $(TMP)/$(1)/*.o
	$(2) $(KERNEL_FLAGS) $(3) $(VECTOR_KERNELS) -o $(TMP)/$(1)/vector_test tests/cpp/vector_test.cpp csrc/cpu/dispatch.cpp $(ISAS)
	$(4) $(TMP)/$(1)/kernel_test
	$(4) $(TMP)/$(1)/vector_test
endef

kernels:
	$(call kernel_tests,plain,$(CXX),-O2 -Werror,)

sanitize:
	$(call kernel_tests,sanitize,$(CXX),$(SANITIZERS),)

aarch64:
	$(call kernel_tests,aarch64,aarch64-linux-gnu-g++,-O2 -static,qemu-aarch64)

# The CUDA kernels on the host, without nvcc and GPU: threads as fibers, under the sanitizers.
SIMT_TESTS := $(patsubst tests/simt/%.cpp,%,$(wildcard tests/simt/*_test.cpp))
simt:
	mkdir -p build/simt
	for t in $(SIMT_TESTS); do echo $$t; done | xargs -P 2 -I{} \
	  $(CXX) $(KERNEL_FLAGS) -Werror $(SANITIZERS) -fno-omit-frame-pointer -DFFN_OPS_SIMT -o build/simt/{} tests/simt/{}.cpp
	for t in $(SIMT_TESTS); do build/simt/$$t || exit 1; done

# Compiles every CUDA source for each architecture (no GPU needed) and says how many registers each kernel takes.
cuda:
	mkdir -p build/cuda
	FFN_OPS_CUDA=1 FFN_OPS_NVCCFLAGS=-Xptxas=-v $(PYTHON) setup.py build_ext --build-lib build/cuda > build/cuda/log 2>&1 || \
	  { tail -n 40 build/cuda/log; exit 1; }
	cat build/objects/csrc/cuda/*.cu.o.log > build/cuda/registers
	$(PYTHON) tests/cuda_registers.py build/cuda/registers

# The grouped products alone, for a Hopper GPU; see benchmarks/products.cu.
products:
	mkdir -p build
	nvcc -std=c++20 -O3 --expt-relaxed-constexpr --fmad=false -Werror all-warnings -DFFN_OPS_HOPPER \
	  -gencode=arch=compute_90a,code=sm_90a -o build/products benchmarks/products.cu csrc/cuda/gemm_bfloat16.cu

# The CUDA operators with their kernels on the host, in the place of the CPU's: the package's tests run on them.
OPERATOR_SOURCES := $(filter-out csrc/cuda/assignment.cu,$(wildcard csrc/cuda/*.cu)) csrc/registration.cpp \
  csrc/cpu/assignment.cpp csrc/cpu/gates.cpp csrc/cpu/parallel.cpp csrc/cpu/memory.cpp csrc/cpu/plan.cpp \
  tests/simt/operators/operators.cpp
OPERATOR_TESTS := moe routing top_k gradients router learned_act quantized quantized_weight lora lora_bases
simt-operators:
	rm -rf build/operators
	mkdir -p build/operators/objects
	cp -r ffn_ops build/operators
	rm -f build/operators/ffn_ops/*.so build/operators/ffn_ops/cuda_build.json
	torch=$$($(PYTHON) -c "import os, torch; print(os.path.dirname(torch.__file__))") && \
	for f in $(OPERATOR_SOURCES); do echo $$f; done | xargs -P 2 -I{} sh -c '$(CXX) -x c++ $(KERNEL_FLAGS) -w -O1 -fPIC \
	  -fvisibility=hidden -DFFN_OPS_SIMT -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -Itests/simt/operators \
	  -I'$$torch'/include $$(case {} in *.cu) echo -include tests/simt/operators/on_cpu.h;; esac) \
	  -c {} -o build/operators/objects/$$(basename {}).o' && \
	$(CXX) -shared -Wl,-Bsymbolic -o build/operators/ffn_ops/libffn_ops_cpu.so build/operators/objects/*.o \
	  -L$$torch/lib -ltorch_cpu -lpthread
	cd build/operators && PYTHONPATH=. $(PYTHON) -m pytest -m "not cpu_only" -k "not threads and not (lora and (second or parts))" $(OPERATOR_TESTS:%=$(CURDIR)/tests/test_%.py)
