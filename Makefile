# make demo, make test: everything from a fresh clone. With a python that has torch already, and no network,
#   make test PY=python3
# builds into build/site, leaves that python as it is and downloads nothing.

ifdef PY
SETUP := given-python
export PYTHONPATH := $(CURDIR)/build/site:$(CURDIR)
# Without it, python -m would import dmoe_ops from this folder, where nothing is built.
export PYTHONSAFEPATH := 1
else
PY := .venv/bin/python
SETUP := .venv/ready
endif
# Read by the shell, so that a name may hold spaces and quotes.
export MODEL ?=
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint miniature miniature-train bench gpu-check clean given-python
.DEFAULT_GOAL := demo

demo: $(SETUP)
	$(PY) -m dmoe_ops demo $${MODEL:+--model "$$MODEL"}

# Two at a time where pytest-xdist is there; threads that wait do not spin, as they would take turns with the other half.
test: $(SETUP)
	OMP_WAIT_POLICY=passive $(PY) -m pytest $$($(PY) -c "import importlib.util as u; print('-n 2 --dist loadfile' * bool(u.find_spec('xdist')))")

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

miniature: $(SETUP)
	$(PY) -m examples.miniature.table

miniature-train: $(SETUP)
	$(PY) -m examples.miniature.train --out build/miniature-retrained
	$(PY) -m examples.miniature.table --checkpoints build/miniature-retrained --out build/miniature-retrained
	$(PY) -m examples.miniature.trainings build/miniature-retrained/results.json

bench: $(SETUP)
	$(PY) -m pytest bench --benchmark-only

gpu-check: $(SETUP)
	$(PY) -m dmoe_ops.gpu_check

.venv/ready: requirements.txt $(SOURCES)
	@echo "== a virtual environment in .venv, with the pinned packages (the CPU build of torch among them)"
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "== building dmoe_ops (C++ with g++ or clang++; CUDA where nvcc is found)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	.venv/bin/python -m dmoe_ops info
	@touch $@

given-python:
	@echo "== building dmoe_ops into build/site with $(PY), which has torch already; nothing is downloaded"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps --upgrade \
		--target build/site .
	$(PY) -m dmoe_ops info

clean:
	rm -rf .venv build dist *.egg-info dmoe_ops/_C*.so
