# `make demo` and `make test` need nothing before them: what they run in, they build.

PYTHON ?= python3
# Exact, so that pip takes a CPU build where the index has one, and so that nothing installed later replaces it.
TORCH ?= 2.13.0
# The newest that tests have passed with.
TRANSFORMERS ?= 5.24.0
PEFT ?= 0.21.2
ACCELERATE ?= 1.15.0
# The lower bounds of pyproject.toml.
OLDEST_TRANSFORMERS ?= 5.17.0
OLDEST_PEFT ?= 0.21.0
OLDEST_ACCELERATE ?= 1.12.0
# Passed on to pytest: make test ARGS="-k mapping", make test ARGS="-n 0"
ARGS ?=
# Of make fuzz
MINUTES ?= 2
# Of make mutants: how many of each module
MUTANTS ?= 20

VENV := .venv
OLDEST_VENV := .venv-5.17
PINS := transformers==$(TRANSFORMERS) peft==$(PEFT) accelerate==$(ACCELERATE)
OLDEST_PINS := transformers==$(OLDEST_TRANSFORMERS) peft==$(OLDEST_PEFT) accelerate==$(OLDEST_ACCELERATE)
# A stamp's name holds all the versions: another pin is another stamp. Older stamps go before anything is installed,
# so that an environment never carries one that is no longer true. $(1): pins, as above
stamp = $(subst $() $(),-,.torch-$(TORCH) $(subst ==,-,$(1)))
STAMP := $(VENV)/$(call stamp,$(PINS))
OLDEST_STAMP := $(OLDEST_VENV)/$(call stamp,$(OLDEST_PINS))
# Tests of one file stay together: they share fixtures, and the conformance kit its models. Files are begun as they are
# listed; pytest-xdist would keep those with few tests for the end, and some of these are slow.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
PLUGINS := $(sort $(wildcard plugins/*))
PROJECTS := pyproject.toml $(PLUGINS:=/pyproject.toml)
CHECKPOINT := .demo/SmolLM2-135M-Instruct

# Everything is on disk: transformers must never wait for a network.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test pytest test-slow test-all test-oldest test-matrix test-next fuzz mutants lint fix clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 21

demo: $(STAMP) | $(CHECKPOINT)  ## convert a real checkpoint, load it with tepatch and let it talk
	@$(VENV)/bin/python examples/demo.py

test: lint pytest  ## lint, then run the tests but the slow ones (test-slow)

# Listed after lint in `test`, and ordered after it under `make -j` too.
pytest: $(STAMP) | lint
	@$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## run what make test leaves out: benchmarks, matrix, fuzzer, long texts
	@$(VENV)/bin/python -m pytest $(PARALLEL) -m slow $(ARGS)

test-all: test test-slow test-oldest  ## run every test with the newest and the oldest transformers: takes long

test-oldest: $(OLDEST_STAMP)  ## run every test with the oldest transformers that is supported
	@$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-matrix: $(STAMP) $(OLDEST_STAMP)  ## run the conformance kit and tests of loading with each minor of transformers
	@$(VENV)/bin/python scripts/matrix.py minors -- $(ARGS)

test-next: $(STAMP)  ## run a case of each family with newer versions than the pinned ones, if the index has any
	@$(VENV)/bin/python scripts/matrix.py next $(PINS)

fuzz: $(STAMP)  ## change checkpoints at random for MINUTES (2), and see that only our errors come of it
	@$(VENV)/bin/python scripts/fuzz.py --minutes $(MINUTES) $(ARGS)

mutants: $(STAMP)  ## change lines of five modules at random, and see that tests notice: takes long
	@$(VENV)/bin/python -m pip install -qq -c $(VENV)/constraints.txt -e ".[mutants]"
	@$(VENV)/bin/python scripts/mutants.py write $(VENV)/mutants.jsonl --most $(MUTANTS)
	@$(VENV)/bin/python scripts/mutants.py run $(VENV)/mutants.jsonl $(ARGS)

lint: $(STAMP)  ## check style and types
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy --no-error-summary

fix: $(STAMP)  ## format, and mend what ruff can mend
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## remove environments, the demo's checkpoint and caches
	rm -rf $(VENV) $(VENV)-* .demo dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CHECKPOINT): | $(STAMP)
	@$(VENV)/bin/python scripts/make_smollm2.py $@

$(STAMP): $(PROJECTS)
	@echo "installing torch $(TORCH), $(PINS) into $(VENV): this takes some minutes"
	@$(PYTHON) -c 'import sys; sys.exit("tepatch needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/.torch-*
	@printf '%s\n' torch==$(TORCH) $(PINS) > $(VENV)/constraints.txt
	@$(VENV)/bin/python -m pip install -qq torch==$(TORCH)
	@$(VENV)/bin/python -m pip install -qq -c $(VENV)/constraints.txt -e ".[demo,dev]" $(PLUGINS:%=-e %)
	@touch $@

# Only what is another version than in $(VENV): the rest is taken from there.
$(OLDEST_STAMP): $(STAMP)
	@echo "installing $(OLDEST_PINS) into $(OLDEST_VENV)"
	@rm -f $(OLDEST_VENV)/.torch-*
	@$(VENV)/bin/python scripts/matrix.py make $(OLDEST_VENV) $(OLDEST_PINS)
	@touch $@
