"""Random numbers by position: an element's number does not depend on the order, tile, shard or process that computes it.

Each number is a hash of two key words and the element's position: a few integer operations that fuse into the loop around.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.typing import Array


def words(seed: int, name: str, model: int) -> np.ndarray:
    """Return the two key words, uint32 (2,), of one tensor of one model."""
    digest = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)


def uniform(words: Array, positions: jax.Array) -> jax.Array:
    """Return float32 numbers in [0, 1), multiples of 2**-24, shaped like ``positions`` (uint32)."""
    first, second = jnp.asarray(words, jnp.uint32)
    bits = _mixed(_mixed(positions * jnp.uint32(0x9E3779B9) ^ first) + second)
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(bits: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Appleby): an input bit flips each output bit with probability near 1/2."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
