"""Experiments MODEL/TASK/METHOD of a benchmark: the options of its command, its order of work, and the records of its runs.

A record stays current while the config of its run and the SHA-256 of its inputs do (`inputs`); it does not need the folder of
the run, which is on one machine only.
"""

import argparse
import fnmatch
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import runs
from benchmarks.runs import RESULTS, ROOT
from dsee_jax.ckpt.folders import METRICS
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.runtime import files
from dsee_jax.train import config_file, hashes
from dsee_jax.train.inputs import read_task


class Experiment(NamedTuple):
    """A method on a task, from a model."""

    base: str
    task: str
    method: str

    @property
    def name(self) -> str:
        """The name that ``--only`` selects."""
        return "/".join(self)

    def run(self, seed: int) -> str:
        """Return the name of the record of a run, and the start of that of its folder."""
        return f"{'_'.join(self)}_seed{seed}"


def absolute(text: str) -> Path:
    """Return the absolute path of an option."""
    return Path(text).absolute()


def parser(description: str | None, data: str, name: str) -> argparse.ArgumentParser:
    """Return the options that the commands share; ``data`` says which folder ``--data`` is, ``name`` is the benchmark's."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=absolute, required=True, help=data)
    made.add_argument("--base", action="append", default=[], metavar="NAME=PATH", help="one more pretrained model")
    made.add_argument("--only", nargs="+", metavar="PATTERN", help="experiments, such as '*/sst2/dsee*'")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--runs", type=absolute, help=f"the folders of the runs (default: runs/{name})")
    made.add_argument("--results", type=absolute, help=f"the records (default: benchmarks/results/{name})")
    made.add_argument("--speed", action="store_true", help="measure the speed again")
    made.add_argument("--no-speed", action="store_true", help="measure no speed")
    made.add_argument("--small", action="store_true", help="a few steps on few examples, to try the command")
    made.add_argument("--list", action="store_true", help="print the names of the experiments and exit")
    return made


def completed(options: argparse.Namespace, name: str, bases: Mapping[str, str]) -> argparse.Namespace:
    """Return the options of `parser` with the default folders of a benchmark, and ``bases``, those of ``--base`` added."""
    options.runs = options.runs or ROOT / "runs" / (f"{name}_small" if options.small else name)
    options.results = options.results or (options.runs / "results" if options.small else RESULTS / name)
    options.hashes = {}
    given = dict(base.split("=", 1) for base in options.base)
    # The runs have another working folder than the command.
    options.bases = {
        **bases,
        **{name: str(absolute(path)) if Path(path).exists() else path for name, path in given.items()},
    }
    return options


def selected(
    options: argparse.Namespace, tasks: Iterable[str], methods: Iterable[str], usual: Iterable[str]
) -> list[Experiment]:
    """Return the experiments of the command, in the order of the table; without ``--only`` those of the ``usual`` methods."""
    every = itertools.starmap(Experiment, itertools.product(options.bases, tasks, methods))
    asked = options.only or [f"*/*/{method}" for method in usual]
    return [one for one in every if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in asked)]


def carry_out(
    work: Iterable[tuple[Experiment, int]], options: argparse.Namespace, finish: Callable[..., Any], tabulate: Any
) -> list[str]:
    """Finish each run, with the tables after each; return the names of those that failed.

    All experiments with the first seed come first: a table is of use early.
    """
    failed: list[str] = []
    options.results.mkdir(parents=True, exist_ok=True)
    for experiment, seed in sorted(work, key=lambda each: options.seeds.index(each[1])):
        try:
            finish(experiment, seed, options)
        except subprocess.CalledProcessError:
            failed.append(experiment.run(seed))
        tabulate(options)
    return failed


def conclude(failed: Sequence[str], table: str) -> int:
    """Print the tables and the runs that failed; return the exit status of the command."""
    print(table)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def inputs(
    config: Path, overrides: Sequence[str], task: str, options: argparse.Namespace, *, model: bool = True
) -> dict[str, Any]:
    """Return the SHA-256 of the inputs of a run, as ``meta_info`` of its record has them (`benchmarks.records`).

    A call of the command reads each model and each set of examples once.

    Args:
      config: the YAML file.
      overrides: of the run, with the places of its model and data.
      task: the name of the task.
      options: of the command; ``hashes`` keeps those of earlier calls.
      model: whether the model is on this machine; otherwise its hash is left out.

    Raises:
      InputError: the model or the data cannot be read.
    """
    made = config_file.read(config, overrides)
    known, data = options.hashes, repr((made.data, made.model.task, made.train.seed))
    if data not in known:
        known[data] = hashes.of_data(read_task(made))
    read = {"dataset_info": {task: {"sha256": known[data]}}}
    if not model:
        return read
    if made.model.path not in known:
        known[made.model.path] = hashes.of_model(resolve(made.model.path))
    return {"model_info": {"sha256": known[made.model.path]}, **read}


def place(
    experiment: Experiment,
    seed: int,
    config: Mapping[str, Any],
    read: Mapping[str, Any],
    options: argparse.Namespace,
) -> Path:
    """Return the folder of a run; it belongs to one config and, by ``read``, to the hashes of its `inputs`."""
    digest = hashlib.sha256(files.dumps([config, read], sort_keys=True).encode()).hexdigest()
    return options.runs / f"{experiment.run(seed)}_{digest[:8]}"


def record(experiment: Experiment, seed: int, options: argparse.Namespace) -> Path:
    """Return the file of the record of a run."""
    return options.results / f"{experiment.run(seed)}.json"


def stored(experiment: Experiment, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of a run; {} where there is none."""
    path = record(experiment, seed, options)
    return json.loads(path.read_text()) if path.exists() else {}


