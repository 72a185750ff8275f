"""Exact selection of the ``k`` largest elements of a tensor or of a whole model.

The result is a `Cut`, a threshold and a position, so that keeping takes one comparison per element in any tile or shard.
Among equal elements the lowest positions are kept, and exactly ``k`` elements are kept in all.
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


class Cut(NamedTuple):
    """The elements kept of a tensor: values above ``threshold``, and values equal to it at positions before ``end``.

    Thresholds are float32 (models,); -1 keeps everything, infinity nothing. Ends are uint32 (models,).
    """

    threshold: Array
    end: Array

    def kept(self, model: int, values: jax.Array, positions: jax.Array) -> jax.Array:
        """Return the mask, True = kept, of the non-negative ``values`` of one model at ``positions``."""
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
) -> list[Cut]:
    """Return a `Cut` for each leaf; together they keep exactly ``counts[m]`` elements of model ``m``.

    Args:
      leaves: one tensor, or all tensors of the models to select over the whole model.
      function: ``function(tile, *args, **static)`` returns for each count a float32 array shaped like the tile, at least 0,
        without NaN.
      counts: how many elements to keep, from 0 to all; whole numbers, or arrays of shape () (concrete where leaves are
        streamed).
      every_tie: also keep all elements equal to the smallest kept, which may be more than ``counts``.
      *args: arrays for ``function``.
      **static: hashable arguments for ``function``.
    """
    sizes = [prod(leaf.shape) for leaf in leaves]
    if all(isinstance(count, int) and not 0 < count < sum(sizes) for count in counts):
        everything = np.asarray([-1.0 if count > 0 else np.inf for count in counts], np.float32)
        return [Cut(everything, np.zeros(len(counts), np.uint32)) for _ in leaves]
    if not isinstance(leaves[0], Whole):
        counts = [int(count) for count in counts]
        return leaves[0].select(leaves, function, counts, *args, every_tie=every_tie, **static)  # pyright: ignore
    if sum(sizes) >= 2**32:
        raise InputError(f"{sum(sizes)} elements to select from in memory; expected fewer than 2**32: merge from files")
    values = [leaf.fold(function, *args, **static) for leaf in leaves]
    cuts = [
        _cuts([part[number] for part in values], jnp.asarray(count, jnp.uint32), every_tie=every_tie)
        for number, count in enumerate(counts)
    ]
    return [
        Cut(jnp.stack([threshold for threshold, _ in cuts]), jnp.stack([ends[number] for _, ends in cuts]))
        for number in range(len(leaves))
    ]


@partial(jax.jit, static_argnames="every_tie")
def _cuts(parts: list[jax.Array], count: jax.Array, *, every_tie: bool) -> tuple[jax.Array, list[jax.Array]]:
    """Return the threshold () and each part's end (); ``count`` uint32 ()."""
    # Non-negative floats are ordered like their bits: build the threshold from its highest bit down.
    bits = [jax.lax.bitcast_convert_type(part, jnp.uint32) for part in parts]

    def total(masks: Iterable[jax.Array]) -> jax.Array:
        return sum((jnp.sum(mask, dtype=jnp.uint32) for mask in masks), jnp.uint32(0))

    def refine(step: jax.Array, lower: jax.Array) -> jax.Array:
        tried = lower | (jnp.uint32(1) << (30 - step).astype(jnp.uint32))
        return jnp.where(total(part >= tried for part in bits) >= count, tried, lower)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.uint32(0))
    spare = count - jnp.minimum(count, total(part > threshold for part in bits))
    ends = []
    for part in bits:
        here = total([part == threshold])
        whole = (here <= spare) | every_tie
        end = jax.lax.cond(whole, lambda *_: jnp.uint32(EVERY), partial(_end, threshold), part, spare)
        ends.append(jnp.where((spare > 0) | every_tie, end, 0))
        spare = spare - jnp.minimum(spare, here)
    value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    size = sum(part.size for part in parts)
    value = jnp.where(count == 0, jnp.inf, jnp.where(count >= size, -1.0, value)).astype(jnp.float32)
    return value, ends


def _end(threshold: jax.Array, part: jax.Array, spare: jax.Array) -> jax.Array:
    """Return the smallest position with ``spare`` elements equal to the threshold before it."""
    equal, where = part == threshold, positions(part.shape)

    def refine(step: jax.Array, lower: jax.Array) -> jax.Array:
        # The last kept element is at the largest position with fewer than ``spare`` equal elements before it.
        tried = lower | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        return jnp.where(jnp.sum(equal & (where < tried), dtype=jnp.uint32) < spare, tried, lower)

    return jax.lax.fori_loop(0, 32, refine, jnp.uint32(0)) + 1


def magnitudes(tile: Tile) -> list[jax.Array]:
    """Return |delta| of every model, the usual function of `largest`."""
    return [jnp.abs(delta) for delta in tile.deltas]
