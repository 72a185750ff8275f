"""What a decoder's tokens may see, and what it remembers of those it has read: one interface for padding, packing, caching.

``attention_mask`` (batch, length) holds the number of the segment that each token belongs to: 0 is padding, on whichever
side; a row of one text is all ones; several texts packed in one row are 1, 2, 3 ... A token sees the tokens of its own
segment up to itself. Positions are counted from the first token of each segment unless they are given.

A cache is a dict of arrays of fixed shapes, passed in and out, so that a compiled step serves every token::

    segments  (batch, capacity)                        int32; as in the mask, 0 where nothing was written yet
    length    ()                                       int32; how many slots are written, padding included
    layer_0   key, value (batch, capacity, groups, head size) each; layers without heads have no entry
    layers    instead, of a model that scans: key, value (layers, batch, capacity, groups, head size)

The tokens of a call go into the next slots; the caller sees to it that they fit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsee_jax.stacks import STACK, stack

Cache: TypeAlias = Mapping[str, Any]


class Context(NamedTuple):
    """Where the tokens of a call stand and what they may see; keys are its own tokens, or the slots of its cache."""

    positions: jax.Array  # (batch, length) int32
    visible: jax.Array  # (batch, length, keys) bool, True = seen
    distance: jax.Array  # (1, length, keys) int32: how many slots a key stands before the token
    start: jax.Array  # () int32: the slot of the first token


def create(model: Any, batch: int, capacity: int) -> dict[str, Any]:
    """Return an empty cache of ``capacity`` tokens a row for a decoder, as cut as that may be."""
    config = model.config
    shape, dtype = (batch, capacity), jnp.dtype(config.dtype)
    layers = {
        f"layer_{number}": {name: jnp.zeros((*shape, groups, config.head_size), dtype) for name in ("key", "value")}
        for number, groups in enumerate(config.widths["heads"])
        if groups
    }
    if model.scan:
        layers = stack(layers)
    return {"segments": jnp.zeros(shape, jnp.int32), "length": jnp.zeros((), jnp.int32), **layers}


def take(cache: Cache, rows: jax.Array) -> dict[str, Any]:
    """Return the cache of the rows ``rows`` (n,), in that order; a row may come more than once."""

    def taken(name: str, part: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf[:, rows] if name == STACK else leaf[rows]) if leaf.ndim else leaf, part)

    return {name: taken(name, part) for name, part in cache.items()}


def read(
    input_ids: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None, cache: Cache | None
) -> tuple[Context, dict[str, Any]]:
    """Return the context of a call and its cache with the segments of the new tokens written, empty without a cache.

    Args:
      input_ids: (batch, length); only its shape counts.
      attention_mask: (batch, length) the segments of these tokens. None: ones.
      positions: int (batch, length); None: counted from the first token of each segment.
      cache: what stands before these tokens, or None.
    """
    length = input_ids.shape[1]
    own = jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else attention_mask.astype(jnp.int32)
    start: jax.Array = jnp.zeros((), jnp.int32) if cache is None else cache["length"]
    segments = own if cache is None else jax.lax.dynamic_update_slice(cache["segments"], own, (0, start))
    slots = start + jnp.arange(length)
    distance = (slots[:, None] - jnp.arange(segments.shape[1])[None, :])[None]
    same = own[:, :, None] == segments[:, None, :]
    if positions is None:
        positions = slots[None] - jnp.argmax(same, axis=-1)
    written = {} if cache is None else {**cache, "segments": segments, "length": start + length}
    return Context(positions, same & (own != 0)[:, :, None] & (distance >= 0), distance, start), written


def last(attention_mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return (batch, ...), the entries of ``x`` (batch, length, ...) at the last token of each row that is not padding."""
    if attention_mask is None:
        return x[:, -1]
    places = jnp.arange(x.shape[1])[None] * (attention_mask != 0)
    return x[jnp.arange(x.shape[0]), jnp.argmax(places, axis=-1)]