def is_here(stored: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Return whether the folder of the finished run of a record is on this machine."""
    return (options.runs / stored["folder"] / METRICS).exists()


def kept(results: Path) -> dict[Experiment, dict[int, dict[str, Any]]]:
    """Return all records of a folder, by experiment and seed.

    The records of an experiment are of one config, one pretrained model and one dev set: those of its newest record.
    """
    every: dict[Experiment, dict[int, dict[str, Any]]] = {}
    for path in results.glob("*.json"):
        each = json.loads(path.read_text())
        about = each["run_info"]
        experiment = Experiment(about["model"], about["task"], about["method"])
        every.setdefault(experiment, {})[about["seed"]] = each
    chosen = {}
    for experiment, by_seed in every.items():
        newest = max(by_seed.values(), key=_created)
        same = [seed for seed, each in by_seed.items() if _same(each, newest)]
        chosen[experiment] = {seed: by_seed[seed] for seed in sorted(same)}
    return chosen


def _same(record: Mapping[str, Any], newest: Mapping[str, Any]) -> bool:
    """Return whether two records of an experiment differ by their seeds alone; training examples are drawn by the seed."""
    return runs.equal(_recipe(record), _recipe(newest)) and _scored(record) == _scored(newest)


def _scored(record: Mapping[str, Any]) -> list[Any]:
    """Return the hashes of the model that the run starts from, and of the examples that choose and score."""
    about, meta = record["run_info"], record["meta_info"]
    data = meta["dataset_info"][about["task"]]["sha256"]
    return [meta["model_info"], {name: data[name] for name in data if name != "train"}]


def from_one_model(group: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
    """Return the records by method and seed that start from the same model as the newest of them."""
    newest = max((each for kept in group.values() for each in kept.values()), key=_created, default=None)
    same = {
        method: {seed: each for seed, each in kept.items() if newest and _model(each) == _model(newest)}
        for method, kept in group.items()
    }
    return {method: kept for method, kept in same.items() if kept}


def _created(record: Mapping[str, Any]) -> str:
    return record["run_info"]["created_at"]


def _model(record: Mapping[str, Any]) -> Any:
    return record["meta_info"]["model_info"]


def _recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a record, with the same seed for all."""
    config = record["config"]
    return config | {"train": config["train"] | {"seed": 0}}


def labels(experiment: Experiment, seed: int, score: str, seconds: float, *, resumed: bool) -> dict[str, Any]:
    """Return the part of ``run_info`` that says which run it is.

    Args:
      experiment: of the run.
      seed: of the run.
      score: the name of the metric.
      seconds: of the last process of the run.
      resumed: whether an earlier process began the run; its files do not tell, but its folder stood before the last process.
    """
    return {
        "experiment_name": f"{experiment.method}/{experiment.base}-{experiment.task}",
        **{"model": experiment.base, "task": experiment.task, "method": experiment.method},
        **{"score": score, "seed": seed, "total_time": seconds, "resumed": resumed},
    }


def unchanged(before: Mapping[str, Any], config: Mapping[str, Any], read: Mapping[str, Any]) -> bool:
    """Return whether a stored record is of this config and, by ``read``, of the same `inputs`."""
    return (
        bool(before)
        and runs.equal(before["config"], config)
        and all(before["meta_info"].get(name) == value for name, value in read.items())
    )


def bases_of(every: Sequence[Experiment], known: Iterable[str]) -> list[str]:
    """Return the models of experiments, the known ones first."""
    return [*dict.fromkeys([*known, *sorted(experiment.base for experiment in every)])]
