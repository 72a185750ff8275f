"""Smaller models on real GLUE tasks, on the real MiniLM: cut heads and neurons, early tickets; one resumable command.

    python -m benchmarks.smaller --data GLUE_DIR [--parts cut ticket birds]

``cut``: DSEE whose heads and neurons are cut out by EarlyBERT's search (once also by score after tuning), next to LoRA and
full fine-tuning of the whole model (the runs of `benchmarks.glue`): score, FLOPs, bytes, and the throughput and memory of the
finished model next to the whole one (`benchmarks.inference`).
``ticket``: full fine-tuning of EarlyBERT's tickets of several sizes and of the whole model: score, and time of training, its
search included and compiling left out, from steps of each that are timed in turns.
``birds``: one search over the whole training; how far the mask of each moment is from the last one.

What a run measured is kept in ``benchmarks/results/smaller/`` with its config and not measured again unless the config
changes; a run that was interrupted goes on. Seconds and throughput want an otherwise idle machine. Writes
``benchmarks/results/smaller.json``, ``smaller.md``, ``tickets.png`` and ``birds.png``.
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
"""Passes over the data of every method, in all; the search for a ticket is not counted, its seconds are."""
AFTER = {"sst2": 2, "stsb": 3, "rte": 4, "rte_after_stsb": 4}
"""Of those the passes after a cut by score; after a ticket all are."""
SEARCHED = {"rte_after_stsb": 1}
"""Passes of the search for a ticket where it is not the default's fifth of one, which on so few examples is 31 steps."""
SIZES = {"75 % of the FLOPs": (2, 0.3), "1/4 of heads, 40 % of neurons": (0.25, 0.4)}
"""(heads, neurons) that go in the part ``cut``."""
KINDS = {"ticket": "earlybert", "score": "structured"}
BY_SCORE = ("sst2", "75 % of the FLOPs")
"""The task and the size of which the cut by score is measured too."""
TICKETS = ((2, 0.3), (4, 0.4), (6, 0.5), (6, 0.6))
"""(heads of each layer, neurons) that go in the part ``ticket``."""
OWN, TIMED, STEPS, MOMENTS = TICKETS[1], "sst2", 313, 30
"""The paper's ticket; the task of ``ticket`` and ``birds``, its steps an epoch; checks of the mask in ``birds``."""
TWICE = TICKETS[1:3]
"""Those of which all seeds are run."""
BATCHES, ROUNDS = 20, 5
"""Of the steps that are timed."""


