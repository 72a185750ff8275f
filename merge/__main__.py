"""``python -m merge RECIPE.yaml OUT_DIR``: merge fine-tuned models of one base by a recipe, from files to files."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Nothing is written before the imports end: Ctrl-C stops them at once, and not with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dsee_jax.ckpt.tensors import byte_size
from dsee_jax.errors import InputError
from dsee_jax.runtime import (
    answer,
    command,
    compilation_cache,
    completion,
    console,
    hub,
    job,
    limits,
    lock,
    malloc,
    multihost,
    preemption,
    storage,
    terminal,
)
from merge import compare, mergekit_flags, pipeline
from merge.inputs.sources import check_bases, open_source
from merge.methods import METHODS
from merge.outputs import destination
from merge.planning import describe
from merge.planning.plan import Plan
from merge.streaming import engine

EXAMPLE = """\
a recipe, in mergekit's grammar:

  merge_method: rankmean        # see --methods
  base_model: BASE              # a folder beside the recipe or in the working folder, a hub id, or any of these +ADAPTER
  models:
    - model: TUNED_A
    - model: TUNED_B

After an interruption the same command resumes. `python -m merge compare A B` prints the difference of two checkpoints.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of a merge."""
    top = argparse.ArgumentParser(
        prog="python -m merge",
        description="Merge fine-tuned models of one base by a recipe, from files to files, one tensor at a time.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("recipe", metavar="RECIPE", help="YAML; mergekit's recipes run unmodified")
    top.add_argument("out", metavar="OUT_DIR", help="the output folder; appears when the merge is complete")
    top.add_argument("--plan", action="store_true", help="read headers only, and print the plan")
    top.add_argument(
        "--topology",
        metavar="KIND:SHAPE",
        help="with --plan: also print the accelerator memory of a merge of all models in memory, compiled for a TPU topology "
        "you do not have (v5e:4x4; extra `tpu`), or for the local devices (`here`)",
    )
    answer.arguments(top, only="with --plan: ")
    top.add_argument("--overwrite", action="store_true", help="replace OUT_DIR when the merge is complete")
    top.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="maximum size of a file of weights; default 5GB"
    )
    top.add_argument("--allow-nonfinite", action="store_true", help="merge NaN and infinities instead of refusing them")
    top.add_argument(
        "--heads",
        metavar="MODEL",
        help="if models have different heads (classes, shapes, or one has none), only the bodies are merged, and the head, "
        "class and labels are those of MODEL, a model of the recipe; first: of the first fine-tuned model with a head, the "
        "default for models of different classes; drop: no head",
    )
    hub.arguments(top, "OUT_DIR")
    _allow_changed_base(top)
    compilation_cache.arguments(top)
    job.arguments(top)
    mergekit_flags.add(top)
    top.add_argument("--methods", action=_Methods, nargs=0, help="list the methods and their options, and exit")
    completion.arguments(top, "dsee-merge")
    return top


def _allow_changed_base(top: argparse.ArgumentParser) -> None:
    top.add_argument(
        "--allow-changed-base",
        action="store_true",
        help="put an adapter of this library on other weights than those that it was trained on, instead of refusing",
    )


class _Methods(argparse.Action):
    def __call__(self, *ignored: object) -> None:
        for name, method in sorted(METHODS.items()):
            print(f"{name}: {method.help}")
            for key, option in {**method.each, **method.shared}.items():
                default = "required" if option.default is None else f"default {option.default}"
                each = ", for each model" * (key in method.each)
                print(f"    {key}: {option.help} ({option.expected}{each}; {default})")
        sys.exit(0)


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of a comparison."""
    top = argparse.ArgumentParser(
        prog="python -m merge compare", description="Print the difference of two checkpoints."
    )
    top.add_argument("a", metavar="A", help="a folder, a hub id, or any of these +ADAPTER")
    top.add_argument("b", metavar="B", help="the same; changes are relative to A")
    top.add_argument(
        "--unit", default="layer", help="layer (default), tensor, or a regular expression with a group unit"
    )
    answer.arguments(top)
    _allow_changed_base(top)
    compilation_cache.arguments(top)
    return top


def print_comparison(options: argparse.Namespace) -> None:
    """Print the difference of two checkpoints."""
    wanted = answer.wanted(options)
    compilation_cache.use(options)
    a, b = (open_source(reference, Path()) for reference in (options.a, options.b))
    if not options.allow_changed_base:
        check_bases((a, b))
    comparison = compare.compare(a, b, unit=options.unit)
    wanted.show(compare.table(comparison))
    wanted.give(compare.figures(comparison))


