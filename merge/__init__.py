"""Merge fine-tuned models of one base, in memory: any pytrees of arrays with the same structure.

merged = merge.merge(base, [model_a, model_b], method="rankmean", unit="layer")
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax.aliases import Array
from dsee_jax.errors import InputError, did_you_mean
from merge.leaf import Whole
from merge.method import KEYWORDS, Method, Option
from merge.methods import METHODS, find, rankmean

__all__ = ["METHODS", "merge", "rankmean_coefficients"]


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

    Works under ``jit`` and ``grad`` (with respect to numbers such as ``weight``, ``scale``, ``t``, ``coefficients``), and on
    sharded arrays. A tensor's name is its path in the tree, keys joined by ``/``. Tensors that are not of floating point are
    the base's.

    Args:
      base: what all models were tuned from: a pytree of arrays. None for methods that do without; then the first model stands
        for the structure, the dtypes, and what is not of floating point. Methods that mix models as they are (``linear``,
        ``karcher``...) do not count the base among them; ``slerp`` and ``nearswap`` go from it to the only model.
      models: trees with the names and shapes of ``base``.
      method: one of `METHODS`, where its options, their ranges and their meaning are.
      statistics: for ``fisher``: one tree for each model like the models, of mean squared gradients.
      grams: for ``regmean``: for each model ``{name: (in, in)}`` of some matrices, which are (out, in) as in Hugging Face's
        layout.
      **options: an option of each model is a number for all, or a sequence of one for each; ``weight`` is 1 where not given.
        mergekit's ``lambda`` is ``scale`` here, and the method under ``lines`` is ``over``. ``rankmean`` also takes
        ``coefficients``, what `rankmean_coefficients` returned.

    Raises:
      InputError: unknown method or option, a value out of range, too few or too many models, or trees that do not match; the
        message names the path.
    """
    found = find(method, options)
    given = _options(found, method, options, len(models))
    if found.base == "required" and base is None:
        raise InputError(f"{method} measures changes from a base; give the base and not None")
    fewest, most = found.models
    if models and not fewest <= len(models) <= (most or len(models)):
        expected = f"{fewest}" if most == fewest else f"at least {fewest}"
        raise InputError(f"{method} merges {expected} besides the base; found {len(models)}")
    flat, others = _matched(base, models)
    first = flat or others[0]
    gathered = [_named(tree) for tree in statistics or ()]
    for number, tree in enumerate(gathered):
        _match(f"statistics {number}", tree, first, "the models")
    names = [name for name, leaf in first.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    use_base = found.base != "none" or method == "lines"
    leaves = [
        Whole(
            name,
            _lined(flat[name]) if flat and use_base else None,
            tuple(_lined(other[name]) for other in others),
            tuple(_lined(tree[name]) for tree in gathered),
        )
        for name in names
    ]
    extra: list[dict[str, Any]] = [{} for _ in leaves]
    if found.prepare and leaves:
        extra = found.prepare(leaves, [given] * len(leaves))
    if grams is not None:
        extra = [more | _grams(leaf.name, grams, len(models)) for leaf, more in zip(leaves, extra, strict=True)]
    merged = dict(first)
    for leaf, more in zip(leaves, extra, strict=True):
        like = first[leaf.name]
        result = found.merge(leaf, **given | more)
        merged[leaf.name] = result.reshape(like.shape).astype(jax.dtypes.canonicalize_dtype(like.dtype))
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
    """Return RankMean's ``{unit: coefficients (models,)}``, each summing to 1.

    Tensors outside every unit get the plain mean in `merge` and do not appear here.

    Args:
      base: what all models were tuned from.
      models: trees with the paths and shapes of ``base``.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.
      order: ``ascending`` is the paper's; see `merge.methods.rankmean`.
      ties: equal changes share their ``mean`` rank, or rank in ``order`` of the units as in the authors' code.
    """
    given = _options(METHODS["rankmean"], "rankmean", {"unit": unit, "order": order, "ties": ties}, len(models))
    flat, others = _matched(base, models)
    leaves = [
        Whole(name, _lined(leaf), tuple(_lined(other[name]) for other in others))
        for name, leaf in flat.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return rankmean.looked(leaves, **given)[0]


def _options(method: Method, name: str, options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return every option of ``method`` by its keyword, checked."""
    known = {KEYWORDS.get(key, key): option for key, option in {**method.each, **method.shared}.items()}
    each = {KEYWORDS.get(key, key) for key in method.each}
    beside = {"coefficients"} if name == "rankmean" or options.get("over") == "rankmean" else set()
    for key in options:
        if key not in known and key not in beside:
            near = did_you_mean(key, known)
            raise InputError(f"{name} has no option {key!r}{near}; it has {', '.join(sorted(known)) or 'none'}")
    found: dict[str, Any] = {key: options[key] for key in beside & options.keys()}
    for key, option in known.items():
        default = 1.0 if key == "weight" else option.default
        value = options.get(key, default)
        if value is None:
            raise InputError(f"{name} needs the option {key!r}: {option.help}; expected {option.expected}")
        where = f"{name}: {key}"
        found[key] = _each(where, option, value, count) if key in each else _checked(where, option, value)
    method.check(name, **{key: value for key, value in found.items() if key not in beside})
    return found


def _each(where: str, option: Option, value: Any, count: int) -> Any:
    """Return ``value`` as one value for each of ``count`` models."""
    if isinstance(value, Tracer):
        if value.shape not in ((), (count,)):
            raise InputError(
                f"{where} has shape {value.shape} for {count} models; give one each, or one number for all"
            )
        return jnp.broadcast_to(value, (count,))
    listed = list(value) if isinstance(value, Sequence) or np.ndim(value) else [value] * count
    if len(listed) != count:
        raise InputError(f"{where} has {len(listed)} values for {count} models; give one each, or one number for all")
    checked = [_checked(f"{where}[{number}]", option, one) for number, one in enumerate(listed)]
    return jnp.stack(checked) if any(isinstance(one, Tracer) for one in checked) else checked


def _checked(where: str, option: Option, value: Any) -> Any:
    if isinstance(value, Tracer):
        if option.kind is not float:
            raise InputError(f"{where} is traced; expected a constant: close over it or make it static")
        return value
    return option.check(where, value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value)


def _grams(name: str, grams: Sequence[Mapping[str, Array]], count: int) -> dict[str, Any]:
    if len(grams) != count:
        raise InputError(f"{len(grams)} sets of Gram matrices for {count} models; give one each")
    found = [one[name] for one in grams if name in one]
    if found and len(found) < count:
        raise InputError(f"{len(found)} Gram matrices of {name!r} for {count} models; give one each or none")
    return {"grams": found} if found else {}


def _lined(leaf: Array) -> Array:
    """Methods see at least one axis."""
    return leaf if leaf.ndim else leaf.reshape(1)


def _named(tree: Any) -> dict[str, Array]:
    """Return ``{name: array}`` in the tree's own order."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for path, leaf in flat
    }


def _matched(base: Any, models: Sequence[Any]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    flat, others = _named(base), [_named(model) for model in models]
    if not others:
        raise InputError("no models to merge; give at least one")
    for number, other in enumerate(others):
        if base is not None:
            _match(f"model {number}", other, flat, "the base")
        else:
            _match(f"model {number}", other, others[0], "model 0")
    return flat, others


def _match(which: str, tree: Mapping[str, Array], expected: Mapping[str, Array], other: str) -> None:
    for name in tree.keys() ^ expected.keys():
        holder, lacking = (which, other) if name in tree else (other, which)
        near = did_you_mean(name, expected if name in tree else tree)
        raise InputError(f"{name!r} is in {holder} and not in {lacking}{near}; merge models of one base")
    for name, leaf in expected.items():
        if tree[name].shape != leaf.shape:
            raise InputError(f"{name!r} is {tree[name].shape} in {which} and {leaf.shape} in {other}")
