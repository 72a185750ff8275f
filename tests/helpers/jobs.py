"""Jobs of several real processes on this machine, one device each, that talk over its loopback."""

import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300
"""After which a job counts as hanging."""

PATCHED = (
    "import runpy, sys; {}; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def start(count: int, *arguments: object, program: str = "train", last: str = "") -> list[subprocess.Popen[str]]:
    """Start the module ``program`` in ``count`` processes of one job.

    ``last``: Python code that the last of them runs first, or an argument (``--...``) that it alone is given.
    """
    address = f"localhost:{random.randint(20000, 60000)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    started = []
    for number in range(count):
        mine = last if number == count - 1 else ""
        code = ["-c", PATCHED.format(mine)] if mine and not mine.startswith("--") else ["-m"]
        flags = [f"--coordinator={address}", f"--processes={count}", f"--process={number}"]
        rest = [*map(str, arguments), *([mine] if mine.startswith("--") else [])]
        started.append(
            subprocess.Popen(
                [sys.executable, *code, program, *rest, *flags],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def end(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all of them; return the exit status, stdout and stderr of each."""
    found = []
    try:
        for process in started:
            out, error = process.communicate(timeout=SECONDS)
            # Gloo, by which CPUs talk, says in between who is connected.
            out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
            found.append((process.returncode, out, error))
    finally:
        for process in started:
            process.kill()
    return found


def run(count: int, *arguments: object, **options: str) -> list[tuple[int, str, str]]:
    """Start a job and wait for it."""
    return end(start(count, *arguments, **options))
