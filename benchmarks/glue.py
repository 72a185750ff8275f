"""Compare DSEE, LoRA and full fine-tuning of the pretrained MiniLM on GLUE tasks; the command is resumable.

    python -m benchmarks.glue --data GLUE_DIR [--search] [--frozen-pooler]

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. A run is ``configs/minilm_TASK_METHOD.yaml`` with a seed. Its
metrics and its config are stored in ``benchmarks/results/glue/RUN.json``; the run is repeated only if the config changes. An
interrupted run resumes.

``--search`` first searches learning rates and batch sizes, with the same budget for every method: half, one and two times a
base rate (full 1e-4, LoRA and DSEE 1e-3) on 3,000 examples of STS-B, two passes; on all of RTE, six passes, the base rate with
batches of 32 and half the base rate with batches of 16. In the search DSEE prunes by |W + D| over all kernels together. The
configs prune by WANDA within each kernel, which was later measured to lose less. RTE after STS-B starts from the MiniLM that
seed 0 tuned in full on STS-B, and uses the rates, batch sizes and passes of RTE.

``--frozen-pooler`` adds rows of LoRA and DSEE that train the classifier alone, as ``train.head: auto`` does for this model and
as the authors of DSEE do. The configs train the pretrained pooler too.

Writes the table and the search to ``benchmarks/results/glue.json`` and ``glue.md`` after every finished row.
"""

import argparse
import itertools
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
from dsee_jax.runtime import files
from dsee_jax.train import config_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = {"sst2": "accuracy", "stsb": "pearson", "rte": "accuracy", "rte_after_stsb": "accuracy"}
STARTS = {"rte_after_stsb": ("stsb", "full", 0)}
"""Tasks whose runs start from the model of a run on another task: task, method and seed of that run."""
METHODS = ("full", "lora", "dsee")
FROZEN_POOLER = ("lora", "dsee")
"""The methods that have rows with a frozen pooler."""
RATES = {"full": 1e-4, "lora": 1e-3, "dsee": 1e-3}
"""The base learning rate of every search."""
SEARCHES: dict[str, tuple[tuple[float, int], ...]] = {
    "stsb": ((0.5, 32), (1, 32), (2, 32)),
    "rte": ((1, 32), (0.5, 16)),
}
"""Task -> (factor of the base rate, batch size) of each trial."""
EXAMPLES = {"stsb": 3000, "rte": 0}
"""Training examples of a search; 0 = all examples."""
PASSES = {
    "stsb": {"full": (2, 0), "lora": (2, 0), "dsee": (1, 1)},
    "rte": {"full": (6, 0), "lora": (6, 0), "dsee": (2, 4)},
}
"""Epochs of a search before and after pruning; the sum is the same for every method."""


def run(
    name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str, folder: str = "glue"
) -> dict[str, Any]:
    """Do the remaining part of a run in a new process; return the content of its metrics.json.

    The metrics are stored in ``RESULTS / folder``; a stored run with the same config is not repeated.
    """
    path, out, stored = config_path(task, method), options.runs / name, RESULTS / folder / f"{name}.json"
    overrides = (f"--train.seed={seed}", *overrides)
    config = yaml.safe_load(config_file.dump(config_file.read(path, overrides)))
    # The places of the files do not change the metrics.
    del config["output_dir"], config["data"]["dir"]
    if stored.exists() and equal((before := json.loads(stored.read_text()))["config"], config):
        return before["metrics"]
    train(name, task, method, options, *overrides)
    metrics = json.loads((out / "metrics.json").read_text())
    stored.parent.mkdir(parents=True, exist_ok=True)
    files.write(stored, {"config": config, "metrics": metrics})
    return metrics


def train(name: str, task: str, method: str, options: argparse.Namespace, *overrides: str) -> None:
    """Do the remaining part of a run in a new process, after the run that it starts from."""
    places = [f"--data.dir={options.data}", f"--output_dir={options.runs / name}"]
    if task in STARTS:
        first_task, first_method, seed = STARTS[task]
        before = f"{first_task}_{first_method}_seed{seed}"
        if not (options.runs / before / "metrics.json").exists():
            train(before, first_task, first_method, options, f"--train.seed={seed}")
        places.append(f"--model.path={options.runs / before / 'model'}")
    print(f"== {name}", flush=True)
    # The runs share shapes, so they share compiled programs.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    command = [sys.executable, str(ROOT / "train.py"), str(config_path(task, method)), *places, *overrides]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)


