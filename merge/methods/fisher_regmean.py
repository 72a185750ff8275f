"""Merges weighted by data statistics: Fisher information, and the Gram matrices of linear layers' inputs (RegMean)."""

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
from merge.methods.linear import WEIGHT, check, weighted


def fisher(leaf: Leaf, *, weight: Sequence[float] | Array, eps: float = 1e-6) -> Any:
    """Return ``sum_m w_m (F_m + eps) t_m / sum_m w_m (F_m + eps)`` (Matena & Raffel 2022, arXiv 2111.09832).

    F_m are the leaf's statistics, at least 0: for each parameter, the mean over examples of the squared gradient of the
    example's log-likelihood.
    """
    return leaf.map(_fisher_mean, numbers(weight), numbers(eps))


def regmean(leaf: Leaf, *, alpha: float | Array = 1.0, grams: Sequence[Array] | None = None) -> Any:
    """Return ``(sum_m G_m)^-1 sum_m G_m W_m`` of kernels W (in, out) (Jin et al. 2023, arXiv 2212.09849).

    Args:
      leaf: a matrix (out, in) as Hugging Face stores it, ``y = x @ W^T``. Other tensors get the plain mean.
      alpha: in [0, 1], the factor of the off-diagonal elements of G.
      grams: (in, in) for each model, the mean of ``X^T X`` over tokens, X the layer's inputs; None: take the plain mean.
    """
    if grams is None or len(leaf.shape) != 2:
        return leaf.map(weighted, np.full(leaf.count, 1 / leaf.count, np.float32))
    width = leaf.shape[-1]
    for model, gram in enumerate(grams):
        if gram.shape != (width, width):
            raise InputError(
                f"{leaf.name!r}: Gram matrix {model} is {gram.shape}; expected {(width, width)}, inputs by inputs"
            )
    return leaf.map(_projected, _projections(grams, alpha))


def _projections(grams: Sequence[Array], alpha: float | Array) -> list[jax.Array]:
    """Return ``G_m (sum_k G_k)^-1`` for each model, (in, in): the factors of the rows of W_m."""
    # An input that never occurs makes the sum singular. float64, where available, needs a smaller ridge.
    traced = any(isinstance(value, Tracer) for value in (alpha, *grams))
    xp, kind = (jnp, jnp.float32) if traced else (np, np.float64)
    scaled = []
    for gram in grams:
        gram = xp.asarray(gram, kind)
        scaled.append(alpha * gram + (1 - alpha) * xp.diag(xp.diagonal(gram)))
    total, width = sum(scaled[1:], scaled[0]), scaled[0].shape[0]
    small = float(np.finfo(kind).eps) * width * xp.trace(total) / width
    ridge = xp.where(small > 0, small, 1) / len(scaled) * xp.eye(width, dtype=kind)
    inverse = xp.linalg.inv(total + len(scaled) * ridge)
    return [jnp.asarray((gram + ridge) @ inverse, jnp.float32) for gram in scaled]


def _projected(tile: Tile, projections: list[jax.Array]) -> jax.Array:
    highest = jax.lax.Precision.HIGHEST
    products = [jnp.matmul(v, p, precision=highest) for v, p in zip(tile.values, projections, strict=True)]
    return sum(products, jnp.float32(0))


def _fisher_mean(tile: Tile, weights: jax.Array, eps: jax.Array) -> jax.Array:
    if len(tile.statistics) != len(tile.models):
        raise InputError(f"fisher needs the statistics of {len(tile.models)} models; found {len(tile.statistics)}")
    shares = [weights[model] * (values.astype(jnp.float32) + eps) for model, values in enumerate(tile.statistics)]
    total = sum((share * value for share, value in zip(shares, tile.values, strict=True)), jnp.float32(0))
    return total / sum(shares, jnp.float32(0))


METHODS = {
    "fisher": Method(
        fisher,
        {"weight": WEIGHT},
        {"eps": Option(float, 1e-6, "added to the Fisher information of every parameter", 0, low_open=True)},
        "mean of the models, weighted by the Fisher information of each element (arXiv 2111.09832)",
        base="none",
        statistics="elements",
        check=check,
    ),
    "regmean": Method(
        regmean,
        {},
        {"alpha": Option(float, 1.0, "factor of the off-diagonal elements of the Gram matrices", 0, 1)},
        "least-squares fit to the outputs of every linear layer (RegMean, arXiv 2212.09849)",
        base="none",
        statistics="grams",
        by_rows=lambda **options: True,
    ),
}
