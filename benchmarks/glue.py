"""DSEE next to LoRA and full fine-tuning on real GLUE tasks, on the real MiniLM: one resumable command.

    python -m benchmarks.glue --data GLUE_DIR [--search]

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. A run is ``configs/minilm_TASK_METHOD.yaml`` with a seed. What
it measured is kept, with its config, in ``benchmarks/results/glue/RUN.json`` and not measured again unless the config changes;
a run that was interrupted goes on. ``--search`` first tries, for every method alike: half, once and twice a learning rate
(full 1e-4, LoRA and DSEE 1e-3) on 3,000 examples of STS-B, two passes; and on the whole of RTE, six passes, that rate with
batches of 32 and half of it with batches of 16. DSEE pruned by |W + D| over all kernels together in the search, before it was
measured that pruning by WANDA within each kernel loses less. RTE after STS-B begins with the MiniLM that the first
seed tuned in full on STS-B, and takes the rates, batches and passes of RTE.

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
from dsee_jax import tree
from dsee_jax.runtime import files
from dsee_jax.train import config_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = {"sst2": "accuracy", "stsb": "pearson", "rte": "accuracy", "rte_after_stsb": "accuracy"}
STARTS = {"rte_after_stsb": ("stsb", "full", 0)}
"""Tasks whose runs begin with the model that a run on another task made: its task, method and seed."""
METHODS = ("full", "lora", "dsee")
RATES = {"full": 1e-4, "lora": 1e-3, "dsee": 1e-3}
"""The learning rates around which every search looks."""
SEARCHES: dict[str, tuple[tuple[float, int], ...]] = {
    "stsb": ((0.5, 32), (1, 32), (2, 32)),
    "rte": ((1, 32), (0.5, 16)),
}
"""By task, (factor of the rate, batch size)."""
EXAMPLES = {"stsb": 3000, "rte": 0}
"""Of a search; 0: all."""
PASSES = {
    "stsb": {"full": (2, 0), "lora": (2, 0), "dsee": (1, 1)},
    "rte": {"full": (6, 0), "lora": (6, 0), "dsee": (2, 4)},
}
"""Of a search: epochs before and after pruning; in all as many for every method."""


def run(
    name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str, folder: str = "glue"
) -> dict[str, Any]:
    """Do one run, or what is left of it, in a process of its own; return the content of its metrics.json.

    ``folder`` of the results keeps it.
    """
    path, out, kept = config_path(task, method), options.runs / name, RESULTS / folder / f"{name}.json"
    overrides = (f"--train.seed={seed}", *overrides)
    asked = yaml.safe_load(config_file.dump(config_file.read(path, overrides)))
    # Where the files lie does not change what is measured.
    del asked["output_dir"], asked["data"]["dir"]
    if kept.exists() and equal((found := json.loads(kept.read_text()))["config"], asked):
        return found["metrics"]
    train(name, task, method, options, *overrides)
    found = json.loads((out / "metrics.json").read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write(kept, {"config": asked, "metrics": found})
    return found


def train(name: str, task: str, method: str, options: argparse.Namespace, *overrides: str) -> None:
    """Do a run, or what is left of it, in a process of its own, after the one that it begins with."""
    places = [f"--data.dir={options.data}", f"--output_dir={options.runs / name}"]
    if task in STARTS:
        *first, seed = STARTS[task]
        before = "{}_{}_seed{}".format(*first, seed)
        if not (options.runs / before / "metrics.json").exists():
            train(before, *first, options, f"--train.seed={seed}")
        places.append(f"--model.path={options.runs / before / 'model'}")
    print(f"== {name}", flush=True)
    # Every run compiles the same shapes: keep the programs.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    command = [sys.executable, str(ROOT / "train.py"), str(config_path(task, method)), *places, *overrides]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)


def equal(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether two configs are one; a key that is younger than the first has its default there."""
    defaults = tree.flatten(yaml.safe_load(config_file.dump(configs.Config())))
    flat = tree.flatten(now)
    return {path: defaults[path] for path in flat} | tree.flatten(before) == flat


def config_path(task: str, method: str) -> Path:
    """Return the config of one line of the table."""
    return ROOT / "configs" / f"minilm_{task}_{method}.yaml"


def search(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{task: {method: {"rate, batch": score}}}`` of the searches, the first seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, settings in SEARCHES.items():
        for method in options.methods:
            epochs, after = PASSES[task][method]
            budget = [f"--train.epochs={epochs}", *([f"--train.retune_epochs={after}"] if after else [])]
            for factor, batch in settings:
                rate = RATES[method] * factor
                chosen = [f"--train.learning_rate={rate}", f"--train.batch_size={batch}"]
                sizes = [f"--data.examples={EXAMPLES[task]}"]
                pruned = ["--prune.score=WABS", "--prune.scope=global"]
                name = f"search_{task}_{method}_{rate:g}_{batch}"
                result = run(name, task, method, options.seeds[0], options, *chosen, *sizes, *budget, *pruned)
                score = result["final"][TASKS[task]]
                found.setdefault(task, {}).setdefault(method, {})[f"{rate:g}, {batch}"] = score
            print(task, method, found[task][method], flush=True)
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


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return the options that the benchmarks on GLUE share; ``text`` is what ``--help`` says."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=lambda text: Path(text).absolute(), required=True, help="the folder of GLUE")
    made.add_argument("--runs", type=lambda text: Path(text).absolute(), default=ROOT / "runs" / "glue")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    return made


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked.add_argument("--search", action="store_true", help="try the learning rates first")
    options = asked.parse_args()
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
            files.write(RESULTS / "glue.json", found)
            files.write_text(RESULTS / "glue.md", markdown(found["rows"]))
    print(markdown(found["rows"]))


if __name__ == "__main__":
    main()
