"""Every notebook runs, and shows what is kept in it; those of the studies without JAX."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY

from alexnet_jax import report
from experiments import execute

NO_JAX = "import sys\nassert 'jax' not in sys.modules"


def tables(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells show as text, less addresses in memory."""
    return [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]


@pytest.mark.slow
def test_notebooks_run_and_show_what_is_kept_in_them(tmp_path: Path) -> None:
    assert len(execute.NOTEBOOKS) == 9
    with ThreadPoolExecutor(2) as pool:
        for path, notebook in zip(execute.NOTEBOOKS, pool.map(execute.executed, execute.NOTEBOOKS), strict=True):
            kept = nbformat.read(path, as_version=4)
            assert tables(notebook) == tables(kept), path
            assert all(cell.execution_count is None for cell in kept.cells if cell.cell_type == "code"), path


@pytest.mark.slow
def test_a_studys_notebook_needs_no_jax(tmp_path: Path) -> None:
    path = REPOSITORY / "experiments" / "lrn" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(NO_JAX))
    folder = tmp_path / "experiments" / "lrn"
    folder.mkdir(parents=True)
    (tmp_path / "alexnet_jax").symlink_to(REPOSITORY / "alexnet_jax")
    for name in ("study.json", "results.csv", "curves.csv"):
        (folder / name).symlink_to(path.parent / name)
    nbformat.write(notebook, folder / "notebook.ipynb")
    execute.executed(folder / "notebook.ipynb")


def test_the_readme_says_what_was_found() -> None:
    readme = (REPOSITORY / "README.md").read_text().splitlines()
    for folder in {path.parent for path in execute.NOTEBOOKS} - {REPOSITORY / "experiments"}:
        (row,) = (line for line in readme if line.startswith(f"| [{folder.name}]"))
        studies = [] if "in its notebook" in row else [path.parent for path in folder.rglob("study.json")]
        for study in studies:
            for found in report.verdicts(study).query("metric != 'eval/top5_error'").itertuples(index=False):
                assert f"{found[3]} ({found[4]}): {found.verdict}" in row
    lrn = report.table(report.load_runs(REPOSITORY / "experiments" / "lrn"))
    for arm, *numbers in lrn.itertuples(index=False):
        assert "".join(f"| {number} " if number else "| " for number in (f"`{arm}`", *numbers)) + "|" in readme
