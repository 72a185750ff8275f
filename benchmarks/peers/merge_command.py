"""Side: a merge by the command of this library or of mergekit, in a process of its own, until its output is on the disk.

All dirty pages are synced before the command starts, and the inputs are in the page cache. Our command syncs its output;
mergekit's does not, so its seconds include one sync of the system. Peak memory is anonymous memory, without mapped files.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import child

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "rankmean": {},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "slerp": {},
}
"""Method -> parameters of each model."""


def recipe(folder: Path, method: str) -> dict[str, Any]:
    """Return the recipe in mergekit's grammar."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **METHODS[method]}}
        for name, weight in (("model_a", 0.4), ("model_b", 0.6))
    ]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        content["base_model"] = str(folder / "base")
    if method == "slerp":
        content |= {"base_model": str(folder / "model_a"), "parameters": {"t": 0.4}}
    if method in ("slerp", "rankmean"):
        for model in models:
            del model["parameters"]
    return content


def prepare(case: dict[str, Any]) -> child.Side:
    folder, scratch = Path(case["checkpoints"]), Path(case["scratch"])
    path, out = scratch / f"{case['tool']}-{case['method']}.yml", scratch / f"out-{os.getpid()}"
    # JSON is YAML.
    path.write_text(json.dumps(recipe(folder, case["method"])))
    for file in sorted(folder.glob("*/*.safetensors")):
        child.read_through(file)
    if case["tool"] == "mergekit":
        command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(path), str(out), "--lazy-unpickle"]
    else:
        command = [sys.executable, "-m", "merge", str(path), str(out)]
    figures = _timed(command)
    facts = {
        "command": "until the output is on the disk" + (", by one sync of the system" * (case["tool"] == "mergekit")),
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("mergekit", "torch") if case["tool"] == "mergekit" else child.versions("jax"),
    }
    shutil.rmtree(out)
    return child.Side(child.once(figures), facts, {})


def _timed(command: list[str]) -> dict[str, float]:
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    if command[1] != "-m":
        os.sync()
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    child.serve(prepare)
