# dspark-stream: `make serve` starts the service, `make test` runs the tests. Each target sets up what it needs,
# once: a stamp in the virtual environment remembers it until pyproject.toml changes. `make help` lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
# Other people's programs pin what we have in newer versions: each lives apart.
CLIENTS_VENV := .venv-clients
DOCS_VENV := .venv-docs
OPENAI_PACKAGE := openai[realtime]==3.54.0
CLIENT_PACKAGES := langchain-openai==1.7.4 litellm==1.110.2 guidellm==0.8.1 aiperf==0.13.0

# The pages of events are made from the structs themselves, which need these two alone.
DOCS_PACKAGES := mkdocs==1.6.1 mkdocs-material==9.8.2 \
  $(shell sed -n 's/^ *\("\(msgspec\|numpy\)[=>][^"]*"\).*/\1/p' pyproject.toml)

TEST_MODEL := smollm2-135m
BIG_MODELS := qwen2.5-coder-0.5b qwen2.5-coder-1.5b

# -qq leaves errors only: warnings about a machine's own pip settings would look like something went wrong.
# Bytecode is made of what is imported, when it is: making it of all that torch brings takes half as long as the rest.
# Images for containers often forbid it; then each program that the tests start would compile torch's source anew.
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL := -m pip install -qq --no-compile --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

RUN_STAMP := $(VENV)/.ready-run
DEV_STAMP := $(VENV)/.ready-dev
BYTECODE_STAMP := $(VENV)/.ready-bytecode
OPENAI_STAMP := $(CLIENTS_VENV)/openai/.ready
CLIENT_STAMPS := $(foreach client,langchain litellm guidellm aiperf,$(CLIENTS_VENV)/$(client)/.ready)

# make_venv FOLDER: a virtual environment that works; one that was left half made is made anew.
define make_venv
	@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  for candidate in "$${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "Python 3.11 or newer is needed; found: $$(python3 --version 2>&1 || echo none)." >&2; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "==> making $(1) with $$("$$python" --version)"; \
	  rm -rf $(1); \
	  if ! "$$python" -m venv $(1); then \
	    rm -rf $(1); \
	    version=$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	    echo "A virtual environment cannot be made; on Debian and Ubuntu this mends it:" >&2; \
	    echo "    apt-get install $$version-venv" >&2; \
	    exit 1; \
	  fi; \
	fi
endef

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	  printf '%-14s %s\n' "$$target" "  $$text"; done
	@echo "  MODEL=smollm2-135m says what 'make serve' serves: a name ('.venv/bin/dspark-stream models' lists them), a"
	@echo "  folder, a .gguf file or a hub name."
	@echo "  PORT=8000 and HOST=127.0.0.1 say where 'make serve' listens; PYTHON=python3 makes the environment."

# --- set-up ----------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(RUN_STAMP) ## Make .venv with all that the service needs

# torch goes first and alone, so that exactly the pinned version is taken and the rest settles around it. Without
# an index of your own this is the platform's default build; to have another one (CPU only, say), install it into
# .venv beforehand: it then counts as there.
$(RUN_STAMP): pyproject.toml
	$(call make_venv,$(VENV))
	@echo "==> installing $(TORCH) (large: this can take some minutes)"
	@$(PY) $(PIP_INSTALL) "$(TORCH)"
	@echo "==> installing dspark-stream and the other pinned packages"
	@$(PY) $(PIP_INSTALL) -e .
	@$(PY) -m dspark_kernels.cpu
	@touch $@

