"""Statistics of the gradients of kernels over micro-batches, for scores of single weights; one pass, weights fixed.

A micro-batch is one batch of the caller; its loss is the mean over the batch, of the real labels. A run takes one example at
a time: with the same examples in batches of 32, TAYLOR loses far more. `STATISTICS`, of the gradients G_b of T micro-batches:

================  ===================================================================================
mean              ``sum of G_b / T``, signed
root_mean_square  ``sqrt(sum of G_b^2 / T)``
platon            ``sqrt(E U)``: ``E <- 0.85 E + 0.15 |G_b|``, then ``U <- 0.95 U + 0.05 ||G_b| - E|``, from 0
================  ===================================================================================

PLATON (Zhang et al. 2022, arXiv 2206.12562) smooths the sensitivity ``|W G_b|``; as W is fixed here, it is a factor of the
score (`dsee_jax.prune.scores`). The code of its authors takes means over windows of steps first and divides that of the first
window by one step too many: gradients of 1 in windows of two steps give E = 0.075 there, 0.15 here.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array, Params

StatisticName: TypeAlias = Literal["mean", "root_mean_square", "platon"]
"""The names of `STATISTICS`."""

Loss: TypeAlias = Callable[[Params, Any], jax.Array]
"""``(params, batch) -> loss``, float32 (): a hashable function without side effects, compiled once."""

SENSITIVITY, UNCERTAINTY = 0.85, 0.95
"""The decay of the moving averages E and U of PLATON, as in the paper."""


class Statistic(NamedTuple):
    """A statistic of the gradients of a kernel over micro-batches."""

    arrays: int  # running arrays of the shape of a kernel
    update: Callable[..., tuple[jax.Array, ...]]  # (running arrays, gradient) -> running arrays
    result: Callable[..., jax.Array]  # (running arrays, micro-batches) -> statistic


def _smoothed(state: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    sensitivity, uncertainty = state
    size = jnp.abs(gradient)
    sensitivity = SENSITIVITY * sensitivity + (1 - SENSITIVITY) * size
    return sensitivity, UNCERTAINTY * uncertainty + (1 - UNCERTAINTY) * jnp.abs(size - sensitivity)


STATISTICS: dict[str, Statistic] = {
    "mean": Statistic(1, lambda state, g: (state[0] + g,), lambda state, count: state[0] / count),
    "root_mean_square": Statistic(
        1, lambda state, g: (state[0] + g * g,), lambda state, count: jnp.sqrt(state[0] / count)
    ),
    "platon": Statistic(2, _smoothed, lambda state, count: jnp.sqrt(state[0] * state[1])),
}
"""Every statistic by name."""


def measure(
    loss: Loss, params: Params, paths: Sequence[str], batches: Iterable[Any], *, statistic: StatisticName
) -> dict[str, jax.Array]:
    """Return ``{path: statistic}`` of the gradients with respect to the kernels at ``paths``, float32 in their shapes.

    Only these kernels have gradients. For a model with updates, ``params`` are those of `dsee_jax.materialize`: the gradient
    with respect to an effective kernel ``W + D`` is that with respect to W.

    Args:
      loss: ``loss(params, batch)``, the mean loss of a batch on its real labels; hashable, as static arguments of ``jax.jit``.
      params: any pytree of weights, as ``loss`` takes it.
      paths: of kernels in ``params``.
      batches: the micro-batches, one or more; pytrees.
      statistic: a name in `STATISTICS`; the score in `dsee_jax.prune.scores.SCORES` has the one that it reads.

    Raises:
      InputError: there are no batches, a path is not in ``params``, or the statistic is unknown.
    """
    if statistic not in STATISTICS:
        near = did_you_mean(str(statistic), STATISTICS)
        raise InputError(f"statistic is {statistic!r}{near}: use one of {', '.join(STATISTICS)}")
    flat = tree.flatten(params)
    kernels = {path: tree.lookup(flat, path) for path in paths}
    arrays, count = range(STATISTICS[statistic].arrays), 0
    state: Any = {path: tuple(jnp.zeros_like(w, jnp.float32) for _ in arrays) for path, w in kernels.items()}
    for batch in batches:
        state, count = _add(loss, statistic, state, kernels, params, batch), count + 1
    if not count:
        raise InputError("there are no batches to measure gradients on; expected one or more, with labels")
    return {path: STATISTICS[statistic].result(running, count) for path, running in state.items()}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(
    loss: Loss, statistic: str, state: Any, kernels: Mapping[str, Array], params: Params, batch: Any
) -> dict[str, tuple[jax.Array, ...]]:
    gradients = jax.grad(lambda kernels: loss(tree.replace(params, kernels), batch))(dict(kernels))
    update = STATISTICS[statistic].update
    return {path: update(state[path], gradient.astype(jnp.float32)) for path, gradient in gradients.items()}
