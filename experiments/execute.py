"""Execute notebooks in place and keep their outputs: python experiments/execute.py [NOTEBOOK ...]; default: all."""

import asyncio
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("**/*.ipynb"))


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder and return it with its outputs, without execution counts and times.

    Raises:
      CellExecutionError: A cell failed.
    """
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, record_timing=False)
    asyncio.run(client.async_execute())  # unlike client.execute(), this closes its event loop
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
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(execute(nbformat.read(path, as_version=4), path.parent), path)
        print(path)
