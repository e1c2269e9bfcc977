# `make help` lists what there is. Every target first sets up what it needs, and does so again only after a change.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 600
SOAK_PORT ?= 8767

VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)
INSTALLED := $(VENV)/.installed
GPU_RESULTS ?= outputs/gpu
GPU_MINUTES ?= 25
GOLDEN ?= ../shared/golden
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint emulate gpu-test bench bench-gpu sanitize fuzz attack soak eval-libero clean

help:
	@echo "make demo      install, then drive a simulated two-armed robot with a small random model"
	@echo "make test      install, then run the tests; PYTEST_ARGS selects, for example PYTEST_ARGS=tests/cli"
	@echo "make emulate   compiled kernels on this CPU: chips, seeds, broken kernels; many minutes (tests/ptx/README.md)"
	@echo "make lint      install, then check style, types and formatting"
	@echo "make gpu-test  install with CUDA, then run the tests that need a GPU"
	@echo "make bench     install, then time every kernel; results go to outputs/kernels.json"
	@echo "make bench-gpu a GPU's first hour (docs/benchmarks.md): is it right, how fast; results and a page go to $(GPU_RESULTS)"
	@echo "make sanitize  test the native module under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz      fuzz the native module, the server's readers of bytes and all that reads files, each for FUZZ_SECONDS (now: $(FUZZ_SECONDS))"
	@echo "make attack    a server on this machine under fifteen attacks, and what a good client notices of them (docs/reliability.md)"
	@echo "make soak      a server and an executor at 30 Hz for SOAK_SECONDS (now: $(SOAK_SECONDS)); report in outputs/soak"
	@echo "make eval-libero  LIBERO in $(LIBERO), then an episode of each suite with a small random model; results in outputs/libero"
	@echo "make clean     remove what was built; $(VENV) stays"
	@echo
	@echo "The installation goes to $(VENV). PYTHON chooses the interpreter (now: $(PYTHON), 3.10 to 3.13)."

demo: $(INSTALLED)-cpu $(VENV)/.renders
	$(BIN)/xr0 demo

test: $(INSTALLED)-cpu $(VENV)/.renders
	$(call need,{ command -v chromium || command -v chromium-browser || command -v google-chrome; },chromium)
	$(call need,command -v openssl,openssl)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
ifeq ($(origin PYTEST_ARGS),file)
	$(foreach chip,$(TESTED_CHIPS),$(call emulated,$(chip),$(PYTEST_ARGS) $(COMPILED_TESTS) $(ONLY_$(chip))) &&) true
endif

# Kernels as compiled code, executed on this CPU: tests/ptx/README.md. `make test` has one schedule of two chips of it,
# of sm_89 only what tells something of its own.
# Another Triton need only come first on the path.
COMPILED_TESTS := tests/kernels tests/fused/test_head.py $(patsubst %,tests/ptx/test_%.py,golden launcher mutations schedules) \
  --ignore tests/kernels/test_ahead_of_time.py
TESTED_CHIPS := 89 90
ONLY_89 := -m "not one_chip"
CHIPS ?= 89 90 120
SEEDS ?= 1 2 3
TRITON_VERSIONS ?= 3.6.0 3.7.1 3.8.0
emulated = XR0_EMULATE=$(1) $(BIN)/python -m pytest $(2)
emulate: $(INSTALLED)-cpu $(addprefix build/triton-,$(TRITON_VERSIONS))
	set -e; for chip in $(CHIPS); do for seed in $(SEEDS); do \
	  XR0_EMULATE_SEED=$$seed XR0_EMULATE_ASYNC=random XR0_EMULATE_RESIDENT=$$((8 * seed)) \
	  XR0_EMULATE_PROCESSORS=$$((5 * seed)) $(call emulated,$$chip,-n 2 $(COMPILED_TESTS)); done; \
	  XR0_EMULATE=$$chip $(BIN)/python -m tests.ptx.mutations; done
	set -e; for version in $(TRITON_VERSIONS); do PYTHONPATH=$(abspath build)/triton-$$version \
	  $(call emulated,90,-n 2 tests/kernels tests/bench/step/test_compile.py); done

