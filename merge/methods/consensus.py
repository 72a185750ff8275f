"""Sparse changes, summed or elected: TIES, DARE, DELLA and Breadcrumbs, each with mergekit's options.

Each model's change is thinned out (``sparse``), rescaled, weighted, and added to the others' or, after an election of the
sign at every element, to those that agree with it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.aliases import Array
from dsee_jax.errors import InputError
from merge import noise, select
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option
from merge.methods import linear
from merge.select import Cut

Weights = Sequence[float] | Array


def ties(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Sequence[float],
    trim_ties: str = "order",
    cut: Cut | None = None,
    **options: Any,
) -> Any:
    """Keep each model's largest changes, elect the signs, average what agrees (Yadav et al. 2023, arXiv 2306.01708).

    Args:
      leaf: one tensor.
      weight: (models,).
      density: (models,) in (0, 1], the fraction of changes kept.
      trim_ties: ``order`` keeps exactly ``max(1, int(density * n))`` elements, the first of equal ones; ``keep`` keeps all at
        or above the ``int((1 - density) * n)``-th smallest, as the authors' code does.
      cut: what `trims` found over the whole model; default: of this tensor alone.
      **options: see `combined`, and ``rescale`` (to the sum of |change| before).
    """
    if cut is None:
        size = prod(leaf.shape)
        counts = [_trimmed_count(share, size, trim_ties) for share in density]
        (cut,) = select.largest([leaf], select.magnitudes, counts, every_tie=trim_ties == "keep")
    return _merge(leaf, _trimmed, cut, weight, elect=True, **options)


def trims(leaves: Sequence[Leaf], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each leaf the `Cut` over all leaves with ``trim: global``, as keyword ``cut``; none for the others."""
    chosen = [number for number, given in enumerate(options) if given.get("trim") == "global"]
    found: list[dict[str, Any]] = [{} for _ in leaves]
    if chosen:
        rule = options[chosen[0]].get("trim_ties", "order")
        size = sum(prod(leaves[number].shape) for number in chosen)
        shares = [
            sum(prod(leaves[n].shape) * options[n]["density"][model] for n in chosen) / size
            for model in range(leaves[chosen[0]].count)
        ]
        counts = [_trimmed_count(share, size, rule) for share in shares]
        cuts = select.largest([leaves[n] for n in chosen], select.magnitudes, counts, every_tie=rule == "keep")
        for number, cut in zip(chosen, cuts, strict=True):
            found[number] = {"cut": cut}
    return found


def dare(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Weights,
    elect: bool,
    seed: int = 0,
    rescale: bool = True,
    rescale_norm: str = "l1",
    **options: Any,
) -> Any:
    """Keep each change with probability ``density``, whatever its size (Yu et al. 2024, arXiv 2311.03099).

    ``rescale`` makes up for what is dropped: ``l1`` to the sum of |change| before, ``inverse`` by 1 / density (the paper's).
    """
    inverse = rescale and rescale_norm == "inverse"
    rule = (_words(leaf, seed), numbers(density))
    sparse = _dropped_inverse if inverse else _dropped
    return _merge(leaf, sparse, rule, weight, elect=elect, rescale=rescale and not inverse, **options)


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
    """Keep changes with a probability that grows with their rank in their row (Deep et al. 2024, arXiv 2406.11617).

    From ``density - epsilon`` for the smallest |change| of a row to ``density + epsilon`` for its largest; all where density
    is 1. ``rescale`` as `dare`, ``inverse`` by 1 / the element's own probability.
    """
    inverse = rescale and rescale_norm == "inverse"
    rule = (_words(leaf, seed), numbers(density), numbers(epsilon))
    sparse = _pruned_inverse if inverse else _pruned
    return _merge(leaf, sparse, rule, weight, elect=elect, rescale=rescale and not inverse, **options)


