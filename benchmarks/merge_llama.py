"""Merge two language models, tuned on different texts from one pretrained Llama, by several methods; the command is resumable.

    python -m benchmarks.merge_llama --llama LLAMA_DIR --e2e E2E_DIR --glue GLUE_DIR

The base is a small Llama of children's stories (``--llama``). Every weight is tuned: ``restaurants`` on the descriptions of
E2E (trained on the dev set, scored on the test set), ``reviews`` on phrases of SST-2 with eight words or more, each after
``good review:`` or ``bad review:`` (scored on the dev set). ``python -m merge`` merges both models with RankMean, linear, task
arithmetic, TIES and DARE. The options are those that the papers advise without a validation set; none is searched. The results
of every model are the mean loss in nats per response token of each task, the mean excess of both losses over the models tuned
for these tasks, and a text generated for one prompt of each task.

Writes ``benchmarks/results/merge_llama.json`` and ``.md``. An interrupted tuning resumes.
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

from benchmarks.experiments import absolute
from dsee_jax.ckpt import hf
from dsee_jax.generation import pipeline
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, finished_run, inputs, sharding, step

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
"""Task -> overrides of configs/stories_e2e_dsee.yaml, besides `FULL`."""

FULL = {
    "delta.rank": 0,
    "delta.nonzeros": 0,
    "prune.kind": "none",
    "train.full": True,
    "train.learning_rate": 2e-3,
    "generate.new_tokens": 0,
}
EXAMPLES, WORDS = 6000, 8
"""The number of training reviews, and the least words of a review."""

PROMPTS = {"restaurants": "name[Blue Spice], eatType[coffee shop], area[city centre]", "reviews": "good review:"}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "RankMean, by layer": ("rankmean", {"unit": "layer"}),
    "RankMean, by tensor": ("rankmean", {"unit": "tensor"}),
    "linear": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"lambda": 0.4}),
    "TIES": ("ties", {"density": 0.2}),
    "DARE": ("dare_linear", {"density": 0.5, "lambda": 0.4}),
}
"""Row -> (method, parameters) of the recipe."""


def write_reviews(glue: Path, folder: Path) -> None:
    """Write train.jsonl and dev.jsonl: prompts and completions from the phrases of SST-2."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", EXAMPLES), ("dev", None)):
        with (glue / "SST-2" / f"{split}.tsv").open(encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        examples = [
            {"prompt": f"{('bad', 'good')[int(label)]} review:", "completion": f" {text.strip()}"}
            for text, label in rows
            if len(text.split()) >= WORDS
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples[:most]))


def tune(task: str, options: argparse.Namespace) -> Path:
    """Do the remaining part of a tuning; return the folder of the run."""
    out = options.runs / task
    data = options.runs / "reviews_data" if task == "reviews" else options.e2e
    no_files = {"data.train_file": "", "data.dev_file": ""} if task == "reviews" else {}
    settings = FULL | TASKS[task] | no_files | {"model.path": options.llama, "data.dir": data, "output_dir": out}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    this = [sys.executable, "train.py", "configs/stories_e2e_dsee.yaml", *overrides]
    subprocess.run(this, check=True, cwd=ROOT)
    return out


def scorer(run: Path) -> Any:
    """Return the function ``model folder -> loss`` on the dev set of the task of a run."""
    config, task, model, *_ = finished_run.load(run)
    data = inputs.read_data(config, task, run / "model", model)
    mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
    evaluate = evaluation.evaluator(model, config, data, sharding.placement(mesh, model))

    def score(folder: Path) -> float:
        _, params = hf.load_pretrained(folder, "causal-lm")
        return evaluate({"deltas": {}, "params": {}}, step.Frozen(params, {}, {}))["loss"]

    return score


def texts(folder: Path) -> dict[str, str]:
    """Return the greedily generated text of a model for the prompt of each task."""
    writer = pipeline.load(folder)
    return {task: pipeline.complete(writer, [prompt], new_tokens=48)[0].strip() for task, prompt in PROMPTS.items()}


def merged(name: str, models: list[Path], options: argparse.Namespace) -> Path:
    """Merge the models by the method of a row, and return the output folder."""
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
    """Return the table in Markdown."""
    lines = ["| model | loss, restaurants | loss, reviews | mean excess over the tuned models |", "|---|---|---|---|"]
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
    report = {
        "command": "python -m benchmarks.merge_llama --llama LLAMA_DIR --e2e E2E_DIR --glue GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "changes": {task: FULL | changes for task, changes in TASKS.items()},
        "prompts": PROMPTS,
        "merges": {name: {"method": method, **parameters} for name, (method, parameters) in MERGES.items()},
        "rows": rows,
    }
    files.write(RESULTS / "merge_llama.json", report)
    files.write_text(RESULTS / "merge_llama.md", markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
