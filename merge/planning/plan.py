"""The plan of a merge: the inputs, the method and the options for every tensor of the result.

A plan needs only a recipe and the headers of its models, so that every mismatch is an error before any tensor is read.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import kept_units, spelling
from dsee_jax.ckpt.tensors import DTYPES, FLOATS
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import QUANTISED, split_layer
from dsee_jax.runtime.strict_yaml import shown
from merge import units
from merge.inputs.lazy import Lazy, cast
from merge.inputs.sources import Source
from merge.planning import heads, numbers, tied
from merge.planning.matching import Row, rows
from merge.recipes import settings
from merge.recipes.recipe import DTYPES as WRITTEN
from merge.recipes.recipe import Recipe

_WIDTHS = ("hidden_size", "n_embd", "d_model")


class Job(NamedTuple):
    """One tensor of the result."""

    name: str
    method: str  # a key of METHODS, or copy: the tensor of the base or the first model, unchanged
    base: Lazy | None
    models: tuple[Lazy, ...]
    statistics: tuple[Lazy, ...]  # of each model, or empty
    options: Mapping[str, Any]  # by their recipe names; per-model options are tuples
    columns: tuple[int, ...]  # the index of each model in `Plan.models`
    dtype: str  # the written type, by its name in safetensors

    @property
    def inputs(self) -> tuple[Lazy, ...]:
        """The base, if any, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result and of every input."""
        return self.inputs[0].shape


class Plan(NamedTuple):
    """The plan of a merge. Jobs are in the order of the origin's tensors; with slices, layers in the order of the result."""

    recipe: Recipe
    jobs: tuple[Job, ...]
    models: tuple[str, ...]  # references, in the recipe's order, without bases
    layers: tuple[int, ...] | None  # with slices: for each layer, the origin's layer that gives its config entries
    notes: tuple[str, ...]  # remarks for the user
    fields: Mapping[str, Any] = {}  # of config.json, which follow from the tensors; None: the field is left out
    warnings: tuple[str, ...] = ()  # one line each


def plan(
    recipe: Recipe,
    sources: Mapping[str, Source],
    statistics: Mapping[Path, Mapping[str, Lazy]] | None = None,
    *,
    head: str | None = None,
) -> Plan:
    """Return the plan of ``recipe``.

    Args:
      recipe: from `merge.recipes.recipe.read`.
      sources: the opened models by reference, for all of `Recipe.references`, with aligned vocabularies where the recipe has
        a tokenizer.
      statistics: the opened statistics files by path, ``{tensor name: statistic}``.
      head: the model whose head is kept where heads differ, see `merge.planning.heads.separate`.

    Raises:
      InputError: different architectures or structural pruning; missing, surplus or mismatched tensors; missing layers; an
        option without a value for a tensor; weights of a mean that sum to zero. The message is one line that names the tensor
        or key.
    """
    origin = sources[recipe.origin]
    for source in sources.values():
        _check_same_architecture(recipe, origin, source)
        _check_same_units(recipe, origin, source)
        if not source.tensors:
            raise InputError(f"{recipe.path}: {source.folder} has no tensors: there is nothing to merge")
    ordered = {reference: sources[reference] for reference in recipe.references}
    ties = tied.fitted(ordered)
    models = tuple(dict.fromkeys(entry.model for part in recipe.slices for entry in part.models))
    separated = heads.separate(str(recipe.path), ordered, ties.views, models, head)
    jobs = [_job(recipe, row, separated.views, models, statistics or {}) for row in rows(recipe, separated.views)]
    jobs += [_copy(recipe, name, tensor) for name, (_, tensor) in separated.kept.items()]
    unit = next((job.options["unit"] for job in jobs if "unit" in job.options), None)
    if unit is not None:
        try:
            units.of([job.name for job in jobs], unit)
        except InputError as error:
            raise InputError(f"{recipe.path}: parameters.unit: {error}") from None
    warnings = [separated.warning, *(numbers.differing(origin, source) for source in ordered.values())]
    return Plan(
        recipe,
        tuple(jobs),
        models,
        _layers(recipe, origin) if recipe.sliced else None,
        (*recipe.notes, *ties.notes),
        ({"tie_word_embeddings": False} if ties.untied else {}) | separated.fields,
        tuple(filter(None, warnings)),
    )


