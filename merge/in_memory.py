# pyright: strict
"""Merging in memory: the entry points of `merge` for pytrees of arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array
from merge import arguments
from merge.arguments import AnyOption
from merge.leaf import Whole
from merge.methods import METHODS, find, rankmean

Model = TypeVar("Model")
"""Any pytree: nested dicts, Flax's and NNX's states, Equinox modules, dataclasses, NamedTuples. The result has its type."""


def merge(
    base: Model | None,
    models: Sequence[Model],
    *,
    method: str = "rankmean",
    statistics: Sequence[object] | None = None,
    grams: Sequence[Mapping[str, Array]] | None = None,
    **options: AnyOption,
) -> Model:
    """Return the merge of ``models``, computed in float32; the structure and each tensor's dtype are the base's.

    The function works under ``jit`` and ``grad`` (with respect to numbers such as ``weight``, ``scale``, ``t`` and
    ``coefficients``), and on sharded arrays. A tensor's name is its path in the tree, keys joined by ``/``. Tensors that
    are not floating point, and leaves that are no arrays, are the base's.

    Each method is also a function of its own with named options, such as `merge.ties`.

    Args:
      base: the model that all models were fine-tuned from: a pytree of arrays. None for methods without a base; then the
        structure, the dtypes and the tensors that are not floating point come from the first model. Methods that combine the
        models themselves (``linear``, ``karcher``...) ignore the base; ``slerp`` and ``nearswap`` interpolate from the base to
        the only model.
      models: trees with the names and shapes of ``base``.
      method: a key of `METHODS`, a table of the options, their ranges and their meaning.
      statistics: for ``fisher``: per model a tree of mean squared gradients, with the model's structure and shapes.
      grams: for ``regmean``: per model ``{name: (in, in)}``, the Gram matrices of some tensors, which are (out, in) as in
        Hugging Face's layout.
      **options: a per-model option is one number for all models, or a sequence with one number per model; ``weight`` defaults
        to 1. An option that holds for parts of the model is a mapping from these parts to such values. A key is a layer, named
        as in `rankmean_coefficients`; a tensor's name; or a regular expression or the end of a name, as in
        `dsee_jax.tree.assign`. One key matches each tensor, in any order; the key ``.*`` gives the value of all others, which
        else have the default. mergekit's ``lambda`` is named ``scale``, and the inner method of ``lines`` is named ``over``.
        ``rankmean`` also takes ``coefficients``, the result of `rankmean_coefficients`.

    Raises:
      InputError: unknown method or option, a value out of range, a key that matches nothing, too few or too many models, or
        trees that do not match; the message names the option, the key or the path.
    """
    definition, models = find(method, options), list(models)
    flat, others = _flattened(base, models)
    first = flat or others[0]
    names = [name for name, leaf in first.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    keywords = arguments.resolve(definition, method, options, names, len(models))
    if definition.base == "required" and base is None:
        raise InputError(f"{method} measures changes from a base; give the base, not None")
    fewest, most = definition.models
    if not fewest <= len(models) <= (most or len(models)):
        expected = f"{fewest}" if most == fewest else f"at least {fewest}"
        raise InputError(f"{method} merges {expected} besides the base; found {len(models)}")
    squares = [tree.arrays(each) for each in statistics or ()]
    for number, square in enumerate(squares):
        _check_same_tensors(f"statistics {number}", square, first, "the models")
    use_base = definition.base != "none" or method == "lines"
    leaves = [
        Whole(
            name,
            _at_least_1d(flat[name]) if flat and use_base else None,
            tuple(_at_least_1d(other[name]) for other in others),
            tuple(_at_least_1d(square[name]) for square in squares),
        )
        for name in names
    ]
    extra: list[dict[str, Any]] = [{} for _ in leaves]
    if definition.prepare and leaves:
        extra = definition.prepare(leaves, keywords)
    if grams is not None:
        extra = [more | _grams(leaf.name, grams, len(models)) for leaf, more in zip(leaves, extra, strict=True)]
    merged = dict(first)
    for leaf, own, more in zip(leaves, keywords, extra, strict=True):
        target = first[leaf.name]
        result = definition.merge(leaf, **own | more)
        merged[leaf.name] = result.reshape(target.shape).astype(jax.dtypes.canonicalize_dtype(target.dtype))
    return tree.replace(models[0] if base is None else base, merged)


def rankmean_coefficients(
    base: Model,
    models: Sequence[Model],
    *,
    unit: str = "layer",
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> dict[str, Array]:
    """Return RankMean's ``{group: coefficients}``, float32 (models,) that sum to 1 (ACL 2024 Findings).

    Tensors outside every group get the plain mean in `merge` and have no entry here.

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the paths and shapes of ``base``.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.
      order: ``ascending`` is the paper's; see `merge.methods.rankmean`.
      ties: ``mean``: equal changes share their mean rank; ``order``: they rank in the order of the groups, as in the authors'
        code.
    """
    options: dict[str, AnyOption] = {"unit": unit, "order": order, "ties": ties}
    models = list(models)
    (keywords,) = arguments.resolve(METHODS["rankmean"], "rankmean", options, [""], len(models))
    flat, others = _flattened(base, models)
    leaves = [
        Whole(name, _at_least_1d(leaf), tuple(_at_least_1d(other[name]) for other in others))
        for name, leaf in flat.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return rankmean.coefficients_and_changes(leaves, **keywords)[0]


def _grams(name: str, grams: Sequence[Mapping[str, Array]], count: int) -> dict[str, Any]:
    if len(grams) != count:
        raise InputError(f"{len(grams)} sets of Gram matrices for {count} models; give one each")
    matrices = [by_name[name] for by_name in grams if name in by_name]
    if matrices and len(matrices) < count:
        raise InputError(f"{len(matrices)} Gram matrices of {name!r} for {count} models; give one each or none")
    return {"grams": matrices} if matrices else {}


def _at_least_1d(leaf: Array) -> Array:
    """Return the leaf with at least one axis, as methods expect."""
    return leaf if leaf.ndim else leaf.reshape(1)


def _flattened(base: object, models: Sequence[object]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    flat, others = tree.arrays(base), [tree.arrays(model) for model in models]
    if not others:
        raise InputError("no models to merge; give at least one")
    for number, other in enumerate(others):
        if base is not None:
            _check_same_tensors(f"model {number}", other, flat, "the base")
        else:
            _check_same_tensors(f"model {number}", other, others[0], "model 0")
    return flat, others


def _check_same_tensors(which: str, flat: Mapping[str, Array], expected: Mapping[str, Array], other: str) -> None:
    for name in flat.keys() ^ expected.keys():
        present, absent = (which, other) if name in flat else (other, which)
        near = did_you_mean(name, expected if name in flat else flat)
        raise InputError(f"{name!r} is in {present} and not in {absent}{near}; merge models of one base")
    for name, leaf in expected.items():
        if flat[name].shape != leaf.shape:
            raise InputError(f"{name!r} is {flat[name].shape} in {which} and {leaf.shape} in {other}")