def equal(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two configs are equal; a key that the older config lacks has its default value."""
    defaults = yaml.safe_load(config_file.dump(configs.Config()))
    return all(defaults[key] | before[key] == now[key] for key in now if isinstance(now[key], dict))


def config_path(task: str, method: str) -> Path:
    """Return the path of the config of a task and a method."""
    return ROOT / "configs" / f"minilm_{task}_{method}.yaml"


def search(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{task: {method: {"rate, batch": score}}}`` of the searches with the first seed."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task, settings in SEARCHES.items():
        for method in options.methods:
            epochs, after = PASSES[task][method]
            budget = [f"--train.epochs={epochs}", *([f"--train.retune_epochs={after}"] if after else [])]
            for factor, batch in settings:
                rate = RATES[method] * factor
                trial = [f"--train.learning_rate={rate}", f"--train.batch_size={batch}"]
                sizes = [f"--data.examples={EXAMPLES[task]}"]
                pruned = ["--prune.score=WABS", "--prune.scope=global"]
                name = f"search_{task}_{method}_{rate:g}_{batch}"
                result = run(name, task, method, options.seeds[0], options, *trial, *sizes, *budget, *pruned)
                score = result["final"][TASKS[task]]
                scores.setdefault(task, {}).setdefault(method, {})[f"{rate:g}, {batch}"] = score
            print(task, method, scores[task][method], flush=True)
    return scores


def row(task: str, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row of the table: means over the seeds, and the score of each seed; scores are multiplied by 100."""
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


CHOSEN = (
    "Score: of the best evaluation of a run, one after each pass over the data, on the dev set that chooses it; "
    "``final_last`` in the files of a run is the score of its last step."
)
"""The note below each table of scores."""


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| task (metric) | method | score: mean (seeds) | trained share of backbone | zero weights "
        "| FLOPs per token without zeros |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        seeds = ", ".join(f"{score:.1f}" for score in r["scores"])
        lines.append(
            f"| {r['task']} ({r['metric']}) | {r['method']} | {np.mean(r['scores']):.1f} ({seeds}) "
            f"| {r['trainable_fraction']:.2%} | {r['weight_sparsity']:.0%} | {r['flops_ratio']:.0%} |"
        )
    return "\n".join([*lines, "", CHOSEN]) + "\n"


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return the parser with the options that the GLUE benchmarks share; ``text`` is the description in ``--help``."""
    shared = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("--data", type=lambda text: Path(text).absolute(), required=True, help="the GLUE folder")
    shared.add_argument("--runs", type=lambda text: Path(text).absolute(), default=ROOT / "runs" / "glue")
    shared.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    shared.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    return shared


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments.add_argument("--search", action="store_true", help="search the learning rates first")
    arguments.add_argument("--frozen-pooler", action="store_true", help="add rows that train the classifier alone")
    options = arguments.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    flags = "".join(f" --{name.replace('_', '-')}" for name in ("search", "frozen_pooler") if getattr(options, name))
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.glue --data GLUE_DIR{flags}",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator; other work ran beside it",
        "seeds": options.seeds,
        "search": search(options) if options.search else {},
        "rows": [],
    }
    heads: dict[str, list[str]] = {"": []}
    if options.frozen_pooler:
        heads["_frozen_pooler"] = ["--train.head=classifier"]
    for task, method, head in itertools.product(options.tasks, options.methods, heads):
        if not head or method in FROZEN_POOLER:
            names = {seed: f"{task}_{method}{head}_seed{seed}" for seed in options.seeds}
            runs = [run(name, task, method, seed, options, *heads[head]) for seed, name in names.items()]
            report["rows"].append(row(task, f"{method}{head}".replace("_", " "), runs))
            files.write(RESULTS / "glue.json", report)
            files.write_text(RESULTS / "glue.md", markdown(report["rows"]))
    print(markdown(report["rows"]))


if __name__ == "__main__":
    main()
