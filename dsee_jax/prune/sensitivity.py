"""The sensitivity of the loss to heads and neurons: scores that compare between all units of a model (TAYLOR).

A unit ``u`` has a coefficient ``c_u``, as in a search of EarlyBERT, which is 1 in the model as it is and 0 without the unit.
The score is ::

    score(u)  =  sum over examples x of  (d loss(x) / d c_u  at  c = 1) ^ 2

The derivative is the change of the loss without the unit, to the first order (Michel et al., arXiv 1905.10650, who sum its
magnitudes; Molchanov et al., arXiv 1906.10771, who square it). The squares of examples are the diagonal of the empirical
Fisher information of the coefficients: in a trained model, where the gradients of the examples cancel, half of their mean
estimates the rise of the mean loss (Kwon et al., arXiv 2204.09656). So the scores of units add up, and those of heads and
neurons have one scale, which magnitudes of weights have not. A layer is scored by one coefficient for all of its heads and
neurons, whose derivative is the sum of theirs: effects of units that cancel in each example cancel in the score of the layer.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.prune import earlybert
from dsee_jax.prune.layers import layer
from dsee_jax.typing import Cuts, Params

B = TypeVar("B")
"""A batch: a pytree of arrays with a leading axis of rows."""


def taylor(losses: Callable[[Any, B], jax.Array], params: Params, cuts: Cuts, batches: Iterable[B]) -> dict[str, Any]:
    """Return ``{kind: {layer: (units,)}, "layers": (layers,)}``, the scores over all rows of ``batches``, float32.

    A row counts by itself, so that the scores do not depend on the sizes of the batches. Filler rows have a loss of 0.

    Args:
      losses: ``(params, batch) -> (rows,)``, the loss of each row, without dropout. It runs the Linen model.
      params: the params of the model, updates folded in; another pytree that holds them under the paths of ``cuts`` too.
      cuts: ``dsee_jax.models.cuts(model)``.
      batches: one pass over the calibration examples; batches of equal shapes compile once.

    Raises:
      InputError: there are no batches; or as `earlybert.attached`.
    """
    start, depth = earlybert.init(cuts, params), max(map(len, cuts.values()))

    @jax.jit
    def squares(params: Params, batch: B) -> Any:
        rows = len(jax.tree.leaves(batch)[0])

        def total(coefficients: Any) -> jax.Array:
            with earlybert.attached(coefficients, cuts):
                return jnp.sum(losses(params, batch))

        gradients = jax.grad(total)(jax.tree.map(lambda c: jnp.broadcast_to(c, (rows, *c.shape)), start))
        of_layers = [
            sum((jnp.sum(each[name], axis=1) for each in gradients.values() if name in each), jnp.zeros(rows))
            for name in map(layer, range(depth))
        ]
        gradients["layers"] = jnp.stack(of_layers, axis=1)
        return jax.tree.map(lambda gradient: jnp.sum(jnp.square(gradient), axis=0), gradients)

    scores: Any = start | {"layers": jnp.zeros(depth)}
    scores, count = jax.tree.map(jnp.zeros_like, scores), 0
    for batch in batches:
        scores, count = jax.tree.map(jnp.add, scores, squares(params, batch)), count + 1
    if not count:
        raise InputError("there are no batches to measure gradients on; expected one or more, with labels")
    return scores
