"""Compare the memory of a step that `dsee_jax.plan` predicts with the measured memory, on the devices of this machine.

    python -m benchmarks.plan_memory [--only NAME ...]

Each case is a new process, which compiles the steps of a run from shapes and then runs the steps on arrays of these shapes. On
a CPU the measured memory is the peak of the process during the steps, less its memory after compilation. On a GPU the
measured memory is the peak of the allocator. Writes ``benchmarks/results/plan_memory.json`` and ``.md``, with one table per
kind of device.
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

from benchmarks.llama_memory import SHAPE
from benchmarks.plans import DECODER, MODELS
from benchmarks.runs import RESULTS, ROOT
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
"""Case -> (config.json, overrides of the config of the run, rows of a batch, tokens per row)."""
STEPS = 3


def measure(name: str) -> dict[str, Any]:
    """Return ``{step: {"said": predicted bytes, "took": measured bytes}}`` of a case."""
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
        steps, placed = run.abstract_steps(config, jax.devices())
        predicted = {
            step: roofline.analyze(*each, placed.mesh, None, donated=run.DONATED[step])["bytes_per_chip"]
            for step, each in steps.items()
        }
    programs = {
        step: jax.jit(function, donate_argnums=run.DONATED[step]).lower(*args).compile()
        for step, (function, args) in steps.items()
    }

    def filled(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        # With 1 for every integer and 0.01 for every float, the indices are valid and the loss is finite.
        return jax.block_until_ready(jnp.full(leaf.shape, 1 if leaf.dtype == jnp.int32 else 0.01, leaf.dtype))

    measured = {}
    for step in ("evaluate", "train"):
        gc.collect()
        begin = _start_peak()
        args = jax.tree.map(filled, steps[step][1])
        for _ in range(STEPS):
            outputs = programs[step](*args)
            if step == "train":
                args = (outputs[0], *args[1:])
            jax.block_until_ready(outputs)
        measured[step] = _peak() - begin
        del args, outputs
    return {step: {"said": predicted[step]["total"], "took": measured[step]} for step in measured}


def _start_peak() -> int:
    """Reset the peak, and return the bytes now in use."""
    import jax

    if jax.default_backend() != "cpu":
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    """Return the peak of the bytes in use since `_start_peak`."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def markdown(results: dict[str, Any]) -> str:
    """Return one table per device."""
    text = ""
    for device, cases in results.items():
        text += f"{device}:\n\n| model, batch | step | predicted | measured | ratio |\n|---|---|---|---|---|\n"
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
    path = RESULTS / "plan_memory.json"
    results: dict[str, Any] = json.loads(path.read_text())["found"] if path.exists() else {}
    # Freed memory returns to the system, so that the resident memory is the memory in use.
    environment = dict(os.environ, MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    for name in options.only:
        this = [sys.executable, "-m", "benchmarks.plan_memory", "--one", name]
        done = subprocess.run(this, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(result["device"], {})[name] = result["steps"]
        print(name, json.dumps(result["steps"]), flush=True)
        files.write(path, {"command": "python -m benchmarks.plan_memory", "found": results})
    files.write_text(RESULTS / "plan_memory.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
