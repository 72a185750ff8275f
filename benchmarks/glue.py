"""DSEE next to LoRA and full fine-tuning on real GLUE tasks, on the real MiniLM: one resumable command.

    python -m benchmarks.glue --data GLUE_DIR [--search]

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. A run is ``configs/minilm_TASK_METHOD.yaml`` with a seed; runs
that are finished are not done again, one that was interrupted goes on. ``--search`` first tries, for every method alike,
half, once and twice the config's learning rate on 3,000 examples of STS-B, and prints what each gave.
Results, with the machine: ``benchmarks/results/glue.json`` and ``glue.md``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
TASKS = {"sst2": "accuracy", "stsb": "pearson", "rte": "accuracy"}
METHODS = ("full", "lora", "dsee")
SEARCH = "stsb"
FACTORS = (0.5, 1.0, 2.0)


def run(name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str) -> dict:
    """Do one run, or what is left of it, in a process of its own; return its metrics.json."""
    out = options.runs / name
    if not (out / "metrics.json").exists():
        print(f"== {name}", flush=True)
        # Every run compiles the same shapes: keep the programs.
        environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
        config = ROOT / "configs" / f"minilm_{task}_{method}.yaml"
        fixed = [f"--data.dir={options.data}", f"--train.seed={seed}", f"--output_dir={out}"]
        command = [sys.executable, str(ROOT / "train.py"), str(config), *fixed, *overrides]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return json.loads((out / "metrics.json").read_text())


def search(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return ``{method: {learning rate: score}}`` on the search task, the first seed."""
    from dsee_jax import config as configs

    found: dict[str, dict[str, float]] = {}
    for method in options.methods:
        rate = configs.read(ROOT / "configs" / f"minilm_{SEARCH}_{method}.yaml").train.learning_rate
        for factor in FACTORS:
            name = f"search_{method}_{rate * factor:g}"
            overrides = (f"--train.learning_rate={rate * factor}", "--data.examples=3000")
            result = run(name, SEARCH, method, options.seeds[0], options, *overrides)
            found.setdefault(method, {})[f"{rate * factor:g}"] = result["final"][TASKS[SEARCH]]
        print(method, found[method], flush=True)
    return found


def row(task: str, method: str, runs: list[dict]) -> dict:
    """Return one line of the table: means over the seeds, and each seed's score."""
    metric = TASKS[task]
    scores = [100 * result["final"][metric] for result in runs]
    mean = {
        key: float(np.mean([result[key] for result in runs]))
        for key in ("trainable_fraction", "weight_sparsity", "flops_ratio", "train_seconds")
    }
    stages = {
        stage["name"]: float(
            np.mean([100 * next(s for s in r["stages"] if s["name"] == stage["name"])["metrics"][metric] for r in runs])
        )
        for stage in runs[0]["stages"]
    }
    return {
        "task": task,
        "method": method,
        "metric": metric,
        "scores": scores,
        "mean": float(np.mean(scores)),
        "stages": stages,
        **mean,
    }


def markdown(rows: list[dict]) -> str:
    """Return the table for the README."""
    lines = [
        "| task (metric) | method | score, mean (seeds) | trained of backbone | weights zero | FLOPs | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        seeds = ", ".join(f"{score:.1f}" for score in r["scores"])
        lines.append(
            f"| {r['task']} ({r['metric']}) | {r['method']} | {r['mean']:.1f} ({seeds}) | {r['trainable_fraction']:.2%} "
            f"| {r['weight_sparsity']:.0%} | {r['flops_ratio']:.0%} | {r['train_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).absolute(), required=True, help="the folder of GLUE")
    parser.add_argument("--runs", type=lambda text: Path(text).absolute(), default=ROOT / "runs" / "glue")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--search", action="store_true", help="try the learning rates first")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    searched = search(options) if options.search else {}
    rows = [
        row(task, method, [run(f"{task}_{method}_seed{seed}", task, method, seed, options) for seed in options.seeds])
        for task in options.tasks
        for method in options.methods
    ]
    found = {
        "command": "python -m benchmarks.glue --data GLUE_DIR" + (" --search" if options.search else ""),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator; other work ran beside it",
        "seeds": options.seeds,
        "search": searched,
        "rows": rows,
    }
    results = ROOT / "benchmarks" / "results"
    (results / "glue.json").write_text(json.dumps(found, indent=1) + "\n")
    (results / "glue.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
