"""Two language models tuned from one real Llama on different texts, merged into one that writes both: one resumable command.

    python -m benchmarks.merge_llama --llama LLAMA_DIR --e2e E2E_DIR --glue GLUE_DIR

The base: a small Llama of children's stories (``--llama``). ``restaurants`` learns E2E's descriptions (dev set; scored on the
test set), ``reviews`` phrases of SST-2 of eight words or more after ``good review:`` or ``bad review:`` (scored on its dev
set); every weight is tuned. The two are merged by ``python -m merge`` with RankMean, linear, TIES and DARE, options as their
papers advise without a validation set, none searched. Of every model: the mean loss in nats over the tokens of each task's
responses, the mean of both over the tuned models', and what it writes first for a prompt of each.

Writes ``benchmarks/results/merge_llama.json`` and ``.md``. A tuning that was interrupted goes on.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.e2e import absolute
from dsee_jax.ckpt import hf
from dsee_jax.generation import pipeline
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, inputs, reopen, sharding, step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS: dict[str, dict[str, Any]] = {
    "restaurants": {"data.max_length": 352, "train.epochs": 3},
    "reviews": {
        "model.task": "causal-lm",
        "data.source": "jsonl",
        "data.task": "reviews",
        "data.max_length": 128,
        "train.epochs": 3,
    },
}
"""What is changed in configs/stories_e2e_dsee.yaml, besides `FULL`."""

FULL = {
    "delta.rank": 0,
    "delta.nonzeros": 0,
    "prune.kind": "none",
    "train.full": True,
    "train.learning_rate": 2e-3,
    "generate.new_tokens": 0,
}
EXAMPLES, WORDS = 6000, 8
"""Reviews to train on, each of so many words or more."""

PROMPTS = {"restaurants": "name[Blue Spice], eatType[coffee shop], area[city centre]", "reviews": "good review:"}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "RankMean, by layer": ("rankmean", {"unit": "layer"}),
    "RankMean, by tensor": ("rankmean", {"unit": "tensor"}),
    "linear": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"lambda": 0.4}),
    "TIES": ("ties", {"density": 0.2}),
    "DARE": ("dare_linear", {"density": 0.5, "lambda": 0.4}),
}
"""Row -> method and parameters of the recipe."""


def write_reviews(glue: Path, folder: Path) -> None:
    """Write train.jsonl and dev.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", EXAMPLES), ("dev", None)):
        with (glue / "SST-2" / f"{split}.tsv").open(encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        found = [
            {"prompt": f"{('bad', 'good')[int(label)]} review:", "completion": f" {text.strip()}"}
            for text, label in rows
            if len(text.split()) >= WORDS
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:most]))


def tune(task: str, options: argparse.Namespace) -> Path:
    """Tune a model, or what is left of it; return the folder of its run."""
    out = options.runs / task
    data = options.runs / "reviews_data" if task == "reviews" else options.e2e
    files = {"data.train_file": "", "data.dev_file": ""} if task == "reviews" else {}
    settings = FULL | TASKS[task] | files | {"model.path": options.llama, "data.dir": data, "output_dir": out}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    this = [sys.executable, "train.py", "configs/stories_e2e_dsee.yaml", *overrides]
    subprocess.run(this, check=True, cwd=ROOT)
    return out


def scorer(run: Path) -> Any:
    """Return the function ``folder of a model -> loss`` on the dev set of a run's task."""
    found = reopen.opened(run)
    data = inputs.read_data(found.config, found.task, run / "model", found.model)
    mesh = sharding.mesh(found.config.mesh, batch_size=found.config.train.batch_size)
    placed = sharding.placement(mesh, found.model)
    evaluate = evaluation.evaluator(found.model, found.config, data, placed)

    def score(folder: Path) -> float:
        _, params = hf.load_pretrained(folder, "causal-lm")
        return evaluate({"deltas": {}, "params": {}}, step.Frozen(params, {}, {}))["loss"]

    return score


def texts(folder: Path) -> dict[str, str]:
    """Return what a model writes for the prompt of each task, the most probable token each time."""
    writer = pipeline.opened(folder)
    return {task: pipeline.complete(writer, [prompt], new_tokens=48)[0].strip() for task, prompt in PROMPTS.items()}


def merged(name: str, models: list[Path], options: argparse.Namespace) -> Path:
    """Merge, and return the folder."""
    method, parameters = MERGES[name]
    out = options.runs / name.replace(", ", "_").replace(" ", "_").lower()
    recipe = {
        "merge_method": method,
        "base_model": str(options.llama),
        "models": [{"model": str(model)} for model in models],
        "parameters": parameters | ({"weight": 1.0} if method != "rankmean" else {}),
        "dtype": "float32",
    }
    if method == "linear":
        del recipe["base_model"]
    out.with_suffix(".yml").write_text(yaml.safe_dump(recipe))
    if not out.exists():
        subprocess.run([sys.executable, "-m", "merge", out.with_suffix(".yml"), out], check=True, cwd=ROOT)
    return out


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for the README."""
    lines = ["| model | loss, restaurants | loss, reviews | mean over the tuned models' |", "|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['loss']['restaurants']:.3f} | {row['loss']['reviews']:.3f} | {row['excess']:+.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=absolute, required=True, metavar="LLAMA_DIR")
    parser.add_argument("--e2e", type=absolute, required=True, metavar="E2E_DIR")
    parser.add_argument("--glue", type=absolute, required=True, metavar="GLUE_DIR")
    parser.add_argument("--runs", type=absolute, default=ROOT / "runs" / "merge_llama")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    write_reviews(options.glue, options.runs / "reviews_data")
    runs = {task: tune(task, options) for task in TASKS}
    scores = {task: scorer(run) for task, run in runs.items()}
    folders = {f"tuned on {task}": run / "model" for task, run in runs.items()}
    own = {task: scores[task](run / "model") for task, run in runs.items()}
    merges = {name: merged(name, list(folders.values()), options) for name in MERGES}
    rows = []
    for name, folder in {"the base": options.llama, **folders, **merges}.items():
        loss = {task: score(folder) for task, score in scores.items()}
        excess = float(np.mean([loss[task] - own[task] for task in TASKS]))
        rows.append({"model": name, "loss": loss, "excess": excess, "texts": texts(folder)})
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "command": "python -m benchmarks.merge_llama --llama LLAMA_DIR --e2e E2E_DIR --glue GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "changes": {task: FULL | changes for task, changes in TASKS.items()},
        "prompts": PROMPTS,
        "merges": {name: {"method": method, **parameters} for name, (method, parameters) in MERGES.items()},
        "rows": rows,
    }
    files.write(RESULTS / "merge_llama.json", found)
    files.write_text(RESULTS / "merge_llama.md", markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
