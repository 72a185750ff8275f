"""Throughput, latency and memory of the finished model of a run, against its pretrained model with the same head.

    python -m benchmarks.inference RUN_DIR [--batch 32 --length 128 --repeats 20 --json FILE]

The finished model is the model that ``export`` writes: updates folded in, and after structured pruning the smaller arrays.
Throughput is measured on batches, and latency on single examples, by warm compiled programs. ``--length 0`` is the mean length
of the dev set of the run. The two models alternate, and each ratio compares two consecutive calls. The
process keeps freed memory, as all commands do (`dsee_jax.runtime.malloc`); with ``--trim`` the C library returns freed memory
to the system. Memory is measured in one process per model, which loads the model and runs one batch: the peak of the process
(Python, JAX, loading and compiling included), and XLA's analysis of the program (arguments, which are weights and a batch, and
temporaries). The machine must be idle otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from dsee_jax.runtime import malloc

MODELS = ("final", "dense")


def write(run: Path, folder: Path) -> dict[str, float]:
    """Write two model folders: ``final``, the finished model, and ``dense``, the pretrained model with the tuned head.

    Returns:
      ``{"mean_length"}``, the mean number of tokens of an example of the dev set.
    """
    from dsee_jax import models, tree
    from dsee_jax.ckpt import folders, hf, hf_save
    from dsee_jax.ckpt.resolve import resolve
    from dsee_jax.train import finished_run
    from dsee_jax.train.inputs import read_data

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
    data = read_data(finished.config, finished.task, run / folders.MODEL, finished.model)
    lengths = [length for tokens in (*data.dev.values(), *data.scoring.values()) for length in tokens.lengths]
    return {"mean_length": float(statistics.fmean(lengths))}


def program(run: Path, folder: Path, batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Return the compiled program of a model folder, and its arguments: the weights, and a batch without padding."""
    import jax
    import numpy as np

    from dsee_jax.ckpt import hf
    from dsee_jax.ckpt.folders import CONFIG, read_json
    from dsee_jax.train import config_file

    labels, dtype = read_json(folder / "config.json")["id2label"], config_file.read(run / CONFIG).model.dtype
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
    return {"weight_bytes": weights, **parts, "program_bytes": sum(parts.values()), "peak_rss_bytes": machine.peak()}


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


def compared(
    batch: int, times: dict[str, list[float]], single: dict[str, list[float]], memories: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Return the figures of both models and the ratios ``final`` over ``dense``; ``single`` are the times of one example."""
    figures: dict[str, Any] = {
        name: {
            "examples_per_second": batch / statistics.median(times[name]),
            "latency_seconds": statistics.median(single[name]),
            "seconds": [round(taken, 5) for taken in times[name]],
            **memories[name],
        }
        for name in MODELS
    }
    final, dense = memories["final"], memories["dense"]
    ratios = {f"{name}_ratio": final[name] / dense[name] for name in final}
    return figures | {"throughput_ratio": 1 / _ratio(times), "latency_ratio": _ratio(single)} | ratios


def _ratio(times: dict[str, list[float]]) -> float:
    """Return the median over consecutive calls of the time of ``final`` over that of ``dense``."""
    return statistics.median(final / dense for final, dense in zip(times["final"], times["dense"], strict=True))


def _answer(command: list[str]) -> dict[str, Any]:
    """Run a command and return the JSON of its last line."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of a finished run")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example; 0: the mean of the dev set")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each model")
    parser.add_argument("--trim", action="store_true", help="let the C library return freed memory to the system")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.run / "metrics.json").exists():
        parser.error(f"{options.run} is no finished run: it has no metrics.json")
    keeps_memory = not options.trim and malloc.keep_freed_memory()
    if options.write:
        return print(json.dumps(write(options.run, options.write)))
    shape = (options.batch, options.length)
    if options.measure:
        return print(json.dumps(memory(options.run, options.measure, *shape)))
    this = [sys.executable, "-m", "benchmarks.inference", str(options.run), *(["--trim"] if options.trim else [])]
    with tempfile.TemporaryDirectory() as temporary:
        folder, memories = Path(temporary), {}
        # On Linux a child process inherits the peak of its parent, so this process must load no model before.
        mean = _answer([*this, "--write", temporary])["mean_length"]
        length = options.length or round(mean)
        for name in MODELS:
            shaped = [f"--batch={options.batch}", f"--length={length}", "--measure", str(folder / name)]
            memories[name] = _answer([*this, *shaped])
        times = seconds(options.run, folder, options.batch, length, options.repeats)
        # One example takes less time, and its time varies more.
        single = seconds(options.run, folder, 1, length, 5 * options.repeats)
    import jax

    report = {
        "run": options.run.name,
        "batch": options.batch,
        "length": length,
        "mean_length": mean,
        "machine": machine.name(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "freed_memory_kept": keeps_memory,
        **compared(options.batch, times, single, memories),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        from dsee_jax.runtime import files

        files.write(options.json, report)
    for name in MODELS:
        figures = report[name]
        speed = f"{figures['examples_per_second']:8.1f} examples/s   single {1e3 * figures['latency_seconds']:7.1f} ms"
        sizes = "   ".join(
            f"{label} {figures[key] / 1e6:7.1f} MB"
            for label, key in (("program", "program_bytes"), ("process", "peak_rss_bytes"), ("weights", "weight_bytes"))
        )
        print(f"{name:6} {speed}   {sizes}")
    ratios = ", ".join(f"{key.removesuffix('_ratio')} {value:.3f}" for key, value in report.items() if "ratio" in key)
    print(f"final / dense: {ratios}")


if __name__ == "__main__":
    main()
