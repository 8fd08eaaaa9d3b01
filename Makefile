# Each command works from nothing: it makes .venv, installs the project into it, and runs.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint docs

# The whole product in a few minutes, into runs/demo.
demo: $(INSTALLED)
	$(BIN)/ssl-vit demo run.overwrite=true

# One thread per test process: the models are too small to share out.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The user guide, into site/.
docs: $(INSTALLED)
	PYTHONPATH=docs $(BIN)/python -m zensical build --strict --clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
