PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

STUDIES = lrn relu dropout pooling augmentation towers depth contributions

.PHONY: run test check studies notebooks lock

run: $(VENV)/installed
	$(BIN)/python -m alexnet_jax.main --config=configs/ablation_lrn.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

check: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Trains every study on the embedded images and keeps what its notebook reads.
studies: $(VENV)/installed
	for study in $(STUDIES); do \
		$(BIN)/python -m alexnet_jax.main --config=configs/ablation_$$study.py || exit; \
		(cd runs/ablation_$$study && cp study.json results.csv curves.csv ../../experiments/$$study) || exit; \
	done

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
