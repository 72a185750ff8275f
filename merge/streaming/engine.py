"""Streaming: merge a plan's tensors from files to files, in bounded memory, with a complete output or none.

The merge takes two passes if the method reads the whole model first, else one pass. Each worker reads one tensor tile by
tile, merges the tiles with JAX, and writes them at the tensor's offset in its shard. All files are written to a hidden folder
beside the output; the folder is renamed at the end. After an interruption, the next merge verifies and keeps the finished
shards.

With several JAX processes, each process reads its share of the tensors and writes its share of the shards; process 0 writes
the other files.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from dsee_jax.ckpt import spelling, tensors
from dsee_jax.ckpt.folders import KEPT
from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, multihost
from merge.method import Method
from merge.methods import find
from merge.planning.plan import Job, Plan, written_bytes
from merge.streaming import shards, staging, tiles

THREADS = max(os.cpu_count() or 1, 2)
"""Threads that merge tensors."""

OPEN_SHARDS = 2 * THREADS
"""The most shards that are written at the same time; each is an open file."""

Extras: TypeAlias = dict[str, dict[str, Any]]
"""The further keyword arguments of each tensor's method, by tensor name, from `Method.prepare`."""


class Progress(NamedTuple):
    """Callbacks that report progress; called from several threads."""

    begin: Callable[[str, int], None] = lambda name, nbytes: None  # starts a pass over so many bytes
    advance: Callable[[int], None] = lambda nbytes: None


def layout(plan: Plan, max_shard_size: str | int = "5GB") -> dict[str, list[str]]:
    """Return ``{file: names}`` of the merged model's shards."""
    return tensors.shards({job.name: written_bytes(job) for job in plan.jobs}, max_shard_size=max_shard_size)


def files(plan: Plan) -> list[Path]:
    """Return every file of weights that the plan reads, in order of use."""
    unique: dict[Path, None] = {}
    for job in plan.jobs:
        for lazy in _inputs(job):
            unique |= dict.fromkeys(lazy.files)
    return list(unique)


def open_files(inputs: Sequence[Path]) -> int:
    """Return the most files that a merge of these inputs has open at once."""
    return min(len(inputs), tensors.MAPS) + OPEN_SHARDS


def run(
    plan: Plan,
    out: Path,
    finish: Callable[[Path, Extras], None],
    *,
    inputs: Sequence[Path],
    check: Callable[[], None] = lambda: None,
    max_shard_size: str | int = "5GB",
    allow_nonfinite: bool = False,
    progress: Progress = Progress(),  # noqa: B008
) -> None:
    """Merge, and write the folder ``out``.

    Args:
      plan: the merge.
      out: the output folder; an existing folder is replaced when the merge is complete.
      finish: called after all tensors are written, with the folder that becomes ``out`` and the method's `Extras`; writes the
        files beside the weights.
      inputs: all files that the merge depends on.
      check: called before ``out`` is replaced; an `InputError` keeps the unfinished output, which the next merge completes.
      max_shard_size: bytes, or text such as ``5GB``.
      allow_nonfinite: merge NaN and infinities instead of refusing them.
      progress: see `Progress`.

    Raises:
      InputError: the disk is too small, an input changes during the merge, or a source has a NaN or an infinity.
    """
    placed, before = layout(plan, max_shard_size), _states(inputs)
    folder = atomic.hidden(out)
    with staging.opened(folder, stamp(plan, placed, inputs), sum(map(written_bytes, plan.jobs))):
        extras = _merge(plan, placed, folder, allow_nonfinite, progress)
        multihost.barrier("every shard is written")
        if multihost.is_main():
            finish(folder, extras)
            # Beside kept units also the index of one file, as of `hf_save.save_pretrained`.
            if len(placed) > 1 or (folder / KEPT).exists():
                text = tensors.index_text(placed, sum(map(written_bytes, plan.jobs)))
                (folder / tensors.INDEX).write_text(text)
            for file, state in _states(inputs).items():
                if state != before[file]:
                    raise InputError(f"{file} has changed during the merge; start again when nothing writes it")
    if multihost.is_main():
        check()
        staging.finish(folder, out)
    multihost.barrier("the output has its name")


def _states(inputs: Sequence[Path]) -> dict[Path, tuple[int, ...]]:
    """Return numbers that change when a file is written again, or replaced."""
    stats = {file: file.stat() for file in inputs}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()}


