"""The effect of pruning alone, by score and scope: a finished run is evaluated without a part of its weights, not tuned again.

    python -m benchmarks.scores RUN_DIR [RUN_DIR ...] [--sparsity 0.5 0.7] [--scores RIA TAYLOR ...] [--data.dir=GLUE_DIR]

RUN_DIR is a run of ``train.py`` by LoRA or DSEE with ``prune.kind: none``, for instance of ``configs/recommended_lora.yaml``.
Every score reads the same `CALIBRATION` examples of training. Writes the dev set metrics of each of `CHOICES`, or of those
with ``--scores``, to ``benchmarks/results/scores.json`` and ``scores.md``; of a run with ``data.split_dev`` those of the
validation half.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, runs
from benchmarks.runs import RESULTS
from dsee_jax import masks, prune, tree
from dsee_jax.data.batches import Batch, Batches
from dsee_jax.prune import calibration, gradients, weights
from dsee_jax.prune.scores import SCORES
from dsee_jax.runtime import files
from dsee_jax.train import calibrated, evaluation, finished_run, sharding, step
from dsee_jax.train.inputs import read_data
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.typing import Params

SCOPES = ("global", "tensor", "output")
CHOICES = [
    *((score, scope, "one_shot") for score in ("W", "WABS", "WANDA", "RIA") for scope in SCOPES),
    *((score, scope, "one_shot") for score in ("MOVEMENT", "TAYLOR", "PLATON") for scope in SCOPES),
    *((score, "tensor", "layerwise") for score in ("WANDA", "RIA")),
    *((score, "output", "layerwise") for score in ("WANDA", "RIA")),
    *(("SPARSEGPT", scope, calibrate) for scope in ("tensor", "global") for calibrate in ("one_shot", "layerwise")),
]
CALIBRATION = 128
"""The examples that a score reads."""


def calibration_data(source: Batches, count: int) -> tuple[list[Batch], list[Batch]]:
    """Return the first batches of ``source``, of ``count`` examples or all, and their examples apart, without filler rows."""
    batches = [source[number] for number in range(min(len(source), -(-count // source.batch_size)))]
    examples = [
        {name: array[row : row + 1] for name, array in batch.items()}
        for batch in batches
        for row in np.flatnonzero(batch["weights"].reshape(source.batch_size, -1).any(1))
    ]
    return batches, examples


def measured(run: Path, overrides: list[str], scores: list[str], sparsities: list[float]) -> list[dict[str, Any]]:
    """Return for every sparsity the metrics of a finished run for every choice, and those of the unpruned run as ``whole``."""
    finished = finished_run.load(run, overrides)
    config, task, model, params, saved = finished
    assert saved is not None, "a run with updates"
    data = read_data(config, task, run / "model", model)
    placed = sharding.placement(sharding.mesh(config.mesh, batch_size=config.train.batch_size), model)
    evaluate = evaluation.evaluator(model, config, data, placed)
    plain = finished_run.plain_params(finished)
    source = Batches(data.train, config.train.batch_size, epochs=1, seed=config.train.seed, edges=data.edges)
    batches, examples = calibration_data(source, CALIBRATION)
    targets = tree.select(config.prune.targets, tree.flatten(params))

    def pruned(score: str, scope: Any, calibrate: str, sparsity: float) -> Params:
        common: dict[str, Any] = {"sparsity": sparsity, "score": score, "scope": scope}
        if score == "SPARSEGPT" or calibrate == "layerwise":
            common |= {"behind": calibrate == "layerwise", "losses": PROBLEMS[task.problem].losses}
            return prune.layerwise(model, params, saved.adapter, targets, batches, **common)[1]
        if "inputs" in SCORES[score].reads:
            common["inputs"] = calibration.sizes(model, plain, batches)
        if "gradients" in SCORES[score].reads:
            statistic: Any = SCORES[score].statistic
            common["gradients"] = gradients.measure(
                calibrated.loss(model, task.problem), plain, targets, examples, statistic=statistic
            )
        return masks.apply(params, weights.unstructured(params, saved.adapter, targets, **common))

    trained = {"deltas": saved.deltas, "params": {}}
    whole = evaluate(trained, step.Frozen(params, saved.supports, {}))
    metrics = {sparsity: {"whole": whole} for sparsity in sparsities}
    for (score, scope, calibrate), sparsity in itertools.product(CHOICES, sparsities):
        if score not in scores:
            continue
        name = f"{score}, {scope}" + (", layerwise" if calibrate == "layerwise" else "")
        kept = step.Frozen(pruned(score, scope, calibrate, sparsity), saved.supports, {})
        metrics[sparsity][name] = evaluate(trained, kept)
        print(task.name, name, sparsity, metrics[sparsity][name], flush=True)
    about = {"task": task.name, "seed": config.train.seed, "examples": config.data.examples}
    return [about | {"sparsity": sparsity, "metrics": found} for sparsity, found in metrics.items()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table: one row per choice, one column per run and sparsity."""
    first = [next(iter(row["metrics"]["whole"])) for row in rows]
    heads = [f"{row['task']}, {row['sparsity']:.0%}: {name}, loss" for row, name in zip(rows, first, strict=True)]
    cells = (
        [
            choice,
            *(
                f"{100 * row['metrics'][choice][name]:.1f}, {row['metrics'][choice]['loss']:.3f}"
                for row, name in zip(rows, first, strict=True)
            ),
        ]
        for choice in rows[0]["metrics"]
    )
    return "\n".join(runs.table(["score, scope", *heads], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    every = [*dict.fromkeys(score for score, *_ in CHOICES)]
    parser.add_argument("--scores", nargs="+", choices=every, default=every, help="the rows to measure")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7], metavar="S", help="default: 0.5 0.7")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of scores.json and scores.md")
    options, overrides = parser.parse_known_args()
    rows = [row for run in options.runs for row in measured(run, overrides, options.scores, options.sparsity)]
    report = {
        "command": "python -m benchmarks.scores RUN_DIR ... --data.dir=GLUE_DIR",
        "machine": machine.name(),
        "calibration": CALIBRATION,
        "runs": rows,
    }
    files.write(options.out / "scores.json", report)
    files.write_text(options.out / "scores.md", markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
