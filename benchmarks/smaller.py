"""Smaller models on real GLUE tasks, on the real MiniLM: cut heads and neurons, early tickets; one resumable command.

    python -m benchmarks.smaller --data GLUE_DIR [--parts cut ticket birds]

``cut``: DSEE whose heads and neurons are cut out by EarlyBERT's search (once also by score after tuning), next to LoRA and
full fine-tuning of the whole model (the runs of `benchmarks.glue`): score, FLOPs, bytes, and the throughput and memory of the
finished model next to the whole one (`benchmarks.inference`).
``ticket``: full fine-tuning of EarlyBERT's tickets of several sizes and of the whole model, in turns: score and seconds of
training, search included and compiling left out.
``birds``: one search over the whole training; how far the mask of each moment is from the last one.

What a run measured is kept in ``benchmarks/results/smaller/`` with its config and not measured again unless the config
changes; a run that was interrupted goes on. Seconds and throughput want an otherwise idle machine. Writes
``benchmarks/results/smaller.json``, ``smaller.md`` and ``birds.png``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks import glue
from benchmarks.glue import RESULTS, ROOT
from dsee_jax import journal
from dsee_jax.pictures import search as searches

FOLDER = "smaller"
EPOCHS = {"sst2": 3, "stsb": 4, "rte": 6}
"""Passes over the data of every method, in all; the search for a ticket is not counted, its seconds are."""
AFTER = {"sst2": 2, "stsb": 3, "rte": 4}
"""Of those the passes after a cut by score; after a ticket all are."""
SIZES = {"75 % of the FLOPs": (2, 0.3), "1/4 of heads, 40 % of neurons": (0.25, 0.4)}
"""(heads, neurons) that go in the part ``cut``."""
KINDS = {"ticket": "earlybert", "score": "structured"}
BY_SCORE = ("sst2", "75 % of the FLOPs")
"""The task and the size of which the cut by score is measured too."""
TICKETS = ((2, 0.3), (4, 0.4), (6, 0.5), (6, 0.6))
"""(heads of each layer, neurons) that go in the part ``ticket``; all seeds for the second, which is EarlyBERT's own."""
OWN, TIMED, STEPS, MOMENTS = TICKETS[1], "sst2", 313, 30
"""The paper's ticket; the task of ``ticket`` and ``birds``, its steps an epoch; checks of the mask in ``birds``."""


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
                overrides = [*pruned(kind, heads, neurons), *passes]
                runs = [done(f"{name}_seed{s}", task, "dsee", s, options, *overrides) for s in options.seeds]
                speed = inference(f"{name}_seed{options.seeds[0]}", options)
                lines.append(glue.row(task, f"DSEE, {size}, by {by}", runs) | described(runs[0]) | {"inference": speed})
    return lines


def described(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's model is, the same for every seed: FLOPs an example against the whole model, and bytes."""
    flops = result["flops_per_example"]
    return {"example_flops_ratio": flops["final"] / flops["dense"], "model_bytes": result["model_bytes"]}


def warm(name: str, options: argparse.Namespace) -> float:
    """Return the seconds that a run trained, its search included, without those of compiling; kept beside its result.

    A program is compiled for every padded length, which takes as long for a run of minutes as for one of days. So: the steps
    of each stage at the median of the speeds that the run logged.
    """
    kept = RESULTS / FOLDER / f"{name}_seconds.json"
    if not kept.exists():
        stages: dict[str, list[dict[str, Any]]] = {}
        for line in journal.read(options.runs / name / "metrics.jsonl"):
            if "tokens_per_second" in line:
                stages.setdefault(line["stage"], []).append(line)
        cost = json.loads((options.runs / name / "metrics.json").read_text())
        steps = {stage: lines[-1]["step"] for stage, lines in stages.items()}
        tokens = cost["train_seconds"] * cost["train_tokens_per_second"] / sum(steps.values())
        speeds = {s: float(np.median([line["tokens_per_second"] for line in lines])) for s, lines in stages.items()}
        journal.write(kept, {"steps": steps, "tokens_a_step": tokens, "tokens_per_second": speeds})
    found = json.loads(kept.read_text())
    return sum(n * found["tokens_a_step"] / found["tokens_per_second"][stage] for stage, n in found["steps"].items())


def ticket(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of the part ``ticket``; the whole model and its tickets are trained in turns, seed by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, list[float]] = {}
    for number, seed in enumerate(options.seeds):
        runs = {"whole": []} | {
            f"{heads} heads of each layer, {neurons:.0%} of neurons": pruned("earlybert", heads, neurons)
            for heads, neurons in TICKETS
            if number == 0 or (heads, neurons) == OWN
        }
        for name, overrides in runs.items():
            short = "_".join(override.partition("=")[2] for override in overrides[1:3])
            label = f"{TIMED}_timed_{short or 'whole'}_seed{seed}"
            found.setdefault(name, []).append(done(label, TIMED, "full", seed, options, *overrides))
            seconds.setdefault(name, []).append(warm(label, options))
    return [
        glue.row(TIMED, name, runs)
        | described(runs[0])
        # Against the run of the same seed, which stood beside it.
        | {"seconds": seconds[name]}
        | {"seconds_ratio": [own / beside for own, beside in zip(seconds[name], seconds["whole"], strict=False)]}
        for name, runs in found.items()
    ]


def birds(options: argparse.Namespace) -> dict[str, Any]:
    """Return how far the mask of each check is from the last, and draw the search into ``birds.png``."""
    name, seed, steps = f"{TIMED}_birds", options.seeds[0], EPOCHS[TIMED] * STEPS
    long = (f"--prune.search={EPOCHS[TIMED]}", f"--prune.check_every={steps // MOMENTS}", "--train.epochs=0.05")
    done(name, TIMED, "full", seed, options, *pruned("earlybert", *OWN), *long)
    kept = RESULTS / FOLDER / f"{name}_checks.json"
    if not kept.exists():
        journal.write(kept, [r for r in journal.read(options.runs / name / "metrics.jsonl") if "coefficients" in r])
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
        text += "| ticket: what goes | score: mean (seeds) | FLOPs an example "
        text += "| seconds of training, search included, compiling left out; whole model = 1 |\n"
        text += "|---|---|---|---|\n"
        for r in found["ticket"]:
            ratios = ", ".join(f"{ratio:.2f}" for ratio in r["seconds_ratio"])
            text += f"| {r['method']} | {mean(r['scores'])} | {r['example_flops_ratio']:.0%} | {ratios} |\n"
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
        journal.write(kept, found)
        journal.write_text(RESULTS / "smaller.md", markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
