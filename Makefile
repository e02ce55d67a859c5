PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test check notebooks lock

run: $(VENV)/installed
	$(BIN)/python -m alexnet_jax.main --config=configs/ablation_lrn.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Writes the notebooks' outputs again.
notebooks: $(VENV)/installed
	$(BIN)/python experiments/execute.py

# All supported versions of Python from one lock: names and versions, no addresses.
lock:
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --no-header --no-annotate \
		--output-file requirements.lock

$(VENV)/installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	touch $@
