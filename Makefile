# Everything happens in .venv; its stamps are renewed only when what they depend on changes.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two workers with one compute thread each use two cores better than two threads in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
# MMDetection asks for opencv-python, which needs libGL from the system; the headless build needs nothing.
HEADLESS = $(BIN)/python -c "import cv2" 2>/dev/null || { $(PIP) uninstall --quiet --yes opencv-python && \
	$(PIP) install --quiet --constraint $(CONSTRAINTS) opencv-python-headless; }

# uv takes half a minute where pip takes two; where it is not to be had, pip does it.
INSTALL = { $(PIP) install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python \
	--constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"; } || \
	$(PIP) install --quiet --no-compile --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"

# Compiled on all cores, without tests that nobody runs.
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true

N ?= 1000

.PHONY: demo docs test test-all test-fast test-versions fuzz lint style types format clean

demo: $(VENV)/.installed
	$(BIN)/timm-lean demo

# mypy takes one core for half a minute, so the tests run beside it.
test: style
	$(MAKE) --jobs 2 types test-fast

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev lint
	$(PYTEST)

# The fast tests with the newest releases there are, then with the oldest that pyproject.toml allows.
test-versions:
	$(MAKE) test-fast VENV=.venv-newest CONSTRAINTS=/dev/null
	@mkdir -p .venv-oldest && $(PYTHON) tools/oldest_versions.py > .venv-oldest/constraints.txt
	$(MAKE) test-fast VENV=.venv-oldest CONSTRAINTS=.venv-oldest/constraints.txt

# Every fuzzer N times; a failure names the seed, and FUZZ_SEED=seed N=1 repeats it.
fuzz: $(VENV)/.installed-dev
	FUZZ_N=$(N) $(PYTEST) --timeout 0 tests/fuzz

# The documentation as a site in output/site; a broken link or reference is an error.
docs: EXTRAS = docs
docs: $(VENV)/.installed
	@$(INSTALL)
	$(BIN)/mkdocs build --quiet

lint: style types

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: EXTRAS = mmdet
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@$(INSTALL)
	@$(HEADLESS)
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: EXTRAS = dev,mmdet
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(INSTALL)
	@$(HEADLESS)
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest output build *.egg-info
