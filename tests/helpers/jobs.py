"""Jobs of several real processes on this machine, one device each, over the loopback interface."""

import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300
"""The time limit of a job."""

PATCHED = (
    "import runpy, sys; {}; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def start(count: int, *arguments: object, program: str = "train", last: str = "") -> list[subprocess.Popen[str]]:
    """Start the module ``program`` in ``count`` processes of one job.

    ``last``: Python code that the last process runs first, or an extra argument (``--...``) for the last process.
    """
    # Below the ports that Linux gives to outgoing connections.
    address = f"localhost:{random.randint(20000, 32000)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    started = []
    for number in range(count):
        extra = last if number == count - 1 else ""
        code = ["-c", PATCHED.format(extra)] if extra and not extra.startswith("--") else ["-m"]
        flags = [f"--coordinator={address}", f"--processes={count}", f"--process={number}"]
        rest = [*map(str, arguments), *([extra] if extra.startswith("--") else [])]
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
    """Wait for all processes; return the exit status, stdout and stderr of each."""
    ended = []
    try:
        for process in started:
            out, error = process.communicate(timeout=SECONDS)
            # Gloo, the transport between CPUs, prints its connections.
            out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
            ended.append((process.returncode, out, error))
    finally:
        for process in started:
            process.kill()
    return ended


def run(count: int, *arguments: object, **options: str) -> list[tuple[int, str, str]]:
    """Start a job and wait for it."""
    return end(start(count, *arguments, **options))
