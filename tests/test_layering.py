"""The architecture: imports go down one list, and generic code names no model."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LEVELS = [
    {"errors"},
    {"aliases", "config"},
    {"tree"},
    # one array at a time: no trees, no models
    {"decompose", "ops"},
    {"supports", "scores"},
    # trees
    {"deltas", "masks"},
    {"prune", "flops"},
    # models: pure apply, no IO
    {"models"},
    # edges
    {"ckpt", "data", "metrics", "optim", "sharding", "journal", "step"},
    {"setup", "report", "inspection"},
    {"cut", "evaluation", "export"},
    {"loop", "finished"},
    {"statistics"},
    {"__main__", "__init__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
MERGE_MAY_IMPORT = {"aliases", "errors", "tree", "ckpt", "config"}

FILES = sorted((ROOT / "dsee_jax").rglob("*.py"))


def part(path: pathlib.Path) -> str:
    """The name that the list gives a file: its own, or its package's."""
    return path.relative_to(ROOT / "dsee_jax").parts[0].removesuffix(".py")


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
    for name in imported(path, "dsee_jax"):
        inside = name == own and path.parent.name == own
        assert inside or LEVEL[name] < LEVEL[own] or (LEVEL[name] == LEVEL[own] and name != own), (
            f"{own} imports {name}"
        )


def test_the_list_names_every_part_and_no_other():
    assert {part(path) for path in FILES} == set(LEVEL)


def test_parts_of_one_level_do_not_import_in_circles():
    graph = {}
    for path in FILES:
        graph.setdefault(part(path), set()).update(imported(path, "dsee_jax"))
    for name, targets in graph.items():
        for target in targets - {name}:
            assert name not in graph.get(target, set()), f"{name} and {target} import each other"


def test_merge_imports_little_of_dsee_jax():
    for path in (ROOT / "merge").rglob("*.py"):
        assert imported(path, "dsee_jax") <= MERGE_MAY_IMPORT, path


def test_generic_code_names_no_model():
    for path in [*FILES, *(ROOT / "merge").rglob("*.py")]:
        if path.is_relative_to(ROOT / "dsee_jax" / "models"):
            continue
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        names = re.findall(r"\b(?:bert|roberta|gpt2|llama|deberta)\b", code, flags=re.IGNORECASE)
        assert not names, f"{path} names {names}"
