"""Sparse changes and their sum, which TIES, DARE, DELLA and Breadcrumbs share, each with mergekit's options.

Each model's change is sparsified, rescaled and weighted. Without an election, all changes are added up. With an election, the
sign of each element is elected, and only the changes of that sign are added up.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.typing import Array
from merge import noise
from merge.leaf import Leaf, Tile, numbers
from merge.method import Option
from merge.methods import linear

Weights = Sequence[float] | Array


def combined(
    base: jax.Array,
    deltas: Sequence[jax.Array],
    weights: jax.Array,
    scale: Array,
    *,
    elect: bool,
    normalize: bool,
    vote: str = "weighted",
) -> jax.Array:
    """Return base + scale * the weighted sum of the changes.

    Args:
      base: t0.
      deltas: the changes of the models, all of one shape.
      weights: (models,).
      scale: ().
      elect: at each element, add up only the changes with the sign of the sum of all votes (a sum of 0 is positive).
      normalize: divide by the sum of the weights, from `merge.methods.linear.divisor`; after an election, by the sum of the
        agreeing models' weights, or by 1 where that is 0.
      vote: a model's vote; ``weighted``: w_m d_m, ``unweighted``: d_m.
    """
    terms = [weights[model] * delta for model, delta in enumerate(deltas)]
    if not elect:
        total = sum(terms, jnp.float32(0))
        return base + scale * (total / linear.divisor(weights) if normalize else total)
    votes = terms if vote == "weighted" else deltas
    positive = sum(votes, jnp.float32(0)) >= 0
    agrees = [jnp.where(positive, value > 0, value < 0) for value in votes]
    total = sum((jnp.where(agree, term, 0) for agree, term in zip(agrees, terms, strict=True)), jnp.float32(0))
    if normalize:
        divisor = sum((jnp.where(agree, weights[model], 0) for model, agree in enumerate(agrees)), jnp.float32(0))
        total = total / jnp.where(divisor == 0, 1, divisor)
    return base + scale * total


class Sparsifier(NamedTuple):
    """A way to sparsify the changes of a tile."""

    function: Callable[..., list[jax.Array]]  # function(tile, rule) returns the sparse change of each model
    rule: Any  # arrays that the function takes


def merge_sparse(
    leaf: Leaf,
    sparsifier: Sparsifier,
    weight: Weights,
    *,
    elect: bool,
    normalize: bool,
    rescale: bool = False,
    scale: float | Array = 1.0,
    vote: str = "weighted",
    **unused: Any,
) -> Any:
    """Return the base plus the combined sparse changes.

    Args:
      leaf: one tensor.
      sparsifier: gives the sparse changes.
      weight: (models,).
      elect: see `combined`.
      normalize: see `combined`.
      rescale: scale each model's sparse change to the sum of |change| before sparsification.
      scale: factor of the merged change.
      vote: see `combined`.
      **unused: options of mergekit that change nothing.
    """
    sparse, rule = sparsifier
    factors: Array = np.ones(leaf.count, np.float32)
    if rescale:
        factors = _factors(*(numbers(sums) for sums in leaf.fold(_sums, rule, sparse=sparse)))
    static = {"sparse": sparse, "elect": elect, "normalize": normalize, "vote": vote}
    return leaf.map(_merged, rule, numbers(weight), factors, numbers(scale), **static)


@jax.jit
def _factors(before: Array, after: Array) -> jax.Array:
    """Return the factors that restore the sums of |change|; 1 where a sum is below 1e-7."""
    small = (before < 1e-7) | (after < 1e-7)
    return jnp.where(small, 1, before / jnp.where(small, 1, after))


def _merged(
    tile: Tile, rule: Any, weights: jax.Array, factors: jax.Array, scale: jax.Array, *, sparse: Any, **static: Any
) -> jax.Array:
    deltas = [factors[model] * delta for model, delta in enumerate(sparse(tile, rule))]
    return combined(tile.origin, deltas, weights, scale, **static)


def _sums(tile: Tile, rule: Any, *, sparse: Any) -> tuple[jax.Array, jax.Array]:
    return _sizes(tile.deltas), _sizes(sparse(tile, rule))


def _sizes(values: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.abs(value)) for value in values])


def draw(
    delta: jax.Array, probability: jax.Array, words: jax.Array, positions: jax.Array, *, inverse: bool
) -> jax.Array:
    """Return ``delta`` with each element kept with probability ``probability``, and else 0.

    Args:
      delta: one model's change.
      probability: in [0, 1], shaped like ``delta``, or ().
      words: uint32 (2,), from `key_words`.
      positions: uint32, shaped like ``delta``.
      inverse: divide by ``probability``.
    """
    kept = delta / jnp.where(probability > 0, probability, 1) if inverse else delta
    return jnp.where(noise.uniform(words, positions) < probability, kept, 0)


def key_words(leaf: Leaf, seed: int) -> np.ndarray:
    """Return the key words of a tensor's random numbers, uint32 (models, 2)."""
    return np.stack([noise.words(seed, leaf.name, model) for model in range(leaf.count)])


def kept_count(share: float, size: int) -> int:
    """Return the number of elements to keep of ``size`` at a density of ``share``: at least 1, unless the density is 0."""
    return min(size, max(1, int(share * size))) if share > 0 else 0


DENSITY = Option(float, 1.0, "fraction of the model's changes that is kept", 0, 1)
EACH = {"weight": linear.WEIGHT, "density": DENSITY}
COUNTED = {"weight": linear.WEIGHT, "density": DENSITY._replace(static=True)}
"""The options for each model, where exactly that fraction is kept."""
SEED = Option(int, 0, "seed of the random numbers", 0)
RESCALE_NORM = Option(
    str, "l1", "l1: restore the sum of |change|; inverse: divide by the keep probability", choices=("l1", "inverse")
)
RANDOM = {"rescale_norm": RESCALE_NORM, "seed": SEED}


def shared_options(*, normalize: bool, rescale: bool) -> dict[str, Option]:
    """Return the options that all these methods share; the arguments are two defaults."""
    return {
        "normalize": Option(bool, normalize, linear.NORMALIZE),
        "lambda": linear.LAMBDA,
        "rescale": Option(bool, rescale, "scale the kept changes to make up for the dropped changes"),
        "int8_mask": linear.INT8_MASK,
    }
