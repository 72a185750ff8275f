"""The memory that `dsee_jax.plan` says a step takes, next to what it took: on the devices of this machine.

    python -m benchmarks.plan_memory [--only NAME ...]

Each case compiles the real steps from shapes alone, in a process of its own, and then runs them on arrays of those shapes. On
a CPU what they took is the most memory that the process ever held since, less what it held once it had compiled; on a GPU
what its allocator says. Writes ``benchmarks/results/plan_memory.json`` and ``.md``, a table for each kind of device.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.glue import RESULTS, ROOT
from benchmarks.llama_memory import SHAPE
from benchmarks.plans import DECODER, MODELS
from dsee_jax.runtime import files

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "BERT-base, DSEE": (MODELS["BERT-base"], {}, 16, 128),
    "BERT-base, every weight": (
        MODELS["BERT-base"],
        {"train.full": True, "delta.rank": 0, "delta.nonzeros": 0},
        8,
        128,
    ),
    "RoBERTa-large, DSEE": (MODELS["RoBERTa-large"], {}, 8, 256),
    "Llama 1.1B, DSEE, bfloat16, remat": (
        SHAPE,
        {f"model.{name}": value for name, value in DECODER.items()},
        1,
        512,
    ),
}
"""config.json, changes of the run's config, rows, tokens of each."""
STEPS = 3


def measure(name: str) -> dict[str, Any]:
    """Return the bytes that the steps of a case are said to take, and those they took."""
    import jax
    import jax.numpy as jnp

    from dsee_jax.plan import roofline, run
    from dsee_jax.train import config_file

    fields, changes, rows, length = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        settings = {"model.path": folder, "data.max_length": length, "train.batch_size": rows} | changes
        settings |= {"data.source": "jsonl", "data.dir": folder} if fields["model_type"] == "llama" else {}
        config = config_file.read(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        steps, placed = run.abstract(config, jax.devices())
        said = {
            step: roofline.compiled(run, args, placed.mesh, None, donated=run.DONATED[step])["bytes_per_chip"]
            for step, (run, args) in steps.items()
        }
    programs = {
        step: jax.jit(run, donate_argnums=run.DONATED[step]).lower(*args).compile()
        for step, (run, args) in steps.items()
    }

    def filled(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        # Entries of a kernel that no two updates share, and what keeps a loss a number.
        return jax.block_until_ready(jnp.full(leaf.shape, 1 if leaf.dtype == jnp.int32 else 0.01, leaf.dtype))

    took = {}
    for step in ("evaluate", "train"):
        gc.collect()
        begin = _begin()
        args = jax.tree.map(filled, steps[step][1])
        for _ in range(STEPS):
            found = programs[step](*args)
            if step == "train":
                args = (found[0], *args[1:])
            jax.block_until_ready(found)
        took[step] = _most() - begin
        del args, found
    return {step: {"said": said[step]["total"], "took": took[step]} for step in took}


def _begin() -> int:
    """Return the bytes that are held now; from now on the most counts."""
    import jax

    if jax.default_backend() != "cpu":
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _most() -> int:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def markdown(found: dict[str, Any]) -> str:
    """Return the tables."""
    text = ""
    for device, cases in found.items():
        text += f"{device}:\n\n| model, batch | step | said | took | ratio |\n|---|---|---|---|---|\n"
        for name, steps in cases.items():
            _, _, rows, length = CASES[name]
            for step, sizes in steps.items():
                text += f"| {name}, {rows} x {length} | {step} | {sizes['said'] / 1e9:.2f} GB | {sizes['took'] / 1e9:.2f} GB "
                text += f"| {sizes['said'] / sizes['took']:.2f} |\n"
        text += "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="cases to run")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import jax

        device = jax.devices()[0]
        where = f"{os.cpu_count()} CPU cores ({platform.machine()})" if device.platform == "cpu" else device.device_kind
        print(json.dumps({"device": where, "steps": measure(options.one)}))
        return
    kept = RESULTS / "plan_memory.json"
    found: dict[str, Any] = json.loads(kept.read_text())["found"] if kept.exists() else {}
    # What is freed goes back to the system, so that what is held is what is used.
    environment = dict(os.environ, MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    for name in options.only:
        this = [sys.executable, "-m", "benchmarks.plan_memory", "--one", name]
        done = subprocess.run(this, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        found.setdefault(result["device"], {})[name] = result["steps"]
        print(name, json.dumps(result["steps"]), flush=True)
        files.write(kept, {"command": "python -m benchmarks.plan_memory", "found": found})
    files.write_text(RESULTS / "plan_memory.md", markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
