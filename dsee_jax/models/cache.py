"""The visible tokens and the cache of a decoder: one interface for padding, packing and caching.

``attention_mask`` (batch, length) holds the number of the segment that each token belongs to: 0 is padding, on either
side; a row of one text is all ones; several texts packed in one row are 1, 2, 3 ... A token sees the tokens of its own
segment up to itself. By default, positions are counted from the first token of each segment.

A cache is a dict of arrays of fixed shapes, passed in and out, so that a compiled step serves every token::

    segments  (batch, capacity)                        int32; as in the mask, 0 in empty slots
    length    ()                                       int32; number of written slots, padding included
    layer_0   key (batch * groups, head size, capacity), value (batch * groups, capacity, head size); layers without heads
              have no entry
    layers    of a model that scans, instead: key and value of all layers, with a first axis for them
    seen      (batch, branches, capacity) bool; of a cache with branches (`branch`), instead of segments: the slots that
              each branch sees

The tokens of a call go into the next slots; the caller must ensure that they fit. A search for several continuations of a row
keeps the slots of all of them in that row: a continuation is what it sees, and no step moves a key or a value. Key and value
have the order of axes in which the products of attention read them, and one axis for the groups of all rows: with two, XLA on
CPUs copies both for every token of a single row, and of groups of several heads. With several devices there are two axes,
batch and groups, which a mesh may split apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsee_jax.models.architecture import Model, scans
from dsee_jax.stacks import stack

Cache: TypeAlias = Mapping[str, Any]


class Context(NamedTuple):
    """The positions and visible keys of the tokens of a call; keys are the tokens of the call, or the slots of the cache."""

    positions: jax.Array  # (batch, length) int32
    visible: jax.Array  # (batch, length, keys) bool, True = visible
    distance: jax.Array  # (1 or batch, length, keys) int32: tokens from a visible key to the token
    start: jax.Array  # () int32: the slot of the first token


def create(model: Model, batch: int, capacity: int) -> dict[str, Any]:
    """Return an empty cache of ``capacity`` tokens per row for a decoder, structurally pruned or not."""
    config = model.config
    dtype = jnp.dtype(config.dtype)

    def zeros(groups: int, *axes: int) -> jax.Array:
        return jnp.zeros((*((batch, groups) if jax.device_count() > 1 else (batch * groups,)), *axes), dtype)

    layers = {
        f"layer_{number}": {
            "key": zeros(groups, config.head_size, capacity),
            "value": zeros(groups, capacity, config.head_size),
        }
        for number, groups in enumerate(config.widths["heads"])
        if groups
    }
    if scans(model):
        layers = stack(layers)
    return {"segments": jnp.zeros((batch, capacity), jnp.int32), "length": jnp.zeros((), jnp.int32), **layers}


def branch(cache: Cache, branches: int, capacity: int) -> dict[str, Any]:
    """Return the cache of ``branches`` continuations of each row, with ``capacity`` more slots.

    The rows, of one segment each, are shared: no key or value is repeated. A call of the model with this cache takes
    ``branches`` tokens of each row, the next of each branch. A token sees what its branch sees: the row at first, and then the
    tokens of the branch too.
    """

    def longer(part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        axes = {"key": -1, "value": -2}
        return {name: _lengthen(array, capacity, axes[name]) for name, array in part.items()}

    layers = {name: longer(part) for name, part in cache.items() if isinstance(part, Mapping)}
    seen = _lengthen(cache["segments"] != 0, capacity, -1)
    seen = jnp.broadcast_to(seen[:, None], (seen.shape[0], branches, seen.shape[1]))
    return {"seen": seen, "length": cache["length"], **layers}


def _lengthen(array: jax.Array, more: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return jnp.pad(array, widths)


def follow(cache: Cache, parents: jax.Array) -> dict[str, Any]:
    """Return the cache of a search whose branches continue ``parents``, int (batch, branches), branches of the same row.

    Keys and values stay where they are: a branch sees from now on what its parent saw.
    """
    return {**cache, "seen": jnp.take_along_axis(cache["seen"], parents[:, :, None], axis=1)}


def read(
    input_ids: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None, cache: Cache | None
) -> tuple[Context, dict[str, Any]]:
    """Return the context of a call, and its cache with the segments of the new tokens written (empty without a cache).

    Args:
      input_ids: (batch, length); only the shape is used.
      attention_mask: (batch, length) the segments of these tokens. None: ones.
      positions: int (batch, length); None: counted from the first token of each segment.
      cache: of the earlier tokens, or None. Of branches: the tokens are one of each branch, and have no segments.
    """
    if cache is not None and "seen" in cache:
        return _read_branches(positions, cache)
    length = input_ids.shape[1]
    own = jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else attention_mask.astype(jnp.int32)
    start: jax.Array = jnp.zeros((), jnp.int32) if cache is None else cache["length"]
    segments = own if cache is None else jax.lax.dynamic_update_slice_in_dim(cache["segments"], own, start, 1)
    slots = start + jnp.arange(length, dtype=jnp.int32)
    distance = (slots[:, None] - jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :])[None]
    same = own[:, :, None] == segments[:, None, :]
    if positions is None:
        positions = slots[None] - jnp.argmax(same, axis=-1).astype(jnp.int32)
    written = {} if cache is None else {**cache, "segments": segments, "length": start + length}
    return Context(positions, same & (own != 0)[:, :, None] & (distance >= 0), distance, start), written


def _read_branches(positions: jax.Array | None, cache: Cache) -> tuple[Context, dict[str, Any]]:
    """Return what `read` returns for the next token of each branch."""
    seen, start = cache["seen"], cache["length"]
    branches, slots = seen.shape[1:]
    own = jnp.arange(slots, dtype=jnp.int32)[None] == start + jnp.arange(branches, dtype=jnp.int32)[:, None]
    count = jnp.sum(seen, axis=-1, dtype=jnp.int32)
    order = jnp.cumsum(seen, axis=-1, dtype=jnp.int32)
    distance = count[:, :, None] - jnp.where(own[None], count[:, :, None], order - 1)
    seen |= own[None]
    written = {**cache, "seen": seen, "length": start + branches}
    return Context(count if positions is None else positions, seen, distance, start), written


def last(attention_mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return (batch, ...), the entries of ``x`` (batch, length, ...) at the last non-padding token of each row."""
    if attention_mask is None:
        return x[:, -1]
    places = jnp.arange(x.shape[1])[None] * (attention_mask != 0)
    return x[jnp.arange(x.shape[0]), jnp.argmax(places, axis=-1)]
