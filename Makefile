# `make help` lists what there is. Every target first sets up what it needs, and does so again only after a change.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 600
SOAK_PORT ?= 8767
UV_VERSION := 0.13.9

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
.PHONY: help demo test lint lock emulate gpu-test bench bench-gpu sanitize fuzz attack kills soak eval-libero lab-quick demo-policy clean

help:
	@echo "make demo      install, then drive a simulated two-armed robot that hands a cube over; picture and video in outputs/demo"
	@echo "make test      install, then run the tests; PYTEST_ARGS selects, for example PYTEST_ARGS=tests/cli"
	@echo "make emulate   compiled kernels on this CPU: chips, seeds, broken kernels; many minutes (tests/ptx/README.md)"
	@echo "make lint      install, then check style, types and formatting"
	@echo "make gpu-test  install with CUDA, then run the tests that need a GPU"
	@echo "make bench     install, then time every kernel; results go to outputs/kernels.json"
	@echo "make bench-gpu a GPU's first hour (docs/benchmarks.md): is it right, how fast; results and a page go to $(GPU_RESULTS)"
	@echo "make sanitize  test the native module under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz      fuzz the native module, the server's readers of bytes and all that reads files, each for FUZZ_SECONDS (now: $(FUZZ_SECONDS))"
	@echo "make attack    a server on this machine under fifteen attacks, and what a good client notices of them (docs/reliability.md)"
	@echo "make kills     kill -9, 30 times of a training run of two processes, 20 times of a server at 30 Hz: what is lost (docs/reliability.md)"
	@echo "make soak      servers and executors at 30 Hz for SOAK_SECONDS (now: $(SOAK_SECONDS)) with restarts, visitors and a bad network,"
	@echo "               then as long in quiet, where no deadline may be missed; report in outputs/soak"
	@echo "make eval-libero  LIBERO in $(LIBERO), then an episode of each suite with a small random model; results in outputs/libero"
	@echo "make lab-quick  three small policies from scratch, in closed loop and looked into (docs/lambda.md); results in outputs/lab-quick"
	@echo "make demo-policy  a policy for the demo, from nothing (docs/training.md): about an hour and a half; goes on where it was stopped"
	@echo "make lock      requirements.lock anew: versions and SHA-256 sums of all that is installed, but torch"
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
	$(foreach chip,$(TABLED_CHIPS),$(call emulated,$(chip),$(PYTEST_ARGS) tests/kernels/test_predicted_tactics.py) &&) true
endif

# Kernels as compiled code, executed on this CPU: tests/ptx/README.md. `make test` has one schedule of two chips of it,
# of sm_89 only what tells something of its own, and what the tables of others name.
# Another Triton need only come first on the path.
COMPILED_TESTS := tests/kernels tests/fused/test_head.py $(patsubst %,tests/ptx/test_%.py,golden launcher mutations schedules) \
  --ignore tests/kernels/test_ahead_of_time.py
TESTED_CHIPS := 89 90
TABLED_CHIPS := 80 86 120
ONLY_89 := -m "not one_chip"
CHIPS ?= 89 90 120
SEEDS ?= 1 2 3
TRITON_VERSIONS ?= 3.6.0 3.8.0 3.9.0
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
	$(BIN)/python -m tests.fuzz_files $(FUZZ_SECONDS) 0 all $$(nproc)

attack: $(INSTALLED)-cpu
	$(BIN)/python -m tests.serve.attack 5

kills: $(INSTALLED)-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.kills 30
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.kills 20

build/fuzz: $(INSTALLED)-cpu $(CSRC) CMakeLists.txt
	$(call need,command -v clang++,clang)
	$(CONFIGURE) -DXR0_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++
	$(BIN)/cmake --build $@
	@touch $@

# With trouble first; then in quiet, server and executor are two processes on this machine, with a core each where there are
# two. The executor runs as a robot's should, at a real-time priority where that is allowed. Exit code 1: a deadline was
# missed, or what tests/serve/soak.py holds did not hold.
REALTIME = $(shell chrt -f 20 true 2> /dev/null && echo chrt -f 20)
soak: $(INSTALLED)-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.soak $(SOAK_SECONDS)
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

lab-quick: $(INSTALLED)-cpu
	OMP_NUM_THREADS=1 $(BIN)/xr0 lab run outputs/lab-quick --plan quick --jobs 2
	$(BIN)/xr0 lab show outputs/lab-quick
	$(BIN)/xr0 lab figures outputs/lab-quick --out outputs/lab-quick

# The policy of `xr0 demo`, from nothing (docs/training.md): record, let the VLM learn to see, then the whole model to act,
# then record what the expert does where that policy goes wrong, learn from it, and evaluate. Starts, of which all that
# follows depends on where the cube is, are what teaches it to see. What is there is kept: after a change of this, or of the
# expert, begin with an empty $(DEMO).
, := ,
DEMO := outputs/demo-policy
POLICY := xr0_engine/drive/aloha_transfer
DEMO_RECORD := $(BIN)/xr0 data record --width 320 --height 240 --view ego -j 2
DEMO_DATA := data.embodiment=$(POLICY)/profile.yaml data.statistics=$(DEMO)/statistics.json data.chunk_length=20 \
  data.validation_fraction=0.05 data.batch_size=32 run.checkpoint_every=100 run.threads=1
