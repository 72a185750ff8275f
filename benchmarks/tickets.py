"""EarlyBERT tickets of the pretrained MiniLM on SST-2: score and time of training, and when the mask settles.

    python -m benchmarks.tickets --data GLUE_DIR [--parts ticket birds]

``ticket``: full fine-tuning of EarlyBERT tickets of several sizes and of the unpruned model. Measures score and training time;
the time includes the search and excludes compilation, and comes from alternating timed steps.
``birds``: one search over the full training. Measures the distance of the mask at each check from the last mask.

The metrics and the config of a run are stored in ``benchmarks/results/tickets/``; the run is repeated only if the config
changes. An interrupted run resumes. Times need an idle machine. Writes ``benchmarks/results/tickets.json``, ``tickets.md``,
``tickets.png`` and ``birds.png``.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from benchmarks.runs import RESULTS, ROOT
from dsee_jax.analysis.pictures import search as searches
from dsee_jax.analysis.pictures import style
from dsee_jax.runtime import files

FOLDER = RESULTS / "tickets"
CONFIG = ROOT / "configs" / "minilm_sst2_full.yaml"
TASK, METRIC, EPOCHS, STEPS = "sst2", "accuracy", 3, 313
"""The task of `CONFIG`, its metric, its passes over the data, and the steps of a pass."""
TICKETS = ((2, 0.3), (4, 0.4), (6, 0.5), (6, 0.6))
"""(heads of each layer, fraction of neurons) that the part ``ticket`` prunes."""
OWN, MOMENTS = TICKETS[1], 30
"""The paper's ticket, for ``birds``, and the checks there."""
TWICE = TICKETS[1:3]
"""The tickets that run with every seed; the others run with the first seed."""
BATCHES, ROUNDS = 20, 5
"""Timed batches per round, and rounds."""


