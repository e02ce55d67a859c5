"""Committed notebooks and tables of results are up to date with the studies' files."""

import csv
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from support import OPTIMISED, REPOSITORY

EXPERIMENTS = REPOSITORY / "experiments"
execute = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "execute.py")))
claims = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "claims.py")))

QUICK = ("lrn", "relu")
NOTEBOOKS = [
    pytest.param(
        path, id=str(path.relative_to(EXPERIMENTS)), marks=[] if path.parent.name in QUICK else [pytest.mark.slow]
    )
    for path in execute.NOTEBOOKS
]


def texts(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Return what each cell printed and the tables that it shows."""
    return [
        [
            output["text"] if output.output_type == "stream" else output["data"]["text/plain"]
            for output in cell.get("outputs", [])
            if output.output_type == "execute_result" or output.get("name") == "stdout"
        ]
        for cell in notebook.cells
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_committed_outputs_are_current(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's notebook must also not need JAX."""
    monkeypatch.setenv("XLA_FLAGS", OPTIMISED["XLA_FLAGS"])
    committed = nbformat.read(path, as_version=4)
    expected = texts(committed)
    assert any(expected), "no outputs: run experiments/execute.py"
    if path.name == "notebook.ipynb":
        committed.cells.append(nbformat.v4.new_code_cell("import sys\nassert 'jax' not in sys.modules"))
    assert texts(execute.execute(committed, path.parent))[: len(expected)] == expected


def test_committed_tables_of_results_are_current() -> None:
    for path, table in claims.tables().items():
        text = path.read_text()
        assert claims.insert(text, table) == text, f"{path}: run experiments/claims.py"


def test_published_effects_are_the_differences_of_their_sources() -> None:
    """Sources give two errors in percent, or two accuracies; the first lacks what the second has."""
    for row in csv.DictReader((EXPERIMENTS / "published.csv").read_text().splitlines()):
        first, second = map(float, re.findall(r"\d+\.\d+", row["source"])[:2])
        difference = second - first if row["source"].startswith("accuracy") else (first - second) / 100
        assert float(row["effect"]) == pytest.approx(difference, abs=1e-9)
