"""The effect of pruning alone, by score and scope: a finished run is evaluated without half of its weights, not tuned again.

    python -m benchmarks.scores RUN_DIR [RUN_DIR ...] [--data.dir=GLUE_DIR]

RUN_DIR is a run of ``train.py`` by LoRA or DSEE with ``prune.kind: none``, for instance of ``configs/minilm_sst2_lora.yaml``.
Writes the dev set metrics of each of `CHOICES` to ``benchmarks/results/scores.json`` and ``scores.md``.
"""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.glue import RESULTS
from dsee_jax import masks
from dsee_jax.data.batches import Batches
from dsee_jax.prune import calibration, weights
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, finished_run, sharding, step
from dsee_jax.train.inputs import read_data

CHOICES = [(score, scope) for score in ("W", "WABS", "WANDA") for scope in ("global", "tensor", "output")]
SPARSITY = 0.5


def measured(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the metrics of a finished run for every choice, and those of the unpruned run as ``whole``."""
    finished = finished_run.load(run, overrides)
    config, task, model, params, saved = finished
    assert saved is not None, "a run with updates"
    data = read_data(config, task, run / "model", model)
    placed = sharding.placement(sharding.mesh(config.mesh, batch_size=config.train.batch_size), model)
    evaluate = evaluation.evaluator(model, config, data, placed)
    plain = finished_run.plain_params(finished)
    source = Batches(data.train, config.train.batch_size, epochs=1, seed=config.train.seed, edges=data.edges)
    sizes = calibration.sizes(
        model, plain, (source[n] for n in range(-(-config.prune.calibration // config.train.batch_size)))
    )
    trained = {"deltas": saved.deltas, "params": {}}
    scores = {"whole": evaluate(trained, step.Frozen(params, saved.supports, {}))}
    for score, scope in CHOICES:
        kept = weights.unstructured(
            *(params, saved.adapter, config.prune.targets),
            sparsity=SPARSITY,
            score=score,
            scope=scope,
            inputs=sizes,
        )
        name = f"{score}, {scope}"
        scores[name] = evaluate(trained, step.Frozen(masks.apply(params, kept), saved.supports, {}))
        print(task.name, name, scores[name], flush=True)
    return {"task": task.name, "seed": config.train.seed, "examples": config.data.examples, "metrics": scores}


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
    options, overrides = parser.parse_known_args()
    runs = [measured(run, overrides) for run in options.runs]
    report = {
        "command": "python -m benchmarks.scores RUN_DIR ... --data.dir=GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "sparsity": SPARSITY,
        "runs": runs,
    }
    files.write(RESULTS / "scores.json", report)
    files.write_text(RESULTS / "scores.md", markdown(runs))
    print(markdown(runs))


if __name__ == "__main__":
    main()
