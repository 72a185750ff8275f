"""``python -m merge RECIPE.yaml OUT_DIR``: merge fine-tuned models of one base as a recipe says, from files to files."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from dsee_jax import heap, processes, stores
from dsee_jax.ckpt.tensors import byte_size
from dsee_jax.errors import InputError
from merge import assembly, compare
from merge.inputs.sources import open_source
from merge.methods import METHODS
from merge.planning import overview
from merge.planning.plan import Plan
from merge.streaming import engine

EXAMPLE = """\
a recipe, in mergekit's grammar:

  merge_method: rankmean        # see --methods
  base_model: BASE              # a folder beside the recipe or here, a hub id, or any of these +ADAPTER
  models:
    - model: TUNED_A
    - model: TUNED_B

Run again after an interruption, it goes on. `python -m merge compare A B` tells how far two checkpoints are apart.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of a merge."""
    top = argparse.ArgumentParser(
        prog="python -m merge",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("recipe", metavar="RECIPE", help="YAML; mergekit's recipes run unmodified")
    top.add_argument("out", metavar="OUT_DIR", help="the folder to make; appears when it is complete")
    top.add_argument("--plan", action="store_true", help="read headers only, and print what would be done")
    top.add_argument(
        "--topology",
        metavar="KIND:SHAPE",
        help="with --plan: what the merge would take in the memory of accelerators instead, all models at once; compiled "
        "for a TPU topology that need not be there (v5e:4x4; extra `tpu`), or for the devices that are `here`",
    )
    top.add_argument("--json", metavar="FILE", help="with --topology: write all figures there as well")
    top.add_argument("--overwrite", action="store_true", help="replace OUT_DIR, once the merge is complete")
    top.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file of weights; default 5GB")
    top.add_argument("--allow-nonfinite", action="store_true", help="merge NaN and infinities as they are")
    processes.arguments(top)
    top.add_argument("--methods", action=_Methods, nargs=0, help="list the methods and their options, and stop")
    return top


class _Methods(argparse.Action):
    def __call__(self, *ignored: object) -> None:
        for name, method in sorted(METHODS.items()):
            print(f"{name}: {method.help}")
            for option, what in {**method.each, **method.shared}.items():
                default = "required" if what.default is None else f"default {what.default}"
                each = ", for each model" * (option in method.each)
                print(f"    {option}: {what.help} ({what.expected}{each}; {default})")
        sys.exit(0)


def comparing() -> argparse.ArgumentParser:
    """Return the parser of a comparison."""
    top = argparse.ArgumentParser(prog="python -m merge compare", description="How far two checkpoints are apart.")
    top.add_argument("a", metavar="A", help="a folder, a hub id, or any of these +ADAPTER")
    top.add_argument("b", metavar="B", help="the same; changes are relative to A")
    top.add_argument(
        "--unit", default="layer", help="layer (default), tensor, or a regular expression with a group unit"
    )
    return top


def distance(options: argparse.Namespace) -> None:
    """Print how far two checkpoints are apart."""
    a, b = (open_source(reference, Path()) for reference in (options.a, options.b))
    print(compare.table(compare.compare(a, b, unit=options.unit)))


def merge(options: argparse.Namespace) -> None:
    """Plan a merge, and do it."""
    byte_size(options.max_shard_size)
    for name in ("topology", "json"):
        if getattr(options, name) and not (options.plan and options.topology):
            raise InputError(f"--{name} says what to plan: give it with --plan --topology")
    file = stores.target(options.json, "--json") if options.json else None
    processes.join(options)
    ready = assembly.read(options.recipe)
    if options.plan:
        print(overview.describe(ready.plan, engine.layout(ready.plan, options.max_shard_size).items()))
        if options.topology:
            _compile(ready.plan, "" if options.topology == "here" else options.topology, file)
        return
    heap.keep()
    there = stores.place(options.out)
    said = _run(ready, there, options) if isinstance(there, Path) else _put(ready, there, options)
    if processes.first():
        print("\n".join([*said, str(there)]))


def _run(ready: assembly.Assembly, out: Path, options: argparse.Namespace) -> list[str]:
    """Merge into a folder of this machine; return lines for the user."""
    said: list[str] = []
    engine.check_output(ready.plan, out, overwrite=options.overwrite)
    with _progress() as progress, assembly.hashed(ready) as digests:
        engine.run(
            ready.plan,
            out,
            lambda folder, extras: said.extend(assembly.surround(ready, folder, out.name, extras, digests())),
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            allow_nonfinite=options.allow_nonfinite,
            progress=progress,
        )
    return said


def _put(ready: assembly.Assembly, there: stores.Place, options: argparse.Namespace) -> list[str]:
    """Merge on this machine and put the result into a store; what an interruption leaves lies where the command finds it."""
    if processes.several():
        raise InputError(
            f"{there}: processes that merge together write one folder; give one on a disk that all of them share"
        )
    read = [*engine.files(ready.plan), *(source.folder / "config.json" for source in ready.sources.values())]
    for path in [str(ready.recipe.path), *filter(None, map(stores.origin, read))]:
        if path.startswith(f"{str(there).rstrip('/')}/"):
            raise InputError(f"{there} holds the input {path}; give another OUT_DIR")
    scratch, stamp = stores.scratch(there), engine.stamp(ready.plan, engine.layout(ready.plan, options.max_shard_size))
    made, said = scratch / there.name, []
    # Of the same merge, made before, all that is left to do is to put it there.
    whole = scratch / "whole"
    if not (whole.is_file() and whole.read_text() == stamp):
        with stores.reached(there):
            if not options.overwrite and there.exists():
                raise InputError(f"{there} is there already; give another OUT_DIR, or --overwrite to replace it")
        whole.unlink(missing_ok=True)
        stores.clear(made)
        said = _run(ready, made, options)
        whole.write_text(stamp)
    stores.put(made, there)
    stores.clear(scratch)
    return said


def _compile(plan: Plan, topology: str, file: stores.Place | None) -> None:
    """Print what the merge would take of accelerators, and write it to ``file``."""
    from dsee_jax import journal, report
    from dsee_jax.plan import tables
    from merge.planning.compiled import compiled

    found = compiled(plan, topology)
    if file:
        journal.write(file, found)
    for table in tables(found, title="the merge, all models in memory"):
        report.show(table)


@contextlib.contextmanager
def _progress() -> Iterator[engine.Progress]:
    """Show each pass on stderr, in bytes; silent when not a terminal."""
    if not sys.stderr.isatty():
        yield engine.Progress()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: list[progress.TaskID] = []
        yield engine.Progress(
            lambda name, nbytes: tasks.append(shown.add_task(name, total=nbytes)),
            lambda nbytes: shown.advance(tasks[-1], nbytes),
        )


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, or 2 for bad input (one line on stderr, no OUT_DIR)."""
    compares = arguments[:1] == ["compare"]
    options = comparing().parse_args(arguments[1:]) if compares else parser().parse_args(arguments)
    try:
        (distance if compares else merge)(options)
    except InputError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    except stores.StoreError as error:
        print(f"merge: {error}; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("merge: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
