"""Digests of the code that figures depend on. Comments, docstrings and layout do not count."""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]

_OWN = re.compile(r"benchmarks\.peers(?:\.(\w+)| import ([\w, ]+))")


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the syntax of Python files and of their paths, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(files):
        tree = _Bare().visit(ast.parse(file.read_text(encoding="utf-8")))
        total.update(f"{file.relative_to(ROOT)}\n{ast.dump(tree)}\n".encode())
    return total.hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """Removes statements that are only a text."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def package(name: str) -> str:
    """Return the digest of all Python files of a package of this checkout."""
    return digest((ROOT / name).rglob("*.py"))


def sides(modules: tuple[str, ...]) -> str:
    """Return the digest of the modules of sides, and of the files of `benchmarks` that they use."""
    folder = Path(__file__).parent
    found, todo = {folder.parent / "machine.py"}, [folder / f"{name}.py" for name in ("rounds", *modules)]
    while todo:
        file = todo.pop()
        if file not in found and file.exists():
            found.add(file)
            for match in _OWN.finditer(file.read_text(encoding="utf-8")):
                todo += [folder / f"{name}.py" for name in re.findall(r"\w+", match[1] or match[2])]
    return digest(found)
