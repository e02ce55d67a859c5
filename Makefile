PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

STUDIES = lrn relu dropout pooling augmentation towers depth modern

.PHONY: run test quick check studies notebooks lock

# Trains the nine runs of a study on the embedded images and prints its table.
run: $(VENV)/installed
	$(BIN)/python -m alexnet_jax.main --config=configs/ablation_lrn.py

# Runs the whole test suite.
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# Runs the fast tests, in about two minutes.
quick: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder -m "not slow"

# Checks format, style and types.
check: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Trains every study on the embedded images and keeps the files that its notebook reads.
studies: $(VENV)/installed
	for study in $(STUDIES); do \
		$(BIN)/python -m alexnet_jax.main --config=configs/ablation_$$study.py --seeds=0:10 || exit; \
		(cd runs/ablation_$$study && cp study.json results.csv curves.csv ../../experiments/$$study) || exit; \
	done

# Executes the notebooks, and writes the generated tables and figures again.
notebooks: $(VENV)/installed
	$(BIN)/python experiments/execute.py
	$(BIN)/python experiments/figure1/figure1.py
	$(BIN)/python experiments/figure3/figure3.py
	$(BIN)/python experiments/initialisation/trained.py
	$(BIN)/python experiments/gpu/table.py
	$(BIN)/python experiments/claims.py
	$(BIN)/python experiments/figures/towers.py

# Locks the dependencies for all supported versions of Python: names and versions, no addresses.
lock:
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --no-header --no-annotate \
		--output-file requirements.lock

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@
