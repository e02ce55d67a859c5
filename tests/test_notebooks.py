"""Every notebook runs, and shows what is kept in it; those of the studies without JAX."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY

from experiments import execute

pytestmark = pytest.mark.slow

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


def test_notebooks_run_and_show_what_is_kept_in_them(tmp_path: Path) -> None:
    assert len(execute.NOTEBOOKS) == 9
    with ThreadPoolExecutor(2) as pool:
        for path, notebook in zip(execute.NOTEBOOKS, pool.map(execute.executed, execute.NOTEBOOKS), strict=True):
            kept = nbformat.read(path, as_version=4)
            assert tables(notebook) == tables(kept), path
            assert all(cell.execution_count is None for cell in kept.cells if cell.cell_type == "code"), path


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
