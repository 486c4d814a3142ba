# Everything from a fresh clone: make demo | test | check. Needs Python >= 3.10 with venv and headers, and a
# C++17 compiler (Debian: python3-venv python3-dev g++).
# setup_cuda.py chooses whether the CUDA core is built, and for which GPUs: by default for those of this machine.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
CORE   := setup.py setup_cuda.py pyproject.toml $(shell find runtime/csrc -type f)

.PHONY: demo test check format clean asked

demo: $(VENV)/demo
	$(PY) -m sdk demo -o out

# Two processes, because most tests use one processor. A file's tests run in one of them, in order.
test: $(VENV)/test
	$(PY) -m pytest -n 2 --dist loadfile tests

# Style and types; .ci/run adds the sanitizers and the NEON build.
# clang-format is Debian's clang-format package.
check: $(VENV)/test
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run -Werror $$(find runtime/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

format: $(VENV)/test
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .
	clang-format -i $$(find runtime/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON); install Python >= 3.10 (Debian: apt-get install python3-venv python3-dev)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: venv failed (Debian: apt-get install python3-venv)"; exit 1; }

# The SEG_CUDA and SEG_CUDA_ARCHS of the last call that set one of them. When they change, the core is built again.
$(VENV)/asked: asked $(VENV)/bin/python
	@echo "$(SEG_CUDA) $(SEG_CUDA_ARCHS)" > $@.new
	@test -e $@ && { test -z "$(SEG_CUDA)$(SEG_CUDA_ARCHS)" || cmp -s $@ $@.new; } && rm $@.new || mv $@.new $@

# One file for each set of packages. Both are made again when the sources of the core change. pip hides the output of
# setup.py, so setup_cuda.py prints its choice first.
$(VENV)/demo: $(VENV)/bin/python $(VENV)/asked $(CORE)
	@$(PY) setup_cuda.py
	@echo "make: compiling the C++ core and installing packages into $(VENV); this takes about a minute"
	$(PY) -m pip install -q --disable-pip-version-check -e '.[run,demo]'
	@touch $@

# Without a GPU, one architecture is enough for the tests of the CUDA module that run on the host.
$(VENV)/test: export SEG_CUDA_WITHOUT_GPU ?= 75
$(VENV)/test: $(VENV)/bin/python $(VENV)/asked $(CORE)
	@$(PY) setup_cuda.py
	@echo "make: compiling the core and installing packages into $(VENV); this takes a few minutes"
	$(PY) -m pip install -q --disable-pip-version-check -e '.[run,test]'
	@touch $@

clean:
	rm -rf $(VENV) build out *.egg-info runtime/*.so