def merge(options: argparse.Namespace) -> None:
    """Plan a merge, and run it."""
    options.max_shard_size = mergekit_flags.shard_size(options)
    byte_size(options.max_shard_size)
    for name in ("topology", "json"):
        if getattr(options, name) and not options.plan:
            raise InputError(f"--{name} belongs to a plan: give --plan too")
    if options.push is not None:
        hub.check(options.push)
        if storage.remote(options.out):
            raise InputError(f"--push uploads a folder of this machine, and {options.out} is in a store: give a folder")
        if options.plan:
            raise InputError("--push uploads the merged model, and --plan merges nothing: give one of them")
    wanted = answer.wanted(options)
    out = destination.located(options.out)
    if not options.plan:
        compilation_cache.use(options)  # before the first program, which a job compiles when it begins
    multihost.join(options)
    with preemption.raised("the same command resumes"):
        ready = pipeline.read(options.recipe, seed=options.random_seed, head=options.heads)
        if multihost.is_main():
            notes = () if options.plan else ready.plan.notes  # a plan lists them
            for note in (*mergekit_flags.notes(options), *notes, *ready.plan.warnings):
                print(f"merge: {console.plain(note)}", file=sys.stderr)
        if options.plan:
            _plan(ready.plan, options, wanted)
            return
        malloc.keep_freed_memory()
        limits.check(
            open_files=engine.open_files(ready.inputs), mapped=sum(path.stat().st_size for path in ready.inputs)
        )
        lines = _run(ready, out, options) if isinstance(out, Path) else _run_and_upload(ready, out, options)
    if multihost.is_main():
        console.show("\n".join([*lines, console.plain(options.out)]))
        if options.push is not None:
            console.show(hub.push(Path(options.out).expanduser(), options.push))


def _run(ready: pipeline.Prepared, out: Path, options: argparse.Namespace) -> list[str]:
    """Merge into a local folder; return lines for the user."""

    def check() -> None:
        destination.check(out, [ready.recipe.path, *ready.inputs], copied=ready.companions, overwrite=options.overwrite)

    with multihost.raise_on_all():
        check()
    with _only_writer(out):
        with multihost.raise_on_all():
            check()  # again: another merge may have ended meanwhile
        return _merge(ready, out, out, options, check)


def _run_and_upload(ready: pipeline.Prepared, out: storage.Place, options: argparse.Namespace) -> list[str]:
    """Merge on local disk, then upload to a store; after an interruption, the same command resumes."""
    if multihost.is_distributed():
        raise InputError(
            f"{out}: processes that merge together write one folder; give a folder on a disk that all processes share"
        )
    scratch, placed = storage.scratch(out), engine.layout(ready.plan, options.max_shard_size)
    stamp, merged, lines = engine.stamp(ready.plan, placed, ready.inputs), scratch / out.name, []
    # An earlier run may have completed the same merge: only the upload is left.
    complete = scratch / "whole"
    with _only_writer(scratch):
        uploads = complete.is_file() and complete.read_text() == stamp
        destination.check(
            out,
            [ready.recipe.path, *ready.inputs],
            copied=ready.companions,
            overwrite=options.overwrite,
            resumes=uploads,
        )
        if not uploads:
            complete.unlink(missing_ok=True)
            storage.clear(merged)
            lines = _merge(ready, merged, out, options)
            complete.write_text(stamp)
        storage.upload(merged, out)
        storage.clear(scratch)
    return lines


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Let no other merge write the folder; of several processes, the first holds the lock."""
    with contextlib.ExitStack() as stack:
        with multihost.raise_on_all():
            if multihost.is_main():
                stack.enter_context(lock.held(folder, "merge"))
        yield


def _merge(
    ready: pipeline.Prepared,
    folder: Path,
    out: storage.Place,
    options: argparse.Namespace,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Merge into a local folder that becomes ``out``; return lines for the user."""
    lines: list[str] = []
    with multihost.raise_on_all():
        known = {} if options.allow_changed_base else check_bases(ready.sources.values())
    with _progress(quiet=bool(options.quiet)) as progress, pipeline.input_digests(ready, known) as digests:
        engine.run(
            ready.plan,
            folder,
            lambda partial, extras: lines.extend(pipeline.write_metadata(ready, partial, out, extras, digests())),
            inputs=ready.inputs,
            check=check,
            max_shard_size=options.max_shard_size,
            allow_nonfinite=options.allow_nonfinite,
            progress=progress,
        )
    return lines


def _plan(plan: Plan, options: argparse.Namespace, wanted: answer.Answer) -> None:
    """Print the plan and, for ``--topology``, the accelerator memory and time of the merge."""
    placed = engine.layout(plan, options.max_shard_size)
    wanted.show(describe.describe(plan, placed.items()))
    figures = describe.figures(plan, placed)
    if options.topology:
        from dsee_jax.plan.roofline import tables
        from merge.planning import memory

        compiled = memory.analyze(plan, "" if options.topology == "here" else options.topology)
        for table in tables(compiled, title="the merge, all models in memory"):
            wanted.show(table)
        figures |= compiled
    wanted.give(figures)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[engine.Progress]:
    """Show each pass on stderr, in bytes; silent if ``quiet``, or where no bar can be drawn."""
    if quiet or not terminal.draws_bars():
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
    """Return the exit status of `command.run`; after an error there is no OUT_DIR."""
    resume = "" if arguments[:1] == ["compare"] else "the same command resumes"
    return command.run("merge", arguments, lambda: _main(arguments), resume=resume)


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["compare"]:
        print_comparison(compare_parser().parse_args(arguments[1:]))
    else:
        merge(parser().parse_args(arguments))


def console_script() -> NoReturn:
    """Run the command line of ``dsee-merge``."""
    command.start(main)


if __name__ == "__main__":
    console_script()
