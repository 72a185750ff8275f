"""Structured pruning of the pretrained MiniLM on GLUE tasks: DSEE, and EarlyBERT tickets; the command is resumable.

    python -m benchmarks.smaller --data GLUE_DIR [--parts cut ticket birds]

``cut``: DSEE with heads and neurons pruned by EarlyBERT's search (in one row by score after tuning), against LoRA and full
fine-tuning of the unpruned model (the runs of `benchmarks.glue`). Measures score, FLOPs, bytes, and the throughput and memory
of the finished model relative to the unpruned model (`benchmarks.inference`).
``ticket``: full fine-tuning of EarlyBERT tickets of several sizes and of the unpruned model. Measures score and training time;
the time includes the search and excludes compilation, and comes from alternating timed steps.
``birds``: one search over the full training. Measures the distance of the mask at each check from the last mask.

The metrics and the config of a run are stored in ``benchmarks/results/smaller/``; the run is repeated only if the config
changes. An interrupted run resumes. Times and throughput need an idle machine. Writes ``benchmarks/results/smaller.json``,
``smaller.md``, ``tickets.png`` and ``birds.png``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import glue
from benchmarks.glue import RESULTS, ROOT
from dsee_jax.analysis.pictures import search as searches
from dsee_jax.analysis.pictures import style
from dsee_jax.runtime import files

FOLDER = "smaller"
EPOCHS = {"sst2": 3, "stsb": 4, "rte": 6, "rte_after_stsb": 6}
"""Task -> passes over the data of every method, without the search for a ticket."""
AFTER = {"sst2": 2, "stsb": 3, "rte": 4, "rte_after_stsb": 4}
"""Task -> the passes that follow pruning by score; a ticket is drawn before all passes."""
SEARCHED = {"rte_after_stsb": 1}
"""Task -> passes of the search for a ticket, instead of the default 1/5, which on this small task is only 31 steps."""
SIZES = {"75 % of the FLOPs": (2, 0.3), "1/4 of heads, 40 % of neurons": (0.25, 0.4)}
"""Size -> (heads, neurons) that the part ``cut`` prunes."""
KINDS = {"ticket": "earlybert", "score": "structured"}
BY_SCORE = ("sst2", "75 % of the FLOPs")
"""The task and the size that are also pruned by score."""
TICKETS = ((2, 0.3), (4, 0.4), (6, 0.5), (6, 0.6))
"""(heads of each layer, fraction of neurons) that the part ``ticket`` prunes."""
OWN, TIMED, STEPS, MOMENTS = TICKETS[1], "sst2", 313, 30
"""The paper's ticket, for ``birds``; the task of ``ticket`` and ``birds``, and its steps per epoch; checks in ``birds``."""
TWICE = TICKETS[1:3]
"""The tickets that run with every seed; the others run with the first seed."""
BATCHES, ROUNDS = 20, 5
"""Timed batches per round, and rounds."""


