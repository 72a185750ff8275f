"""Throughput and memory of the finished model of a run, against its pretrained model with the same head.

    python -m benchmarks.inference RUN_DIR [--batch 32 --length 128 --repeats 20 --json FILE]

The finished model is the model that ``export`` writes: updates folded in, and after structured pruning the smaller arrays.
Throughput is measured on warm compiled programs. The two models alternate, and each ratio compares two consecutive calls. The
process keeps freed memory, as all commands do (`dsee_jax.runtime.malloc`); with ``--trim`` the C library returns freed memory
to the system. Memory is measured in one process per model, which loads the model and runs one batch: the peak of the process
(Python, JAX, loading and compiling included), and XLA's analysis of the program (arguments, which are weights and a batch, and
temporaries). The machine must be idle otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.load_memory import peak
from dsee_jax.runtime import malloc

MODELS = ("final", "dense")


def write(run: Path, folder: Path) -> None:
    """Write two model folders: ``final``, the finished model, and ``dense``, the pretrained model with the tuned head."""
    from dsee_jax import models, tree
    from dsee_jax.ckpt import folders, hf, hf_save
    from dsee_jax.ckpt.resolve import resolve
    from dsee_jax.train import finished_run

    finished = finished_run.load(run)
    base, new_head = resolve(finished.config.model.path), finished.config.model.new_head
    plain = finished_run.plain_params(finished)
    hf_save.save_pretrained(folder / "final", finished.model, plain, source=run / folders.MODEL)
    model: Any
    model, params = hf.load_pretrained(base, num_labels=finished.task.num_labels, new_head=new_head)
    flat, tuned = tree.flatten(params), tree.flatten(finished.params)
    head = tree.select(models.find(model.config.model_type).head, flat)
    params = tree.unflatten(flat | {path: tuned[path] for path in head})
    hf_save.save_pretrained(folder / "dense", model, params, source=base, labels=finished.task.labels)


def program(run: Path, folder: Path, batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Return the compiled program of a model folder, and its arguments: the weights, and a batch without padding."""
    import jax
    import numpy as np

    from dsee_jax.ckpt import hf
    from dsee_jax.ckpt.folders import CONFIG
    from dsee_jax.train import config_file

    labels, dtype = hf.read_json(folder / "config.json")["id2label"], config_file.read(run / CONFIG).model.dtype
    model: Any
    model, params = hf.load_pretrained(folder, num_labels=len(labels), dtype=dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length), np.int32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    arguments = jax.device_put((params, inputs))
    run_once = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs))
    return run_once.lower(*arguments).compile(), arguments


def memory(run: Path, folder: Path, batch: int, length: int) -> dict[str, int]:
    """Return the bytes of the program and the peak of this process after one batch; the process must hold nothing else."""
    import jax

    compiled, arguments = program(run, folder, batch, length)
    jax.block_until_ready(compiled(*arguments))
    sizes = compiled.memory_analysis()
    parts = {"argument_bytes": sizes.argument_size_in_bytes, "temporary_bytes": sizes.temp_size_in_bytes}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0]))
    return {"weight_bytes": weights, **parts, "program_bytes": sum(parts.values()), "peak_rss_bytes": peak()}


def seconds(run: Path, folder: Path, batch: int, length: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of ``repeats`` alternating calls of each model, after one call that is not counted."""
    import jax

    programs = {name: program(run, folder / name, batch, length) for name in MODELS}
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    for repeat in range(repeats + 1):
        for name, (compiled, arguments) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def compared(batch: int, times: dict[str, list[float]], memories: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return the figures of both models and their ratios, ``final`` over ``dense``."""
    figures: dict[str, Any] = {
        name: {
            "examples_per_second": batch / statistics.median(times[name]),
            "seconds": [round(taken, 5) for taken in times[name]],
            **memories[name],
        }
        for name in MODELS
    }
    turns = [dense / final for final, dense in zip(times["final"], times["dense"], strict=True)]
    final, dense = memories["final"], memories["dense"]
    ratios = {f"{name}_ratio": final[name] / dense[name] for name in final}
    return figures | {"throughput_ratio": statistics.median(turns)} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of a finished run")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each model")
    parser.add_argument("--trim", action="store_true", help="let the C library return freed memory to the system")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.run / "metrics.json").exists():
        parser.error(f"{options.run} is no finished run: it has no metrics.json")
    keeps_memory = not options.trim and malloc.keep_freed_memory()
    shape = (options.batch, options.length)
    if options.write:
        return write(options.run, options.write)
    if options.measure:
        return print(json.dumps(memory(options.run, options.measure, *shape)))
    this = [sys.executable, "-m", "benchmarks.inference", str(options.run)]
    this += [f"--batch={options.batch}", f"--length={options.length}", *(["--trim"] if options.trim else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder, memories = Path(temporary), {}
        # On Linux a child process inherits the peak of its parent, so this process must load no model before.
        subprocess.run([*this, "--write", temporary], check=True, stdout=sys.stderr)
        for name in MODELS:
            done = subprocess.run(
                [*this, "--measure", str(folder / name)], check=True, stdout=subprocess.PIPE, text=True
            )
            memories[name] = json.loads(done.stdout.splitlines()[-1])
        times = seconds(options.run, folder, *shape, options.repeats)
    import jax

    report = {
        "run": options.run.name,
        "batch": options.batch,
        "length": options.length,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "freed_memory_kept": keeps_memory,
        **compared(options.batch, times, memories),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        from dsee_jax.runtime import files

        files.write(options.json, report)
    for name in MODELS:
        figures = report[name]
        print(
            f"{name:6} {figures['examples_per_second']:8.1f} examples/s   program {figures['program_bytes'] / 1e6:7.1f} MB"
            f"   process {figures['peak_rss_bytes'] / 1e6:7.1f} MB   weights {figures['weight_bytes'] / 1e6:6.1f} MB"
        )
    ratios = ", ".join(f"{key.removesuffix('_ratio')} {value:.3f}" for key, value in report.items() if "ratio" in key)
    print(f"final / dense: {ratios}")


if __name__ == "__main__":
    main()
