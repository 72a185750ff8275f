"""The effect of pruning alone, by score and scope: a finished run is evaluated without half of its weights, not tuned again.

    python -m benchmarks.scores RUN_DIR [RUN_DIR ...] [--scores RIA TAYLOR ...] [--data.dir=GLUE_DIR]

RUN_DIR is a run of ``train.py`` by LoRA or DSEE with ``prune.kind: none``, for instance of ``configs/minilm_sst2_lora.yaml``.
Writes the dev set metrics of each of `CHOICES`, or of those with ``--scores``, to ``benchmarks/results/scores.json`` and
``scores.md``.
"""

import argparse
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.runs import RESULTS
from dsee_jax import masks, prune, tree
from dsee_jax.data.batches import Batch, Batches
from dsee_jax.models import INPUTS
from dsee_jax.prune import calibration, gradients, weights
from dsee_jax.prune.scores import SCORES
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, finished_run, sharding, step
from dsee_jax.train.inputs import read_data
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.typing import Array, Params

SCOPES = ("global", "tensor", "output")
CHOICES = [
    *((score, scope, "one_shot") for score in ("W", "WABS", "WANDA", "RIA") for scope in SCOPES),
    *((score, scope, "one_shot") for score in ("MOVEMENT", "TAYLOR", "PLATON") for scope in SCOPES),
    *((score, "tensor", "layerwise") for score in ("WANDA", "RIA")),
    *((score, "output", "layerwise") for score in ("WANDA", "RIA")),
    *(("SPARSEGPT", scope, calibrate) for scope in ("tensor", "global") for calibrate in ("one_shot", "layerwise")),
]
SPARSITY = 0.5


def calibration_data(source: Batches, count: int) -> tuple[list[Batch], list[Batch]]:
    """Return the first batches of ``source``, of ``count`` examples or all, and their examples apart, without filler rows."""
    batches = [source[number] for number in range(min(len(source), -(-count // source.batch_size)))]
    examples = [
        {name: array[row : row + 1] for name, array in batch.items()}
        for batch in batches
        for row in np.flatnonzero(batch["weights"].reshape(source.batch_size, -1).any(1))
    ]
    return batches, examples


def measured(run: Path, overrides: list[str], scores: list[str]) -> dict[str, Any]:
    """Return the metrics of a finished run for every choice, and those of the unpruned run as ``whole``."""
    finished = finished_run.load(run, overrides)
    config, task, model, params, saved = finished
    assert saved is not None, "a run with updates"
    data = read_data(config, task, run / "model", model)
    placed = sharding.placement(sharding.mesh(config.mesh, batch_size=config.train.batch_size), model)
    evaluate = evaluation.evaluator(model, config, data, placed)
    plain = finished_run.plain_params(finished)
    source = Batches(data.train, config.train.batch_size, epochs=1, seed=config.train.seed, edges=data.edges)
    batches, examples = calibration_data(source, config.prune.calibration)
    targets = tree.select(config.prune.targets, tree.flatten(params))

    def loss(params: Params, batch: Mapping[str, Array]) -> jax.Array:
        outputs: Any = model.apply({"params": params}, *(batch[name] for name in INPUTS), deterministic=True)
        return jnp.sum(PROBLEMS[task.problem].losses(outputs, batch) * batch["weights"]) / jnp.sum(batch["weights"])

    def pruned(score: str, scope: Any, calibrate: str) -> Params:
        common: dict[str, Any] = {"sparsity": SPARSITY, "score": score, "scope": scope}
        if score == "SPARSEGPT" or calibrate == "layerwise":
            common |= {"behind": calibrate == "layerwise", "losses": PROBLEMS[task.problem].losses}
            return prune.layerwise(model, params, saved.adapter, targets, batches, **common)[1]
        if "inputs" in SCORES[score].reads:
            common["inputs"] = calibration.sizes(model, plain, batches)
        if "gradients" in SCORES[score].reads:
            statistic: Any = SCORES[score].statistic
            common["gradients"] = gradients.measure(loss, plain, targets, examples, statistic=statistic)
        return masks.apply(params, weights.unstructured(params, saved.adapter, targets, **common))

    trained = {"deltas": saved.deltas, "params": {}}
    metrics = {"whole": evaluate(trained, step.Frozen(params, saved.supports, {}))}
    for score, scope, calibrate in CHOICES:
        if score not in scores:
            continue
        name = f"{score}, {scope}" + (", layerwise" if calibrate == "layerwise" else "")
        metrics[name] = evaluate(trained, step.Frozen(pruned(score, scope, calibrate), saved.supports, {}))
        print(task.name, name, metrics[name], flush=True)
    return {"task": task.name, "seed": config.train.seed, "examples": config.data.examples, "metrics": metrics}


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return the table: one row per choice, one column per run."""
    first = [next(iter(run["metrics"]["whole"])) for run in runs]
    heads = [f"{run['task']}: {metric}, loss" for run, metric in zip(runs, first, strict=True)]
    lines = [f"| score, scope | {' | '.join(heads)} |", "|" + "---|" * (1 + len(runs))]
    for choice in runs[0]["metrics"]:
        cells = [
            f"{100 * r['metrics'][choice][m]:.1f}, {r['metrics'][choice]['loss']:.3f}"
            for r, m in zip(runs, first, strict=True)
        ]
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    every = [*dict.fromkeys(score for score, *_ in CHOICES)]
    parser.add_argument("--scores", nargs="+", choices=every, default=every, help="the rows to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of scores.json and scores.md")
    options, overrides = parser.parse_known_args()
    runs = [measured(run, overrides, options.scores) for run in options.runs]
    report = {
        "command": "python -m benchmarks.scores RUN_DIR ... --data.dir=GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "sparsity": SPARSITY,
        "runs": runs,
    }
    files.write(options.out / "scores.json", report)
    files.write_text(options.out / "scores.md", markdown(runs))
    print(markdown(runs))


if __name__ == "__main__":
    main()
