"""Pyright, as a user of the installed packages runs it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def pyright(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pyright on the packages of this folder; a type checker finds no editable install by itself."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