$(DEV_STAMP): pyproject.toml $(RUN_STAMP)
	@echo "==> installing the tools for tests, style and types"
	@$(PY) $(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(CLIENTS_VENV)/%/.ready: Makefile
	$(call make_venv,$(@D))
	@package="$(or $(filter $*%,$(CLIENT_PACKAGES)),$(OPENAI_PACKAGE))"; \
	echo "==> installing $$package into $(@D)"; \
	$(@D)/bin/python $(PIP_INSTALL) "$$package"
	@touch $@

.PHONY: model
model: $(RUN_STAMP) ## Fetch and verify the model that the tests and benches use (98 MB)
	@$(PY) -m dspark_stream.models.fetch $(TEST_MODEL)

.PHONY: big-models
big-models: $(RUN_STAMP)
	@$(PY) -m dspark_stream.models.fetch $(BIG_MODELS)

.PHONY: chromium
chromium: # The tests of the page drive a real browser.
	@if [ -n "$$CHROMIUM" ] || command -v chromium chromium-browser google-chrome google-chrome-stable \
	      >/dev/null 2>&1; then :; \
	elif command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
	  echo "==> installing chromium for the tests of the page"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else \
	  echo "The tests of the page need Chromium or Chrome. Install it, on Debian and Ubuntu with" >&2; \
	  echo "    sudo apt-get install chromium" >&2; \
	  echo "or say where one is: make test CHROMIUM=/path/to/chrome" >&2; \
	  exit 1; \
	fi

# --- use -------------------------------------------------------------------------------------------------------

.PHONY: serve
serve: $(RUN_STAMP) ## Start the service; the first time this fetches the model (MODEL=name for another one)
	@exec $(PY) -m dspark_stream serve $(if $(MODEL),--model "$(MODEL)") $(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)")

# --- checks ----------------------------------------------------------------------------------------------------

# A worker takes a core and the memory of the models that it runs: fewer of them where those are big.
WORKERS := -n logical --maxprocesses

.PHONY: test
test: ## Run all tests; ARGS="-k name" goes to pytest, ARGS=-n0 is one process
	@$(MAKE) --no-print-directory -j SIDE_BY_SIDE=1 test-ready
	@$(PY) -m pytest $(WORKERS) 4 $(ARGS)

.PHONY: test-ready
test-ready: test-kernels $(DEV_STAMP) $(OPENAI_STAMP) chromium model $(BYTECODE_STAMP)

# Made once, while pip installs the tools, and not by every worker for itself.
$(BYTECODE_STAMP): $(RUN_STAMP)
	@$(PY) -c "import dspark_stream.engine.build, dspark_stream.training.pipeline"
	@touch $@

# pip keeps one core busy, and the compiler another one. Where this fails, the tests build for themselves and say why.
.PHONY: test-kernels
test-kernels:
	@"$${PYTHON:-python3}" tests/kernels_ahead.py "$(CURDIR)/build/tests" 2>/dev/null || :

.PHONY: test-all
test-all: $(DEV_STAMP) $(OPENAI_STAMP) chromium model big-models ## Run the slow tests too; fetches 1.7 GB of models
	@TEST_PROFILE=nightly $(PY) -m pytest $(WORKERS) 2 -m "not clients" $(ARGS)

.PHONY: test-clients
test-clients: $(DEV_STAMP) $(OPENAI_STAMP) $(CLIENT_STAMPS) model ## Try well-known clients against the service
	@$(PY) -m pytest -m clients tests/clients $(ARGS)

# On a machine with a GPU. GPU_PY=python3 takes that Python, with what is installed there, instead of making .venv:
# for machines without a network.
GPU_PY ?=
GPU_RUN := $(if $(GPU_PY),PYTHONPATH="$(CURDIR)/src:$(CURDIR)/kernels" $(GPU_PY),$(PY))
GPU_SETUP := $(if $(GPU_PY),,$(DEV_STAMP))
GPU_TESTS := tests/kernels/operations tests/engine/test_gpu_round.py tests/engine/test_gpu_sizing.py

.PHONY: gpu
gpu: $(GPU_SETUP) ## On a GPU: tests, figures, then the sanitizer; what docs/gpu.md says that no GPU has confirmed
	@$(GPU_RUN) bench/gpu_ready.py
	@status=0; \
	for part in gpu-suite bench-gpu gpu-sanitizer; do \
	  $(MAKE) --no-print-directory $$part || { status=1; echo "make $$part failed; the rest goes on" >&2; }; \
	done; \
	exit $$status

.PHONY: test-gpu
test-gpu: gpu-suite gpu-sanitizer ## On a GPU: the kernels' and rounds' tests, then the kernels' under compute-sanitizer

.PHONY: gpu-suite
gpu-suite: $(GPU_SETUP)
	@$(GPU_RUN) bench/gpu_ready.py --quiet
	@$(GPU_RUN) -m pytest --timeout=600 -rs $(GPU_TESTS) $(ARGS)

.PHONY: gpu-sanitizer
gpu-sanitizer: $(GPU_SETUP)
	@$(GPU_RUN) bench/gpu_ready.py --quiet
	@if ! command -v compute-sanitizer >/dev/null 2>&1; then \
	  echo "NOT RUN: compute-sanitizer is not installed (it comes with the CUDA toolkit)" >&2; \
	  exit 0; \
	fi; \
	for tool in memcheck racecheck synccheck; do \
	  echo "==> compute-sanitizer --tool $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$$tool" --target-processes all --error-exitcode 7 \
	    $(if $(GPU_PY),env $(GPU_RUN),$(GPU_RUN)) -m pytest --timeout=1800 tests/kernels/operations \
	    -k triton || exit 1; \
	done

.PHONY: style
style: $(DEV_STAMP) ## Check the style
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: types
types: $(DEV_STAMP) ## Check the types
	@$(PY) -m mypy

# What is built is then run from another folder, as somebody who installed it does.
.PHONY: dist
dist: $(DEV_STAMP) ## Build the wheel and the source archive into dist/, and run what is in the wheel
	@rm -rf dist build/installed
	@$(PY) -m build --outdir dist . >/dev/null
	@$(PY) $(PIP_INSTALL) --no-deps --target build/installed dist/*.whl
	@cd build && PYTHONPATH=installed PYTHONSAFEPATH=1 ../$(PY) -m dspark_stream --version
	@ls -l dist

BENCHES := edge scheduling pareto regret sockets

.PHONY: bench
bench: $(DEV_STAMP) model ## Run the benches; their tables and CSV files go to runs/
	@for bench in $(BENCHES); do echo "==> bench/$$bench.py"; $(PY) "bench/$$bench.py" $(ARGS) || exit 1; done

.PHONY: bench-gpu
bench-gpu: $(GPU_SETUP) ## On a GPU: measure everything that docs/gpu.md promises, in one run of eight minutes
	@$(GPU_RUN) bench/gpu_ready.py --quiet
	@$(GPU_RUN) -m dspark_stream.models.fetch $(TEST_MODEL) || \
	  echo "NOT FETCHED: $(TEST_MODEL); only the section smollm2 needs it" >&2
	@$(GPU_RUN) bench/gpu.py $(ARGS)

.PHONY: abuse
abuse: $(DEV_STAMP) model ## Try on a service of its own what strangers may do to it (ten minutes at most)
	@$(PY) bench/abuse.py $(ARGS)

.PHONY: soak
soak: $(DEV_STAMP) model ## Half an hour of mixed clients: memory, descriptors, threads (ARGS="--minutes 5" for less)
	@$(PY) bench/soak.py $(ARGS)

.PHONY: pictures
pictures: $(DEV_STAMP) chromium ## Take docs/page.png and docs/race.webm anew: a race with the default model
	@$(PY) bench/pictures.py $(ARGS)

$(DOCS_VENV)/.ready: Makefile pyproject.toml
	$(call make_venv,$(DOCS_VENV))
	@echo "==> installing what the pages are built with into $(DOCS_VENV)"
	@$(DOCS_VENV)/bin/python $(PIP_INSTALL) $(DOCS_PACKAGES)
	@touch $@

.PHONY: docs
docs: $(DOCS_VENV)/.ready ## Build the documentation as pages into build/docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --clean
	@echo "==> build/docs/index.html"

.PHONY: clean
clean: ## Remove the environments and everything built (the fetched model stays in its cache)
	rm -rf $(VENV) $(CLIENTS_VENV) $(DOCS_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
