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

The tokens of a call go into the next slots; the caller must ensure that they fit. Key and value have the order of axes in
which the products of attention read them, and one axis for the groups of all rows: with two, XLA on CPUs copies both for every
token of a single row, and of groups of several heads. With several devices there are two axes, batch and groups, which a mesh
may split apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsee_jax.models.architecture import Model, scans
from dsee_jax.stacks import STACK, stack

Cache: TypeAlias = Mapping[str, Any]


class Context(NamedTuple):
    """The positions and visible keys of the tokens of a call; keys are the tokens of the call, or the slots of the cache."""

    positions: jax.Array  # (batch, length) int32
    visible: jax.Array  # (batch, length, keys) bool, True = visible
    distance: jax.Array  # (1, length, keys) int32: slots from the key to the token
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


def take(cache: Cache, rows: jax.Array) -> dict[str, Any]:
    """Return the cache of the rows ``rows`` (n,), in that order; a row may occur more than once."""
    batch = cache["segments"].shape[0]

    def take_part(name: str, part: Any) -> Any:
        axis = int(name == STACK)

        def take_leaf(leaf: jax.Array) -> jax.Array:
            apart = leaf.reshape(*leaf.shape[:axis], batch, -1, *leaf.shape[axis + 1 :])
            # An index that may fill is fused into the write of the next token; one that may not copies the cache once more.
            taken = jnp.take(apart, rows, axis)
            return taken.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])

        return jax.tree.map(lambda leaf: take_leaf(leaf) if leaf.ndim else leaf, part)

    return {name: take_part(name, part) for name, part in cache.items()}


def read(
    input_ids: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None, cache: Cache | None
) -> tuple[Context, dict[str, Any]]:
    """Return the context of a call, and its cache with the segments of the new tokens written (empty without a cache).

    Args:
      input_ids: (batch, length); only the shape is used.
      attention_mask: (batch, length) the segments of these tokens. None: ones.
      positions: int (batch, length); None: counted from the first token of each segment.
      cache: of the earlier tokens, or None.
    """
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


def last(attention_mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return (batch, ...), the entries of ``x`` (batch, length, ...) at the last non-padding token of each row."""
    if attention_mask is None:
        return x[:, -1]
    places = jnp.arange(x.shape[1])[None] * (attention_mask != 0)
    return x[jnp.arange(x.shape[0]), jnp.argmax(places, axis=-1)]