def done(name: str, seed: int, options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """Do the remaining part of a run, and return the content of its metrics.json; a stored run is not repeated."""
    overrides = (f"--train.seed={seed}", *overrides)
    stored, config = FOLDER / f"{name}.json", runs.settings(CONFIG, overrides)
    if stored.exists() and runs.equal((before := json.loads(stored.read_text()))["config"], config):
        return before["metrics"]
    places = (f"--data.dir={options.data}", *overrides)
    metrics = runs.train(CONFIG, options.runs / name, places, compiled=options.runs / "compiled")
    files.write(stored, {"config": config, "metrics": metrics})
    return metrics


def pruned(heads: float, neurons: float) -> list[str]:
    """Return the overrides that prune ``heads`` and ``neurons`` of every layer."""
    return [
        "--prune.kind=earlybert",
        f"--prune.heads={heads}",
        f"--prune.neurons={neurons}",
        "--prune.scope=tensor",
        "--prune.score=WABS",
        "--prune.schedule=one_shot",
    ]


def row(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row of the table: the score of each seed times 100, and the means of the other figures."""
    stages = [{stage["name"]: 100 * stage["metrics"][METRIC] for stage in result["stages"]} for result in results]
    figures = ("trainable_fraction", "weight_sparsity", "flops_ratio", "train_seconds")
    flops = results[0]["flops_per_example"]
    return {
        "task": TASK,
        "method": method,
        "metric": METRIC,
        "scores": [100 * result["final"][METRIC] for result in results],
        "stages": {name: float(np.mean([stage[name] for stage in stages])) for name in stages[0]},
        **{key: float(np.mean([result[key] for result in results])) for key in figures},
        "example_flops_ratio": flops["final"] / flops["dense"],
        "model_bytes": results[0]["model_bytes"],
    }


def first_units(widths: dict[str, Sequence[int]], setup: Any) -> Any:
    """Return masks of kept heads and neurons (True = kept): in each layer the first ``widths[kind][layer]`` units."""
    from dsee_jax import models
    from dsee_jax.prune import units

    return {
        kind: {
            units.layer(number): np.arange(units.count(setup.params, layer)) < widths[kind][number]
            for number, layer in enumerate(layers)
        }
        for kind, layers in models.cuts(setup.model).items()
    }


def step_times(tickets: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Return the step time of full tuning of each ticket, and of the search, relative to the unpruned model (``whole``).

    Each ratio is the median over `ROUNDS`. In a round the compiled steps of both models run the same `BATCHES` batches of the
    task, one model after the other.

    Args:
      tickets: the content of metrics.json of one run per ticket, by name.
      options: of the command.
    """
    import jax
    import jax.numpy as jnp

    from dsee_jax.models import cuts
    from dsee_jax.prune import earlybert
    from dsee_jax.train import config_file, programs, pruning, setup, sharding, stages, step

    with tempfile.TemporaryDirectory() as folder:
        places = [f"--data.dir={options.data}", f"--output_dir={folder}/run"]
        unpruned = setup.prepare(config_file.read(CONFIG, places))
    setups = {name: pruning.resize(unpruned, first_units(result["kept"], unpruned)) for name, result in tickets.items()}
    source = stages.batches(unpruned, 1)
    batches = [sharding.split(unpruned.placed.mesh, source[number]) for number in range(BATCHES)]

    def timer(of: setup.Setup, *, searching: bool = False) -> Callable[[], float]:
        compiled = programs.make_programs(of, searching=searching)
        coefficients = {"coefficients": earlybert.init(cuts(of.model), of.params)} if searching else {}
        trained = sharding.place(of.placed, jax.tree.map(jnp.copy, of.trained | coefficients))
        frozen = sharding.place(of.placed, pruning.freeze(of, {}))
        state = step.State(jnp.zeros((), jnp.int32), trained, compiled.optimizer.init(trained))

        def run() -> float:
            nonlocal state
            begin = time.perf_counter()
            for batch in batches:
                state, _ = compiled.step(state, frozen, batch, jax.random.key(0), 1e-5)
            jax.block_until_ready(state)
            return time.perf_counter() - begin

        run()  # compiles
        return run

    ratios = {"whole": 1.0}
    for name, pruned_setup in {"search": unpruned, **setups}.items():
        reference, other = timer(unpruned), timer(pruned_setup, searching=name == "search")
        ratios[name] = float(np.median([other() / reference() for _ in range(ROUNDS)]))
        print(name, ratios[name], flush=True)
        # The programs of all tickets do not fit in the memory of one process.
        jax.clear_caches()
    return ratios


def ticket(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the part ``ticket``: scores of the runs, and their training times by `step_times`."""
    results: dict[str, list[dict[str, Any]]] = {}
    for number, seed in enumerate(options.seeds):
        sizes: dict[str, list[str]] = {"whole": []} | {
            f"{heads} heads of each layer, {neurons:.0%} of neurons": pruned(heads, neurons)
            for heads, neurons in TICKETS
            if number == 0 or (heads, neurons) in TWICE
        }
        for name, overrides in sizes.items():
            short = "_".join(override.partition("=")[2] for override in overrides[1:3])
            label = f"{TASK}_timed_{short or 'whole'}_seed{seed}"
            results.setdefault(name, []).append(done(label, seed, options, *overrides))
    unpruned, *_ = results["whole"]
    times = step_times({name: of_seeds[0] for name, of_seeds in results.items() if name != "whole"}, options)
    total = stage_steps(unpruned)["tune"]
    rows = []
    for name, of_seeds in results.items():
        steps = stage_steps(of_seeds[0])
        search = steps.get("draw", 0)
        ratio = (search * times["search"] + steps["tune"] * times[name]) / total
        figures = {"step_time_ratio": times[name], "search_steps": search, "time_ratio": ratio}
        rows.append(row(name, of_seeds) | figures)
    rows[0]["search_step_time_ratio"] = times["search"]
    curve(rows)
    return rows


def stage_steps(result: dict[str, Any]) -> dict[str, int]:
    """Return the steps of each stage with steps; the stage ``draw`` has the steps of the search."""
    return {stage["name"]: stage["steps"] for stage in result["stages"] if "steps" in stage}


def birds(options: argparse.Namespace) -> dict[str, Any]:
    """Return the distance of the mask at each check from the last mask, and draw the search into ``birds.png``."""
    name, seed, steps = f"{TASK}_birds", options.seeds[0], EPOCHS * STEPS
    long = (f"--prune.search={EPOCHS}", f"--prune.check_every={steps // MOMENTS}", "--train.epochs=0.05")
    done(name, seed, options, *pruned(*OWN), *long)
    path = FOLDER / f"{name}_checks.json"
    if not path.exists():
        files.write(path, [r for r in files.read(options.runs / name / "metrics.jsonl") if "coefficients" in r])
    checks = json.loads(path.read_text())
    searches.draw(checks).savefig(RESULTS / "birds.png", dpi=120)
    last = checks[-1]["kept"]
    return {
        "task": TASK,
        "epoch": [check["step"] / STEPS for check in checks],
        "units_away_from_the_last": [
            {kind: searches.distance(check["kept"][kind], last[kind]) for kind in last} for check in checks
        ],
        "moved_since_the_one_before": [check["distance"] for check in checks],
    }


def curve(rows: list[dict[str, Any]]) -> None:
    """Draw the scores of tickets against their training time into ``tickets.png``."""
    figure = style.figure(5.2, 3.4)
    axis = figure.subplots()
    for row in rows:
        times = [row["time_ratio"]] * len(row["scores"])
        axis.plot(times, row["scores"], "o", color=style.BLUE)
        label = f"{row['example_flops_ratio']:.0%} of the FLOPs"
        axis.annotate(
            label, (times[0], min(row["scores"])), (0, -12), textcoords="offset points", ha="center", fontsize=8
        )
    best = float(np.mean(rows[0]["scores"]))
    axis.axhline(best - 1.5, color="0.6", linestyle="--", label="1.5 points below the unpruned model")
    axis.axvline(0.65, color="0.6", linestyle=":", label="35 % less time")
    axis.set(xlabel="training time with search; unpruned model = 1", ylabel=f"{rows[0]['metric']} on {TASK}")
    axis.margins(0.15, 0.2)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "tickets.png", dpi=120)


def mean(scores: list[float]) -> str:
    """Return the mean of the scores, followed by the scores in parentheses."""
    return f"{np.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"


def markdown(report: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    text = ""
    if "ticket" in report:
        text += "| ticket: pruned units | score: mean (seeds) | FLOPs per example | step time "
        text += "| training time with search |\n"
        text += "|---|---|---|---|---|\n"
        for r in report["ticket"]:
            text += f"| {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} "
            text += f"| {r['step_time_ratio']:.2f} | {r['time_ratio']:.2f} |\n"
        text += "\n"
    return f"{text}{runs.CHOSEN}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).absolute(), required=True, help="the GLUE folder")
    parser.add_argument("--runs", type=lambda text: Path(text).absolute(), default=ROOT / "runs" / "glue")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parts = {"ticket": ticket, "birds": birds}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "tickets.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    report |= {
        "command": "python -m benchmarks.tickets --data GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "seeds": options.seeds,
    }
    for part in options.parts:
        report[part] = parts[part](options)
        files.write(path, report)
        files.write_text(RESULTS / "tickets.md", markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
