"""Exact selection of the ``k`` largest elements of a tensor or of a whole model.

The result is a `Selection`, a threshold and a position, so that any tile or shard tests an element with one comparison. Among
equal elements the lowest positions are selected, and exactly ``k`` elements are selected in total.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError
from dsee_jax.typing import Array
from merge.leaf import Leaf, Tile, Whole, positions

EVERY = np.uint32(0xFFFFFFFF)
"""The end of a selection that takes equal elements at every position."""


class Selection(NamedTuple):
    """The selected elements of a tensor: values above ``threshold``, and values equal to it at positions before ``end``.

    Thresholds are float32 (models,); -1 selects all elements, infinity none. Ends are uint32 (models,).
    """

    threshold: Array
    end: Array

    def mask(self, model: int, values: jax.Array, positions: jax.Array) -> jax.Array:
        """Return the mask, True = selected, of the non-negative ``values`` of one model at ``positions``."""
        threshold, end = jnp.asarray(self.threshold)[model], jnp.asarray(self.end)[model]
        # Compare bits, as the search for the threshold does: compared as floats, subnormal numbers may all count as zero.
        bits, least = (jax.lax.bitcast_convert_type(value, jnp.int32) for value in (values, threshold))
        return (bits > least) | ((bits == least) & ((positions < end) | (end == EVERY)))


def largest(
    leaves: Sequence[Leaf],
    function: Callable[..., Sequence[jax.Array]],
    counts: Sequence[int | Array],
    *args: Any,
    every_tie: bool = False,
    **static: Any,
) -> list[Selection]:
    """Return a `Selection` for each leaf; together they select exactly ``counts[m]`` elements of model ``m``.

    Args:
      leaves: one tensor, or all tensors, to select over the whole model.
      function: ``function(tile, *args, **static)`` returns for each count a float32 array shaped like the tile, with values of
        at least 0 and no NaN.
      counts: numbers of elements to select, from 0 to all; integers, or arrays of shape () (concrete where leaves are
        streamed).
      every_tie: also select all elements equal to the smallest selected element, which may exceed ``counts``.
      *args: arrays for ``function``.
      **static: hashable arguments for ``function``.
    """
    sizes = [prod(leaf.shape) for leaf in leaves]
    if all(isinstance(count, int) and not 0 < count < sum(sizes) for count in counts):
        threshold = np.asarray([-1.0 if count > 0 else np.inf for count in counts], np.float32)
        return [Selection(threshold, np.zeros(len(counts), np.uint32)) for _ in leaves]
    if not isinstance(leaves[0], Whole):
        counts = [int(count) for count in counts]
        return leaves[0].select(leaves, function, counts, *args, every_tie=every_tie, **static)  # pyright: ignore
    if sum(sizes) >= 2**32:
        raise InputError(f"{sum(sizes)} elements to select from in memory; expected fewer than 2**32: merge from files")
    values = [leaf.fold(function, *args, **static) for leaf in leaves]
    thresholds = [
        _threshold([part[number] for part in values], jnp.asarray(count, jnp.uint32), every_tie=every_tie)
        for number, count in enumerate(counts)
    ]
    return [
        Selection(jnp.stack([value for value, _ in thresholds]), jnp.stack([ends[number] for _, ends in thresholds]))
        for number in range(len(leaves))
    ]


@partial(jax.jit, static_argnames="every_tie")
def _threshold(parts: list[jax.Array], count: jax.Array, *, every_tie: bool) -> tuple[jax.Array, list[jax.Array]]:
    """Return the threshold () over all parts, and the end () in each part; ``count`` is uint32 ()."""
    # Non-negative floats are ordered like their bits: build the threshold from its highest bit down.
    bits = [jax.lax.bitcast_convert_type(part, jnp.uint32) for part in parts]

    def total(masks: Iterable[jax.Array]) -> jax.Array:
        return sum((jnp.sum(mask, dtype=jnp.uint32) for mask in masks), jnp.uint32(0))

    def refine(step: jax.Array, lower: jax.Array) -> jax.Array:
        trial = lower | (jnp.uint32(1) << (30 - step).astype(jnp.uint32))
        return jnp.where(total(part >= trial for part in bits) >= count, trial, lower)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.uint32(0))
    spare = count - jnp.minimum(count, total(part > threshold for part in bits))
    ends = []
    for part in bits:
        equal = total([part == threshold])
        all_equal = (equal <= spare) | every_tie
        end = jax.lax.cond(all_equal, lambda *_: jnp.uint32(EVERY), partial(_end, threshold), part, spare)
        ends.append(jnp.where((spare > 0) | every_tie, end, 0))
        spare = spare - jnp.minimum(spare, equal)
    value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    size = sum(part.size for part in parts)
    value = jnp.where(count == 0, jnp.inf, jnp.where(count >= size, -1.0, value)).astype(jnp.float32)
    return value, ends


def _end(threshold: jax.Array, part: jax.Array, spare: jax.Array) -> jax.Array:
    """Return the smallest position with ``spare`` elements equal to the threshold before it."""
    equal, where = part == threshold, positions(part.shape)

    def refine(step: jax.Array, lower: jax.Array) -> jax.Array:
        # The last selected element is at the largest position with fewer than ``spare`` equal elements before it.
        trial = lower | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        return jnp.where(jnp.sum(equal & (where < trial), dtype=jnp.uint32) < spare, trial, lower)

    return jax.lax.fori_loop(0, 32, refine, jnp.uint32(0)) + 1


def magnitudes(tile: Tile) -> list[jax.Array]:
    """Return |delta| of every model, the usual function of `largest`."""
    return [jnp.abs(delta) for delta in tile.deltas]
