# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint check format schema clean

help:
	@echo "make demo    make .venv, install, run the bundled study, print where the report is"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format the code"
	@echo "make schema  write docs/study.schema.json"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/installed
	$(BIN)/polyclinic demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(VENV)/installed
	$(BIN)/polyclinic schema > docs/study.schema.json

clean:
	rm -rf $(VENV)
