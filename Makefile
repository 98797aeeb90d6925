# `make demo` and `make test` need nothing before them: what they run in, they build.

PYTHON ?= python3
# Exact, so that pip takes a CPU build where the index has one, and so that nothing installed later replaces it.
TORCH ?= 2.13.0
TRANSFORMERS ?= 5.23.0
OLDEST_TRANSFORMERS ?= 5.17.0
# Passed on to pytest: make test ARGS="-k mapping"
ARGS ?=

VENV := .venv
OLDEST_VENV := .venv-5.17
STAMP := $(VENV)/.torch-$(TORCH)-transformers-$(TRANSFORMERS)
OLDEST_STAMP := $(OLDEST_VENV)/.torch-$(TORCH)-transformers-$(OLDEST_TRANSFORMERS)
PLUGINS := $(sort $(wildcard plugins/*))
PROJECTS := pyproject.toml $(PLUGINS:=/pyproject.toml)
CHECKPOINT := .demo/SmolLM2-135M-Instruct

# Everything is on disk: transformers must never wait for a network.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test pytest test-all test-oldest lint fix clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 21

demo: $(STAMP) | $(CHECKPOINT)  ## convert a real checkpoint, load it with tepatch and let it talk
	@$(VENV)/bin/python examples/demo.py

test: lint pytest  ## lint, then run every test

# Listed after lint in `test`, and ordered after it under `make -j` too.
pytest: $(STAMP) | lint
	@$(VENV)/bin/python -m pytest $(ARGS)

test-all: test test-oldest  ## run every test with the newest and the oldest transformers: takes long

test-oldest: $(OLDEST_STAMP)  ## run every test with the oldest transformers that is supported
	@$(OLDEST_VENV)/bin/python -m pytest $(ARGS)

lint: $(STAMP)  ## check style and types
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy --no-error-summary

fix: $(STAMP)  ## format, and mend what ruff can mend
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## remove environments, the demo's checkpoint and caches
	rm -rf $(VENV) $(OLDEST_VENV) .demo dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CHECKPOINT): | $(STAMP)
	@$(VENV)/bin/python scripts/make_smollm2.py $@

$(STAMP): $(PROJECTS)
	@$(call install,$(VENV),$(TRANSFORMERS))

$(OLDEST_STAMP): $(PROJECTS)
	@$(call install,$(OLDEST_VENV),$(OLDEST_TRANSFORMERS))

# $(1): folder of the environment, $(2): version of transformers. The name of the stamp, $@, holds the versions;
# older stamps go first, so that an environment never carries one that is no longer true.
define install
echo "installing torch $(TORCH) and transformers $(2) into $(1): this takes some minutes" && \
$(PYTHON) -c 'import sys; sys.exit("tepatch needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)' && \
{ $(1)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(1); } && \
rm -f $(1)/.torch-* && \
echo "torch==$(TORCH)" > $(1)/constraints.txt && \
$(1)/bin/python -m pip install -qq torch==$(TORCH) && \
$(1)/bin/python -m pip install -qq -c $(1)/constraints.txt \
    -e ".[demo,dev]" $(PLUGINS:%=-e %) transformers==$(2) && \
touch $@
endef
