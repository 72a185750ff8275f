"""Run notebooks in an empty folder and store their outputs.

``python docs/notebooks/execute.py [NAME ...]``
"""

import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import nbclient
import nbformat

HERE = pathlib.Path(__file__).resolve().parent
NOTEBOOKS = sorted(path.stem for path in HERE.glob("*.ipynb"))


def execute(name: str, folder: str | os.PathLike[str], **environment: str) -> Any:
    """Run the cells of a notebook in ``folder`` and return the notebook with their outputs.

    ``environment`` adds to the variables of the kernel, which imports this checkout.

    Raises:
      CellExecutionError: a cell fails; the message has the cell and the traceback.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",  # that of this Python
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), **environment}
    return client.execute(env={**os.environ, **own})


def main(names: list[str]) -> None:
    """Run the named notebooks, by default all, in full, and write them with their outputs."""
    for name in names or NOTEBOOKS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, folder)
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        size = (HERE / f"{name}.ipynb").stat().st_size
        print(f"{name}: {time.perf_counter() - start:.0f} s, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