def done(name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """Do the remaining part of a run of this benchmark, as `glue.run`."""
    return glue.run(name, task, method, seed, options, *overrides, folder=FOLDER)


def pruned(kind: str, heads: float, neurons: float) -> list[str]:
    """Return the overrides that prune ``heads`` and ``neurons`` of every layer."""
    return [
        f"--prune.kind={kind}",
        f"--prune.heads={heads}",
        f"--prune.neurons={neurons}",
        "--prune.scope=tensor",
        "--prune.score=WABS",
        "--prune.schedule=one_shot",
    ]


def inference(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the report of `benchmarks.inference` on the finished model of a run; it is measured once."""
    path = RESULTS / FOLDER / f"{name}_inference.json"
    if not path.exists():
        module = [sys.executable, "-m", "benchmarks.inference", str(options.runs / name), "--json", str(path)]
        subprocess.run([*module, "--batch=32", "--length=128"], check=True, cwd=ROOT)
    return json.loads(path.read_text())


def cut(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the part ``cut``."""
    rows = []
    for task in options.tasks:
        unpruned = {
            method: [glue.run(f"{task}_{method}_seed{s}", task, method, s, options) for s in options.seeds]
            for method in ("full", "lora", "dsee")
        }
        # Some of these runs did not record FLOPs per example; all of them have the model and the length of the DSEE run.
        dsee = unpruned.pop("dsee")[0]
        length = dsee["flops_per_example"]["length"]
        attention = dsee["flops_per_example"]["dense"] - length * dsee["flops_per_token"]["dense"]
        for method, runs in unpruned.items():
            flops = {name: length * count + attention for name, count in runs[0]["flops_per_token"].items()}
            rows.append(glue.row(task, method, runs) | described(runs[0] | {"flops_per_example": flops}))
        for size, (heads, neurons) in SIZES.items():
            for by, kind in KINDS.items():
                if by == "score" and (task, size) != BY_SCORE:
                    continue
                name = f"{task}_{by}_{heads}_{neurons}"
                before = EPOCHS[task] if kind == "earlybert" else EPOCHS[task] - AFTER[task]
                passes = [f"--train.epochs={before}", f"--train.retune_epochs={AFTER[task]}"]
                searched = [f"--prune.search={SEARCHED[task]}"] if task in SEARCHED else []
                overrides = [*pruned(kind, heads, neurons), *passes, *searched]
                runs = [done(f"{name}_seed{s}", task, "dsee", s, options, *overrides) for s in options.seeds]
                speed = inference(f"{name}_seed{options.seeds[0]}", options)
                rows.append(glue.row(task, f"DSEE, {size}, by {by}", runs) | described(runs[0]) | {"inference": speed})
    return rows


def described(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run that do not depend on the seed: its ratio of FLOPs per example, and its bytes."""
    flops = result["flops_per_example"]
    return {"example_flops_ratio": flops["final"] / flops["dense"], "model_bytes": result["model_bytes"]}


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
        unpruned = setup.prepare(config_file.read(glue.config_path(TIMED, "full"), places))
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
        runs = {"whole": []} | {
            f"{heads} heads of each layer, {neurons:.0%} of neurons": pruned("earlybert", heads, neurons)
            for heads, neurons in TICKETS
            if number == 0 or (heads, neurons) in TWICE
        }
        for name, overrides in runs.items():
            short = "_".join(override.partition("=")[2] for override in overrides[1:3])
            label = f"{TIMED}_timed_{short or 'whole'}_seed{seed}"
            results.setdefault(name, []).append(done(label, TIMED, "full", seed, options, *overrides))
    unpruned, *_ = results["whole"]
    times = step_times({name: runs[0] for name, runs in results.items() if name != "whole"}, options)
    total = stage_steps(unpruned)["tune"]
    rows = []
    for name, runs in results.items():
        steps = stage_steps(runs[0])
        search = steps.get("draw", 0)
        ratio = (search * times["search"] + steps["tune"] * times[name]) / total
        figures = {"step_time_ratio": times[name], "search_steps": search, "time_ratio": ratio}
        rows.append(glue.row(TIMED, name, runs) | described(runs[0]) | figures)
    rows[0]["search_step_time_ratio"] = times["search"]
    curve(rows)
    return rows


def stage_steps(result: dict[str, Any]) -> dict[str, int]:
    """Return the steps of each stage with steps; the stage ``draw`` has the steps of the search."""
    return {stage["name"]: stage["steps"] for stage in result["stages"] if "steps" in stage}


def birds(options: argparse.Namespace) -> dict[str, Any]:
    """Return the distance of the mask at each check from the last mask, and draw the search into ``birds.png``."""
    name, seed, steps = f"{TIMED}_birds", options.seeds[0], EPOCHS[TIMED] * STEPS
    long = (f"--prune.search={EPOCHS[TIMED]}", f"--prune.check_every={steps // MOMENTS}", "--train.epochs=0.05")
    done(name, TIMED, "full", seed, options, *pruned("earlybert", *OWN), *long)
    path = RESULTS / FOLDER / f"{name}_checks.json"
    if not path.exists():
        files.write(path, [r for r in files.read(options.runs / name / "metrics.jsonl") if "coefficients" in r])
    checks = json.loads(path.read_text())
    searches.draw(checks).savefig(RESULTS / "birds.png", dpi=120)
    last = checks[-1]["kept"]
    return {
        "task": TIMED,
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
    axis.set(xlabel="training time with search; unpruned model = 1", ylabel=f"{rows[0]['metric']} on {TIMED}")
    axis.margins(0.15, 0.2)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "tickets.png", dpi=120)


def mean(scores: list[float]) -> str:
    """Return the mean of the scores, followed by the scores in parentheses."""
    return f"{np.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"


def markdown(report: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    text = ""
    if "cut" in report:
        text += (
            "| task (metric) | method | score: mean (seeds) | FLOPs per example | bytes | throughput | memory |\n"
            "|---|---|---|---|---|---|---|\n"
        )
        for r in report["cut"]:
            speed = r.get("inference")
            measured = f"{speed['throughput_ratio']:.2f} x | {speed['program_bytes_ratio']:.2f} x" if speed else "1 | 1"
            text += (
                f"| {r['task']} ({r['metric']}) | {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} "
                f"| {r['model_bytes'] / 1e6:.1f} MB | {measured} |\n"
            )
        text += "\n"
    if "ticket" in report:
        text += "| ticket: pruned units | score: mean (seeds) | FLOPs per example | step time "
        text += "| training time with search |\n"
        text += "|---|---|---|---|---|\n"
        for r in report["ticket"]:
            text += f"| {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} "
            text += f"| {r['step_time_ratio']:.2f} | {r['time_ratio']:.2f} |\n"
        text += "\n"
    return f"{text}{glue.CHOSEN}\n"


def main() -> None:
    parser = glue.parser(__doc__)
    parts = {"cut": cut, "ticket": ticket, "birds": birds}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "smaller.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    report |= {
        "command": "python -m benchmarks.smaller --data GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "seeds": options.seeds,
    }
    for part in options.parts:
        report[part] = parts[part](options)
        files.write(path, report)
        files.write_text(RESULTS / "smaller.md", markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