def done(name: str, task: str, method: str, seed: int, options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """Do one run of this benchmark; see `glue.run`."""
    return glue.run(name, task, method, seed, options, *overrides, folder=FOLDER)


def pruned(kind: str, heads: float, neurons: float) -> list[str]:
    """Return the overrides that cut so many heads and neurons out."""
    return [
        f"--prune.kind={kind}",
        f"--prune.heads={heads}",
        f"--prune.neurons={neurons}",
        "--prune.scope=tensor",
        "--prune.score=WABS",
        "--prune.schedule=one_shot",
    ]


def inference(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the finished model of a run next to the whole one, once; return what `benchmarks.inference` writes."""
    kept = RESULTS / FOLDER / f"{name}_inference.json"
    if not kept.exists():
        module = [sys.executable, "-m", "benchmarks.inference", str(options.runs / name), "--json", str(kept)]
        subprocess.run([*module, "--batch=32", "--length=128"], check=True, cwd=ROOT)
    return json.loads(kept.read_text())


def cut(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of the part ``cut``."""
    lines = []
    for task in options.tasks:
        wholes = {
            method: [glue.run(f"{task}_{method}_seed{s}", task, method, s, options) for s in options.seeds]
            for method in ("full", "lora", "dsee")
        }
        # Of one model and one length, which some of these runs did not record.
        flops = wholes.pop("dsee")[0]
        beside = (
            flops["flops_per_example"]["dense"]
            - flops["flops_per_example"]["length"] * flops["flops_per_token"]["dense"]
        )
        for method, runs in wholes.items():
            length, tokens = flops["flops_per_example"]["length"], runs[0]["flops_per_token"]
            found = {name: length * count + beside for name, count in tokens.items()}
            lines.append(glue.row(task, method, runs) | described(runs[0] | {"flops_per_example": found}))
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
                lines.append(glue.row(task, f"DSEE, {size}, by {by}", runs) | described(runs[0]) | {"inference": speed})
    return lines


def described(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's model is, the same for every seed: FLOPs an example against the whole model, and bytes."""
    flops = result["flops_per_example"]
    return {"example_flops_ratio": flops["final"] / flops["dense"], "model_bytes": result["model_bytes"]}


def kept(widths: dict[str, Sequence[int]], setup: Any) -> Any:
    """Return masks of heads and neurons of which so many are left in each layer: the first."""
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
    """Return the time of a step of tuning each ticket in full, and of a step of the search, that of the whole model being 1.

    Each in turns with the whole model, compiled: both take the same `BATCHES` of the task's own, one after the other, `ROUNDS`
    times; the median of the ratios.

    Args:
      tickets: what a run measured, by name.
      options: of the command.
    """
    import jax
    import jax.numpy as jnp

    from dsee_jax.models import cuts
    from dsee_jax.prune import earlybert
    from dsee_jax.train import config_file, programs, pruning, setup, sharding, stages, step

    with tempfile.TemporaryDirectory() as folder:
        places = [f"--data.dir={options.data}", f"--output_dir={folder}/run"]
        found = setup.prepare(config_file.read(glue.config_path(TIMED, "full"), places))
    setups = {name: pruning.smaller(found, kept(result["kept"], found)) for name, result in tickets.items()}
    source = stages.batches(found, 1)
    batches = [sharding.split(found.placed.mesh, source[number]) for number in range(BATCHES)]

    def looped(one: setup.Setup, *, searching: bool = False) -> Callable[[], float]:
        compiled = programs.make_programs(one, searching=searching)
        more = {"coefficients": earlybert.init(cuts(one.model), one.params)} if searching else {}
        trained = sharding.place(one.placed, jax.tree.map(jnp.copy, one.trained | more))
        frozen = sharding.place(one.placed, pruning.freeze(one, {}))
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
    for name, one in {"search": found, **setups}.items():
        whole, other = looped(found), looped(one, searching=name == "search")
        ratios[name] = float(np.median([other() / whole() for _ in range(ROUNDS)]))
        print(name, ratios[name], flush=True)
        # A process cannot hold the programs of all of them.
        jax.clear_caches()
    return ratios


def ticket(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of the part ``ticket``: scores of the runs, and what they take by `step_times`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, seed in enumerate(options.seeds):
        runs = {"whole": []} | {
            f"{heads} heads of each layer, {neurons:.0%} of neurons": pruned("earlybert", heads, neurons)
            for heads, neurons in TICKETS
            if number == 0 or (heads, neurons) in TWICE
        }
        for name, overrides in runs.items():
            short = "_".join(override.partition("=")[2] for override in overrides[1:3])
            label = f"{TIMED}_timed_{short or 'whole'}_seed{seed}"
            found.setdefault(name, []).append(done(label, TIMED, "full", seed, options, *overrides))
    whole, *_ = found["whole"]
    times = step_times({name: runs[0] for name, runs in found.items() if name != "whole"}, options)
    steps = stages(whole)["tune"]
    lines = []
    for name, runs in found.items():
        searched = stages(runs[0]).get("draw", 0)
        taken = (searched * times["search"] + stages(runs[0])["tune"] * times[name]) / steps
        figures = {"step_time_ratio": times[name], "search_steps": searched, "time_ratio": taken}
        lines.append(glue.row(TIMED, name, runs) | described(runs[0]) | figures)
    lines[0]["search_step_time_ratio"] = times["search"]
    curve(lines)
    return lines


def stages(result: dict[str, Any]) -> dict[str, int]:
    """Return the steps of each stage of a run that has some; those of a search are the draw's."""
    return {stage["name"]: stage["steps"] for stage in result["stages"] if "steps" in stage}


def birds(options: argparse.Namespace) -> dict[str, Any]:
    """Return how far the mask of each check is from the last, and draw the search into ``birds.png``."""
    name, seed, steps = f"{TIMED}_birds", options.seeds[0], EPOCHS[TIMED] * STEPS
    long = (f"--prune.search={EPOCHS[TIMED]}", f"--prune.check_every={steps // MOMENTS}", "--train.epochs=0.05")
    done(name, TIMED, "full", seed, options, *pruned("earlybert", *OWN), *long)
    kept = RESULTS / FOLDER / f"{name}_checks.json"
    if not kept.exists():
        files.write(kept, [r for r in files.read(options.runs / name / "metrics.jsonl") if "coefficients" in r])
    checks = json.loads(kept.read_text())
    searches.draw(checks).savefig(RESULTS / "birds.png", dpi=120)
    last = checks[-1]["kept"]
    return {
        "task": TIMED,
        "epoch": [check["step"] / STEPS for check in checks],
        "units_away_from_the_last": [
            {kind: searches.apart(check["kept"][kind], last[kind]) for kind in last} for check in checks
        ],
        "moved_since_the_one_before": [check["distance"] for check in checks],
    }


def curve(lines: list[dict[str, Any]]) -> None:
    """Draw the scores of tickets against the time that training took into ``tickets.png``."""
    figure = style.figure(5.2, 3.4)
    axis = figure.subplots()
    for line in lines:
        times = [line["time_ratio"]] * len(line["scores"])
        axis.plot(times, line["scores"], "o", color=style.BLUE)
        label = f"{line['example_flops_ratio']:.0%} of the FLOPs"
        axis.annotate(
            label, (times[0], min(line["scores"])), (0, -12), textcoords="offset points", ha="center", fontsize=8
        )
    best = float(np.mean(lines[0]["scores"]))
    axis.axhline(best - 1.5, color="0.6", linestyle="--", label="1.5 points below the whole model")
    axis.axvline(0.65, color="0.6", linestyle=":", label="35 % less time")
    axis.set(xlabel="time of training, search included; whole model = 1", ylabel=f"{lines[0]['metric']} on {TIMED}")
    axis.margins(0.15, 0.2)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "tickets.png", dpi=120)


def mean(scores: list[float]) -> str:
    """Return the mean of scores, and the scores."""
    return f"{np.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"


def markdown(found: dict[str, Any]) -> str:
    """Return the tables for the README."""
    text = ""
    if "cut" in found:
        text += (
            "| task (metric) | method | score: mean (seeds) | FLOPs an example | bytes | throughput | memory |\n"
            "|---|---|---|---|---|---|---|\n"
        )
        for r in found["cut"]:
            speed = r.get("inference")
            measured = f"{speed['throughput_ratio']:.2f} x | {speed['program_bytes_ratio']:.2f} x" if speed else "1 | 1"
            text += (
                f"| {r['task']} ({r['metric']}) | {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} "
                f"| {r['model_bytes'] / 1e6:.1f} MB | {measured} |\n"
            )
        text += "\n"
    if "ticket" in found:
        text += "| ticket: what goes | score: mean (seeds) | FLOPs an example | time of a step "
        text += "| of training, with the search |\n"
        text += "|---|---|---|---|---|\n"
        for r in found["ticket"]:
            text += f"| {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} "
            text += f"| {r['step_time_ratio']:.2f} | {r['time_ratio']:.2f} |\n"
    return text


def main() -> None:
    parser = glue.parser(__doc__)
    parts = {"cut": cut, "ticket": ticket, "birds": birds}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "smaller.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    found |= {
        "command": "python -m benchmarks.smaller --data GLUE_DIR",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "seeds": options.seeds,
    }
    for part in options.parts:
        found[part] = parts[part](options)
        files.write(kept, found)
        files.write_text(RESULTS / "smaller.md", markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
