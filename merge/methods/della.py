"""DELLA: drop changes at random, small changes more often."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option
from merge.methods import sparsify
from merge.methods.sparsify import EACH, RANDOM, Sparsifier, Weights, draw, key_words, merge_sparse, shared_options


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
    """Return the merge of changes that are kept by their rank in their row (Deep et al. 2024, arXiv 2406.11617).

    The probability goes from ``density - epsilon`` for the smallest |change| of a row to ``density + epsilon`` for the
    largest; it is 1 where ``density`` is 1. ``rescale`` is as in `merge.methods.dare.dare`, but ``inverse`` divides by the
    element's own probability. The other options are those of `merge.methods.sparsify.merge_sparse`.
    """
    inverse = rescale and rescale_norm == "inverse"
    rule = (key_words(leaf, seed), numbers(density), numbers(epsilon))
    sparsifier = Sparsifier(_pruned_inverse if inverse else _pruned, rule)
    return merge_sparse(leaf, sparsifier, weight, elect=elect, rescale=rescale and not inverse, **options)


def _pruned(tile: Tile, rule: tuple[jax.Array, jax.Array, jax.Array], *, inverse: bool = False) -> list[jax.Array]:
    words, densities, epsilons = rule

    def chance(model: int, size: jax.Array) -> jax.Array:
        # The rank of a row's only element is the middle.
        last = size.shape[-1] - 1
        rank = jnp.argsort(jnp.argsort(size, axis=-1), axis=-1) / last if last else jnp.full(size.shape, 0.5)
        return jnp.where(densities[model] >= 1, 1, densities[model] + epsilons[model] * (2 * rank - 1))

    return [
        draw(delta, chance(model, jnp.abs(delta)), words[model], tile.positions, inverse=inverse)
        for model, delta in enumerate(tile.deltas)
    ]


def _pruned_inverse(tile: Tile, rule: Any) -> list[jax.Array]:
    return _pruned(tile, rule, inverse=True)


def _check(where: str, *, density: Any, epsilon: Any = None, **others: Any) -> None:
    for share, window in zip(density, epsilon or (), strict=False):
        if share < 1 and not window < share < 1 - window:
            raise InputError(
                f"{where}: density {share:g} and epsilon {window:g} give chances from {share - window:g} to "
                f"{share + window:g}; expected both in (0, 1): lower epsilon"
            )
    sparsify.check(where, **others)


def _method(*, elect: bool) -> Method:
    return Method(
        partial(della, elect=elect),
        {**EACH, "epsilon": Option(float, 0.15, "half the width of the window of chances", 0, 1)},
        {**shared_options(normalize=elect, rescale=True), **RANDOM},
        f"drop changes at random, small ones first, {'then elect signs' if elect else 'then sum'} (arXiv 2406.11617)",
        by_rows=lambda **options: True,
        exact=False,
        check=partial(_check, elect=elect),
    )


METHODS = {"della": _method(elect=True), "della_linear": _method(elect=False)}
