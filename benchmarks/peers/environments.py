"""The environments of the peers: virtual environments with pinned packages, beside the one of this library."""

import functools
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "torch": (
        *("torch==2.13.0", "peft==0.21.2", "transformers==5.24.0", "accelerate==1.15.0"),
        *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"),
    ),
    "keras": ("keras-hub==0.32.0", "keras==3.15.1", "tensorflow==2.21.0", "jax==0.10.2", "safetensors==0.8.0"),
    "mergekit": ("mergekit==0.1.5", "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2"),
}
"""Name -> what is installed."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""The packages that decide the speed of this library."""

MARKER = "complete"
"""The file of a complete environment: what was installed."""


def pins(name: str) -> str:
    """Return what the environment ``name`` consists of: the version of Python and of each package."""
    return " ".join([f"python=={platform.python_version()}", *ENVIRONMENTS[name]])


def is_complete(name: str, folder: Path) -> bool:
    """Return whether ``folder`` has the environment ``name`` with the pins of this version of the harness."""
    marker = folder / name / MARKER
    return marker.exists() and marker.read_text(encoding="utf-8") == pins(name)


def is_old(name: str, folder: Path) -> bool:
    """Return whether ``folder`` has the environment ``name`` with other pins than those of this version of the harness."""
    return bool(name) and (folder / name / MARKER).exists() and not is_complete(name, folder)


def make(folder: Path) -> None:
    """Create the environments that ``folder`` lacks or has with other pins, with the settings that pip has here.

    Ends the process with one line where venv or pip fails.
    """
    for name, packages in ENVIRONMENTS.items():
        if is_complete(name, folder):
            print(f"{folder / name}: complete", flush=True)
            continue
        print(f"{folder / name}: {' '.join(packages)}", flush=True)
        own = str(folder / name / "bin" / "python")
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder / name)],
            [own, "-m", "pip", "install", *packages],
        ):
            if status := subprocess.run(command).returncode:
                raise SystemExit(
                    f"{folder / name}: {command[2]} ended with exit status {status}; expected 0: remove the cause that it "
                    "names above, and run --make-environments again"
                )
        (folder / name / MARKER).write_text(pins(name), encoding="utf-8")


def python(name: str, needs: Sequence[str], folder: Path) -> str | None:
    """Return the interpreter of the environment ``name``, or this process' own where that has the packages ``needs``.

    None: neither exists. An environment with other pins is none.
    """
    if name and is_complete(name, folder):
        return str(folder / name / "bin" / "python")
    return sys.executable if all(importlib.util.find_spec(package) for package in needs) else None


def installed(name: str, needs: Sequence[str], folder: Path) -> str:
    """Return the packages that the interpreter of `python` gives a side: the pins, or those of this process.

    A side without ``needs`` is one of this library, whose figures depend on `LIBRARIES`.
    """
    if name and is_complete(name, folder):
        return pins(name)
    names = _distributions()
    # tensorflow is a module of tensorflow-cpu too.
    wanted = sorted({name for package in needs or LIBRARIES for name in names[package]})
    packages = [f"{name}=={importlib.metadata.version(name)}" for name in wanted]
    return " ".join([f"python=={platform.python_version()}", *packages])


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the distributions of each installed module; a listing reads the file list of every package."""
    return importlib.metadata.packages_distributions()