build/triton-%: $(INSTALLED)-cpu
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*
	@touch $@

lint: $(INSTALLED)-cpu
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cuh %.cpp %.cu,$(CSRC))

gpu-test: $(INSTALLED)-cuda
	$(BIN)/python -c "import torch; torch.cuda.init()"
	$(BIN)/python -m pytest -m "gpu or compiled"

bench: $(INSTALLED)-$(if $(shell command -v nvidia-smi),cuda,cpu)
	@mkdir -p outputs
	$(BIN)/python -m pytest xr0_engine/bench/step/suite.py --benchmark-only --benchmark-sort=fullname \
	  --benchmark-columns=min,median,iqr,rounds --benchmark-json=outputs/kernels.json

# The same again goes on with what was left out.
bench-gpu: $(INSTALLED)-cuda
	$(BIN)/python -m xr0_engine bench machine --minutes $(GPU_MINUTES) --out $(GPU_RESULTS) $(addprefix --golden ,$(wildcard $(GOLDEN)))

# CMake settings of a build of csrc/ outside of the package.
CONFIGURE = $(BIN)/cmake -G Ninja -S . -B $@ -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DXR0_BUILD_CUDA=0

# The tests run in a copy of the sources with the instrumented module in its place. Python itself is not instrumented:
# the sanitizer has to be loaded first, and Python's own leaks are not looked for.
sanitize: build/sanitize
	rm -rf $</tree && mkdir $</tree
	cp -a xr0_engine tests pyproject.toml $</tree
	rm -f $</tree/xr0_engine/_C.*.so && cp $</_C.*.so $</tree/xr0_engine
	cd $</tree && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest tests/robot/test_native.py

build/sanitize: $(INSTALLED)-cpu $(CSRC) CMakeLists.txt
	$(CONFIGURE) -DXR0_SANITIZE=ON
	$(BIN)/cmake --build $@
	@touch $@

fuzz: build/fuzz
	mkdir -p $</corpus
	$</fuzz_patches -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=40 -len_control=0 $</corpus
	$(BIN)/python -m tests.serve.fuzz $(FUZZ_SECONDS)
	$(BIN)/python -m tests.fuzz_files $(FUZZ_SECONDS)

attack: $(INSTALLED)-cpu
	$(BIN)/python -m tests.serve.attack 5

build/fuzz: $(INSTALLED)-cpu $(CSRC) CMakeLists.txt
	$(call need,command -v clang++,clang)
	$(CONFIGURE) -DXR0_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++
	$(BIN)/cmake --build $@
	@touch $@

# Server and executor are two processes on this machine, with a core each where there are two. The executor runs as a
# robot's should, at a real-time priority where that is allowed. Exit code 1: a deadline was missed.
REALTIME = $(shell chrt -f 20 true 2> /dev/null && echo chrt -f 20)
soak: $(INSTALLED)-cpu
	rm -rf outputs/soak && mkdir -p outputs/soak
	$(BIN)/xr0 init --out outputs/soak/tiny
	set -e; export OMP_NUM_THREADS=1; \
	$(BIN)/xr0 serve outputs/soak/tiny --robot-type bimanual --image-size 256x256 --port $(SOAK_PORT) 2> outputs/soak/server.log & \
	server=$$!; trap "kill $$server" EXIT; \
	until $(BIN)/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$(SOAK_PORT)/healthz')" 2> /dev/null; do \
	  kill -0 $$server; sleep 1; done; \
	$(REALTIME) $(BIN)/xr0 drive --env null --server ws://127.0.0.1:$(SOAK_PORT) --seconds $(SOAK_SECONDS) \
	  --record outputs/soak/session.jsonl --json > outputs/soak/report.json || missed=$$?; \
	$(BIN)/xr0 replay outputs/soak/session.jsonl --out outputs/soak/session.png; \
	$(BIN)/python -m json.tool outputs/soak/report.json; exit $${missed:-0}