DEMO_EVAL := $(BIN)/xr0 eval aloha $(DEMO)/handover/model --suite transfer --execute 10 --dtype float32 --jobs 2
# $(call trained,RUN,RECIPE AND SETTINGS): a run that goes on where it was stopped.
trained = if test -f $(DEMO)/$(1)/config.json; then $(BIN)/xr0 train resume $(DEMO)/$(1); else \
  $(BIN)/xr0 train $(2) --tiny --out $(DEMO)/$(1) $(DEMO_DATA); fi
demo-policy: export OMP_NUM_THREADS := 1
demo-policy: $(INSTALLED)-cpu $(VENV)/.renders
	set -e; for episodes in starts midway whole led; do \
	  mkdir -p $(DEMO)/$$episodes && cp $(POLICY)/profile.yaml $(DEMO)/$$episodes; \
	  echo "embodiment: profile.yaml" > $(DEMO)/$$episodes/xr0.yaml; done
	$(DEMO_RECORD) $(DEMO)/starts -n 400 --over-table 0.7 --seconds 0.7 --first-seed 20000
	$(DEMO_RECORD) $(DEMO)/midway -n 500 --over-table 0.5 --midway 1 --seconds 2 --first-seed 40000
	$(DEMO_RECORD) $(DEMO)/whole -n 100 --over-table 0.3 --first-seed 50000
	test -d $(DEMO)/base || $(BIN)/xr0 init --config $(POLICY)/base.json --out $(DEMO)/base
	test -f $(DEMO)/statistics.json || $(BIN)/xr0 data stats --chunk-length 20 --validation-fraction 0.05 \
	  $(DEMO)/midway $(DEMO)/whole --out $(DEMO)/statistics.json
	$(call trained,vlm,pretrain_vlm model.checkpoint=$(DEMO)/base model.standardize_vision=true data.language_every=0 \
	  choice.candidates=1 data.robot=$(DEMO)/starts=3$(,)$(DEMO)/midway=1 optim.steps=600)
	$(call trained,policy,training_rtc model.checkpoint=$(DEMO)/vlm/model flow.repeat=2 optim.steps=4000 \
	  data.robot=$(DEMO)/starts=1$(,)$(DEMO)/midway=2.5$(,)$(DEMO)/whole=1)
	$(DEMO_RECORD) $(DEMO)/led -n 400 --over-table 0.2 --midway 1 --policy $(DEMO)/policy/model --seconds 2 --first-seed 60000
	$(call trained,handover,training_rtc model.checkpoint=$(DEMO)/policy/model flow.repeat=2 optim.steps=3000 optim.peak_lr=1e-3 \
	  data.robot=$(DEMO)/starts=0.5$(,)$(DEMO)/midway=2$(,)$(DEMO)/whole=1$(,)$(DEMO)/led=2)
	$(DEMO_EVAL) --mode async --delay-steps 0-3 --out $(DEMO)/results-async
	$(DEMO_EVAL) --mode sync --delay-steps 0 --out $(DEMO)/results-sync

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

# Of all that is installed here, on every Python: versions, and the SHA-256 sums of their files on PyPI. LOCKED=1 installs
# no other files. Left out is torch, whose wheels for CPUs are of PyTorch's own index.
# LOCK_ARGS=--upgrade takes newer versions of what constraints.txt leaves open.
LOCKED_EXTRAS := serve ray train export tensorrt sim viz dev
LOCKED_BESIDE := pip huggingface-hub cuda-bindings openpi-client
UV := build/uv/bin/python -m uv
lock: build/uv
	grep '^numpy==' constraints.txt > build/uv/overrides.txt
	printf '%s\n' $(LOCKED_BESIDE) > build/uv/beside.txt
	$(UV) pip compile pyproject.toml build/uv/beside.txt $(addprefix --extra ,$(LOCKED_EXTRAS)) $(LOCK_ARGS) \
	  --constraint constraints.txt --override build/uv/overrides.txt --universal --python-version 3.10 --generate-hashes \
	  --no-annotate --no-header --no-emit-index-url --quiet --output-file requirements.lock

build/uv: Makefile
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet uv==$(UV_VERSION)
	@touch $@

# One stamp for each choice of torch: cpu or cuda. No build isolation: a rebuild is quick. Older pips than the pinned one
# can take hours to resolve the requirements. openpi-client comes alone: its pin of NumPy below 2 is out of date.
$(INSTALLED)-%: $(BIN)/python constraints.txt $(if $(LOCKED),requirements.lock) pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(CSRC)
	$(call need,command -v c++,g++)
	$(call need,test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",python3-dev)
	$(if $(LOCKED),$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$*,sim,serve,ray,train,export,tensorrt,viz,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps openpi-client
	@touch $@

# The simulated robot's cameras need an OpenGL that draws without a display. Without the simulator (Python 3.13 cannot
# have it) there is nothing to set up: its tests skip, and `xr0 demo` says why it cannot run.
RENDER := from importlib.util import find_spec; from xr0_engine.sim import choose_renderer; \
  find_spec("gym_aloha") and choose_renderer()

$(VENV)/.renders: $(INSTALLED)-cpu
	$(call need,$(BIN)/python -c '$(RENDER)',libegl1 libgl1)
	@touch $@
