# The commands of the project. `make help` lists them.
# demo's parameters: make demo MODEL=/folder-or-hub-id DATA=/text.jsonl TOKENS=800000

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= builtin:demo
DATA ?= builtin:python-docs
TOKENS ?= 400000
SUITE ?= short
export DS_BUILD_OPS := 0

.PHONY: help demo test lint format bench bench-step bench-init bench-plan bench-quality bench-super-resolution serve lock teacher clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and alone: with it in place nothing else pulls another build of it.
$(VENV)/.worker: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker]'
	@touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
	@touch $@

demo: $(VENV)/.worker  ## binarize a small model end to end, through the real server
	@KBOP="$(CURDIR)/$(BIN)" MODEL="$(MODEL)" DATA="$(DATA)" TOKENS="$(TOKENS)" bash deploy/demo.sh

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## format check, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-step bench-init bench-plan bench-quality bench-super-resolution  ## every benchmark

bench-step: $(VENV)/.worker  ## cost and memory of a training step beside latent weights + AdamW
	$(BIN)/python -m benchmarks.step

bench-init: $(VENV)/.worker  ## BNN Init: perplexity and time beside plain binarization
	$(BIN)/python -m benchmarks.init

bench-plan: $(VENV)/.worker  ## memory that kbop plan foretells beside what ranks take
	$(BIN)/python -m benchmarks.plan

bench-quality: $(VENV)/.worker  ## perplexity per bit beside every peer; resumable; SUITE="short medium seeds ablations long"
	$(BIN)/python -m benchmarks.quality $(SUITE)

bench-super-resolution: $(VENV)/.worker  ## binary convolutions: T91 to Set5 and Set14, beside their peers
	$(BIN)/python -m benchmarks.super_resolution

serve: $(VENV)/.worker  ## run the server on http://127.0.0.1:8700
	$(BIN)/kbop serve

teacher: $(VENV)/.worker  ## train the demo's model again (about half an hour)
	$(BIN)/python -m jobs.demo.train_teacher --out jobs/demo/teacher

lock: $(VENV)/.dev  ## write constraints.txt from what is installed
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip list --format=freeze --exclude-editable \
	  | grep -viE '^(kbop|pip|setuptools|wheel|triton|nvidia-[a-z]+-cu[0-9]+)=' | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove everything that the other commands made
	rm -rf $(VENV) .kbop build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