def _copy(recipe: Recipe, name: str, tensor: Lazy) -> Job:
    """Return the job of a tensor that only one model gives, in the written type."""
    dtype = _written(recipe, tensor.stored or tensor.dtype) if tensor.dtype in FLOATS else tensor.dtype
    return Job(name, "copy", None, (cast(tensor, dtype),), (), {}, (), dtype)


def _job(
    recipe: Recipe,
    row: Row,
    views: Mapping[str, Mapping[str, Lazy]],
    models: tuple[str, ...],
    statistics: Mapping[Path, Mapping[str, Lazy]],
) -> Job:
    part = row.part
    inputs = [views[entry.model][name] for entry, name in zip(part.inputs, row.names, strict=True)]
    if spelling.is_buffer(row.name, inputs[0].shape):
        return Job(row.name, "copy", None, (inputs[0],), (), {}, (), inputs[0].dtype)
    _check_same_shapes(recipe, row, inputs)
    base = inputs[0] if part.base else None
    rest = tuple(inputs[1:]) if part.base else tuple(inputs)
    columns = tuple(models.index(entry.model) for entry in part.models)
    stored = next(
        (lazy.dtype for entry, lazy in zip(part.inputs, inputs, strict=True) if entry.model == recipe.origin),
        inputs[0].dtype,
    )
    if stored not in FLOATS:
        if len(inputs) > 1 and len(inputs[0].shape) > 1 and row.name.endswith("weight"):
            raise InputError(
                f"{recipe.path}: {shown(row.name)} is stored as {stored} in {part.inputs[0].model}: its weights are "
                "quantised; merge the unquantised models"
            )
        return Job(row.name, "copy", base, rest, (), {}, columns, stored)
    names = row.names[1:] if part.base else row.names
    return Job(
        row.name,
        recipe.name,
        base,
        rest,
        _statistics(recipe, row, inputs[0].shape, statistics),
        _options(recipe, row, names),
        columns,
        _written(recipe, _promoted(inputs)),
    )


def _written(recipe: Recipe, otherwise: str) -> str:
    """Return the type that the recipe names, or else ``otherwise``."""
    named = recipe.out_dtype or recipe.dtype
    return WRITTEN[named] if named else otherwise


def _promoted(inputs: Sequence[Lazy]) -> str:
    """Return the type that holds every input's values, as PyTorch promotes types: of F16 and BF16 it is F32."""
    dtypes = {lazy.stored or lazy.dtype for lazy in inputs}
    return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"


def _options(recipe: Recipe, row: Row, names: Sequence[str]) -> dict[str, Any]:
    """Resolve every option for one tensor, from the nearest level up; filters see the tensor's name in each model."""
    where, part, method = str(recipe.path), row.part, recipe.method
    shared = [(f"{part.key}.parameters", part.parameters), ("parameters", recipe.parameters)]
    options: dict[str, Any] = {
        key: settings.lookup(where, key, option, shared, row.name, row.t) for key, option in method.shared.items()
    }
    for key, option in method.each.items():
        options[key] = tuple(
            settings.lookup(where, key, option, [(f"{entry.key}.parameters", entry.parameters), *shared], name, row.t)
            for entry, name in zip(part.models, names, strict=True)
        )
    method.check(f"{where}: parameters, for {shown(row.name)}", **method.keywords(options))
    return options


