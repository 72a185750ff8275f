"""The architecture: imports go down one list, and generic code names no model."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import dsee_jax

ROOT = pathlib.Path(__file__).parents[1]

LEVELS = [
    {"errors", "heap", "standalone"},
    {"stores"},
    {"aliases", "config", "processes"},
    {"tree"},
    {"stacks"},
    # one array at a time: no trees, no models
    {"decompose", "layout", "ops"},
    {"supports", "scores"},
    # trees
    {"deltas", "masks"},
    {"units"},
    {"prune", "tickets", "flops"},
    # models: pure apply, no IO
    {"models"},
    {"compaction", "generation"},
    # edges
    {"ckpt", "data", "metrics", "text_metrics", "optim", "sharding", "journal", "step", "preemption"},
    {"writing", "activations"},
    {"setup", "report", "inspection", "stablehlo", "pictures"},
    {"cut", "evaluation", "export"},
    {"training", "program"},
    {"plan"},
    {"loop", "finished"},
    {"statistics", "completion"},
    {"__main__", "__init__"},
]
MERGE_LEVELS = [
    # one tensor of all models: no files
    {"leaf", "noise", "units"},
    {"method", "select"},
    {"methods"},
    # what is said and what is read
    {"recipes", "inputs"},
    {"planning", "compare"},
    # what is written
    {"streaming", "outputs"},
    {"assembly"},
    {"__main__", "__init__"},
]
MERGE_MAY_IMPORT = {"aliases", "errors", "heap", "tree", "layout", "ckpt", "config", "processes", "stores"}
MERGE_MAY_IMPORT |= {"plan", "sharding", "journal", "report"}

PACKAGES = {"dsee_jax": LEVELS, "merge": MERGE_LEVELS}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def package(path: pathlib.Path) -> str:
    """The package that a file belongs to."""
    return path.relative_to(ROOT).parts[0]


def part(path: pathlib.Path) -> str:
    """The name that the list gives a file: its own, or that of the package it lies in."""
    return path.relative_to(ROOT / package(path)).parts[0].removesuffix(".py")


def level(path: pathlib.Path, name: str) -> int:
    """Where the list of a file's package has ``name``."""
    return next(number for number, names in enumerate(PACKAGES[package(path)]) if name in names)


def imported(path: pathlib.Path, package: str) -> set[str]:
    """The parts of ``package`` that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package + "."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(package + ".")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_list(path):
    own = part(path)
    for name in imported(path, package(path)):
        inside = name == own and (path.parent.name == own or path.is_relative_to(ROOT / package(path) / own))
        beside = level(path, name) == level(path, own) and name != own
        assert inside or beside or level(path, name) < level(path, own), f"{own} imports {name}"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_list_names_every_part_and_no_other(name):
    parts = {part(path) for path in FILES if package(path) == name}
    assert parts == {each for names in PACKAGES[name] for each in names}


@pytest.mark.parametrize("name", PACKAGES)
def test_parts_of_one_level_do_not_import_in_circles(name):
    graph = {}
    for path in FILES:
        if package(path) == name:
            graph.setdefault(part(path), set()).update(imported(path, name))
    for own, targets in graph.items():
        for target in targets - {own}:
            assert own not in graph.get(target, set()), f"{own} and {target} import each other"


def test_merge_imports_little_of_dsee_jax():
    for path in (ROOT / "merge").rglob("*.py"):
        assert imported(path, "dsee_jax") <= MERGE_MAY_IMPORT, path


def test_generic_code_names_no_model():
    for path in FILES:
        if path.is_relative_to(ROOT / "dsee_jax" / "models"):
            continue
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        names = re.findall(r"\b(?:bert|roberta|gpt2|llama|deberta)\b", code, flags=re.IGNORECASE)
        assert not names, f"{path} names {names}"


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_imported(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert importlib.import_module(name).__doc__


@pytest.mark.smoke
def test_every_name_of_the_package_is_there():
    for name in dsee_jax.__all__:
        assert name in dir(dsee_jax)
        assert getattr(dsee_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dsee_jax.nothing  # noqa: B018


def test_a_merge_waits_for_no_import_that_it_does_not_need():
    heavy = ("flax", "optax", "orbax", "transformers", "huggingface_hub", "rich", "matplotlib", "PIL")
    code = f"import sys, merge.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
