"""DELLA: drop changes at random, small changes more often."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dsee_jax.errors import InputError
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option
from merge.methods.sparse_sum import EACH, RANDOM, Sparsifier, Weights, draw, key_words, merge_sparse, shared_options


def della(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Weights,
    epsilon: Weights,
    elect: bool,
    seed: int = 0,
    rescale: bool = True,
    rescale_norm: str = "l1",
    **options: Any,
) -> Any:
    """Return the merge of changes that are kept at random, by their rank in the row (Deep et al. 2024, arXiv 2406.11617).

    The keep probability goes from ``density - epsilon`` for the smallest |change| of a row to ``density + epsilon`` for the
    largest; it is ``density`` where that is 0 or 1. ``rescale`` is as in `merge.methods.dare.dare`, but ``inverse`` divides by
    the element's own probability. The other options are those of `merge.methods.sparse_sum.merge_sparse`.
    """
    inverse = rescale and rescale_norm == "inverse"
    rule = (key_words(leaf, seed), numbers(density), numbers(epsilon))
    sparsifier = Sparsifier(_dropped_inverse if inverse else _dropped, rule)
    return merge_sparse(leaf, sparsifier, weight, elect=elect, rescale=rescale and not inverse, **options)


def _dropped(tile: Tile, rule: tuple[jax.Array, jax.Array, jax.Array], *, inverse: bool = False) -> list[jax.Array]:
    words, densities, epsilons = rule

    def probability(model: int, size: jax.Array) -> jax.Array:
        # The rank of a row's only element is the middle.
        last = size.shape[-1] - 1
        rank = jnp.argsort(jnp.argsort(size, axis=-1), axis=-1) / last if last else jnp.full(size.shape, 0.5)
        share = densities[model]
        return jnp.where((share <= 0) | (share >= 1), share, share + epsilons[model] * (2 * rank - 1))

    return [
        draw(delta, probability(model, jnp.abs(delta)), words[model], tile.positions, inverse=inverse)
        for model, delta in enumerate(tile.deltas)
    ]


def _dropped_inverse(tile: Tile, rule: Any) -> list[jax.Array]:
    return _dropped(tile, rule, inverse=True)


def _check(where: str, *, density: Any, epsilon: Any = None, **others: Any) -> None:
    for share, spread in zip(density, () if epsilon is None else epsilon, strict=False):
        if isinstance(share + spread, Tracer):
            continue
        if 0 < share < 1 and not spread < share < 1 - spread:
            raise InputError(
                f"{where}: density {share:g} and epsilon {spread:g} give probabilities from {share - spread:g} to "
                f"{share + spread:g}; expected both in (0, 1): lower epsilon"
            )


def _method(*, elect: bool) -> Method:
    return Method(
        partial(della, elect=elect),
        {
            **EACH,
            "epsilon": Option(float, 0.15, "keep probabilities go from density - epsilon to density + epsilon", 0, 1),
        },
        {**shared_options(normalize=elect, rescale=True), **RANDOM},
        f"drop changes at random, small changes more often, {'elect signs, then average' if elect else 'then sum'} "
        "(arXiv 2406.11617)",
        by_rows=lambda **options: True,
        exact=False,
        check=_check,
    )


METHODS = {"della": _method(elect=True), "della_linear": _method(elect=False)}
