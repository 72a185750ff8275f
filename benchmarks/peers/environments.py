"""The environments of the peers: virtual environments with pinned packages, beside the one of this library."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "torch": (
        *("torch==2.13.0", "peft==0.21.2", "transformers==5.24.0", "accelerate==1.15.0"),
        *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"),
    ),
    "keras": ("keras-hub==0.32.0", "keras==3.15.1", "jax==0.10.2", "safetensors==0.8.0"),
    "mergekit": ("mergekit==0.1.5", "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2"),
}
"""Name -> what is installed."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""The wheels of PyTorch without CUDA, for machines without an NVIDIA card."""


def make(folder: Path) -> None:
    """Create the environments that ``folder`` lacks."""
    for name, packages in ENVIRONMENTS.items():
        done = folder / name / "complete"
        if done.exists():
            continue
        print(f"{folder / name}: {' '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / name)], check=True)
        index = [] if shutil.which("nvidia-smi") else ["--extra-index-url", CPU_INDEX]
        subprocess.run([str(folder / name / "bin" / "pip"), "install", *index, *packages], check=True)
        done.touch()


def python(name: str, needs: Sequence[str], folder: Path) -> str | None:
    """Return the interpreter of the environment ``name``, or this process' own where that has the packages ``needs``.

    None: neither exists.
    """
    own = folder / name / "bin" / "python"
    if name and own.exists():
        return str(own)
    return sys.executable if all(importlib.util.find_spec(package) for package in needs) else None
