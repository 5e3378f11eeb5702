# One environment for everything, in .venv. The stamp files make a second run instant; a changed pyproject.toml renews it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_OUT := artifacts/smollm2-arm-int4
DEMO_ENCODER_OUT := artifacts/minilm-x86-int8
# Pages of docs/ that tools/NAME_reference.py writes.
PAGES := cli profile report sweep
DEMO_PROMPT ?= Why is the sky blue?

.PHONY: demo test fuzz test-providers test-runtimes lint docs site clean
.DEFAULT_GOAL := test
.NOTPARALLEL:

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The model packages first and without their dependencies: see [project.optional-dependencies] in pyproject.toml.
$(VENV)/.models: pyproject.toml tools/demo_requirements.py | $(BIN)/python
	$(BIN)/python tools/demo_requirements.py > $(VENV)/models.txt
	$(PIP) install --quiet --no-deps -r $(VENV)/models.txt
	@touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e '.[test]'
	@touch $@ $(VENV)/.demo

# The site is built from sources alone, so it needs the tools but not the libraries.
$(VENV)/.site: pyproject.toml tools/demo_requirements.py | $(BIN)/python
	$(BIN)/python tools/demo_requirements.py docs > $(VENV)/site.txt
	$(PIP) install --quiet -r $(VENV)/site.txt
	@touch $@

# Exports two real models that Python packages ship: one that writes (and is asked something), one that embeds texts.
# No network once installed.
demo: $(VENV)/.demo $(VENV)/.models
	rm -rf $(DEMO_OUT) $(DEMO_ENCODER_OUT)
	HF_HUB_OFFLINE=1 $(BIN)/compress export smollm2 --profile arm-int4 -o $(DEMO_OUT)
	HF_HUB_OFFLINE=1 $(BIN)/compress generate $(DEMO_OUT) "$(DEMO_PROMPT)"
	HF_HUB_OFFLINE=1 $(BIN)/compress export minilm --profile x86-int8 -o $(DEMO_ENCODER_OUT)

test: $(VENV)/.test $(VENV)/.models
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Hostile cases for every parser; a longer run is tools/fuzz.py's --seconds, or --cases.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.test
	$(BIN)/python tools/fuzz.py --seconds $(FUZZ_SECONDS)

# Runtimes that exclude the ordinary onnxruntime go into the cache (COMPRESS_CACHE), some hundred megabytes each. Only a
# machine without an NVIDIA GPU is none to fail on: its test is skipped with the reason.
test-providers: $(VENV)/.test $(VENV)/.models
	$(BIN)/compress doctor $(foreach name,openvino qnn webgpu cpu-arm64,--install $(name))
	-$(BIN)/compress doctor --install cuda
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m providers

# transformers.js (Node 18 or later) and optimum, each apart, in the cache: does one artifact load in all of them?
test-runtimes: $(VENV)/.test $(VENV)/.models
	$(BIN)/python tools/runtimes.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m runtimes

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	for page in $(PAGES); do $(BIN)/python tools/$${page}_reference.py --check || exit; done

docs: $(VENV)/.test
	for page in $(PAGES); do $(BIN)/python tools/$${page}_reference.py || exit; done

# build/site, to be opened as files or served by anything. Fails on a broken link, but not under --quiet: mkdocs counts
# only warnings that it shows.
site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) $(DEMO_OUT) $(DEMO_ENCODER_OUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find compress tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
