"""Side: a merge by the command of this library or of mergekit, in a process of its own, until its output is on the disk.

All dirty pages are synced before the command starts, and the inputs are in the page cache. Our command syncs its output;
mergekit's does not, so its seconds include one sync of the system. Peak memory is anonymous memory, without mapped files.

The sides are compared by the same recipe in float32 on tiny models, number by number, and by the size of the measured output,
whose bfloat16 numbers the two tools round at other points.
"""

import array
import json
import math
import os
import shutil
import struct
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


def recipe(folder: Path, method: str, dtype: str = "bfloat16", **parameters: Any) -> dict[str, Any]:
    """Return the recipe in mergekit's grammar; ``parameters`` of each model replace those of `METHODS`."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **METHODS[method], **parameters}}
        for name, weight in (("model_a", 0.4), ("model_b", 0.6))
    ]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype}
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
    out = scratch / f"out-{os.getpid()}"
    # The rounds of a case share their compiled programs, and not those of the user.
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    check = _small(case, out) if case.get("check") else {}
    for file in sorted(folder.glob("*/*.safetensors")):
        child.read_through(file)
    figures = _timed(_command(case["tool"], recipe(folder, case["method"]), out))
    if case.get("check"):
        sizes = [math.prod(shape) for _, shape, _ in tensors(out).values()]
        check["tensors and numbers"] = [len(sizes), sum(sizes)]
    facts = {
        "command": "until the output is on the disk" + (", by one sync of the system" * (case["tool"] == "mergekit")),
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("mergekit", "torch") if case["tool"] == "mergekit" else child.versions("jax"),
    }
    shutil.rmtree(out)
    return child.Side(child.once(figures), facts, check)


def _command(tool: str, content: dict[str, Any], out: Path) -> list[str]:
    """Write a recipe beside the output folder ``out``, and return the command that carries it out."""
    path = out.with_suffix(".yml")
    # JSON is YAML.
    path.write_text(json.dumps(content))
    if tool == "mergekit":
        return [str(Path(sys.executable).parent / "mergekit-yaml"), str(path), str(out), "--lazy-unpickle"]
    return [sys.executable, "-m", "merge", str(path), str(out)]


def _small(case: dict[str, Any], out: Path) -> dict[str, list[float]]:
    """Return all numbers of the same merge of the tiny models of ``checked`` in float32, by tensor.

    A method that drops weights at random keeps all of them.
    """
    keep = {"density": 1.0} if case["method"] == "dare_ties" else {}
    content = recipe(Path(case["checked"]), case["method"], "float32", **keep)
    subprocess.run(_command(case["tool"], content, out), check=True, stdout=subprocess.DEVNULL)
    numbers = {}
    for name, (dtype, _, data) in tensors(out).items():
        if dtype != "F32":
            raise SystemExit(f"{name}: the merge has the type {dtype}; expected F32")
        numbers[name] = array.array("f", data).tolist()
    shutil.rmtree(out)
    return numbers


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return (type, shape, bytes) of each tensor in the safetensors files of a folder; the bytes of float32 only."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                opened.seek(8 + size + begin)
                data = opened.read(end - begin) if entry["dtype"] == "F32" else b""
                found[name] = (entry["dtype"], entry["shape"], data)
    return found


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
