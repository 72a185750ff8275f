"""The work of ``python -m merge``: a merge from files to files, its plan, and the comparison of two checkpoints."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dsee_jax.ckpt.tensors import byte_size
from dsee_jax.errors import InputError
from dsee_jax.runtime import (
    answer,
    compilation_cache,
    console,
    hub,
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
from merge.outputs import destination
from merge.planning import describe
from merge.planning.plan import Plan
from merge.streaming import engine


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
