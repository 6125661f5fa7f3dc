# make demo   the whole pipeline on this machine, from nothing to a report
# make real   a pretrained model, SmolLM2-135M, made sparse on GSM8K with a small budget
# make test   all tests
# make test-slow      further cases of the same checks, minutes each
# make test-sanitize  the tests of native code, built with AddressSanitizer and UndefinedBehaviorSanitizer
# make test-serve     the tests that need vLLM, in an environment of its own
# make test-cluster   the tests that need SLURM, on one that it starts on this machine (root, Debian)
# make gpu    on a machine with a GPU: the tests that need it, then its benchmarks, into build/gpu/results.md; goes on
#             after a cut. WHEELS=FOLDER installs from there alone, beside the torch that PYTHON has
# make lint   ruff, mypy and the width of lines of C++; make types is mypy alone
# Each makes the environment first: .venv, from pyproject.toml and the pins of constraints.txt.

PYTHON ?= python3
SHELL := /bin/bash
READY := .venv/ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo real test test-slow test-sanitize test-serve test-cluster serve gpu lint types setup clean

demo: setup
	.venv/bin/sparse-train run configs/demo.yaml

# GSM8K=FOLDER holds train.jsonl and test.jsonl, or .jsonl.gz, where the hub cannot be reached. TEXT=PATH, general text,
# adds its perplexity.
GSM8K ?= openai/gsm8k
WEIGHTS := build/weights/smollm2-135m.gguf
real: $(WEIGHTS)
	.venv/bin/sparse-train run configs/smollm2/small.yaml model.path=$(WEIGHTS) task.path='$(GSM8K)' \
	  $(if $(TEXT),evaluate.texts.general.path='$(TEXT)')

$(WEIGHTS): | setup
	.venv/bin/python -m tests.weights smollm2-135m

test: setup
	.venv/bin/python -m pytest

test-slow: setup
	.venv/bin/python -m pytest -m slow

# Python was built without the sanitizer, so its library is loaded before all others, and C++'s with it, whose exceptions
# it looks for. Python frees little at its end, and the tests ask for more memory than there is. A test that starts a
# process of its own ("openmp") would find the usual module there. An abort makes pytest print the test.
test-sanitize: setup
	PATH=$$PWD/.venv/bin:$$PATH cmake -S sparse_train/kernels -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DSPARSE_TRAIN_SANITIZE=ON -DPython_EXECUTABLE=$$PWD/.venv/bin/python --log-level=WARNING
	PATH=$$PWD/.venv/bin:$$PATH cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 \
	  UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 .venv/bin/python -m pytest --capture=sys \
	  -m "sanitize and not slow" -k "not openmp" -p tests.kernels.sanitized tests/kernels

# vLLM and its own torch are in build/serve, and so is this package, as a wheel: without the rest of what it depends on.
test-serve: setup
	$(MAKE) serve || echo "vLLM cannot be installed here; its tests are skipped"
	.venv/bin/python -m pytest -m "serve and not slow" tests/serve

serve: setup build/serve/ready
	.venv/bin/python -m pip wheel -q --no-deps --no-build-isolation -w build/serve/wheel .
	build/serve/bin/python -m pip install -q --no-deps --force-reinstall build/serve/wheel/*.whl

build/serve/ready: tests/serve/requirements.txt
	[ -x build/serve/bin/python ] || $(PYTHON) -m venv build/serve
	build/serve/bin/python -m pip install -q --no-deps -r tests/serve/requirements.txt
	touch $@

test-cluster: setup
	slurm/cluster/stop.sh; trap slurm/cluster/stop.sh EXIT; slurm/cluster/start.sh && REQUIRE_CLUSTER=1 .venv/bin/python -m pytest tests/cluster

lint: setup
	.venv/bin/ruff check .
	! grep -nE '.{121}' sparse_train/kernels/csrc/*  # ruff reads no C++
	$(MAKE) types

# mypy sees jobs/ and launch/ where they are installed, in sparse_train.
types:
	rm -rf build/mypy && mkdir -p build/mypy/sparse_train
	cd build/mypy/sparse_train && ln -s ../../../sparse_train/* ../../../jobs ../../../launch .
	.venv/bin/python -m mypy

setup: $(READY)

# Native sources are built by the editable install; touching one makes the environment out of date.
NATIVE := $(wildcard sparse_train/kernels/csrc/*) sparse_train/kernels/CMakeLists.txt
# So it is by a module that was added, moved or removed.
MODULES := .venv/modules
$(shell mkdir -p .venv; find sparse_train launch jobs -name '*.py' | LC_ALL=C sort > $(MODULES).new; \
  cmp -s $(MODULES).new $(MODULES) && rm $(MODULES).new || mv $(MODULES).new $(MODULES))
$(READY): pyproject.toml constraints.txt $(NATIVE) $(MODULES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparse-train needs Python 3.11 or newer: make PYTHON=python3.11"; exit 2; }
	[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt torch numpy setuptools wheel scikit-build-core nanobind cmake ninja
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[all,test]'
	touch $@

gpu: $(if $(WHEELS),.venv/gpu,setup)
	.venv/bin/python -m tests.gpu

# From a folder there are no pins: torch and its Triton are those of PYTHON, or else among the wheels.
INSTALL_WHEELS = .venv/bin/python -m pip install -q --no-index --find-links '$(WHEELS)'
.venv/gpu: pyproject.toml $(NATIVE) $(MODULES)
	[ -x .venv/bin/python ] || $(PYTHON) -m venv --system-site-packages .venv
	$(INSTALL_WHEELS) setuptools wheel scikit-build-core nanobind cmake ninja
	$(INSTALL_WHEELS) --no-build-isolation -e '.[all]' pytest
	touch $@

clean:
	rm -rf .venv build runs