def _merge(
    plan: Plan, placed: Mapping[str, Sequence[str]], folder: Path, allow_nonfinite: bool, progress: Progress
) -> Extras:
    """Prepare the method, then write this process's unfinished shards."""
    jobs = {job.name: job for job in plan.jobs}
    owned = [file for number, file in enumerate(placed) if multihost.owns(number)]
    todo = [file for file in owned if not shards.finished(folder / file)]
    with ThreadPoolExecutor(THREADS) as workers, contextlib.ExitStack() as opened:
        stop = threading.Event()
        resources = tiles.Resources(workers, set(), stop, allow_nonfinite, multihost.owns, multihost.gather)
        running: list[Future[None]] = []
        closer = opened.enter_context(ThreadPoolExecutor(1))
        closing: list[Future[None]] = []
        try:
            extras = _prepare(plan, resources, progress)
            progress.begin("merging", sum(written_bytes(jobs[name]) for file in todo for name in placed[file]))
            for number, file in enumerate(todo):
                if number >= OPEN_SHARDS:
                    closing[number - OPEN_SHARDS].result()
                arrays = {name: (jobs[name].dtype, jobs[name].shape) for name in placed[file]}
                shard = shards.create(folder / file, arrays)
                opened.callback(shard.abandon)
                parts = [
                    workers.submit(
                        _merge_tensor, jobs[name], extras[name], resources, shard.sink(name, progress.advance)
                    )
                    for name in placed[file]
                ]
                running += parts
                closing.append(closer.submit(shard.close, parts))
            for future in closing:
                future.result()
        except BaseException:
            stop.set()
            for future in [*running, *closing]:
                future.cancel()
            raise
    return extras


def _prepare(plan: Plan, resources: tiles.Resources, progress: Progress) -> Extras:
    extras: Extras = {job.name: {} for job in plan.jobs}
    jobs = [job for job in plan.jobs if job.method != "copy"]
    method = _method(jobs[0]) if jobs else None
    if method is None or method.prepare is None:
        return extras
    progress.begin("reading the whole model", sum(lazy.nbytes for job in jobs for lazy in _inputs(job)))
    leaves = [_leaf(job, resources._replace(read=progress.advance)) for job in jobs]
    prepared = method.prepare(leaves, [method.keywords(job.options) for job in jobs])
    return extras | {job.name: extra for job, extra in zip(jobs, prepared, strict=True)}


def _merge_tensor(job: Job, extra: Mapping[str, Any], resources: tiles.Resources, sink: tiles.Sink) -> None:
    """Merge or copy one tensor."""
    if job.method == "copy":
        size = prod(job.shape)
        for start in range(0, size, tiles.TILE):
            resources.raise_if_stopped()
            chunk = job.inputs[0].read(start, min(start + tiles.TILE, size))
            checked = job.dtype in tensors.FLOATS and not (
                resources.allow_nonfinite or spelling.is_buffer(job.name, job.shape)
            )
            if checked and tiles.nonfinite(chunk):
                raise InputError(
                    f"{job.inputs[0].files[0]} holds NaN, infinity or a value beyond {job.dtype} in {job.name!r}, which is "
                    "copied; give --allow-nonfinite to copy it anyway, or another dtype"
                )
            sink(start, chunk)
        return
    method, grams = _method(job), {}
    if method.statistics == "grams" and job.statistics:
        grams["grams"] = [lazy.read(0, prod(lazy.shape)).reshape(lazy.shape) for lazy in job.statistics]
    method.merge(_leaf(job, resources, sink), **method.keywords(job.options), **extra, **grams)


def _leaf(job: Job, resources: tiles.Resources, sink: tiles.Sink = lambda start, chunk: None) -> tiles.Tiled:
    method = _method(job)
    by_rows = method.by_rows(**method.keywords(job.options))
    statistics = job.statistics if method.statistics == "elements" else ()
    return tiles.Tiled(job.name, job.base, job.models, statistics, by_rows, job.dtype, sink, resources)


def _method(job: Job) -> Method:
    return find(job.method, job.options)


def _inputs(job: Job) -> tuple[Any, ...]:
    return (*job.inputs, *job.statistics)


def stamp(plan: Plan, placed: Mapping[str, Sequence[str]], inputs: Sequence[Path]) -> str:
    """Return a digest of everything that determines the output's bytes.

    Args:
      plan: the merge.
      placed: from `layout`.
      inputs: all files that the merge depends on.
    """
    content = {
        "recipe": plan.recipe.content,
        "computed": [jax.__version__, jax.default_backend(), tiles.TILE],
        "jobs": [(job.name, job.method, repr(sorted(job.options.items())), job.dtype) for job in plan.jobs],
        "inputs": [(str(file.resolve()), *state[:2]) for file, state in _states(inputs).items()],
        "sources": [[str(file) for lazy in _inputs(job) for file in lazy.files] for job in plan.jobs],
        "placed": {file: list(names) for file, names in placed.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
