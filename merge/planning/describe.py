"""A text description of a plan, which the user checks before the merge."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsee_jax.hf_layout import split_layer
from dsee_jax.runtime import console
from merge.planning.plan import Job, Plan, written_bytes

_SHOWN = 6
_WIDTH = 120


def describe(plan: Plan, files: Iterable[tuple[str, Sequence[str]]] = ()) -> str:
    """Return about forty lines of text at most: models, tensors, bytes, types, and the options of tensors.

    Args:
      plan: from `merge.planning.plan.plan`.
      files: the shards to write, each with the names of its tensors.
    """
    recipe, jobs = plan.recipe, plan.jobs
    merged = [job for job in jobs if job.method != "copy"]
    layers = {position[:2] for job in jobs if (position := split_layer(job.name))}
    outside = sum(split_layer(job.name) is None for job in jobs)
    bases = dict.fromkeys(part.base.model for part in recipe.slices if part.base)
    lines = [f"{recipe.path}: {recipe.name}, {recipe.method.help}"]
    lines += [f"  base     {reference}" for reference in [*bases][:4]]
    lines += [f"  model {number:2} {reference}" for number, reference in enumerate(plan.models[:8])]
    if len(plan.models) > 8:
        lines.append(f"  ... and {len(plan.models) - 8} more models")
    if recipe.sliced:
        lines += [f"  layers   {_slice(part)}" for part in recipe.slices[:6]]
        if len(recipe.slices) > 6:
            lines.append(f"  ... and {len(recipe.slices) - 6} more slices")
    lines.append(
        f"  tensors  {len(merged)} to merge, {len(jobs) - len(merged)} to copy; {outside} outside {len(layers)} layers"
    )
    reads = sum(lazy.nbytes for job in jobs for lazy in _read_tensors(job))
    passes = "; more in a first pass over the whole model" if recipe.method.prepare else ""
    lines.append(f"  read     {_size(reads)}{passes}")
    shards = list(files)
    sizes = {job.name: written_bytes(job) for job in jobs}
    lines.append(f"  write    {_size(sum(sizes.values()))} in {len(shards) or 'some'} file(s), {_types(jobs)}")
    for file, names in shards[:4]:
        lines.append(f"           {file}: {len(names)} tensors, {_size(sum(sizes[name] for name in names))}")
    if len(shards) > 4:
        lines.append(f"           ... and {len(shards) - 4} more")
    lines += [f"  note     {note}" for note in plan.notes[:4]]
    if len(plan.notes) > 4:
        lines.append(f"  ... and {len(plan.notes) - 4} more notes")
    lines += _ranges(merged)
    lines += _table(merged)
    lines = [console.plain(line) for line in lines]
    return "\n".join(line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..." for line in lines)


def figures(plan: Plan, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a plan as an object of JSON: every model, file and tensor.

    Args:
      plan: from `merge.planning.plan.plan`.
      files: the names of the tensors in each shard to write.
    """
    sizes = {job.name: written_bytes(job) for job in plan.jobs}
    bases = dict.fromkeys(part.base.model for part in plan.recipe.slices if part.base)
    return {
        "recipe": str(plan.recipe.path),
        "method": plan.recipe.name,
        "bases": [*bases],
        "models": list(plan.models),
        "read_bytes": sum(lazy.nbytes for job in plan.jobs for lazy in _read_tensors(job)),
        "written_bytes": sum(sizes.values()),
        "files": [
            {"file": file, "tensors": len(names), "bytes": sum(sizes[name] for name in names)}
            for file, names in files.items()
        ],
        "tensors": [
            {
                "name": job.name,
                "shape": list(job.shape),
                "dtype": job.dtype,
                "method": job.method,
                "models": list(job.columns),
                "options": dict(job.options),
            }
            for job in plan.jobs
        ],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def _read_tensors(job: Job) -> Iterable[Any]:
    # Copying reads only the first input.
    return job.inputs[:1] if job.method == "copy" else (*job.inputs, *job.statistics)


def _slice(part: Any) -> str:
    return ", ".join(f"{entry.model} {list(entry.layers)}" for entry in part.inputs)


def _types(jobs: Sequence[Job]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in Counter(job.dtype for job in jobs).most_common())


def _ranges(jobs: Sequence[Job]) -> list[str]:
    """Return one line per option, with the smallest and the largest value over all tensors."""
    lines = []
    for key in jobs[0].options if jobs else ():
        values = [job.options[key] for job in jobs]
        if isinstance(values[0], tuple):
            by_model: dict[int, list[Any]] = {}
            for job, row in zip(jobs, values, strict=True):
                for column, value in zip(job.columns, row, strict=True):
                    by_model.setdefault(column, []).append(value)
            lines.append(
                f"  {key:16} " + ", ".join(f"model {column}: {_range(by_model[column])}" for column in sorted(by_model))
            )
        else:
            lines.append(f"  {key:16} {_range(values)}")
    return ["options, smallest to largest over the tensors", *lines[:12]] if lines else []


def _table(jobs: Sequence[Job]) -> list[str]:
    if not jobs or not jobs[0].options:
        return []
    # The lines above list the options with one value for all tensors.
    keys = [key for key, value in jobs[0].options.items() if isinstance(value, tuple) or len(_distinct(jobs, key)) > 1]
    rows = [f"  {job.name}  {list(job.shape)}  {_options(job.options, keys)}".rstrip() for job in jobs[:_SHOWN]]
    more = [f"  ... and {len(jobs) - _SHOWN} more"] if len(jobs) > _SHOWN else []
    return ["the first tensors", *rows, *more]


def _distinct(jobs: Sequence[Job], key: str) -> set[Any]:
    return {job.options[key] for job in jobs}


def _options(options: Mapping[str, Any], keys: Iterable[str]) -> str:
    return " ".join(f"{key}={_value(options[key])}" for key in keys)


def _range(values: Sequence[Any]) -> str:
    distinct = (
        sorted(set(values)) if all(isinstance(value, (int, float)) for value in values) else [*dict.fromkeys(values)]
    )
    if len(distinct) == 1:
        return _value(distinct[0])
    if isinstance(distinct[0], (str, bool)):
        return " or ".join(_value(kind) for kind in distinct[:4])
    return f"{_value(distinct[0])} to {_value(distinct[-1])}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(_value(part) for part in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    return console.size(count) if count < 1000 else f"{console.size(count)} ({count:,} bytes)"