def _statistics(
    recipe: Recipe, row: Row, shape: tuple[int, ...], statistics: Mapping[Path, Mapping[str, Lazy]]
) -> tuple[Lazy, ...]:
    kind = recipe.method.statistics
    if kind == "none":
        return ()
    files = [(entry, statistics[entry.statistics]) for entry in row.part.models if entry.statistics is not None]
    arrays = [(entry, file[row.name]) for entry, file in files if row.name in file]
    if len(arrays) < len(files) and (arrays or kind == "elements"):
        entry = next(entry for entry, file in files if row.name not in file)
        raise InputError(
            f"{recipe.path}: {entry.key}.statistics: {entry.statistics} lacks {shown(row.name)}; collect the statistics again"
        )
    expected = shape if kind == "elements" else shape[-1:] * 2
    for entry, lazy in arrays:
        if lazy.shape != expected or (kind == "grams" and len(shape) != 2):
            raise InputError(
                f"{recipe.path}: {entry.key}.statistics: {shown(row.name)} is {list(lazy.shape)} in {entry.statistics}; "
                f"expected {list(expected)}, for a tensor of {list(shape)}"
            )
    return tuple(lazy for _, lazy in arrays)


def _check_same_shapes(recipe: Recipe, row: Row, inputs: Sequence[Lazy]) -> None:
    first, entry = inputs[0], row.part.inputs[0]
    for lazy, other in zip(inputs[1:], row.part.inputs[1:], strict=True):
        kinds = [tensor.dtype if tensor.dtype not in FLOATS else "floating point" for tensor in (first, lazy)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{recipe.path}: {shown(row.name)} is {kinds[0]} in {entry.model} and {kinds[1]} in {other.model}; "
                "merge models of one kind"
            )
        if lazy.shape != first.shape:
            rows_only = lazy.shape[1:] == first.shape[1:] and len(first.shape) > 0 and len(lazy.shape) > 0
            advice = "merge models of one base"
            if rows_only and split_layer(row.name) is None and recipe.tokenizer is None:
                advice = "if their vocabularies differ, add tokenizer_source: base (or union)"
            raise InputError(
                f"{recipe.path}: {shown(row.name)} is {list(first.shape)} in {entry.model} and {list(lazy.shape)} in "
                f"{other.model}; {advice}"
            )


def _check_same_architecture(recipe: Recipe, first: Source, other: Source) -> None:
    if any(other.config.get(name) is not None for name in QUANTISED):
        raise InputError(f"{recipe.path}: {other.reference} is quantised; merge the unquantised models")
    kinds = [source.config.get("model_type") for source in (first, other)]
    # Models of one type may be of different classes, with different heads.
    keys = ("model_type", *(() if all(kinds) else ("architectures",)), *(_WIDTHS if recipe.sliced else ()))
    for key in keys:
        left, right = first.config.get(key), other.config.get(key)
        if left != right and left is not None and right is not None:
            raise InputError(
                f"{recipe.path}: {first.reference} and {other.reference} are different architectures: {key} is "
                f"{str(left)[:80]} in one and {str(right)[:80]} in the other; merge models of one kind"
            )


def _check_same_units(recipe: Recipe, first: Source, other: Source) -> None:
    """Raise `InputError` for models with different remaining heads or neurons, even if their tensors have equal shapes."""
    if recipe.sliced and other.kept:
        raise InputError(
            f"{recipe.path}: slices: {other.folder} is structurally pruned, layer by layer; export it with --format hf"
        )
    if where := kept_units.difference(first.kept, other.kept):
        advice = "merge models with the same heads and neurons, or export each with --format hf first"
        if not (first.kept and other.kept):
            dense = (other if first.kept else first).folder
            advice = f"{dense} is not pruned: take the compact model that the others were fine-tuned from, or {advice}"
        raise InputError(
            f"{recipe.path}: {first.folder} and {other.folder} are pruned differently: {where} differ; {advice}"
        )


def _layers(recipe: Recipe, origin: Source) -> tuple[int, ...]:
    last = max((position[1] for name in origin.tensors if (position := split_layer(name))), default=0)
    numbers = []
    for part in recipe.slices:
        entry = next((entry for entry in part.inputs if entry.model == recipe.origin), part.inputs[0])
        numbers += [min(number, last) for number in range(*(entry.layers or (0, 0)))]
    return tuple(numbers)


def written_bytes(job: Job) -> int:
    """Return the size of the merged tensor in bytes."""
    return prod(job.shape) * np.dtype(DTYPES[job.dtype]).itemsize