def breadcrumbs(
    leaf: Leaf, *, weight: Weights, density: Sequence[float], gamma: Sequence[float], elect: bool, **options: Any
) -> Any:
    """Drop the ``gamma`` largest changes and the smallest ones (Davari & Belilovsky 2023, arXiv 2312.06795).

    ``max(1, int(density * n))`` are kept; fewer of the largest go where these would not be enough.
    """
    size = prod(leaf.shape)
    kept = [_count(share, size) for share in density]
    top = [min(int(share * size), size - count) for share, count in zip(gamma, kept, strict=True)]
    upto = [count + largest for count, largest in zip(kept, top, strict=True)]
    (cut,) = select.largest([leaf], _magnitudes_twice, [*upto, *top])
    return _merge(leaf, _banded, cut, weight, elect=elect, **options)


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
      deltas: one for each model, of one shape.
      weights: (models,).
      scale: ().
      elect: sum at each element only the changes whose sign is that of the sum of all votes (a sum of 0 is positive).
      normalize: divide by the sum of the weights; after an election by that of the weights that agree.
      vote: ``weighted``: w_m d_m, ``unweighted``: d_m.
    """
    terms = [weights[model] * delta for model, delta in enumerate(deltas)]
    if not elect:
        total, divisor = sum(terms, jnp.float32(0)), jnp.sum(weights)
        return base + scale * (total / divisor if normalize else total)
    votes = terms if vote == "weighted" else deltas
    positive = sum(votes, jnp.float32(0)) >= 0
    agrees = [jnp.where(positive, value > 0, value < 0) for value in votes]
    total = sum((jnp.where(agree, term, 0) for agree, term in zip(agrees, terms, strict=True)), jnp.float32(0))
    if normalize:
        divisor = sum((jnp.where(agree, weights[model], 0) for model, agree in enumerate(agrees)), jnp.float32(0))
        total = total / jnp.where(divisor == 0, 1, divisor)
    return base + scale * total


def _merge(
    leaf: Leaf,
    sparse: Callable[..., list[jax.Array]],
    rule: Any,
    weight: Weights,
    *,
    elect: bool,
    normalize: bool,
    rescale: bool = False,
    scale: float | Array = 1.0,
    vote: str = "weighted",
    **unused: Any,
) -> Any:
    factors: Array = np.ones(leaf.count, np.float32)
    if rescale:
        factors = _factors(*(numbers(sums) for sums in leaf.fold(_sums, rule, sparse=sparse)))
    static = {"sparse": sparse, "elect": elect, "normalize": normalize, "vote": vote}
    return leaf.map(_merged, rule, numbers(weight), factors, numbers(scale), **static)


@jax.jit
def _factors(before: Array, after: Array) -> jax.Array:
    """Return what makes sums of |change| what they were, 1 where there is too little to tell."""
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


def _trimmed(tile: Tile, cut: Cut) -> list[jax.Array]:
    positions = tile.positions
    return [jnp.where(cut.kept(model, jnp.abs(delta), positions), delta, 0) for model, delta in enumerate(tile.deltas)]


def _banded(tile: Tile, cut: Cut) -> list[jax.Array]:
    positions, count = tile.positions, len(tile.models)

    def kept(model: int, size: jax.Array) -> jax.Array:
        return cut.kept(model, size, positions) & ~cut.kept(model + count, size, positions)

    return [jnp.where(kept(model, jnp.abs(delta)), delta, 0) for model, delta in enumerate(tile.deltas)]


def _dropped(tile: Tile, rule: tuple[jax.Array, jax.Array], *, inverse: bool = False) -> list[jax.Array]:
    words, densities = rule
    return [
        _drawn(delta, densities[model], words[model], tile.positions, inverse=inverse)
        for model, delta in enumerate(tile.deltas)
    ]


def _pruned(tile: Tile, rule: tuple[jax.Array, jax.Array, jax.Array], *, inverse: bool = False) -> list[jax.Array]:
    words, densities, epsilons = rule

    def chance(model: int, size: jax.Array) -> jax.Array:
        # In a row of one element nothing is smaller or larger: the middle.
        last = size.shape[-1] - 1
        rank = jnp.argsort(jnp.argsort(size, axis=-1), axis=-1) / last if last else jnp.full(size.shape, 0.5)
        return jnp.where(densities[model] >= 1, 1, densities[model] + epsilons[model] * (2 * rank - 1))

    return [
        _drawn(delta, chance(model, jnp.abs(delta)), words[model], tile.positions, inverse=inverse)
        for model, delta in enumerate(tile.deltas)
    ]


def _dropped_inverse(tile: Tile, rule: Any) -> list[jax.Array]:
    return _dropped(tile, rule, inverse=True)


def _pruned_inverse(tile: Tile, rule: Any) -> list[jax.Array]:
    return _pruned(tile, rule, inverse=True)


def _drawn(delta: jax.Array, chance: jax.Array, words: jax.Array, positions: jax.Array, *, inverse: bool) -> jax.Array:
    return jnp.where(noise.uniform(words, positions) < chance, delta / chance if inverse else delta, 0)


def _magnitudes_twice(tile: Tile) -> list[jax.Array]:
    return 2 * select.magnitudes(tile)


def _words(leaf: Leaf, seed: int) -> np.ndarray:
    return np.stack([noise.words(seed, leaf.name, model) for model in range(leaf.count)])


def _count(share: float, size: int) -> int:
    return min(size, max(1, int(share * size)))


def _trimmed_count(share: float, size: int, trim_ties: str) -> int:
    return _count(share, size) if trim_ties == "order" else min(size, size - int((1 - share) * size) + 1)


def _check(
    where: str, *, weight: Any, density: Any, normalize: Any, elect: bool, epsilon: Any = None, **others: Any
) -> None:
    for share, window in zip(density, epsilon or (), strict=False):
        if share < 1 and not window < share < 1 - window:
            raise InputError(
                f"{where}: density {share:g} and epsilon {window:g} give chances from {share - window:g} to "
                f"{share + window:g}; expected both in (0, 1): lower epsilon"
            )
    if not elect:
        linear.check(where, weight=weight, normalize=normalize)


DENSITY = Option(float, 1.0, "fraction of the model's changes kept", 0, 1, low_open=True)
EACH = {"weight": linear.WEIGHT, "density": DENSITY}
SEED = Option(int, 0, "of the random choice", 0)
RESCALE_NORM = Option(str, "l1", "rescale to the sum of |change| or by 1 / the chance", choices=("l1", "inverse"))
RANDOM = {"rescale_norm": RESCALE_NORM, "seed": SEED}


def _shared(*, normalize: bool, rescale: bool) -> dict[str, Option]:
    return {
        "normalize": Option(bool, normalize, linear.NORMALIZE),
        "lambda": linear.LAMBDA,
        "rescale": Option(bool, rescale, "scale what is kept up to the size of all"),
        "int8_mask": Option(bool, False, linear.UNUSED),
    }


METHODS = {
    "ties": Method(
        ties,
        EACH,
        {
            **_shared(normalize=True, rescale=False),
            "trim": Option(str, "tensor", "trim each tensor, or over the whole model", choices=("tensor", "global")),
            "vote": Option(str, "weighted", "elect on weighted changes or not", choices=("weighted", "unweighted")),
            "trim_ties": Option(
                str, "order", "of equal changes keep the first, or keep all (the authors')", choices=("order", "keep")
            ),
        },
        "trim, elect signs, average what agrees (arXiv 2306.01708)",
        prepare=trims,
    )
}
for _elect, _dare, _della, _breadcrumbs in (
    (True, "dare_ties", "della", "breadcrumbs_ties"),
    (False, "dare_linear", "della_linear", "breadcrumbs"),
):
    _how = "then elect signs" if _elect else "then sum"
    METHODS[_dare] = Method(
        partial(dare, elect=_elect),
        EACH,
        {**_shared(normalize=False, rescale=True), **RANDOM},
        f"drop changes at random, {_how} (arXiv 2311.03099)",
        exact=False,
        check=partial(_check, elect=_elect),
    )
    METHODS[_della] = Method(
        partial(della, elect=_elect),
        {**EACH, "epsilon": Option(float, 0.15, "half the width of the window of chances", 0, 1)},
        {**_shared(normalize=_elect, rescale=True), **RANDOM},
        f"drop changes at random, small ones first, {_how} (arXiv 2406.11617)",
        by_rows=lambda **options: True,
        exact=False,
        check=partial(_check, elect=_elect),
    )
    METHODS[_breadcrumbs] = Method(
        partial(breadcrumbs, elect=_elect),
        {**EACH, "gamma": Option(float, 0.01, "fraction of the largest changes dropped", 0, 1)},
        _shared(normalize=False, rescale=False),
        f"drop the largest and the smallest changes, {_how} (arXiv 2312.06795)",
        check=partial(_check, elect=_elect),
    )
