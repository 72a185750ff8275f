"""Merging in memory: the entry points of `merge` for pytrees of arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array
from merge.leaf import Whole
from merge.method import KEYWORDS, Method, Option
from merge.methods import METHODS, find, rankmean


def merge(
    base: Any,
    models: Sequence[Any],
    *,
    method: str = "rankmean",
    statistics: Sequence[Any] | None = None,
    grams: Sequence[Mapping[str, Array]] | None = None,
    **options: Any,
) -> Any:
    """Return the merge of ``models``, computed in float32; the structure and each tensor's dtype are the base's.

    The function works under ``jit`` and ``grad`` (with respect to numbers such as ``weight``, ``scale``, ``t`` and
    ``coefficients``), and on sharded arrays. A tensor's name is its path in the tree, keys joined by ``/``. Tensors that
    are not floating point are copied from the base.

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
        to 1. mergekit's ``lambda`` is named ``scale``, and the inner method of ``lines`` is named ``over``. ``rankmean`` also
        takes ``coefficients``, the result of `rankmean_coefficients`.

    Raises:
      InputError: unknown method or option, a value out of range, too few or too many models, or trees that do not match; the
        message names the path.
    """
    definition = find(method, options)
    keywords = _options(definition, method, options, len(models))
    if definition.base == "required" and base is None:
        raise InputError(f"{method} measures changes from a base; give the base, not None")
    fewest, most = definition.models
    if models and not fewest <= len(models) <= (most or len(models)):
        expected = f"{fewest}" if most == fewest else f"at least {fewest}"
        raise InputError(f"{method} merges {expected} besides the base; found {len(models)}")
    flat, others = _flattened(base, models)
    first = flat or others[0]
    squares = [_by_name(tree) for tree in statistics or ()]
    for number, tree in enumerate(squares):
        _check_same_tensors(f"statistics {number}", tree, first, "the models")
    names = [name for name, leaf in first.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    use_base = definition.base != "none" or method == "lines"
    leaves = [
        Whole(
            name,
            _at_least_1d(flat[name]) if flat and use_base else None,
            tuple(_at_least_1d(other[name]) for other in others),
            tuple(_at_least_1d(tree[name]) for tree in squares),
        )
        for name in names
    ]
    extra: list[dict[str, Any]] = [{} for _ in leaves]
    if definition.prepare and leaves:
        extra = definition.prepare(leaves, [keywords] * len(leaves))
    if grams is not None:
        extra = [own | _grams(leaf.name, grams, len(models)) for leaf, own in zip(leaves, extra, strict=True)]
    merged = dict(first)
    for leaf, own in zip(leaves, extra, strict=True):
        target = first[leaf.name]
        result = definition.merge(leaf, **keywords | own)
        merged[leaf.name] = result.reshape(target.shape).astype(jax.dtypes.canonicalize_dtype(target.dtype))
    structure = jax.tree.structure(models[0] if base is None else base)
    return jax.tree.unflatten(structure, merged.values())


def rankmean_coefficients(
    base: Any,
    models: Sequence[Any],
    *,
    unit: str = "layer",
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> dict[str, Array]:
    """Return RankMean's ``{group: coefficients (models,)}``, each summing to 1.

    Tensors outside every group get the plain mean in `merge` and have no entry here.

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the paths and shapes of ``base``.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.
      order: ``ascending`` is the paper's; see `merge.methods.rankmean`.
      ties: ``mean``: equal changes share their mean rank; ``order``: they rank in the order of the groups, as in the authors'
        code.
    """
    keywords = _options(METHODS["rankmean"], "rankmean", {"unit": unit, "order": order, "ties": ties}, len(models))
    flat, others = _flattened(base, models)
    leaves = [
        Whole(name, _at_least_1d(leaf), tuple(_at_least_1d(other[name]) for other in others))
        for name, leaf in flat.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return rankmean.coefficients_and_changes(leaves, **keywords)[0]


def _options(method: Method, name: str, options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the checked value of every option of ``method``, by keyword."""
    accepted = {KEYWORDS.get(key, key): option for key, option in {**method.each, **method.shared}.items()}
    each = {KEYWORDS.get(key, key) for key in method.each}
    extra = {"coefficients"} if name == "rankmean" or options.get("over") == "rankmean" else set()
    for key in options:
        if key not in accepted and key not in extra:
            near = did_you_mean(key, accepted)
            raise InputError(f"{name} has no option {key!r}{near}; it has {', '.join(sorted(accepted)) or 'none'}")
    keywords: dict[str, Any] = {key: options[key] for key in extra & options.keys()}
    for key, option in accepted.items():
        default = 1.0 if key == "weight" else option.default
        value = options.get(key, default)
        if value is None:
            raise InputError(f"{name} needs the option {key!r}: {option.help}; expected {option.expected}")
        where = f"{name}: {key}"
        keywords[key] = _each(where, option, value, count) if key in each else _checked(where, option, value)
    method.check(name, **{key: value for key, value in keywords.items() if key not in extra})
    return keywords


def _each(where: str, option: Option, value: Any, count: int) -> Any:
    """Return ``value`` as a sequence or an array of ``count`` values, one per model."""
    if isinstance(value, Tracer):
        if value.shape not in ((), (count,)):
            raise InputError(
                f"{where} has shape {value.shape} for {count} models; give one each, or one number for all"
            )
        return jnp.broadcast_to(value, (count,))
    values = list(value) if isinstance(value, Sequence) or np.ndim(value) else [value] * count
    if len(values) != count:
        raise InputError(f"{where} has {len(values)} values for {count} models; give one each, or one number for all")
    checked = [_checked(f"{where}[{number}]", option, item) for number, item in enumerate(values)]
    return jnp.stack(checked) if any(isinstance(item, Tracer) for item in checked) else checked


def _checked(where: str, option: Option, value: Any) -> Any:
    if isinstance(value, Tracer):
        if option.kind is not float:
            raise InputError(f"{where} is traced; expected a constant: close over it or make it static")
        return value
    return option.check(where, value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value)


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


def _by_name(tree: Any) -> dict[str, Array]:
    """Return ``{name: array}`` in the order of the tree."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for path, leaf in flat
    }


def _flattened(base: Any, models: Sequence[Any]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    flat, others = _by_name(base), [_by_name(model) for model in models]
    if not others:
        raise InputError("no models to merge; give at least one")
    for number, other in enumerate(others):
        if base is not None:
            _check_same_tensors(f"model {number}", other, flat, "the base")
        else:
            _check_same_tensors(f"model {number}", other, others[0], "model 0")
    return flat, others


def _check_same_tensors(which: str, tree: Mapping[str, Array], expected: Mapping[str, Array], other: str) -> None:
    for name in tree.keys() ^ expected.keys():
        present, absent = (which, other) if name in tree else (other, which)
        near = did_you_mean(name, expected if name in tree else tree)
        raise InputError(f"{name!r} is in {present} and not in {absent}{near}; merge models of one base")
    for name, leaf in expected.items():
        if tree[name].shape != leaf.shape:
            raise InputError(f"{name!r} is {tree[name].shape} in {which} and {leaf.shape} in {other}")
