"""DSEE next to LoRA and full fine-tuning on real GLUE tasks, on the real MiniLM: one resumable command.

    python -m benchmarks.glue --data GLUE_DIR [--search]

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. A run is ``configs/minilm_TASK_METHOD.yaml`` with a seed. What
it measured is kept, with its config, in ``benchmarks/results/glue/RUN.json`` and not measured again unless the config changes;
a run that was interrupted goes on. ``--search`` first tries, for every method alike, half, once and twice the config's
learning rate on 3,000 examples of STS-B, two passes.

Writes the table and the search to ``benchmarks/results/glue.json`` and ``glue.md``, of the runs there are so far.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dsee_jax import config as configs
from dsee_jax import journal, tree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = {"sst2": "accuracy", "stsb": "pearson", "rte": "accuracy"}
METHODS = ("full", "lora", "dsee")
SEARCH = "stsb"
FACTORS = (0.5, 1.0, 2.0)
BUDGET = {"full": ("epochs=2",), "lora": ("epochs=2",), "dsee": ("epochs=1", "retune_epochs=1")}
"""Of the search: two passes over the data for every method."""


def run(
    name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str, folder: str = "glue"
) -> dict[str, Any]:
    """Do one run, or what is left of it, in a process of its own; return the content of its metrics.json.

    ``folder`` of the results keeps it.
    """
    path, out, kept = config_path(task, method), options.runs / name, RESULTS / folder / f"{name}.json"
    overrides = (f"--train.seed={seed}", *overrides)
    asked = yaml.safe_load(configs.dump(configs.read(path, overrides)))
    # Where the files lie does not change what is measured.
    del asked["output_dir"], asked["data"]["dir"]
    if kept.exists() and equal((found := json.loads(kept.read_text()))["config"], asked):
        return found["metrics"]
    print(f"== {name}", flush=True)
    # Every run compiles the same shapes: keep the programs.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    places = (f"--data.dir={options.data}", f"--output_dir={out}")
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(path), *places, *overrides], check=True, env=environment, cwd=ROOT
    )
    found = json.loads((out / "metrics.json").read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    journal.write(kept, {"config": asked, "metrics": found})
    return found


def equal(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether two configs are one; a key that is younger than the first has its default there."""
    defaults = tree.flatten(yaml.safe_load(configs.dump(configs.Config())))
    flat = tree.flatten(now)
    return {path: defaults[path] for path in flat} | tree.flatten(before) == flat


def config_path(task: str, method: str) -> Path:
    """Return the config of one line of the table."""
    return ROOT / "configs" / f"minilm_{task}_{method}.yaml"


def search(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return ``{method: {learning rate: score}}`` on the search task, the first seed."""
    found: dict[str, dict[str, float]] = {}
    for method in options.methods:
        rate = configs.read(config_path(SEARCH, method)).train.learning_rate
        for factor in FACTORS:
            name = f"search_{method}_{rate * factor:g}"
            budget = (f"--train.{key}" for key in BUDGET[method])
            overrides = (f"--train.learning_rate={rate * factor}", "--data.examples=3000", *budget)
            result = run(name, SEARCH, method, options.seeds[0], options, *overrides)
            found.setdefault(method, {})[f"{rate * factor:g}"] = result["final"][TASKS[SEARCH]]
        print(method, found[method], flush=True)
    return found


def row(task: str, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one line of the table: means over the seeds, and each seed's score; scores times 100."""
    metric = TASKS[task]
    stages = [{stage["name"]: 100 * stage["metrics"][metric] for stage in result["stages"]} for result in runs]
    figures = ("trainable_fraction", "weight_sparsity", "flops_ratio", "train_seconds")
    return {
        "task": task,
        "method": method,
        "metric": metric,
        "scores": [100 * result["final"][metric] for result in runs],
        "stages": {name: float(np.mean([stage[name] for stage in stages])) for name in stages[0]},
        **{key: float(np.mean([result[key] for result in runs])) for key in figures},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for the README."""
    lines = [
        "| task (metric) | method | score: mean (seeds) | trained of backbone | weights zero | FLOPs a token, zeros skipped |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        seeds = ", ".join(f"{score:.1f}" for score in r["scores"])
        lines.append(
            f"| {r['task']} ({r['metric']}) | {r['method']} | {np.mean(r['scores']):.1f} ({seeds}) "
            f"| {r['trainable_fraction']:.2%} | {r['weight_sparsity']:.0%} | {r['flops_ratio']:.0%} |"
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
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.glue --data GLUE_DIR{' --search' if options.search else ''}",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator; other work ran beside it",
        "seeds": options.seeds,
        "search": search(options) if options.search else {},
        "rows": [],
    }
    for task in options.tasks:
        for method in options.methods:
            runs = [run(f"{task}_{method}_seed{seed}", task, method, seed, options) for seed in options.seeds]
            found["rows"].append(row(task, method, runs))
            journal.write(RESULTS / "glue.json", found)
            journal.write_text(RESULTS / "glue.md", markdown(found["rows"]))
    print(markdown(found["rows"]))


if __name__ == "__main__":
    main()
