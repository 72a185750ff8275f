"""The hidden width of a model under a budget: coefficients of its dimensions, and the choice of a width.

The width is one choice for the whole model and multiplies the costs of all heads and neurons, so no linear programme holds it
as a variable. `choose` solves the programme of `dsee_jax.prune.budget` at each of a few widths, with the costs at that width,
and takes the width of the highest total. A width keeps its highest-scoring dimensions and adds the sum of their scores.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.deltas.attach import input_of, intercepted
from dsee_jax.errors import InputError, shorten
from dsee_jax.models.layers import LayerNorm, RmsNorm
from dsee_jax.ops.dense import wide
from dsee_jax.ops.joint import Affine, JointDense
from dsee_jax.prune import budget
from dsee_jax.prune.budget import Costs, Counts
from dsee_jax.prune.earlybert import traced_anew
from dsee_jax.typing import Array, Tree

STEPS = 16
"""The parts into which a width is divided where no multiple is given."""


@contextlib.contextmanager
def weighted(coefficients: Array, axes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Multiply the hidden dimensions by coefficients wherever a Linen model of this library reads them.

    Dimensions are read by kernels, by the table of words that makes logits, and by the statistics of norms. In a norm a
    coefficient is the weight of its dimension in the means: coefficients of 0 and 1 compute the model without the dimensions
    at 0, as `dsee_jax.prune.masked` does. The residual stream itself is not multiplied, so that each use counts once.

    Args:
      coefficients: (width,); or (rows, width), one for each row of the batch, whose gradients are those of the rows apart. An
        input without rows, such as embeddings of distances, is then not multiplied.
      axes: ``dsee_jax.models.hidden_axes(model)``.

    Raises:
      InputError: a kernel that reads hidden dimensions was not called in the block.
    """
    readers = {path for path, own in axes.items() if path.endswith("/kernel") and 0 in own}
    c, seen = jnp.asarray(coefficients), set[str]()

    def of(x: jax.Array) -> jax.Array | None:
        """Return the coefficients in a shape that multiplies ``x`` (..., width); None for an input without rows."""
        *rows, width = c.shape
        if rows and x.shape[0] != rows[0]:
            return None
        return c.reshape(*rows, *[1] * (x.ndim - 1 - len(rows)), width)

    def times(x: jax.Array) -> jax.Array:
        own = of(x)
        return x if own is None else (x * own).astype(x.dtype)

    def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if module.scope is None:
            return call(*args, **kwargs)
        if context.method_name == "attend":
            return call(times(args[0]), *args[1:], **kwargs)
        if context.method_name != "__call__" or isinstance(module, Affine):  # of a JointDense, which has the input
            return call(*args, **kwargs)
        if isinstance(module, LayerNorm | RmsNorm) and f"{path}/scale" in axes:
            return _normalised(module, args[0], of(args[0]), call)
        names = module.joint if isinstance(module, JointDense) else ("",)
        kernels = {"/".join(filter(None, (path, name, "kernel"))) for name in names} & readers
        if not kernels:
            return call(*args, **kwargs)
        seen.update(kernels)
        return call(times(input_of(args, kwargs)), *args[1:])

    with traced_anew(), intercepted(intercept):
        yield
    for path in sorted(readers - seen):
        raise InputError(
            f"the coefficients of hidden dimensions reached no {path!r}: call the whole model in the block"
        )


def _normalised(
    module: LayerNorm | RmsNorm, x: jax.Array, weights: jax.Array | None, call: Callable[..., Any]
) -> jax.Array:
    """Return the norm of ``x`` (..., width) whose means are over dimensions with these weights."""
    if weights is None:
        return call(x)
    share, y = weights / jnp.sum(weights, axis=-1, keepdims=True), x.astype(jnp.float32)
    if isinstance(module, LayerNorm):
        y = y - jnp.sum(share * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.sum(share * jnp.square(y), axis=-1, keepdims=True) + module.epsilon)
    y = y * wide(module.get_variable("params", "scale"), y)
    if isinstance(module, LayerNorm):
        y = y + wide(module.get_variable("params", "bias"), y)
    return y.astype(module.dtype)


def widths(size: int, *, multiple: int = 0) -> list[int]:
    """Return the widths that a target chooses among, in increasing order; the last is ``size``, all dimensions.

    Args:
      size: the hidden width of the model.
      multiple: the others are multiples of it. 0: of a 16th of ``size``, rounded down.
    """
    step = multiple or max(size // STEPS, 1)
    return [*range(step, size, step), size]


def balanced(scores: Array, whole: Costs, narrow: Costs, width: int) -> np.ndarray:
    """Return scores of hidden dimensions with the total score per total cost of `dsee_jax.prune.budget.balanced`.

    Args:
      scores: (dimensions,)
      whole: the costs of all dimensions.
      narrow: the costs of ``width`` of them, fewer than all.
      width: 1 or more.
    """
    host = budget.host(scores)
    saved = float((whole.ratio({}) - narrow.ratio({}))[0]) * len(host) / (len(host) - width)
    total = float(np.nansum(host))
    return host * (saved / total if total else 1.0)


def choose(
    scores: Tree,
    costs: Callable[[np.ndarray], Costs],
    limit: float,
    *,
    among: Mapping[int, Counts],
    uniform: bool = False,
) -> dict[str, Any]:
    """Return the units to keep, hidden dimensions among them: the highest score within a budget.

    The result scores at least as high as that of `dsee_jax.prune.budget.choose` at the full width, if that is among the
    widths. Of widths with equal totals the largest is taken.

    Args:
      scores: as of `dsee_jax.prune.budget.choose`, and ``hidden`` (width,), the scores of the hidden dimensions.
      costs: the costs of the model with these dimensions alone, bool (width,), as fractions of the unpruned model.
      limit: the budget, as of `dsee_jax.prune.budget.choose`.
      among: the numbers of units to choose from by width; its keys are the widths.
      uniform: as of `dsee_jax.prune.budget.choose`.

    Returns:
      The kept units; ``hidden`` is absent where all dimensions stay.

    Raises:
      InputError: as `dsee_jax.prune.budget.choose`; the least cost is that over all widths. Or a width is out of range.
    """
    units: dict[str, Any] = {**jax.tree.map(budget.host, scores)}
    score = budget.finite("hidden", units.pop("hidden"))
    size = len(score)
    if not among or min(among) < 1 or max(among) > size:
        raise InputError(f"the widths are {shorten(str([*among]))}; expected some of 1 to {size}")
    order = np.argsort(-score, kind="stable")
    gained = np.concatenate([[0.0], np.cumsum(score[order])])
    most, best, least = budget.total(units), None, np.inf
    for width in sorted(among, reverse=True):
        if best is not None and gained[width] + most <= best[0]:
            break  # nor can a smaller width be better
        flags = np.zeros(size, bool)
        flags[order[:width]] = True
        solution = budget.solve(units, costs(flags), limit, among=among[width], uniform=uniform)
        least = min(least, solution.least)
        if solution.kept is not None and (best is None or solution.value + gained[width] > best[0]):
            best = solution.value + gained[width], solution.kept if width == size else solution.kept | {"hidden": flags}
    if best is None:
        raise budget.too_small(limit, least, [*scores])
    return best[1]