# LIBERO wants an older MuJoCo than the other simulations, so it has an environment of its own, without torch: the policy is
# a server in ours. tests/conftest.py looks for torch.
LIBERO := .venv-libero
LIBERO_PORT ?= 8769
eval-libero: $(INSTALLED)-cpu $(LIBERO)/.renders
	OMP_NUM_THREADS=1 $(LIBERO)/bin/python -m pytest --noconftest tests/evaluation/test_libero.py tests/evaluation/test_libero_real.py
	rm -rf outputs/libero && mkdir -p outputs/libero
	$(BIN)/xr0 init --out outputs/libero/tiny
	set -e; export OMP_NUM_THREADS=1; \
	$(BIN)/xr0 serve outputs/libero/tiny --robot-type libero_all --image-size 256x256 --port $(LIBERO_PORT) \
	  2> outputs/libero/server.log & \
	server=$$!; trap "kill $$server" EXIT; \
	$(LIBERO)/bin/xr0 eval libero --server ws://127.0.0.1:$(LIBERO_PORT) --suite spatial,object,goal,10,90 --task 0 --trials 1 \
	  --video all --out outputs/libero/tiny-policy; \
	$(LIBERO)/bin/xr0 eval libero --expert --suite object --task 0 --trials 1 --out outputs/libero/expert

$(LIBERO)/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt MANIFEST.in $(CSRC)
	$(call need,$(PYTHON) -c "import ensurepip",python3-venv)
	$(call need,command -v c++,g++)
	$(PYTHON) -m venv $(LIBERO)
	grep -v '^mujoco==' constraints.txt > $(LIBERO)/constraints.txt
	$(LIBERO)/bin/python -m pip install --quiet --constraint $(LIBERO)/constraints.txt pip
	$(LIBERO)/bin/python -m pip install --quiet --constraint $(LIBERO)/constraints.txt --editable '.[libero]' pytest
	@touch $@

# OpenCV, which LIBERO imports, needs glib.
$(LIBERO)/.renders: $(LIBERO)/.installed
	$(call need,$(LIBERO)/bin/python -c 'import cv2; from xr0_engine.sim import choose_gl; choose_gl()',libegl1 libgl1 libglib2.0-0)
	@touch $@

clean:
	rm -rf build dist *.egg-info outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis xr0_engine/_C.*.so
	rm -f $(INSTALLED)-* $(VENV)/.renders

# $(call need,COMMAND,PACKAGES): if the command fails, install the Debian packages where we may, then insist on it.
define need
	@$(1) >/dev/null 2>&1 || { \
	  echo "Installing $(2) ..."; \
	  $(SUDO) apt-get update -qq; $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $(2) >/dev/null; \
	  $(1) || { echo "Please install what is missing, then run make again: apt-get install $(2)"; exit 1; }; }
endef

$(BIN)/python:
	$(call need,$(PYTHON) -c "import ensurepip",python3-venv)
	$(PYTHON) -m venv $(VENV)

# One stamp for each choice of torch: cpu or cuda. No build isolation: a rebuild is quick. Older pips than the pinned one
# can take hours to resolve the requirements. openpi-client comes alone: its pin of NumPy below 2 is out of date.
$(INSTALLED)-%: $(BIN)/python constraints.txt pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(CSRC)
	$(call need,command -v c++,g++)
	$(call need,test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",python3-dev)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$*,sim,serve,ray,train,export,tensorrt,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps openpi-client
	@touch $@

# The simulated robot's cameras need an OpenGL that draws without a display. Without the simulator (Python 3.13 cannot
# have it) there is nothing to set up: its tests skip, and `xr0 demo` says why it cannot run.
RENDER := from importlib.util import find_spec; from xr0_engine.sim import choose_renderer; \
  find_spec("gym_aloha") and choose_renderer()

$(VENV)/.renders: $(INSTALLED)-cpu
	$(call need,$(BIN)/python -c '$(RENDER)',libegl1 libgl1)
	@touch $@
