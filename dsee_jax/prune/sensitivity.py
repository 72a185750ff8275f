"""The sensitivity of the loss to units: scores that compare between all units of a model (TAYLOR).

A unit ``u`` has a coefficient ``c_u``, as in a search of EarlyBERT, which is 1 in the model as it is and 0 without the unit.
The score is ::

    score(u)  =  sum over examples x of  (d loss(x) / d c_u  at  c = 1) ^ 2

The derivative is the change of the loss without the unit, to the first order (Michel et al., arXiv 1905.10650, who sum its
magnitudes; Molchanov et al., arXiv 1906.10771, who square it). The squares of examples are the diagonal of the empirical
Fisher information of the coefficients: in a trained model, where the gradients of the examples cancel, half of their mean
estimates the rise of the mean loss (Kwon et al., arXiv 2204.09656). So the scores of units add up, and those of heads and
neurons have one scale, which magnitudes of weights have not. A layer is scored by one coefficient for all of its heads and
neurons, whose derivative is the sum of theirs: effects of units that cancel in each example cancel in the score of the layer.
A hidden dimension is scored by one coefficient at all of its uses (`dsee_jax.prune.width.weighted`).
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.prune import earlybert, width
from dsee_jax.prune.layers import layer
from dsee_jax.typing import Cuts, Params

B = TypeVar("B")
"""A batch: a pytree of arrays with a leading axis of rows."""


def taylor(
    losses: Callable[[Any, B], jax.Array],
    params: Params,
    cuts: Cuts,
    batches: Iterable[B],
    *,
    hidden: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Return ``{kind: {layer: (units,)}, "layers": (layers,)}``, the scores over all rows of ``batches``, float32.

    With ``hidden`` there is ``"hidden": (width,)`` too.

    A row counts by itself, so that the scores do not depend on the sizes of the batches. Filler rows have a loss of 0.

    Args:
      losses: ``(params, batch) -> (rows,)``, the loss of each row, without dropout. It runs the Linen model.
      params: the params of the model, updates folded in; another pytree that holds them under the paths of ``cuts`` too.
      cuts: ``dsee_jax.models.cuts(model)``.
      batches: one pass over the calibration examples; batches of equal shapes compile once.
      hidden: ``dsee_jax.models.hidden_axes(model)``, to score hidden dimensions; None: they have no scores.

    Raises:
      InputError: there are no batches; or as `earlybert.attached`.
    """
    units: Any = earlybert.init(cuts, params)
    depth, start = max(map(len, cuts.values())), units if hidden is None else units | {"hidden": _ones(params, hidden)}

    @jax.jit
    def squares(params: Params, batch: B) -> Any:
        rows = len(jax.tree.leaves(batch)[0])
        # `width.weighted` tells an input of one row from an input without rows by the number of rows.
        batch = batch if rows > 1 else jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
        own = jnp.arange(max(rows, 2)) < rows

        def total(coefficients: Any) -> jax.Array:
            wide = coefficients.pop("hidden", None)
            narrowing = contextlib.nullcontext() if hidden is None else width.weighted(wide, hidden)
            with earlybert.attached(coefficients, cuts), narrowing:
                return jnp.sum(losses(params, batch))

        gradients = jax.grad(total)(jax.tree.map(lambda c: jnp.broadcast_to(c, (len(own), *c.shape)), start))
        of_layers = [
            sum((jnp.sum(gradients[kind][name], axis=1) for kind in units if name in units[kind]), jnp.zeros(len(own)))
            for name in map(layer, range(depth))
        ]
        gradients["layers"] = jnp.stack(of_layers, axis=1)
        return jax.tree.map(
            lambda gradient: jnp.einsum("r...,r->...", jnp.square(gradient), own.astype(gradient.dtype)), gradients
        )

    scores = start | {"layers": jnp.zeros(depth)}
    scores, count = jax.tree.map(jnp.zeros_like, scores), 0
    for batch in batches:
        scores, count = jax.tree.map(jnp.add, scores, squares(params, batch)), count + 1
    if not count:
        raise InputError("there are no batches to measure gradients on; expected one or more, with labels")
    return scores


def _ones(params: Params, hidden: Mapping[str, tuple[int, ...]]) -> jax.Array:
    """Return a coefficient of 1 for every hidden dimension, float32."""
    path, (axis, *_) = next(iter(hidden.items()))
    return jnp.ones(tree.lookup(tree.flatten(params), path).shape[axis], jnp.float32)
