# make demo, make test: everything from a fresh clone. With a python that has torch already, and no network,
#   make test PY=python3
# builds into build/site, leaves that python as it is and downloads nothing.
# An extension that does not build is an error here; DMOE_REQUIRE_EXTENSION=0 goes on without, on the torch reference.
export DMOE_REQUIRE_EXTENSION ?= 1

ifdef PY
SETUP := given-python
SITE ?= $(CURDIR)/build/site
export PYTHONPATH := $(SITE):$(CURDIR)
# Without it, python -m would import dmoe_ops from this folder, where nothing is built.
export PYTHONSAFEPATH := 1
else
PY := .venv/bin/python
SETUP := .venv/ready
endif
# Read by the shell, so that a name may hold spaces and quotes.
export MODEL ?=
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-sglang test-vllm test-hf lint fuzz compat miniature miniature-train bench gpu-check clean given-python FORCE
.DEFAULT_GOAL := demo

demo: $(SETUP)
	$(PY) -m dmoe_ops demo $${MODEL:+--model "$$MODEL"}

# Two at a time where pytest-xdist is there; threads that wait do not spin, as they would take turns with the other half.
test: $(SETUP)
	OMP_WAIT_POLICY=passive $(PY) -m pytest $$($(PY) -c "import importlib.util as u; print('-n 2 --dist loadfile' * bool(u.find_spec('xdist')))")

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format as c, subprocess as s, sys; files = s.check_output(['git', 'ls-files', '*.cpp', '*.h', '*.cu'], text=True).split(); sys.exit(s.call([c.get_executable('clang-format'), '--dry-run', '--Werror', *files]))"
	$(PY) -m mypy

# The tests against another torch (TORCH=newest: the newest that pip finds), in an environment of its own. Its packages are
# several GB where PyPI's torch is a CUDA build; COMPAT=folder puts them elsewhere.
TORCH ?= 2.11.0
COMPAT ?= build/compat
COMPAT_ENV := $(abspath $(COMPAT))/torch-$(TORCH)
compat:
	test -x $(COMPAT_ENV)/bin/python || python3 -m venv $(COMPAT_ENV)
	$(COMPAT_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		torch$(if $(filter newest,$(TORCH)),,==$(TORCH))
	grep -Ev "^(torch|triton|setuptools)==" requirements.txt > $(COMPAT_ENV)/requirements.txt
	$(COMPAT_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(COMPAT_ENV)/requirements.txt
	$(MAKE) test PY=$(COMPAT_ENV)/bin/python SITE=$(COMPAT_ENV)/site

# An engine whole, on the CPU, in an environment of its own with the versions of tests/engines/ENGINE.txt: 3 GB, elsewhere by
# ENGINES=folder, and half an hour (hf, transformers 5: 1 GB and minutes). ARGS="-k dmoe" for a part.
ENGINES ?= build/engines
test-sglang test-vllm test-hf: test-%:
	test -x $(ENGINES)/$*/bin/python || python3 -m venv $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/$*.txt
	$(ENGINES)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--force-reinstall .
	PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 HF_HOME=$(abspath $(ENGINES))/home $(ENGINES)/$*/bin/python -m pytest --confcutdir tests/engines tests/engines/test_$*.py $(ARGS)

# Ends with an error if anything differs or crashes. FUZZ="--count 5000 --seed 3" for fewer cases, or others.
fuzz: $(SETUP)
	$(PY) tools/fuzz.py $(FUZZ)

miniature: $(SETUP)
	$(PY) -m examples.miniature.table

miniature-train: $(SETUP)
	$(PY) -m examples.miniature.train --out build/miniature-retrained
	$(PY) -m examples.miniature.table --checkpoints build/miniature-retrained --out build/miniature-retrained
	$(PY) -m examples.miniature.trainings build/miniature-retrained/results.json

bench: $(SETUP)
	$(PY) -m pytest bench --benchmark-only

# ARGS="--minutes 8 --out folder", ARGS=--rehearse without a GPU.
ARGS ?=
gpu-check: $(SETUP)
	$(PY) -m dmoe_ops.gpu_check $(ARGS)

# Another compiler builds anew.
.venv/compiler: FORCE
	@mkdir -p $(@D)
	@echo "$$CXX" | cmp --silent - $@ || echo "$$CXX" > $@

.venv/ready: requirements.txt .venv/compiler $(SOURCES)
	@echo "== a virtual environment in .venv, with the pinned packages (the CPU build of torch among them)"
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "== building dmoe_ops (C++ with g++ or clang++; CUDA where nvcc is found)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	.venv/bin/python -m dmoe_ops info
	@touch $@

given-python:
	@echo "== building dmoe_ops into $(SITE) with $(PY), which has torch already; nothing is downloaded"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps --upgrade \
		--target $(SITE) .
	$(PY) -m dmoe_ops info

clean:
	rm -rf .venv build dist *.egg-info dmoe_ops/_C*.so dmoe_ops/_why_no_c.txt
