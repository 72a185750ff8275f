"""Weighted sums of models and of their changes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax.errors import InputError
from dsee_jax.typing import Array
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option


def linear(leaf: Leaf, *, weight: Sequence[float] | Array, normalize: bool = True) -> Any:
    """Return ``sum_m w_m t_m``, over ``sum_m w_m`` when ``normalize`` (Wortsman et al. 2022, arXiv 2203.05482)."""
    weights = numbers(weight)
    return leaf.map(weighted, weights / weights.sum() if normalize else weights)


def task_arithmetic(
    leaf: Leaf,
    *,
    weight: Sequence[float] | Array,
    normalize: bool = False,
    scale: float | Array = 1.0,
    **unused: Any,
) -> Any:
    """Return ``t0 + scale * sum_m w_m (t_m - t0)`` (Ilharco et al. 2023, arXiv 2212.04089).

    ``normalize`` divides by the sum of the weights, from `divisor`. The other options have no effect; mergekit's recipes may
    hold them.
    """
    weights = numbers(weight)
    with np.errstate(over="ignore"):  # the merge checks its result
        factors = weights * numbers(scale) / (divisor(weights) if normalize else 1)
    return leaf.map(moved, factors)


def passthrough(leaf: Leaf, *, scale: Sequence[float] | Array = (1.0,)) -> Any:
    """Return the only model times ``scale``."""
    return leaf.map(weighted, numbers(scale))


def weighted(tile: Tile, weights: jax.Array) -> jax.Array:
    """Return ``sum_m w_m t_m``, ``weights`` (models,)."""
    return sum((weights[model] * value for model, value in enumerate(tile.values)), jnp.float32(0))


def moved(tile: Tile, weights: jax.Array) -> jax.Array:
    """Return ``t0 + sum_m w_m (t_m - t0)``, ``weights`` (models,)."""
    return tile.origin + sum((weights[model] * delta for model, delta in enumerate(tile.deltas)), jnp.float32(0))


def divisor(weights: Array) -> Array:
    """Return the sum () of ``weights`` (models,), or 1 where the sum is below 1e-8 in magnitude, as mergekit does."""
    xp = jnp if isinstance(weights, jax.Array) else np
    total = weights.sum()
    return xp.where(xp.abs(total) < 1e-8, xp.float32(1), total)


def check(where: str, *, weight: Any, normalize: Any = True, **others: Any) -> None:
    """Raise `InputError` for concrete weights that sum to 0, if they are divided by their sum."""
    if normalize and not isinstance(weight, Tracer) and abs(sum(map(float, weight))) < 1e-8:
        raise InputError(f"{where}: the weights sum to 0 and cannot be normalized; change them or normalize: false")


WEIGHT = Option(float, None, "weight of the model")
NORMALIZE = "divide by the sum of the weights"
LAMBDA = Option(float, 1.0, "factor of the merged change")
INT8_MASK = Option(bool, False, "no effect; accepted for mergekit's recipes", effect=False)

METHODS = {
    "linear": Method(
        linear,
        {"weight": WEIGHT},
        {"normalize": Option(bool, True, NORMALIZE)},
        "weighted mean of the models (model soups, arXiv 2203.05482)",
        base="none",
        check=check,
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        {"weight": WEIGHT, "density": Option(float, 1.0, INT8_MASK.help, 0, 1, effect=False)},
        {
            "normalize": Option(bool, False, NORMALIZE),
            "lambda": LAMBDA,
            "rescale": INT8_MASK,
            "int8_mask": INT8_MASK,
        },
        "base plus the weighted sum of the models' changes (arXiv 2212.04089)",
    ),
    "passthrough": Method(
        passthrough,
        {"scale": Option(float, 1.0, "factor of every element")},
        {},
        "one model, unchanged or scaled; for slices",
        base="none",
        models=(1, 1),
    ),
}
