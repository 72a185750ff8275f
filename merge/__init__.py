"""Merge fine-tuned models of one base, in memory: any nested dicts of arrays with the same paths and shapes.

merged = merge.merge(base, [model_a, model_b], method="rankmean", unit="layer")
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.aliases import Array, Params
from dsee_jax.errors import InputError, did_you_mean
from merge import units
from merge.methods import linear, rankmean

__all__ = ["METHODS", "merge", "rankmean_coefficients"]

METHODS = ("linear", "rankmean", "task_arithmetic")


def merge(base: Params, models: Sequence[Params], *, method: str = "rankmean", **options: Any) -> dict[str, Any]:
    """Return the merge of ``models``, computed in float32, each tensor in the dtype of the base's.

    Args:
      base: what all models were tuned from.
      models: one or more trees with the paths and shapes of ``base``.
      method: one of `METHODS`.
      **options: ``linear``: ``weights`` (models,), default equal, ``normalize`` (default True).
        ``task_arithmetic``: ``weights`` (models,), default 1 each, ``normalize`` (default False), ``scale`` (default 1).
        ``rankmean``: as `rankmean_coefficients`, or ``coefficients``, what that returned.

    Raises:
      InputError: unknown method or option, no models, or trees that do not match; the message names the path.
    """
    flat, others = _matched(base, models)
    count = len(others)
    known = {
        "linear": {"weights", "normalize"},
        "task_arithmetic": {"weights", "normalize", "scale"},
        "rankmean": {"unit", "order", "ties", "coefficients"},
    }
    if method not in known:
        raise InputError(f"no merge method {method!r}{did_you_mean(method, METHODS)}; there are {', '.join(METHODS)}")
    for option in options.keys() - known[method]:
        raise InputError(
            f"{method} has no option {option!r}{did_you_mean(option, known[method])}; it has {sorted(known[method])}"
        )
    if method == "rankmean":
        given = options.pop("coefficients", None)
        shares = given if given is not None else rankmean_coefficients(base, models, **options)
        where = units.of(list(flat), options.get("unit", "layer"))
        plain = jnp.full(count, 1 / count, jnp.float32)
        weights: Mapping[str, Array] = {
            name: plain if (unit := where[name]) is None else jnp.asarray(shares[unit]) for name in flat
        }
        combine = linear.linear
    else:
        mean = method == "linear"
        shared = jnp.asarray(options.get("weights", jnp.ones(count)), jnp.float32)
        if shared.shape != (count,):
            raise InputError(f"weights has shape {shared.shape}; there are {count} models: give one each")
        if options.get("normalize", mean):
            shared = shared / jnp.sum(shared)
        weights = dict.fromkeys(flat, shared * options.get("scale", 1.0))
        combine = linear.linear if mean else linear.task_arithmetic
    return tree.unflatten(
        {
            name: combine(leaf, [other[name] for other in others], weights[name]).astype(leaf.dtype)
            for name, leaf in flat.items()
        }
    )


def rankmean_coefficients(
    base: Params,
    models: Sequence[Params],
    *,
    unit: str = "layer",
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> dict[str, jax.Array]:
    """Return RankMean's ``{unit: coefficients (models,)}``, each summing to 1.

    Tensors outside every unit get the plain mean in `merge` and do not appear here.

    Args:
      base: what all models were tuned from.
      models: trees with the paths and shapes of ``base``.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.
      order: ``ascending`` is the paper's; see `merge.methods.rankmean`.
      ties: equal changes share their ``mean`` rank, or rank in ``order`` of the units as in the authors' code.
    """
    flat, others = _matched(base, models)
    where = units.of(list(flat), unit)
    found = [
        units.changes({name: jnp.asarray(other[name], jnp.float32) - flat[name] for name in flat}, where)
        for other in others
    ]
    scores = jnp.stack([jnp.stack(list(sums.values())) for sums in found])
    shares = rankmean.coefficients(scores, order=order, ties=ties)
    return {name: shares[:, number] for number, name in enumerate(found[0])}


def _matched(base: Params, models: Sequence[Params]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    flat, others = tree.flatten(base), [tree.flatten(model) for model in models]
    if not others:
        raise InputError("no models to merge; give at least one")
    for number, other in enumerate(others):
        for name in flat.keys() ^ other.keys():
            holder, lacking = ("the base", f"model {number}") if name in flat else (f"model {number}", "the base")
            near = did_you_mean(name, other if name in flat else flat)
            raise InputError(f"{name!r} is in {holder} and not in {lacking}{near}; merge models of one base")
        for name, leaf in flat.items():
            if other[name].shape != leaf.shape:
                raise InputError(f"{name!r} is {other[name].shape} in model {number} and {leaf.shape} in the base")
    return flat, others
