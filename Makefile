# Everything a developer runs; `make` lists it. Written files go to .venv/ and build/.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help venv demo ort-headers test lint format wheel-smoke clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(STAMP)  ## make .venv with the package, its extras and the tools

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,onnx,ort]'
	touch $@

# One thread: on so small a model a second one gains little, and loses a lot where another program wants its core.
demo: venv  ## convert the bundled ViT, evaluate it, export it, run it in ONNX Runtime
	rm -rf build/demo
	OMP_NUM_THREADS=1 $(BIN)/gspn2convert demo --output build/demo

ort-headers:  ## put ONNX Runtime's headers into build/ort-headers, for tests of the library (Debian)
	bash .ci/ort-headers build/ort-headers

# One thread for each of the two workers: more would only compete for the same cores.
test: venv  ## run the tests; fails below 85 % line coverage
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=85

lint: venv  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: venv  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel-smoke: venv  ## build the wheel, install it into a clean environment and use it there
	bash .ci/wheel-smoke $(BIN)/python

clean:  ## remove what was built; keeps .venv
	rm -rf build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
