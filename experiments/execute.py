"""Executes notebooks in place and keeps their outputs: python experiments/execute.py [NOTEBOOK ...]; by default all."""

import asyncio
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("**/*.ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of its code, without counts and times, which change when nothing else does.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, record_timing=False)
    asyncio.run(client.async_execute())  # which closes its event loop, as client.execute() does not
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    return notebook


if __name__ == "__main__":
    for notebook_path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(executed(notebook_path), notebook_path)
        print(notebook_path)
