# Everything here creates .venv by itself; `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN ?= runs/demo

.PHONY: help install demo test lint format bench clean
.DEFAULT_GOAL := help

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with hydra-ssm (editable) and the development tools

# pyproject.toml and constraints.txt are all that an installation depends on: the source is linked, not copied.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		f"hydra-ssm needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	@echo 'Installing into .venv; torch is large, so the first time takes minutes.'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python tests/torchvision_on_cpu.py
	@touch $@

demo: $(STAMP)  ## train a small Hydra encoder on the CPU (about 3 minutes), then fill a mask and embed a file with it
	$(BIN)/hydra-ssm pretrain --out $(RUN) --overwrite
	$(BIN)/hydra-ssm fill-mask $(RUN) 'This method [MASK] called when the object is created.'
	$(BIN)/hydra-ssm embed $(RUN) README.md

test: $(STAMP)  ## run the tests in two processes, a file in one of them; ARGS='-k name' goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure the CPU speeds that the documentation states
	$(BIN)/python benchmarks/cpu.py

clean:  ## delete .venv, caches and build results; keeps runs/
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find hydra_ssm tests benchmarks recipes -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
