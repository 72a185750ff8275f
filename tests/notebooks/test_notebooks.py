"""The notebooks of the documentation: every cell runs, and what they store fits the project."""

import json
import pathlib
import runpy
import tomllib

import pytest

import decoders
import tiny

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
LINES = 15
"""The most lines of a code cell, which then fits on a screen with its output."""
SIZE = 300_000
"""The most bytes of a notebook with its outputs."""


def cells(name: str, kind: str) -> list[str]:
    """The sources of the cells of one type."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.notebooks
@pytest.mark.filterwarnings("default")  # those of Jupyter
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_cell_fails(name, tmp_path):
    """The kernel has the tests' environment, so it shares their cache of compiled programs."""
    models, work = tmp_path / "models", tmp_path / "work"
    work.mkdir()
    tiny.bert(models / "bert", head=False, max_position_embeddings=64)
    decoders.write(models / "llama", max_position_embeddings=256)
    runpy.run_path(str(FOLDER / "execute.py"))["execute"](name, work, DSEE_SMALL=str(models))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_badge_or_the_first_cell_names_another_repository(name):
    badge = f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}"
    assert f"]({badge}/blob/main/docs/notebooks/{name}.ipynb)" in cells(name, "markdown")[0]
    first, *others = cells(name, "code")
    assert "importlib.util.find_spec" in first
    assert f" @ git+{REPOSITORY}" in first
    assert not any("%pip" in cell for cell in others)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_code_cell_is_too_long(name):
    assert max(len(cell.splitlines()) for cell in cells(name, "code")) <= LINES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_too_large_or_name_a_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) <= SIZE
    outputs = [cell["outputs"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    for place in ("site-packages", "ipykernel_", str(pathlib.Path.home())):
        assert place not in json.dumps(outputs)
